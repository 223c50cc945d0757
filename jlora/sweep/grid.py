"""The grid of a sweep: the settings that vary, and one config for each combination of their values."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora.adapters.plain_lora import unsupported_as_lora
from jlora.adapters.settings import spec_of
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.common.yaml_text import parse_yaml
from jlora.config.schema import Config, suggest_nearest
from jlora.config.validation import validate

VARIES = "lora_rank lora_alpha lora_dropout use_rslora target_modules learning_rate weight_decay seed".split()
OPTIONS = {
    "halving": "after a part of the steps, only the best 1/halving of the settings go on; 0: all go on",
    "folds": "number of parts of the training rows, each held out once; 0: the config's held-out rows",
    "groups": "leaves out one group of training rows at a time: file, duplicates, report, or the name of a column",
    "together": "number of adapters that train in one step; 0: as many as fit, up to 8, but one on a CPU",
    "yes": "whether to train more than 60 settings",
}
SEEDS = 3  # with groups of rows, unless they are set
MANY = 60  # trainings that need `sweep.yes`
# Settings that the padded form of a sweep has no place for.
FIXED = (
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "trainable_token_indices"),
    *("init_adapter", "neftune_noise_alpha"),
)


class Grid(NamedTuple):
    """What a sweep trains."""

    settings: list[dict[str, Any]]  # the varied keys of each setting
    configs: list[Config]  # of each setting, as for a run of its own
    halving: int
    folds: int
    together: int
    groups: str  # which groups of training rows are left out, one at a time; "": none
    yes: bool

    def check_size(self, groups: int = 0) -> None:
        """Raises a UserError if there are very many trainings.

        Args:
          groups: the number of groups of rows that are left out, one at a time.
        """
        trainings = len(self.settings) * max(self.folds, 1) * (groups + 1)
        if trainings <= MANY or self.yes:
            return
        parts = [plural(len(self.settings), "setting")]
        parts += [f"{self.folds} folds"] if self.folds else []
        parts += [f"{plural(groups, 'group')}, and all rows"] if groups else []
        raise UserError(
            f"The sweep has {plural(trainings, 'training')} ({'; '.join(parts)}), each as long as one run. Train "
            "fewer, or add --sweep.yes=true."
        )


def read_grid(config: Config) -> Grid:
    """Reads `config.sweep`.

    Raises:
      UserError: a key is unknown or cannot vary, a value is wrong, or there are very many combinations.
    """
    varied: dict[str, list[Any]] = {}
    options: dict[str, Any] = {"halving": 0, "folds": 0, "together": 0, "groups": "", "yes": False}
    for key, given in config.sweep.items():
        if key in OPTIONS:
            options[key] = _read_option(key, given)
        elif key in VARIES:
            varied[key] = _read_values(key, given, config)
        else:
            raise UserError(_unknown(key))
    if options["groups"] and not options["folds"]:  # trainings differ by chance, and this shows by how much
        varied.setdefault("seed", [config.seed + i for i in range(SEEDS)])
    if not varied and not options["groups"]:
        raise UserError(f"Nothing varies. Set --sweep.KEY=VALUE,VALUE for one or more of {', '.join(VARIES)}.")
    settings = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    configs = [dataclasses.replace(config, sweep={}, **changes) for changes in settings]
    grid = Grid(settings, configs, **options)
    _check(grid, config)
    if not grid.groups:
        grid.check_size()
    elif varied.keys() - {"seed"} or grid.halving:
        raise UserError("--sweep.groups compares trainings with the same settings. Beside it, set only seed and folds.")
    elif len(settings) * max(grid.folds, 1) < 2:
        raise UserError("--sweep.groups needs at least two seeds or folds, because trainings differ by chance.")
    return grid


def name_of(changes: Mapping[str, Any]) -> str:
    """Returns the name of a setting, such as "lora_rank=8 learning_rate=0.0003"; it is valid as a directory's."""
    return " ".join(f"{key}={_text(value)}" for key, value in changes.items())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unknown(key: str) -> str:
    known = (*VARIES, *OPTIONS)
    if key in Config.__dataclass_fields__:
        return (
            f"--sweep.{key}: {key} cannot vary, because all trainings share the base model and the rows. "
            f"Keys that can: {', '.join(VARIES)}."
        )
    return f"--sweep.{key}: Unknown key. Did you mean {suggest_nearest(key, known)}?"


def _read_option(key: str, given: Any) -> Any:
    if key == "groups":
        return str(given)
    value = parse_yaml(given) if isinstance(given, str) else given
    least = 1 if key == "together" else 2
    if key == "yes":
        good, expected = isinstance(value, bool), "true or false"
    else:
        good = type(value) is int and (value == 0 or value >= least)
        expected = f"0, or a number of at least {least}"
    if not good:
        raise UserError(f"--sweep.{key}={given}: Expected {expected} ({OPTIONS[key]}).")
    return value


def _read_values(key: str, given: Any, config: Config) -> list[Any]:
    """Returns the values of a key without repetitions; those of target_modules are joined by +."""
    if isinstance(given, str):
        parsed = parse_yaml(given)
        values = parsed if isinstance(parsed, list) else given.split(",")
    else:
        values = list(given) if isinstance(given, list | tuple) else [given]
    read = [_read_value(key, value, getattr(config, key)) for value in values]
    return list(dict.fromkeys(read))


def _read_value(key: str, value: Any, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is tuple:
            return tuple(str(value).split("+")) if isinstance(value, str) else tuple(value)
        if kind is bool:
            return {"true": True, "false": False}[str(value).strip().lower()]
        return kind(value if not isinstance(value, str) else value.strip())
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--sweep.{key} has {str(value)!r}: Expected {kind.__name__}.") from None


def _check(grid: Grid, config: Config) -> None:
    """Raises a UserError for settings that cannot be trained together."""
    for changes, one in zip(grid.settings, grid.configs, strict=True):
        if problems := validate(one):
            raise UserError("\n  ".join([f"{name_of(changes)}:", *problems]))
    kinds = [*unsupported_as_lora(spec_of(dataclasses.asdict(config)))]
    kinds += [key for key in FIXED if getattr(config, key)]
    kinds += ["init_lora_weights=pissa"] if config.init_lora_weights != "true" else []
    if kinds:
        raise UserError(f"A sweep trains plain LoRA, but the config has {', '.join(dict.fromkeys(kinds))}. Remove it.")
    if config.eval_share and not grid.folds and len({one.seed for one in grid.configs}) > 1:
        raise UserError(
            "--sweep.seed with eval_share: each seed would hold out other rows. Set eval_data_dir or --sweep.folds."
        )
