"""Writes and reads PEFT directories. Tensors are float32 and contiguous, under PEFT's names."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jlora.adapters import params
from jlora.adapters.conflicts import find_conflicts
from jlora.adapters.methods import make_method, table_method
from jlora.adapters.methods.method import Leaf, Leaves, Method
from jlora.adapters.methods.tables import TableMethod
from jlora.adapters.params import Adapter
from jlora.adapters.peft_config import CONFIG, read_config_file
from jlora.adapters.provenance import TENSORS, WEIGHTS, metadata, tensors_hash
from jlora.adapters.spec import EMBEDDINGS, AdapterSpec
from jlora.common import hf_names
from jlora.common.atomic_io import new_directory
from jlora.common.errors import UserError
from jlora.common.plural import plural

PREFIX = "base_model.model."
# Tables that PEFT copies into a file if LoRA changes them; `bases.hashes.check_base` compares them with the base model.
COPIES = {f"{PREFIX}{name}.base_layer.weight": table for table, name in EMBEDDINGS.items()}
FLOATS = ("F16", "BF16", "F32", "F64")  # safetensors' names
PARITY, TEMPLATE = "parity.json", "chat_template.jinja"


class Place(NamedTuple):
    """A module in a PEFT file, and its values in the adapter's tree."""

    name: str  # in the file
    leaves: Leaves  # of one layer, or of a token table
    rank: int | None  # of the layer; None for a token table, whose arrays are not padded
    method: Method | TableMethod

    def files(self) -> Iterator[tuple[str, Leaf]]:
        """Yields the name in the file of each array, and its leaf."""
        for leaf in self.method.leaves():
            if leaf.tensor:
                yield self.name + leaf.tensor, leaf


def _places(adapter: Adapter, spec: AdapterSpec, *, tied: bool) -> Iterator[Place]:
    """Yields every module that a PEFT file stores."""
    for path, leaves in params.modules(adapter):
        size = next(iter(leaves.values())).shape[0]
        names = [name.removesuffix(".weight") for name in hf_names.tensor_names((*path, "weight"), (size,))]
        if not (projection := params.projection(path)):
            yield Place(PREFIX + names[0], leaves, None, table_method(spec, path[0], tied=tied))
            continue
        method = make_method(spec, projection)
        for layer, (name, rank) in enumerate(zip(names, method.site(size).ranks, strict=True)):
            if rank:
                own = {part: leaf[layer] for part, leaf in leaves.items()}
                yield Place(PREFIX + name, own, rank, method)


def tensors(adapter: Adapter, spec: AdapterSpec, *, tied: bool) -> dict[str, np.ndarray]:
    """Returns the tensors of a PEFT file: one per layer, cut to the layer's rank, and PiSSA as plain LoRA.

    Args:
      tied: whether the base model's head is its embedding table; PEFT writes a trained one under both names.
    """
    found: dict[str, Any] = {}
    for place in _places(jax.device_get(adapter), spec, tied=tied):
        if isinstance(place.method, TableMethod):
            found |= {name: place.leaves[leaf.name] for name, leaf in place.files()}
        else:
            of_module = place.method.to_peft(place.leaves, place.rank or 0)
            found |= {place.name + end: values for end, values in of_module.items()}
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
    """Writes a PEFT directory atomically.

    Args:
      config: the content of adapter_config.json.
      card: the content of README.md.
      notes: the metadata of the safetensors file (see provenance.py).
      check: called with the complete directory before it is renamed to `target`. Its result is written as parity.json;
        if it raises, nothing is written.
      template: the chat template of training, if it is not the base model's own.

    Raises:
      UserError: `target` exists, or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists, and jlora never overwrites. Choose another directory with --output.")
    named = tensors(adapter, spec, tied=config.get("ensure_weight_tying") is True)
    notes = {**(notes or {}), TENSORS: tensors_hash(named)}
    try:
        with new_directory(target) as made:
            (made / WEIGHTS).write_bytes(_in_order(save(named, metadata={"format": "pt", **notes})))
            (made / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (made / "README.md").write_text(card, encoding="utf-8")
            if template:
                (made / TEMPLATE).write_text(template, encoding="utf-8")
            if check:
                (made / PARITY).write_text(check(made), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"The adapter could not be written to {target}: {error}.") from None


def _in_order(file: bytes) -> bytes:
    """Sorts the metadata of a safetensors file: the library shuffles it, but equal runs must write equal files."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def read_adapter(directory: Path, spec: AdapterSpec, shapes: Adapter, *, tied: bool) -> Adapter:
    """Reads a PEFT directory's tensors into the adapter's tree; PiSSA's frozen pair stays zero (see `params.complete`).

    Args:
      spec: the adapter's spec, from `peft_config.read_spec`.
      shapes: the adapter's tree of shapes, for this base model.
      tied: whether the base model's head is its embedding table.

    Raises:
      UserError: the file cannot be read, or a tensor is missing, unexpected, of the wrong shape, or not finite.
    """
    found = {name: values for name, values in read_tensors(directory).items() if name not in COPIES}
    adapter = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    for place in _places(adapter, spec, tied=tied):
        for name, leaf in place.files():
            target = leaf.cut(place.leaves[leaf.name], place.rank)
            shape = place.method.in_file(target).shape if isinstance(place.method, Method) else target.shape
            target[...] = _take(found, name, shape, directory).reshape(target.shape)
    if tied and spec.modules_to_save:
        head, embedding = found.pop(PREFIX + hf_names.NAMES["lm_head", "weight"], None), adapter["embed_tokens"]
        only = head is None and read_config_file(directory).get("ensure_weight_tying") is not True
        if only or not (head is None or np.array_equal(head, embedding["modules_to_save"])):
            raise UserError(
                f"Adapter {directory} has an embedding and a head that differ, but this base model ties them."
            )
    if conflicts := find_conflicts(spec, tied=tied):
        raise UserError(f"Adapter {directory} does not fit this base model: {' '.join(conflicts)}")
    if found:
        raise UserError(
            f"Adapter {directory} contains {plural(len(found), 'unexpected tensor')} for this base model and "
            f"{CONFIG}, such as {min(found)}."
        )
    return jax.tree.map(jnp.asarray, adapter)


def _take(found: dict[str, np.ndarray], name: str, expected: tuple[int, ...], directory: Path) -> np.ndarray:
    if name not in found:
        raise UserError(f"Adapter {directory} lacks the tensor {name}.")
    values = found.pop(name)
    if values.shape != expected:
        raise UserError(
            f"Adapter {directory} belongs to another base model, or its {CONFIG} has the wrong rank: {name} has shape "
            f"{values.shape}, expected {expected}."
        )
    if not np.all(np.isfinite(values)):
        raise UserError(f"Adapter {directory}: {name} contains NaN or infinity; training probably diverged.")
    return values


def copied_tables(weights: Path) -> dict[str, np.ndarray]:
    """Returns the token tables of the base model that an adapter file contains, by name; float32."""
    try:
        with safe_open(weights, framework="numpy") as file:
            return {COPIES[name]: file.get_tensor(name).astype(np.float32) for name in COPIES.keys() & file.keys()}
    except (OSError, ValueError, SafetensorError):
        return {}  # `read_tensors` reports it


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a PEFT directory, as float32.

    Raises:
      UserError: the file cannot be read, has a tensor that is not of floats, or differs from what jlora wrote.
    """
    read_config_file(directory)  # first, for a clear error if the directory is not an adapter
    if not (directory / WEIGHTS).is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        if pickled:
            raise UserError(
                f"Adapter {directory} has only {pickled[0]}, which can run code when loaded. If you trust it, convert "
                "it: PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW_DIR, safe_serialization=True)"
            )
        raise UserError(f"Adapter {directory}: Expected a directory with {CONFIG} and {WEIGHTS}.")
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as file:
            names = list(file.keys())
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            if odd := [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in FLOATS]:
                raise UserError(f"Adapter {directory}: {odd[0]}, expected {', '.join(FLOATS)}.")
            found = {name: file.get_tensor(name).astype(np.float32) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"Adapter {directory} is damaged or unreadable: {error}.") from None
    recorded = metadata(directory / WEIGHTS).get(TENSORS)
    if recorded and recorded != (actual := tensors_hash(found)):
        raise UserError(
            f"Adapter {directory} is damaged: the hash of its tensors is {actual[:12]}, but it was written with "
            f"{recorded[:12]}. Export or copy it again."
        )
    return found
