"""Low-rank adaptation and its kin as pure functions of arrays (Hu et al. 2021, arXiv:2106.09685).

Every array has the orientation that PEFT writes: A is [r, in], B is [out, r], a weight is [out, in]. Where ranks differ
by layer, A's rows and B's columns beyond a layer's rank are zero: so is their gradient, and they stay exactly zero.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters.spec import LoraConfig
from jlora.common.errors import UserError

Adapter = dict[str, Any]  # nested: {"layers": {"self_attn": {"q_proj": {"lora_A": [L, r, in], "lora_B": [L, out, r]}}}}
Leaves = dict[str, Any]  # of one module


def init(shapes: Adapter, key: PRNGKeyArray) -> Adapter:
    """A uniform in +-1/sqrt(in), as PEFT's kaiming_uniform(a=sqrt(5)); all else zero, as B is, so that it does nothing.

    Args:
      shapes: the adapter's tree of shapes and dtypes.
      key: one key; each leaf gets its own.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, key: PRNGKeyArray) -> Array:
        if path[-1].key != "lora_A":
            return jnp.zeros(shape.shape, shape.dtype)
        bound = 1.0 / math.sqrt(shape.shape[-1])
        return jax.random.uniform(key, shape.shape, shape.dtype, -bound, bound)

    values = [leaf(path, shape, key) for (path, shape), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, values)


def modules(adapter: Adapter, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Leaves]]:
    """The adapted modules: path, as ("layers", "self_attn", "q_proj"), and leaves by name."""
    if any(not isinstance(node, dict) for node in adapter.values()):
        yield path, adapter
        return
    for key, node in adapter.items():
        yield from modules(node, (*path, key))


def tree(found: dict[tuple[str, ...], Leaves]) -> Adapter:
    """The other way: modules by path as an adapter."""
    made: Adapter = {}
    for (*parents, name), leaves in found.items():
        node = made
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaves
    return made


def start(spec: LoraConfig, shapes: Adapter, base: Any, key: PRNGKeyArray) -> Adapter:
    """The adapter that training begins with: it does nothing, whatever its kind, and A is drawn or, for PiSSA, found.

    Args:
      shapes: the adapter's tree of shapes and dtypes.
      base: the frozen weights' tree; a module of the adapter has its `weight` at the same path.
    """
    adapter = neutral(init(shapes, key), base)
    for path, leaves in modules(adapter):
        if "lora_A" in leaves:
            site = spec.site(".".join(path[1:]), len(leaves["lora_A"]))
            within = jnp.arange(leaves["lora_A"].shape[1])[None] < jnp.array(site.ranks)[:, None]
            leaves["lora_A"] = jnp.where(within[..., None], leaves["lora_A"], 0.0)
    adapter = complete(spec, adapter, base)
    if spec.pissa:
        for _, leaves in modules(adapter):
            if "pissa_A" in leaves:
                leaves["lora_A"], leaves["lora_B"] = jnp.copy(leaves["pissa_A"]), jnp.copy(leaves["pissa_B"])
    return adapter


def neutral(adapter: Adapter, base: Any) -> Adapter:
    """An adapter of the same form that does nothing: B zero, DoRA's magnitude the weight's own, IA3's factors one."""
    made = jax.tree.map(lambda leaf: leaf, adapter)
    for path, leaves in modules(made):
        weight = _weight(base, path)
        for name, leaf in leaves.items():
            if name == "lora_magnitude_vector":
                leaves[name] = jax.lax.map(lambda w: jnp.linalg.norm(w.astype(jnp.float32), axis=-1), weight)
            elif name == "modules_to_save":
                leaves[name] = jnp.array(weight, leaf.dtype, copy=True)
            elif name == "ia3_l":
                leaves[name] = jnp.ones_like(leaf)
            elif name != "lora_A":
                leaves[name] = jnp.zeros_like(leaf)
    return made


def complete(spec: LoraConfig, adapter: Adapter, base: Any) -> Adapter:
    """The adapter with PiSSA's frozen pair found from the base: its `rank` largest singular components, by layer."""
    made = jax.tree.map(lambda leaf: leaf, adapter)
    for path, leaves in modules(made):
        if "pissa_A" in leaves:
            site = spec.site(".".join(path[1:]), len(leaves["lora_A"]))
            ranks, scales = jnp.array(site.ranks), jnp.array(site.scales, jnp.float32)
            weight, size = _weight(base, path), leaves["pissa_A"].shape[1]
            if size > (most := min(weight.shape[1:])):
                raise UserError(f"init_lora_weights=pissa: {path[-1]} has {most} components, so no rank of {size}")
            leaves["pissa_A"], leaves["pissa_B"] = _principal(weight, ranks, scales, size)
    return made


def _weight(base: Any, path: tuple[str, ...]) -> Any:
    """Of a stack of layers or a table: an array, or a quantised weight, which `astype` makes an array of by layer."""
    for key in path:
        base = base[key]
    return base["weight"]


@jax.jit(static_argnames="size")
def _principal(
    weight: Any, ranks: Int[Array, " L"], scales: Float[Array, " L"], size: int
) -> tuple[Float[Array, "L r i"], Float[Array, "L o r"]]:
    """A and B of each layer with scale * B A the sum of its first `ranks` singular components, zero up to `size`."""

    def one(leaves: tuple[Any, Array, Array]) -> tuple[Array, Array]:
        weight, rank, scale = leaves
        u, s, v = jnp.linalg.svd(weight.astype(jnp.float32), full_matrices=False)
        root = jnp.where(jnp.arange(size) < rank, jnp.sqrt(s[:size] / jnp.where(scale > 0, scale, 1.0)), 0.0)
        return root[:, None] * v[:size], u[:, :size] * root[None]

    return jax.lax.map(one, (weight, ranks, scales))


def at(values: tuple[float, ...], layer: Int[Array, ""]) -> float | Float[Array, ""]:
    """One layer's value; a plain number where all layers have the same."""
    return values[0] if len(set(values)) == 1 else jnp.array(values, jnp.float32)[layer]


def dropout(x: Float[Array, "B T i"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "B T i"]:
    """x with a share of its entries zero and the rest made larger; x itself without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))


def delta(
    x: Float[Array, "B T i"], a: Float[Array, "r i"], b: Float[Array, "o r"], scale: float | Float[Array, ""]
) -> Float[Array, "B T o"]:
    """scale * B A x, in x's dtype; the scale acts before anything is rounded to it."""
    low = jnp.einsum("BTi,ri->BTr", x, (scale * a).astype(x.dtype))
    return jnp.einsum("BTr,or->BTo", low, b.astype(x.dtype))


def difference(leaves: Leaves, rank: int | None = None) -> tuple[Any, Any]:
    """One layer's A and B as they add to the base, cut to `rank`; PiSSA's is [A; A0], [B, -B0], of twice the rank."""
    a, b = leaves["lora_A"][:rank], leaves["lora_B"][:, :rank]
    if "pissa_A" not in leaves:
        return a, b
    frozen_a, frozen_b = leaves["pissa_A"][:rank], leaves["pissa_B"][:, :rank]
    return jnp.concatenate([a, frozen_a]), jnp.concatenate([b, -frozen_b], axis=1)


def portable(adapter: Adapter, spec: LoraConfig) -> tuple[Adapter, LoraConfig]:
    """The same LoRA with one rank and scale 1: each scale folded into its B, ranks padded, absent layers zero."""
    pairs = {path: jax.vmap(lambda leaves: difference(leaves))(leaves) for path, leaves in modules(adapter)}
    rank = max(a.shape[1] for a, _ in pairs.values())
    made: dict[tuple[str, ...], Leaves] = {}
    for path, (a, b) in pairs.items():
        site = spec.site(".".join(path[1:]), len(a))
        missing = rank - a.shape[1]
        folded = np.asarray(b, np.float64) * np.array(site.scales)[:, None, None]  # so that it is rounded once
        made[path] = {
            "lora_A": jnp.pad(a, [(0, 0), (0, missing), (0, 0)]),
            "lora_B": jnp.pad(jnp.asarray(folded, b.dtype), [(0, 0), (0, 0), (0, missing)]),
        }
    return tree(made), LoraConfig(rank, float(rank), spec.dropout, tuple(path[-1] for path in pairs))


def dora_factor(weight: Any, leaves: Leaves, scale: float | Float[Array, ""]) -> Float[Array, " o"]:
    """magnitude / ||W + scale * B A|| by output, float32; the norm is no path for gradients (section 4.3).

    One where the layer has no adapter, which is where the scale is 0.
    """
    a, b = difference(leaves)
    norm = jnp.linalg.norm(merge(weight.astype(jnp.float32), a, b, scale=scale), axis=1)
    factor = leaves["lora_magnitude_vector"] / jax.lax.stop_gradient(norm)
    return jnp.where(scale == 0, 1.0, factor)


def merge(
    weight: Float[Array, "o i"], a: Float[Array, "r i"], b: Float[Array, "o r"], *, scale: float | Float[Array, ""]
) -> Float[Array, "o i"]:
    """W + scale * B A, computed in float32 and returned in the weight's dtype."""
    product = jnp.einsum("or,ri->oi", b.astype(jnp.float32), a.astype(jnp.float32))
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)


def applied(weight: Float[Array, "o i"], leaves: Leaves, scale: float, *, scales_input: bool) -> Float[Array, "o i"]:
    """The weight with one layer's adapter in it, whatever its kind; in the weight's dtype.

    Args:
      scales_input: IA3's factors are of the input.
    """
    if "ia3_l" in leaves:
        factor = leaves["ia3_l"][None] if scales_input else leaves["ia3_l"][:, None]
        return (weight.astype(jnp.float32) * factor).astype(weight.dtype)
    a, b = difference(leaves)
    if "lora_magnitude_vector" not in leaves:
        return merge(weight, a, b, scale=scale)
    factor = dora_factor(weight, leaves, scale)[:, None]
    return (merge(weight.astype(jnp.float32), a, b, scale=scale) * factor).astype(weight.dtype)


def noise(
    x: Float[Array, "B T D"], segments: Int[Array, "B T"], alpha: float, key: PRNGKeyArray
) -> Float[Array, "B T D"]:
    """Uniform noise within alpha / sqrt(T D), T the places of a token's own example (arXiv:2310.05914, Algorithm 1)."""
    length = jax.vmap(lambda row: jnp.bincount(row, length=row.size + 1)[row])(segments)
    bound = alpha / jnp.sqrt(length * x.shape[-1])
    return x + (jax.random.uniform(key, x.shape, jnp.float32, -1.0, 1.0) * bound[..., None]).astype(x.dtype)
