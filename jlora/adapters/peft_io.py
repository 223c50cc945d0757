"""PEFT's directory: an adapter -> adapter_model.safetensors under PEFT's names, float32 and contiguous; and back."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jlora.adapters import hf_names, tree
from jlora.adapters.methods import TABLE, method_of
from jlora.adapters.methods.method import Leaves, Method
from jlora.adapters.peft_config import CONFIG, read_config_file
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.spec import AdapterSpec
from jlora.adapters.tree import Adapter
from jlora.common.atomic_io import new_directory
from jlora.common.errors import UserError

PREFIX = "base_model.model."
PARITY, TEMPLATE = "parity.json", "chat_template.jinja"


class Place(NamedTuple):
    """A module that the files know."""

    name: str  # there
    leaves: Leaves
    layer: int | None  # of a projection, in the leaves' stacks; None for a token table
    rank: int
    method: Method | None


def _places(adapter: Adapter, spec: AdapterSpec) -> Iterator[Place]:
    """Every module that the files know."""
    for path, leaves in tree.modules(adapter):
        size = next(iter(leaves.values())).shape[0]
        names = [name.removesuffix(".weight") for name in hf_names.tensor_names((*path, "weight"), (size,))]
        if not (projection := tree.projection(path)):
            yield Place(PREFIX + names[0], leaves, None, 0, None)
            continue
        method = method_of(spec, projection)
        for layer, (name, rank) in enumerate(zip(names, method.site(size).ranks, strict=True)):
            if rank:
                yield Place(PREFIX + name, leaves, layer, rank, method)


def tensors(adapter: Adapter, spec: AdapterSpec, *, tied: bool) -> dict[str, np.ndarray]:
    """The adapter under PEFT's names: layers apart, ranks cut to each layer's own, PiSSA as a difference.

    Args:
      tied: the base's head is its embedding table; a trained one then stands under both names, as PEFT writes it.
    """
    found: dict[str, Any] = {}
    for name, leaves, layer, rank, method in _places(jax.device_get(adapter), spec):
        if method is None:
            found[name + TABLE.tensor] = leaves[TABLE.name]
            continue
        one = {part: leaf[layer] for part, leaf in leaves.items()}
        found |= {name + end: values for end, values in method.to_peft(one, rank).items()}
    if tied and spec.modules_to_save:
        embedding, head = (PREFIX + hf_names.NAMES[table, "weight"] for table in ("embed_tokens", "lm_head"))
        found[head] = found[embedding].copy()
    return {name: np.ascontiguousarray(values, np.float32) for name, values in found.items()}


def write_adapter(
    adapter: Adapter,
    spec: AdapterSpec,
    config: dict[str, Any],
    card: str,
    target: Path,
    notes: dict[str, str] | None = None,
    check: Callable[[Path], str] | None = None,
    template: str = "",
) -> None:
    """Writes the PEFT directory, whole or not at all.

    Args:
      config: its adapter_config.json.
      card: its README.md.
      notes: what goes into the weights' metadata (see provenance.py).
      check: looks at the directory before it gets its name; what it returns is kept as parity.json, what it raises
        leaves nothing behind.
      template: the chat template it was trained on, where that is not the base's own.

    Raises:
      UserError: `target` exists, or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists, and jlora never overwrites: name another directory with --output")
    named = tensors(adapter, spec, tied=config.get("ensure_weight_tying") is True)
    try:
        with new_directory(target) as made:
            (made / WEIGHTS).write_bytes(_in_order(save(named, metadata={"format": "pt", **(notes or {})})))
            (made / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (made / "README.md").write_text(card, encoding="utf-8")
            if template:
                (made / TEMPLATE).write_text(template, encoding="utf-8")
            if check:
                (made / PARITY).write_text(check(made), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapter could not be written to {target}: {error}") from None


def _in_order(file: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library shuffles them, and equal runs should be equal files."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def read_adapter(directory: Path, spec: AdapterSpec, shapes: Adapter, *, tied: bool) -> Adapter:
    """The tensors of a PEFT directory in the adapter's tree; PiSSA's frozen pair is left zero (see `tree.complete`).

    Args:
      spec: what its adapter_config.json says (`peft_config.read_spec`).
      shapes: the adapter's tree of shapes on the base at hand.
      tied: the base's head is its embedding table.

    Raises:
      UserError: a tensor is missing, surplus, misshapen or not finite, or the file cannot be read; nothing is dropped.
    """
    found = _read_tensors(directory)
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    for name, leaves, layer, rank, method in _places(adapter, spec):
        if method is None:
            whole = leaves[TABLE.name]
            whole[...] = _take(found, name + TABLE.tensor, whole.shape, directory)
            continue
        for leaf in (leaf for leaf in method.leaves() if leaf.tensor):
            place = leaf.cut(leaves[leaf.name][layer], rank)
            values = _take(found, name + leaf.tensor, method.in_file(place).shape, directory)
            place[...] = values.reshape(place.shape)
    if tied and spec.modules_to_save:
        head, embedding = found.pop(PREFIX + hf_names.NAMES["lm_head", "weight"], None), adapter["embed_tokens"]
        only = head is None and read_config_file(directory).get("ensure_weight_tying") is not True
        if only or not (head is None or np.array_equal(head, embedding["modules_to_save"])):
            raise UserError(f"adapter {directory} trains embeddings apart from the head, and this base ties them")
    if found:
        raise UserError(f"adapter {directory}: {len(found)} tensor(s) would be dropped, the first {min(found)}")
    return jax.tree.map(jnp.asarray, adapter)


def _take(found: dict[str, np.ndarray], name: str, expected: tuple[int, ...], directory: Path) -> np.ndarray:
    if name not in found:
        raise UserError(f"adapter {directory}: tensors are missing, the first {name}")
    values = found.pop(name)
    if values.shape != expected:
        raise UserError(
            f"adapter {directory} belongs to another base, or its {CONFIG} has another rank: {name} has shape "
            f"{values.shape}, expected {expected}"
        )
    if not np.all(np.isfinite(values)):
        raise UserError(f"adapter {directory}: {name} holds values that are not finite; it broke down in training")
    return values


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    read_config_file(directory)  # so that a directory that is no adapter is called that
    if not (directory / WEIGHTS).is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        if pickled:
            raise UserError(
                f"adapter {directory} has only {pickled[0]}, which can run code when opened. Convert it where you "
                "trust it: PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW_DIR, safe_serialization=True)"
            )
        raise UserError(f"adapter {directory}: expected a directory with {CONFIG} and {WEIGHTS}")
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            return {name: file.get_tensor(name).astype(np.float32) for name in list(file.keys())}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter {directory} is damaged or unreadable: {error}") from None
