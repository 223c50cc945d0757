"""Causal attention within segments: by XLA in blocks of queries, which runs anywhere, or by a kernel (flash.py).

Axes: B batch, T query position, S key position, N query heads, K kv heads, G=N/K, H head dim.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jlora.model.flash import flash

BLOCK = 512  # queries at a time: the largest array is [B, N, BLOCK, S]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_start: Int[Array, ""] | int,
    window: int | None,
    backend: str,
    mesh: Mesh | None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, where a query sees the keys of its own segment up to its own place.

    Args:
      q_segments, k_segments: which example a token belongs to; 0 is padding, which no example sees. With "xla" a row
        may begin with keys that all of it sees, however far: those of a segment below 0.
      q_start: place of the first query among the keys (0 in training, the cache's fill in decoding).
      window: how many keys a query sees at most, its own included; None is all.
      backend: "xla", or a kernel of flash.py where the keys are the queries' own row (see backend.choose).
      mesh: that B and N are split over, for kernels.

    Returns:
      The mixed values, in v's dtype; softmax in float32.
    """
    if backend != "xla":
        return flash(q, k, v, q_segments, kernel=backend, window=window, mesh=mesh)
    B, T, N, H = q.shape
    attend = jax.checkpoint(_attend, prevent_cse=False, static_argnums=6)  # scores are made again, not kept
    if T <= BLOCK:
        return attend(q, k, v, q_segments, k_segments, q_start + jnp.arange(T), window)
    count = -(-T // BLOCK)
    padding = count * BLOCK - T
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q_segments = jnp.pad(q_segments, ((0, 0), (0, padding)))

    def block(index: Int[Array, ""]) -> Float[Array, "B t N H"]:
        start = index * BLOCK
        q_block = jax.lax.dynamic_slice_in_dim(q, start, BLOCK, axis=1)
        segments = jax.lax.dynamic_slice_in_dim(q_segments, start, BLOCK, axis=1)
        return attend(q_block, k, v, segments, k_segments, q_start + start + jnp.arange(BLOCK), window)

    blocks = jax.lax.map(block, jnp.arange(count))
    return jnp.moveaxis(blocks, 0, 1).reshape(B, count * BLOCK, N, H)[:, :T]


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_places: Int[Array, " T"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    # The small arrays are turned, so that no array of scores ever is: the query heads of a kv head lie end to end.
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3).reshape(B, K, N // K * T, H)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    own = q_segments[:, :, None] == k_segments[:, None, :]
    distance = q_places[:, None] - jnp.arange(S)[None, :]
    if window is not None:
        own &= (distance < window)[None]
    seen = ((own | (k_segments < 0)[:, None, :]) & (distance >= 0)[None])[:, None, None]
    scores = jnp.where(seen, scores.reshape(B, K, N // K, T, S), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, N // K * T, S)
    mixed = jnp.einsum("BKQS,BKSH->BKQH", weights, v).reshape(B, K, N // K, T, H)
    return jnp.moveaxis(mixed, 3, 1).reshape(B, T, N, H)
