"""Reads config files: `.py` with `get_config()`, which starts from `default_config()`; `.yaml` of `key: value` lines.

Both accept `--config.KEY=VALUE` overrides on the command line.
"""

import argparse
import dataclasses
import re
import runpy
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jlora.adapters.spec import tokens_by_table
from jlora.common.errors import UserError
from jlora.common.paths import looked_for, path_problem
from jlora.common.plural import plural
from jlora.common.yaml_text import parse_yaml
from jlora.config.schema import ENTRIES, Config, default_config, described_key, described_keys, suggest_key
from jlora.config.validation import PATH_KEYS, validate
from jlora.data.mixture import read_share
from jlora.data.named_templates import TEMPLATES
from jlora.data.readers.encoding import BOMS

CODING = re.compile(rb"[ \t\f]*#.*?coding[:=][ \t]*[-\w.]+")  # PEP 263


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with all settings; their descriptions are read only then."""

    def format_help(self) -> str:
        return f"{super().format_help()}All settings, with their defaults:\n\n{described_keys()}\n"


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Shows the help of a program, or that of one setting."""
        print(described_key(values) if values else parser.format_help())
        parser.exit()


def config_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with `--config`; `parse_known_args` leaves the overrides for `load_config`."""
    parser = _Parser(
        prog=f"jlora {program}",
        description=description,
        epilog="Override any setting with --config.KEY=VALUE, for example --config.lora_rank=8.",
        add_help=False,
    )
    shown = "show this help, or that of one setting"
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="KEY", action=_Help, help=shown)
    parser.add_argument("--config", required=True, metavar="FILE", help="a .py or .yaml config file")
    return parser


def load_config(path: str, overrides: list[str]) -> Config:
    """Reads a config file, applies `--config.KEY=VALUE` overrides, and validates the result.

    Raises:
      UserError: the file cannot be read, a key is unknown (the message suggests the nearest), or values are wrong (the
        message lists all of them).
    """
    if problem := path_problem(path):
        raise UserError(f"--config {path[:100]}: {problem}")
    if not Path(path).is_file():
        raise UserError(f"--config {path}: No such file.{looked_for(path)}")
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from None
    config = _from_yaml(path, raw) if path.endswith((".yaml", ".yml")) else _from_python(path, raw)
    _apply_overrides(config, overrides)
    values, problems = typed(config.to_dict())
    kinds = {key: type(value) for key, value in dataclasses.asdict(Config()).items()}
    mistyped = [f"{k}={v!r}: Expected {kinds[k].__name__}." for k, v in values.items() if type(v) is not kinds[k]]
    problems += mistyped
    if not mistyped:
        result = Config(**values)
        problems += [*validate(result), *_misplaced(path, result)]
    if problems:
        raise UserError("\n  ".join([f"{path}: {plural(len(problems), 'setting', ('is', 'are'))} wrong:", *problems]))
    return result


def typed(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings with their lists as the tuples of Config, and a message for each entry that cannot be read.

    Accepts every form that a config file or the record of an older run may contain.
    """
    found, problems = {}, []
    for key, value in settings.items():
        if key == "trainable_token_indices":
            try:
                found[key] = tokens_by_table(value)
            except (TypeError, ValueError):
                found[key] = ()
                problems.append(f"{key} has {value!r}: Expected {ENTRIES[key]}.")
            continue
        read, entries = READERS.get(key, str), []
        for entry in value if isinstance(value, list | tuple) else ():
            text = "=".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry)
            try:
                entries.append(read(text))
            except ValueError:
                problems.append(f"{key} has {text!r}: Expected {ENTRIES[key]}.")
        found[key] = tuple(entries) if isinstance(value, list | tuple) else value
    return found, problems


def _read_rank(text: str) -> tuple[str, int]:
    pattern, rank = _split(text)
    return pattern, int(rank)


def _read_alpha(text: str) -> tuple[str, float]:
    pattern, alpha = _split(text)
    return pattern, float(alpha)


def _read_portion(text: str) -> tuple[str, str]:
    """Reads "PATH=SHARE"; a PATH alone has the share 1."""
    path, _, share = text.rpartition("=")
    if path and read_share(share) is None:
        raise ValueError(text)
    return (path, share) if path else (text, "1")


def _split(text: str) -> tuple[str, str]:
    """Splits "PATTERN=NUMBER" at the last "=", because the pattern may contain one too."""
    pattern, _, number = text.rpartition("=")
    if not pattern:
        raise ValueError(text)
    return pattern, number


READERS: dict[str, Callable[[str], Any]] = {
    "rank_pattern": _read_rank,
    "alpha_pattern": _read_alpha,
    "layers_to_transform": int,
    "train_data_mix": _read_portion,
}


def _field_names() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _set_key(config: ConfigDict, key: str, value: Any, where: str) -> None:
    """Sets one key from text or YAML, converted to the type of its default."""
    if key not in config:
        raise UserError(f"{where}: Unknown key {key!r}. {suggest_key(key)}")
    if key == "train_data_dir" and isinstance(value, dict | list | tuple):
        key = "train_data_mix"
    kind = type(config[key])
    if key == "init_lora_weights" and value is True:
        value = "true"
    if key == "resume_from_checkpoint" and str(value).lower() in ("true", "false"):
        value = "auto" if str(value).lower() == "true" else ""
    try:
        config[key] = value if key == "mesh" and isinstance(value, dict) else _convert(kind, value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {key}={value!r}: Expected {kind.__name__}.") from None


def _convert(kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-4 as text, because it has no dot
    if kind is int and isinstance(value, str):
        return int(value)
    if kind is str and value is None:
        return ""
    if kind is ConfigDict and isinstance(value, dict):
        return {str(name): inner if inner is None else str(inner) for name, inner in value.items()}
    if kind is tuple and isinstance(value, dict):
        return tuple(value.items())
    if kind is tuple and isinstance(value, int):
        return (value,)
    if kind is tuple:
        parts = re.findall(r"[^\s,()\[\]'\"]+", value) if isinstance(value, str) else value or ()
        return tuple(parts)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


def _misplaced(path: str, config: Config) -> list[str]:
    """Returns a message for each path that exists beside the config file, but not in the working directory."""
    problems = []
    for key in PATH_KEYS:
        value, beside = getattr(config, key), Path(path).parent / getattr(config, key)
        is_name = value in (*TEMPLATES, "auto") or (key == "base_model" and not value.startswith("."))
        if not value or is_name or path_problem(value):
            continue
        if not Path(value).expanduser().exists() and beside.exists():
            problems.append(
                f"{key}={value}: No such file or directory.{looked_for(value)} A relative path starts in the working "
                f"directory, not beside the config. Set {key}={beside}."
            )
    return problems


def _decode(path: str, raw: bytes, marked: Collection[str]) -> str:
    """Returns the text of a config file in UTF-8, or in one of the encodings `marked` with its byte order mark.

    Raises:
      UserError: the file has another encoding.
    """
    encoding = next((name for mark, name in BOMS.items() if raw.startswith(mark) and name in marked), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise UserError(f"{path}:{line}: Not valid {encoding.upper()}. Save the file as UTF-8.") from None
    if "\0" in text:
        raise UserError(f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}: Not text. Save the file as UTF-8.")
    return text


def _from_yaml(path: str, raw: bytes) -> ConfigDict:
    try:
        values = parse_yaml(_decode(path, raw, BOMS.values()))
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: Expected `key: value` lines, got {type(values).__name__}.")
    config, problems = default_config(), []
    for key, value in values.items():
        try:
            _set_key(config, str(key), value, path)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n  ".join(problems))
    return config


def _from_python(path: str, raw: bytes) -> ConfigDict:
    if not any(map(CODING.match, raw.splitlines()[:2])):  # otherwise Python reads it in the encoding named there
        _decode(path, raw, ("utf-8-sig",))
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path}: Expected a function get_config().")
        config = get_config()
    except UserError:
        raise
    except Exception as error:  # the user's own code may raise anything
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = f":{frames[-1].lineno}" if frames else ""
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        if unknown := re.match(r"['\"]?Key \"(\w+)\" does not exist", text):
            text = f"Unknown key {unknown[1]!r}. {suggest_key(unknown[1])}"
        raise UserError(f"{path}{line}: {text.strip()}") from None
    if not isinstance(config, ConfigDict) or set(config) != set(_field_names()):
        raise UserError(f"{path}: get_config() must start from jlora.config.default_config().")
    return config


def _apply_overrides(config: ConfigDict, overrides: list[str]) -> None:
    """Applies `--config.KEY=VALUE` or `--config.KEY VALUE`; values are read as in a `.yaml` config."""
    arguments = iter(overrides)
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UserError(f"Unknown argument {argument!r}. Settings are set with --config.KEY=VALUE.")
        key, equals, text = argument.removeprefix("--config.").partition("=")
        text = text if equals else next(arguments, "")
        if not (equals or text):
            raise UserError(f"{argument} has no value. Expected {argument}=VALUE.")
        try:
            value = text if key in config and isinstance(config[key], str) else parse_yaml(text)
        except ValueError:
            raise UserError(f"{argument}: {text!r} is not a valid YAML value.") from None
        _set_key(config, key, value, argument)
