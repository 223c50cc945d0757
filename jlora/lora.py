"""Low-rank adaptation as pure functions of arrays: initial values, delta, merge (Hu et al. 2021, arXiv:2106.09685).

Every array has the orientation that PEFT writes: A is [r, in], B is [out, r], a weight is [out, in].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Adapter = dict[str, Any]  # nested: {"layers": {"self_attn": {"q_proj": {"lora_A": [L, r, in], "lora_B": [L, out, r]}}}}


def scaling(rank: int, alpha: float) -> float:
    """The factor before BA: alpha / r (section 4.1)."""
    return alpha / rank


def init(shapes: Adapter, key: PRNGKeyArray) -> Adapter:
    """A uniform in +-1/sqrt(in), as PEFT's kaiming_uniform(a=sqrt(5)); B zero, so that the adapter starts as the base.

    Args:
      shapes: the adapter's tree of shapes and dtypes.
      key: one key; each leaf gets its own.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct, key: PRNGKeyArray) -> Array:
        if path[-1].key == "lora_B":
            return jnp.zeros(shape.shape, shape.dtype)
        bound = 1.0 / math.sqrt(shape.shape[-1])
        return jax.random.uniform(key, shape.shape, shape.dtype, -bound, bound)

    values = [leaf(path, shape, key) for (path, shape), key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, values)


def delta(
    x: Float[Array, "B T i"],
    a: Float[Array, "r i"],
    b: Float[Array, "o r"],
    *,
    scale: float,
    dropout: float,
    key: PRNGKeyArray | None,
) -> Float[Array, "B T o"]:
    """scale * B A dropout(x), in x's dtype. Dropout acts on the adapter's input only, and only with a key."""
    if key is not None and dropout > 0:
        kept = jax.random.bernoulli(key, 1.0 - dropout, x.shape)
        x = jnp.where(kept, x / (1.0 - dropout), jnp.zeros((), x.dtype))
    low = jnp.einsum("BTi,ri->BTr", x, a.astype(x.dtype))
    return jnp.einsum("BTr,or->BTo", low * scale, b.astype(x.dtype))


def merge(
    weight: Float[Array, "o i"], a: Float[Array, "r i"], b: Float[Array, "o r"], *, scale: float
) -> Float[Array, "o i"]:
    """W + scale * B A, computed in float32 and returned in the weight's dtype."""
    product = jnp.einsum("or,ri->oi", b.astype(jnp.float32), a.astype(jnp.float32))
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)
