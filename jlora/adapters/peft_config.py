"""adapter_config.json: what PEFT says of an adapter -> LoraConfig, and back."""

import json
import math
import re
from pathlib import Path
from typing import Any

from jlora.adapters import hf_names
from jlora.adapters.spec import TABLES, TARGETS, LoraConfig
from jlora.common.errors import UserError

CONFIG = "adapter_config.json"
# Fields that jlora reads, and fields that say nothing of the numbers.
READ = set(
    "peft_type r lora_alpha lora_dropout target_modules exclude_modules use_rslora use_dora init_lora_weights "
    "rank_pattern alpha_pattern layers_to_transform layers_pattern modules_to_save ensure_weight_tying "
    "feedforward_modules".split()
)
SILENT = set(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode init_ia3_weights "
    "megatron_core qalora_group_size loftq_config eva_config corda_config lora_ga_config runtime_config".split()
)
FIXED = {"bias": "none"}  # of all other fields jlora computes only what is off
DRAWN = (None, True, False, "gaussian", "orthogonal", "eva")  # initial values that leave the base as it is


def peft_config(spec: LoraConfig, base: str, revision: str | None, *, tied: bool) -> dict[str, Any]:
    """adapter_config.json of the tensors that `peft_format.tensors` makes.

    PiSSA becomes plain LoRA of twice the rank, with alpha such that the scale stays.

    Args:
      base: a hub id or directory, with `revision` where it has one.
      tied: the base's head is its embedding table.
    """
    common = {
        "peft_type": spec.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "target_modules": list(spec.target_modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": list(spec.modules_to_save) or None,
    }
    if spec.peft_type == "IA3":
        return {**common, "feedforward_modules": list(spec.feedforward_modules)}
    twice = 2 if spec.pissa else 1
    stronger = math.sqrt(twice) if spec.use_rslora else twice
    return {
        **common,
        "r": spec.rank * twice,
        "lora_alpha": spec.alpha * stronger,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "bias": "none",
        "modules_to_save": ["embed_tokens"] if spec.modules_to_save and tied else common["modules_to_save"],
        "ensure_weight_tying": bool(spec.modules_to_save) and tied,
        "layers_to_transform": list(spec.layers_to_transform) or None,
        "rank_pattern": {pattern: rank * twice for pattern, rank in spec.rank_pattern},
        "alpha_pattern": {pattern: alpha * stronger for pattern, alpha in spec.alpha_pattern},
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


def read_spec(directory: Path, layers: int) -> LoraConfig:
    """The adapter that a PEFT directory's adapter_config.json describes, on a base of so many layers.

    Raises:
      UserError: it asks for something that jlora does not compute, by name.
    """
    config = read_config_file(directory)
    kind, init = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    problems = [
        f"{field}={value!r}"
        for field, value in config.items()
        if value and field not in READ | SILENT and value != FIXED.get(field)
    ]
    if kind not in ("LORA", "IA3"):
        problems.append(f"peft_type={kind!r} (expected LORA or IA3)")
    if init not in (*DRAWN, "pissa"):
        problems.append(f"init_lora_weights={init!r}, which changes the base: save it as a difference with PEFT")
    if config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        problems.append(f"layers_pattern={config['layers_pattern']!r} (expected none)")
    saved = config.get("modules_to_save") or []
    problems += [f"modules_to_save has {table!r}" for table in saved if table.split(".")[-1] not in TABLES]
    if saved and kind == "IA3":
        problems.append("modules_to_save beside IA3")
    forward = config.get("feedforward_modules") or []
    if not isinstance(forward, list) or not set(forward) <= set(TARGETS):
        problems.append(f"feedforward_modules={forward!r} (expected some of {', '.join(TARGETS)})")
    targets = _targets(config, layers)
    if not targets:
        problems.append(f"target_modules={config.get('target_modules')!r} (expected some of {', '.join(TARGETS)})")
    if problems:
        raise UserError(f"adapter {directory} asks for what jlora does not compute: {'; '.join(problems)}")
    if kind == "IA3":
        return LoraConfig(1, 1.0, 0.0, targets, peft_type="IA3", feedforward_modules=tuple(forward))
    if not {"r", "lora_alpha"} <= config.keys():
        raise UserError(f"adapter {directory}: {CONFIG} has no r and lora_alpha")
    only = config.get("layers_to_transform")
    return LoraConfig(
        config["r"],
        float(config["lora_alpha"]),
        float(config.get("lora_dropout") or 0.0),
        targets,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        pissa=init == "pissa",
        rank_pattern=tuple((config.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((k, float(v)) for k, v in (config.get("alpha_pattern") or {}).items()),
        layers_to_transform=(only,) if isinstance(only, int) else tuple(only or ()),
        modules_to_save=tuple(table for table in TABLES if any(table == name.split(".")[-1] for name in saved)),
    )


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
