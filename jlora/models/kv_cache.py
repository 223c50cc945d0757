"""Keys and values of earlier tokens, for decoding. Axes: L layers, B batch, S key position, K kv heads, H head dim."""

from typing import NamedTuple

import jax
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

    def written(
        self, layer: Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> tuple["KVCache", Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns the cache with new keys and values of one layer, from position `fill` on, and all of that layer's."""
        at = (layer, 0, self.fill, 0, 0)
        keys = jax.lax.dynamic_update_slice(self.k, k[None], at)
        values = jax.lax.dynamic_update_slice(self.v, v[None], at)
        own = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
        return self._replace(k=keys, v=values), *own


def empty_kv_cache(config: ModelConfig, dtype: DTypeLike, batch: int, length: int) -> KVCache:
    """Returns an empty cache for `batch` rows of up to `length` tokens."""
    c = config
    shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
    segments = jnp.zeros((batch, length), jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), segments, jnp.zeros((), jnp.int32))
