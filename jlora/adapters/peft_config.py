"""adapter_config.json: what PEFT says of an adapter -> AdapterSpec, and back."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from jlora.adapters import hf_names
from jlora.adapters.methods import METHODS, choices, core_of, kind_of
from jlora.adapters.spec import NOTHING, TABLES, TARGETS, AdapterSpec
from jlora.common.errors import UserError

CONFIG = "adapter_config.json"
# Fields that jlora reads, and fields that say nothing of the numbers.
READ = {"peft_type", "target_modules", "exclude_modules"}
READ |= {field for method in METHODS for field in (method.chosen_by[0], *method.reads)}
SILENT = set(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode init_ia3_weights "
    "megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config runtime_config".split()
)
FIXED = {"bias": "none"}  # of all other fields jlora computes only what is off
DRAWN = (None, True, False, "gaussian", "orthogonal", "eva")  # initial values that leave the base as it is


def peft_config(spec: AdapterSpec, base: str, revision: str | None, *, tied: bool) -> dict[str, Any]:
    """adapter_config.json of the tensors that `peft_io.tensors` makes.

    Args:
      base: a hub id or directory, with `revision` where it has one.
      tied: the base's head is its embedding table.
    """
    return {
        "peft_type": spec.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "target_modules": list(spec.target_modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        **kind_of(spec).peft_fields(spec, tied=tied),
    }


def read_config_file(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT directory, as it stands.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = f"; did you mean {directory / 'adapter'}?" if (directory / "adapter" / CONFIG).is_file() else ""
        raise UserError(
            f"adapter {directory}: expected a directory with {CONFIG} and adapter_model.safetensors{inside}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"adapter {directory} is damaged or unreadable: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"adapter {directory}: {CONFIG} holds no fields")
    return config


def base_of(directory: Path) -> tuple[str, str]:
    """The base that a PEFT directory names, and its revision ("" where it names none)."""
    config = read_config_file(directory)
    return config["base_model_name_or_path"], config.get("revision") or ""


def read_spec(directory: Path, layers: int) -> AdapterSpec:
    """The adapter that a PEFT directory's adapter_config.json describes, on a base of so many layers.

    Raises:
      UserError: it asks for something that jlora does not compute, by name.
    """
    config = read_config_file(directory)
    kind, init = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    kinds, inits = choices("peft_type"), choices("init_lora_weights")
    problems = [
        f"{field}={value!r}"
        for field, value in config.items()
        if value and field not in READ | SILENT and value != FIXED.get(field)
    ]
    if kind not in kinds:
        problems.append(f"peft_type={kind!r} (expected {' or '.join(kinds)})")
    if init not in (*DRAWN, *inits):
        problems.append(f"init_lora_weights={init!r}, which changes the base: save it as a difference with PEFT")
    if config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        problems.append(f"layers_pattern={config['layers_pattern']!r} (expected none)")
    saved = config.get("modules_to_save") or []
    problems += [f"modules_to_save has {table!r}" for table in saved if table.split(".")[-1] not in TABLES]
    if saved and kind in kinds and "modules_to_save" in core_of(kind).unused:
        problems.append(f"modules_to_save beside {kind}")
    forward = config.get("feedforward_modules") or []
    if not isinstance(forward, list) or not set(forward) <= set(TARGETS):
        problems.append(f"feedforward_modules={forward!r} (expected some of {', '.join(TARGETS)})")
    targets = _targets(config, layers)
    if not targets:
        problems.append(f"target_modules={config.get('target_modules')!r} (expected some of {', '.join(TARGETS)})")
    if problems:
        raise UserError(f"adapter {directory} asks for what jlora does not compute: {'; '.join(problems)}")
    if not config.keys() >= set(core_of(kind).required):
        raise UserError(f"adapter {directory}: {CONFIG} has no {' and '.join(core_of(kind).required)}")
    spec = dataclasses.replace(NOTHING, target_modules=targets, **_chosen(config, kind))
    return dataclasses.replace(spec, **kind_of(spec).read_fields(config))


def _chosen(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields that choose methods of a `peft_type`, where they do."""
    chosen: dict[str, Any] = {"peft_type": kind}
    for key, value in (method.chosen_by for method in METHODS if method.peft_type == kind):
        if (bool(config.get(key)) if value is True else config.get(key)) == value:
            chosen[key] = value
    return chosen


def _targets(config: dict[str, Any], layers: int) -> tuple[str, ...]:
    """`target_modules`: as they stand where they are plain names, else written out; () where one is no projection."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(TARGETS)
    if isinstance(targets, list) and any(name.split(".")[-1] not in TARGETS for name in targets):
        return ()
    if isinstance(targets, list) and not excluded:
        order = {name: i for i, name in enumerate(TARGETS)}
        return tuple(sorted(targets, key=lambda name: (order[name.split(".")[-1]], name)))
    if not isinstance(targets, list | str):
        return ()

    def means(words: list[str] | str, name: str) -> bool:
        if isinstance(words, str):
            return re.fullmatch(words, name) is not None
        return any(name == word or name.endswith(f".{word}") for word in words)

    paths = (path for path in hf_names.NAMES if path[-1] == "weight" and path[-2] in TARGETS)
    names = [name.removesuffix(".weight") for path in paths for name in hf_names.tensor_names(path, (layers,))]
    return tuple(name for name in names if means(targets, name) and not means(excluded, name))
