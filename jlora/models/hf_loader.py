"""Hugging Face's side of the model: THE table of names in both directions, and the loader.

Weights lie in jlora as they lie on disk, [out, in], stacked over layers; no row is ever permuted or transposed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jlora.adapters.hf_names import tensor_names
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import UserError
from jlora.distributed.sharding import shardings
from jlora.models.compute import Compute
from jlora.models.llama import Llama, LlamaConfig
from jlora.models.quant import BLOCK, is_quantized
from jlora.models.safetensors_files import DTYPES, Weights


def abstract(
    config: LlamaConfig,
    spec: AdapterSpec,
    compute: Compute,
) -> tuple[nnx.GraphDef[Llama], dict[str, Any], dict[str, Any]]:
    """The model as shapes: its structure, the adapter's tree and the base's tree. `nnx.merge` joins them again.

    Raises:
      UserError: the mesh that it is computed on does not divide it.
    """
    if compute.mesh is not None:
        _check_mesh(config, compute, compute.mesh)
    model = nnx.eval_shape(lambda: Llama(config, spec, compute))
    graphdef, state = nnx.split(model)
    adapter, base = nnx.split_state(state, nnx.LoRAParam, ...)
    return graphdef, nnx.to_pure_dict(adapter), nnx.to_pure_dict(base)


def _check_mesh(config: LlamaConfig, compute: Compute, mesh: Mesh) -> None:
    """Raises UserError where an axis of the mesh does not divide what it splits; names the sizes that do."""
    block = BLOCK if compute.quantize == "nf4" else 1  # blocks of a quantised row stay whole
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
                f"mesh: {axis}={count} does not divide all of the base's {listed}: "
                f"set {axis} to one of {', '.join(map(str, fitting))}"
            )


def open_base(directory: Path, shapes: dict[str, Any]) -> Weights:
    """The tensors of a model directory, which are those of the base's tree.

    Raises:
      UserError: all missing, surplus and misshapen tensors at once.
    """
    weights = Weights(directory)
    if problems := _unfit(weights, shapes):
        raise UserError(
            f"base_model {directory}: {len(problems)} tensor(s) do not fit its config.json:{_listed(problems)}"
        )
    return weights


def load_base(
    directory: Path, shapes: dict[str, Any], mesh: Mesh, progress: Callable[[int], object] = lambda size: None
) -> dict[str, Any]:
    """Reads the frozen weights, tensor by tensor, each straight to its place on the mesh; quantised on the way there.

    Args:
      directory: the model directory.
      shapes: the base's tree of shapes and dtypes; values are cast to these dtypes.
      progress: called with the bytes of each tensor read.

    Raises:
      UserError: tensors do not fit, or hold values that are not finite; all of them at once.
    """
    weights, broken = open_base(directory, shapes), set()

    def place(path: tuple[Any, ...], leaf: Any, sharding: Any) -> Any:
        names = tensor_names(_keys(path), leaf.shape)
        if is_quantized(leaf):
            return quantize(names, leaf, sharding)

        def read(index: Any) -> np.ndarray:
            part = _empty([len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)], leaf.dtype)
            stacked = _keys(path)[0] == "layers"
            wanted = names[index[0]] if stacked else names
            for name, target in zip(wanted, part if stacked else part[None], strict=True):
                with np.errstate(over="ignore"):  # what does not fit the dtype is named below
                    target[...] = weights.read(name)[index[1:] if stacked else index]
                weights.release(name)
                if not _finite(target):
                    broken.add(name)
                progress(target.nbytes)
            return part

        return jax.make_array_from_callback(leaf.shape, sharding, read)

    def quantize(names: list[str], leaf: Any, sharding: Any) -> Any:
        parts, form = jax.tree.flatten(leaf)
        places = jax.tree.leaves(sharding)
        own = [  # what this process's devices hold of each part
            {
                _span(index, part.shape): _empty(place.shard_shape(part.shape), part.dtype)
                for index in place.addressable_devices_indices_map(part.shape).values()
            }
            for part, place in zip(parts, places, strict=True)
        ]
        for layer, name in enumerate(names):
            for held, made in zip(own, leaf.quantized(weights.read(name)), strict=True):
                for (_, *within), target in held.items():
                    target[layer] = made[tuple(slice(*span) for span in within)]
                if made.dtype == np.float32 and not np.isfinite(made).all():  # as is a block that holds such a value
                    broken.add(name)
                progress(made.nbytes)
            weights.release(name)
        arrays = [
            jax.make_array_from_callback(part.shape, place, lambda at: held[_span(at, part.shape)])  # noqa: B023
            for part, place, held in zip(parts, places, own, strict=True)
        ]
        return jax.tree.unflatten(form, arrays)

    base = jax.tree_util.tree_map_with_path(place, shapes, shardings(shapes, mesh, "base"), is_leaf=is_quantized)
    if broken:
        raise UserError(
            f"base_model {directory}: {len(broken)} tensor(s) hold values that are not finite numbers in "
            f"{jax.tree.leaves(shapes)[0].dtype.name}:{_listed(sorted(broken))}"
        )
    return base


def dense(base: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The quantised weights of a base by the file's names, as the model computes with them; float32."""
    layer_of = jax.jit(lambda stack, layer: jax.tree.map(itemgetter(layer), stack).astype(jnp.float32))
    for path, leaf in jax.tree_util.tree_flatten_with_path(base, is_leaf=is_quantized)[0]:
        if is_quantized(leaf):
            for layer, name in enumerate(tensor_names(_keys(path), leaf.shape)):
                yield name, np.asarray(layer_of(leaf, layer))


def ignored(name: str, *, tied: bool) -> bool:
    """Does transformers leave this tensor aside too? Old files store rotary tables, and the head of a tied model."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _unfit(weights: Weights, shapes: dict[str, Any]) -> list[str]:
    """What of a directory's tensors is missing, surplus, misshapen or of a dtype that is not read."""
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
    """Is there no NaN and no infinity? In two passes over the bits, without a temporary array.

    Bits of IEEE floats grow with the magnitude, infinity and NaN at the top: as signed integers the positive ones are
    the largest, as unsigned the negative ones.
    """
    kind = jnp.finfo(values.dtype)
    infinity = np.array(np.inf, values.dtype).view(f"u{kind.bits // 8}").item()
    signed, unsigned = values.view(f"i{kind.bits // 8}"), values.view(f"u{kind.bits // 8}")
    return int(signed.max()) < infinity and int(unsigned.max()) < infinity + (1 << kind.bits - 1)


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins on a 64-byte boundary: on a CPU, JAX takes such a one over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _span(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """A part of an array as (start, stop) by axis: slices can be no keys."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _listed(problems: list[str]) -> str:
    more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
    return "\n  ".join(["", *problems[:20], *more])
