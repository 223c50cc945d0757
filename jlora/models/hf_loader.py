"""Loads the frozen weights of a Hugging Face model directory.

Weights keep their layout on disk, [out, in], and are stacked over layers; no row is permuted or transposed.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jlora.adapters.spec import NO_ADAPTER, AdapterSpec
from jlora.common.errors import UserError
from jlora.common.hf_names import tensor_names
from jlora.distributed.platforms import find_devices
from jlora.distributed.sharding import make_mesh, shardings
from jlora.models.compute_settings import ComputeSettings
from jlora.models.families import read_config
from jlora.models.llama import Llama
from jlora.models.model_config import ModelConfig
from jlora.models.quant import BLOCK, Bits, is_quantized
from jlora.models.safetensors_files import DTYPES, Weights


def abstract_model(
    config: ModelConfig,
    spec: AdapterSpec,
    compute: ComputeSettings,
) -> tuple[nnx.GraphDef[Llama], dict[str, Any], dict[str, Any]]:
    """Returns the model as shapes: its structure, the adapter's tree and the base model's tree, for `nnx.merge`.

    The token tables have the rows that the base model has, or more if the adapter added some.

    Raises:
      UserError: the mesh does not divide the model evenly, or the adapter trains the row of a token that has none.
    """
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, spec.vocabulary))
    for token in (token for _, ids in spec.trainable_token_indices for token in ids):
        if token >= config.vocab_size:
            raise UserError(f"trainable_token_indices has {token}: Expected ids from 0 to {config.vocab_size - 1}.")
    if compute.mesh is not None:
        _check_mesh(config, compute, compute.mesh)
    model = nnx.eval_shape(lambda: Llama(config, spec, compute))
    graphdef, state = nnx.split(model)
    adapter, base = nnx.split_state(state, nnx.LoRAParam, ...)
    return graphdef, nnx.to_pure_dict(adapter), nnx.to_pure_dict(base)


def _check_mesh(config: ModelConfig, compute: ComputeSettings, mesh: Mesh) -> None:
    """Raises a UserError that suggests sizes if an axis of the mesh does not divide the dimensions that it splits."""
    block = BLOCK if compute.quantize == "nf4" else 1  # a block of a quantized row cannot be split
    inner, hidden = config.intermediate_size // block, config.hidden_size // block
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    blocks = f" / {block}" if block > 1 else ""
    splits = {
        "tensor": {**heads, f"intermediate_size{blocks}": inner, "vocab_size": config.vocab_size},
        "fsdp": {f"hidden_size{blocks}": hidden},
    }
    for axis, sizes in splits.items():
        common, count = math.gcd(*sizes.values()), mesh.shape[axis]
        if common % count:
            fitting = [n for n in range(1, mesh.size + 1) if common % n == 0 and mesh.size % n == 0]
            listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise UserError(
                f"mesh: {axis}={count} does not divide all of the base model's {listed}. "
                f"Set {axis} to one of {', '.join(map(str, fitting))}."
            )


def open_base(directory: Path, shapes: dict[str, Any]) -> Weights:
    """Opens a model directory and checks that its tensors are those of the base model's tree.

    The tree's token tables may have more rows than config.json says: those of new tokens.

    Raises:
      UserError: tensors are missing, unexpected or of the wrong shape or dtype; all of them are listed.
    """
    rows = shapes["embed_tokens"]["weight"].shape[0]
    weights = Weights(directory, added_rows=rows - read_config(directory).vocab_size)
    if problems := _mismatches(weights, shapes):
        raise UserError(
            f"base_model={directory} does not match its config.json ({_tensors(problems)}):{_listed(problems)}"
        )
    return weights


def load_base(
    directory: Path, shapes: dict[str, Any], mesh: Mesh, progress: Callable[[int], object] = lambda size: None
) -> dict[str, Any]:
    """Reads the frozen weights tensor by tensor to their devices, quantizing them on the way if the tree says so.

    Args:
      directory: the model directory.
      shapes: the base model's tree of shapes and dtypes; values are cast to these dtypes.
      progress: called with the number of bytes of each tensor read.

    Raises:
      UserError: tensors do not match, or contain NaN or infinity; all of them are listed.
    """
    reader = _LeafReader(open_base(directory, shapes), progress)
    places = shardings(shapes, mesh, "base")
    base = jax.tree_util.tree_map_with_path(reader.read, shapes, places, is_leaf=is_quantized)
    if reader.broken:
        raise UserError(
            f"base_model={directory} contains NaN or infinity in {jax.tree.leaves(shapes)[0].dtype.name} "
            f"({_tensors(reader.broken)}):{_listed(sorted(reader.broken))}"
        )
    return base


@dataclasses.dataclass
class _LeafReader:
    """Reads the leaves of a base model from its files onto their devices."""

    weights: Weights
    progress: Callable[[int], object]
    broken: set[str] = dataclasses.field(default_factory=set)  # names of tensors with NaN or infinity

    def read(self, path: tuple[Any, ...], leaf: Any, sharding: Any) -> Any:
        names = tensor_names(_keys(path), leaf.shape)
        if is_quantized(leaf):
            return self._quantize(names, leaf, sharding)
        stacked = _keys(path)[0] == "layers"

        def shard(index: Any) -> np.ndarray:
            part = _empty([len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)], leaf.dtype)
            wanted = names[index[0]] if stacked else names
            for name, target in zip(wanted, part if stacked else part[None], strict=True):
                with np.errstate(over="ignore"):  # overflowing values are reported by `load_base`
                    target[...] = self.weights.read(name)[index[1:] if stacked else index]
                self.weights.release(name)
                self._check(name, target.nbytes, finite=_finite(target))
            return part

        return jax.make_array_from_callback(leaf.shape, sharding, shard)

    def _quantize(self, names: list[str], leaf: Any, sharding: Any) -> Any:
        parts, treedef = jax.tree.flatten(leaf)
        part_shardings = jax.tree.leaves(sharding)
        own = [  # the shards of each part on this process's devices
            {
                _bounds(index, part.shape): _empty(where.shard_shape(part.shape), part.dtype)
                for index in where.addressable_devices_indices_map(part.shape).values()
            }
            for part, where in zip(parts, part_shardings, strict=True)
        ]
        for layer, name in enumerate(names):
            for held, made in zip(own, leaf.quantized(self.weights.read(name)), strict=True):
                for (_, *within), target in held.items():
                    target[layer] = made[tuple(slice(*span) for span in within)]
                # NaN or infinity in a block makes the block's scale NaN or infinity
                values = np.asarray(made.view(jnp.bfloat16) if isinstance(leaf, Bits) else made)
                codes = np.issubdtype(values.dtype, np.integer)
                self._check(name, made.nbytes, finite=codes or _finite(values))
            self.weights.release(name)
        arrays = [
            jax.make_array_from_callback(part.shape, where, lambda at: held[_bounds(at, part.shape)])  # noqa: B023
            for part, where, held in zip(parts, part_shardings, own, strict=True)
        ]
        return jax.tree.unflatten(treedef, arrays)

    def _check(self, name: str, size: int, *, finite: bool) -> None:
        if not finite:
            self.broken.add(name)
        self.progress(size)


def load_base_alone(directory: Path, compute: ComputeSettings, vocabulary: int = 0) -> dict[str, Any]:
    """Loads a base model without an adapter, on the mesh of `compute` or on one device.

    Args:
      vocabulary: rows of the token tables, if they must have more than the base model's.

    Raises:
      UserError: as `load_base`.
    """
    alone = dataclasses.replace(NO_ADAPTER, vocabulary=vocabulary)
    _, _, shapes = abstract_model(read_config(directory), alone, compute)
    return load_base(directory, shapes, compute.mesh or make_mesh(find_devices()[:1]))


def dequantized_weights(base: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the quantized weights of a base model, dequantized to float32, with their names on disk."""
    layer_of = jax.jit(lambda stack, layer: jax.tree.map(itemgetter(layer), stack).astype(jnp.float32))
    for path, leaf in jax.tree_util.tree_flatten_with_path(base, is_leaf=is_quantized)[0]:
        if is_quantized(leaf):
            for layer, name in enumerate(tensor_names(_keys(path), leaf.shape)):
                yield name, np.asarray(layer_of(leaf, layer))


def ignored(name: str, *, tied: bool) -> bool:
    """Returns whether to ignore a tensor, as transformers does: rotary tables, and the head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _mismatches(weights: Weights, shapes: dict[str, Any]) -> list[str]:
    """Describes each tensor that is missing, unexpected, or of the wrong shape or dtype."""
    problems, expected, stored = [], set(), weights.names()
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_quantized)[0]:
        shape = leaf.shape[1:] if _keys(path)[0] == "layers" else leaf.shape
        for name in tensor_names(_keys(path), leaf.shape):
            expected.add(name)
            if name not in stored:
                problems.append(f"{name} is missing")
            elif (got := weights.shape(name)) != shape:
                problems.append(f"{name} has shape {got}, expected {shape}")
            elif weights.format(name) not in DTYPES:
                problems.append(f"{name} is {weights.format(name)}, expected {', '.join(DTYPES)}")
    surplus = (name for name in sorted(stored - expected) if not ignored(name, tied="lm_head" not in shapes))
    return problems + [f"{name} is not part of the model" for name in surplus]


def _finite(values: np.ndarray) -> bool:
    """Returns whether all values are finite, in two passes over the bits and without a temporary array.

    The bits of IEEE floats grow with the magnitude, up to infinity and NaN: read as signed integers, the positive ones
    are the largest; as unsigned integers, the negative ones.
    """
    kind = jnp.finfo(values.dtype)
    infinity = np.array(np.inf, values.dtype).view(f"u{kind.bits // 8}").item()
    signed, unsigned = values.view(f"i{kind.bits // 8}"), values.view(f"u{kind.bits // 8}")
    return int(signed.max()) < infinity and int(unsigned.max()) < infinity + (1 << kind.bits - 1)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array aligned to 64 bytes, which JAX uses on a CPU without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns (start, stop) by axis, because slices are not hashable before Python 3.12."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _tensors(problems: Collection[str]) -> str:
    return "1 tensor" if len(problems) == 1 else f"{len(problems)} tensors"


def _listed(problems: list[str]) -> str:
    more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n  ".join(["", *problems[:20], *more])
