"""Keys and values of earlier tokens, for generation, in blocks that rows take and give back (Kwon et al. 2023,
arXiv:2309.06180).

Axes: L layers, C blocks of the cache, b positions in a block, R rows, T new tokens of a row, M blocks of a row, S key
position in a row, N query heads, K kv heads, G=N/K, H head dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jlora.models.model_config import ModelConfig

BLOCK = 32  # positions in a block: a CPU gathers few large blocks faster, and rows share more with small ones
SPAN = 4  # blocks whose scores are computed at a time
UNUSED = 0  # a block that no row reads; padding is written there


class KVCache(NamedTuple):
    """Keys and values of all rows, and the blocks of the rows of one call."""

    k: Float[Array, "L C K b H"]
    v: Float[Array, "L C K b H"]
    blocks: Int[Array, "R M"]  # the blocks of a row, in the order of its positions; M is a multiple of SPAN

    def written(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "R T K H"],
        v: Float[Array, "R T K H"],
        segments: Int[Array, "R T"],
        positions: Int[Array, "R T"],
    ) -> "KVCache":
        """Returns the cache with the keys and values of new tokens in one layer; those in segment 0 are not kept."""
        own = jnp.take_along_axis(self.blocks, positions // BLOCK, axis=1)
        block, offset = jnp.where(segments > 0, own, UNUSED), positions % BLOCK
        v = jnp.where(jnp.isfinite(v), v, 0)  # a row that overflows must not reach later users of its blocks: 0 * NaN
        keys, values = (
            old.at[layer, block, :, offset].set(new.astype(old.dtype)) for old, new in ((self.k, k), (self.v, v))
        )
        return self._replace(k=keys, v=values)

    def attend(
        self, layer: Int[Array, ""], q: Float[Array, "R T N H"], positions: Int[Array, "R T"], window: int | None
    ) -> Float[Array, "R T N H"]:
        """Computes softmax(q k^T / sqrt(H)) v over the positions of a row up to each query's own.

        Reads SPAN blocks of each row at a time, up to the last position of the longest row, and corrects the sums of
        the spans before as their largest score grows (Milakov and Gimelshein 2018, arXiv:1805.02867).
        """
        R, T, N, H = q.shape
        K, b = self.k.shape[2:4]
        grouped = jnp.einsum("RTKGH->RKGTH", q.reshape(R, T, K, N // K, H)).reshape(R, K, -1, H)

        def span(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, total, largest = sums
            ids = jax.lax.dynamic_slice_in_dim(self.blocks, number * SPAN, SPAN, axis=1)
            k, v = (x.at[layer, ids].get(mode="promise_in_bounds") for x in (self.k, self.v))
            distance = positions[:, :, None] - (number * SPAN * b + jnp.arange(SPAN * b)[None, None])
            seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
            scores = jnp.einsum("RKQH,RnKbH->RKQnb", grouped, k, preferred_element_type=jnp.float32) * H**-0.5
            by_head = scores.reshape(R, K, N // K, T, -1)
            masked = jnp.where(seen[:, None, None], by_head, jnp.finfo(jnp.float32).min)
            scores = masked.reshape(R, K, grouped.shape[2], -1)
            highest = jnp.maximum(largest, jnp.max(scores, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - highest), jnp.exp(largest - highest)
            parts = weights.astype(v.dtype).reshape(R, K, -1, SPAN, b)
            new = jnp.einsum("RKQnb,RnKbH->RKQH", parts, v, preferred_element_type=jnp.float32)
            return out * shrink + new, total * shrink + jnp.sum(weights, axis=-1, keepdims=True), highest

        shape = (R, K, grouped.shape[2], 1)
        none = jnp.zeros(grouped.shape, jnp.float32), jnp.zeros(shape), jnp.full(shape, jnp.finfo(jnp.float32).min)
        count = jnp.max(positions) // (SPAN * b) + 1
        out, total, _ = jax.lax.fori_loop(0, count, span, none)
        heads = (out / total).astype(q.dtype).reshape(R, K, N // K, T, H)
        return jnp.einsum("RKGTH->RTKGH", heads).reshape(R, T, N, H)


def cache_shardings(mesh: Mesh) -> KVCache:
    """Returns where a cache is: its kv heads are split as those of the model are."""
    specs = PartitionSpec(None, None, "tensor"), PartitionSpec(None, None, "tensor"), PartitionSpec()
    places: Any = (NamedSharding(mesh, spec) for spec in specs)
    return KVCache(*places)


def empty_kv_cache(config: ModelConfig, dtype: DTypeLike, blocks: int) -> KVCache:
    """Returns an empty cache of this many blocks, without rows."""
    shape = (config.num_hidden_layers, blocks, config.num_key_value_heads, BLOCK, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((0, SPAN), jnp.int32))
