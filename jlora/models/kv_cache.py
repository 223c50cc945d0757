"""Keys and values of earlier tokens, for decoding. Axes: L layers, B batch, S key position, K kv heads, H head dim."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jlora.models.model_config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, for decoding."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    segments: Int[Array, "B S"]  # 0 at empty positions and padding
    fill: Int[Array, ""]  # number of positions written


class LayerKVCache(NamedTuple):
    """One layer's part of the cache; `segments` already includes the tokens that this step writes at `fill`."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    segments: Int[Array, "B S"]
    fill: Int[Array, ""]


def empty_kv_cache(config: ModelConfig, dtype: DTypeLike, batch: int, length: int) -> KVCache:
    """Returns an empty cache for `batch` rows of up to `length` tokens."""
    c = config
    shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
    segments = jnp.zeros((batch, length), jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), segments, jnp.zeros((), jnp.int32))
