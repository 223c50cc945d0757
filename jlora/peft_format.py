"""PEFT's format: adapter -> directory, and back.

adapter_config.json, and adapter_model.safetensors with a float32 A [r, in] and B [out, r] for every module and layer.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jlora.config import TARGETS
from jlora.errors import UserError
from jlora.lora import Adapter
from jlora.model import hf
from jlora.model.llama import LoraConfig
from jlora.whole import new_directory

PREFIX = "base_model.model."
WEIGHTS, CONFIG, TEMPLATE = "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"
# Fields of adapter_config.json that change the numbers, with the one value that jlora computes.
REQUIRED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "exclude_modules": None,
    "trainable_token_indices": None,
}


def tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The adapter's leaves under PEFT's names, one tensor a layer, contiguous float32."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(adapter)[0]:
        *module, part = (key.key for key in path)
        stacked = np.asarray(jax.device_get(leaf), np.float32)
        for name, values in zip(tensor_names((*module, part), stacked.shape), stacked, strict=True):
            found[name] = np.ascontiguousarray(values)
    return found


def tensor_names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """PEFT's names of one stacked leaf (`path` ends in lora_A or lora_B), by layer."""
    *module, part = path
    base = hf.tensor_names((*module, "weight"), shape)
    return [f"{PREFIX}{name.removesuffix('weight')}{part}.weight" for name in base]


def peft_config(spec: LoraConfig, base: str, revision: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": list(spec.target_modules),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def write_adapter(
    adapter: Adapter, config: dict[str, Any], card: str, target: Path, step: int = 0, template: str = ""
) -> None:
    """Writes the PEFT directory, whole or not at all.

    Args:
      template: the chat template it was trained on, where that is not the base's own.

    Raises:
      UserError: `target` exists, or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists, and jlora never overwrites: name another directory with --output")
    try:
        with new_directory(target) as made:
            (made / WEIGHTS).write_bytes(save(tensors(adapter), metadata={"format": "pt", "jlora_step": str(step)}))
            (made / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (made / "README.md").write_text(card, encoding="utf-8")
            if template:
                (made / TEMPLATE).write_text(template, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapter could not be written to {target}: {error}") from None


def read_adapter(directory: Path) -> tuple[Adapter, LoraConfig, dict[str, Any]]:
    """A PEFT LoRA directory as an adapter, its LoraConfig, and its adapter_config.json.

    Raises:
      UserError: it cannot be read, or has something that jlora does not compute, by name; nothing is dropped.
    """
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            found = {name: file.get_tensor(name).astype(np.float32) for name in list(file.keys())}
    except FileNotFoundError:
        inside = f"; did you mean {directory / 'adapter'}?" if (directory / "adapter" / CONFIG).is_file() else ""
        raise UserError(f"adapter {directory}: expected a directory with {CONFIG} and {WEIGHTS}{inside}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter {directory} is damaged or unreadable: {error}") from None
    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= config.keys():
        raise UserError(f"adapter {directory}: {CONFIG} has no r and lora_alpha")
    problems = [
        f"{field}={config[field]!r} (jlora computes {expected!r})"
        for field, expected in REQUIRED.items()
        if config.get(field, expected) not in (expected, None, [], {})
    ]
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not set(targets) <= set(TARGETS):
        problems.append(f"target_modules={targets!r} (expected some of {', '.join(TARGETS)})")
    if problems:
        raise UserError(f"adapter {directory} asks for what jlora does not compute: {'; '.join(problems)}")
    assert isinstance(targets, list)
    rank = config["r"]
    spec = LoraConfig(rank, float(config["lora_alpha"]), 0.0, tuple(t for t in TARGETS if t in targets))
    layers = len({name.split(".layers.")[1].split(".")[0] for name in found if ".layers." in name})
    adapter: Adapter = {}
    for module in (p[:-1] for p in hf.NAMES if p[-1] == "weight" and p[-2] in spec.target_modules):
        for part in ("lora_A", "lora_B"):
            names = tensor_names((*module, part), (layers,))
            if missing := [name for name in names if name not in found]:
                raise UserError(f"adapter {directory}: {len(missing)} tensor(s) are missing, the first {missing[0]}")
            leaf = jnp.asarray(np.stack([found.pop(name) for name in names]))
            node = adapter
            for key in module:
                node = node.setdefault(key, {})
            node[part] = leaf
    if found:
        raise UserError(f"adapter {directory}: {len(found)} tensor(s) would be dropped, the first {min(found)}")
    return adapter, spec, config


def refuse_other_base(weights: Adapter, shapes: Adapter, adapter: Path, base: str) -> None:
    """Raises UserError where the shapes of an adapter are not those that a base needs."""
    expected, got = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (shapes, weights))
    if expected != got:
        one, other = (jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))[0] for tree in (got, expected))
        raise UserError(f"adapter {adapter} belongs to another base: its first tensors are {one}, {base} needs {other}")


def written_step(directory: Path) -> int | None:
    """The step that an exported adapter is of; None where jlora did not write it."""
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            step = (file.metadata() or {}).get("jlora_step", "")
    except (OSError, SafetensorError):
        return None
    return int(step) if step.isdigit() else None
