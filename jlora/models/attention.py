"""Causal attention within segments: by XLA in blocks of queries, which runs anywhere, or by a kernel (flash.py).

Axes: B batch, T query position, S key position, N query heads, K kv heads, G=N/K, H head dim, b block, t query in a
block, Q=Gt: the query heads of a kv head, end to end.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jlora.models.compute import MIXED, UNKNOWN, Packing
from jlora.models.kernels import flash
from jlora.models.slots import slots_of

BLOCK = 512  # queries at a time: the largest array is [B, N, BLOCK, S]
WORTH = 0.75  # of what a block holds: examples apart hold less, or moving them does not pay
LANES = 16  # of a CPU's widest registers: the keys of an example apart are a multiple


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
    packing: Packing = UNKNOWN,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, where a query sees the keys of its own segment up to its own place.

    Args:
      q_segments, k_segments: which example a token belongs to, from 1; 0 is padding, which no example sees. A row may
        begin with keys that all of it sees, however far: those of segment -1.
      q_start: place of the first query among the keys (0 in training, the cache's fill in decoding).
      window: how many keys a query sees at most, its own included; None is all.
      backend: "xla", or a kernel of flash.py where the keys are the queries' own row (see backend.choose).
      mesh: that B and N are split over, for kernels.
      packing: what is known of the rows, where the keys are the queries' own; kernels take no prefix with a window.

    Returns:
      The mixed values, in v's dtype; softmax in float32.
    """
    if backend != "xla":
        return flash(q, k, v, q_segments, kernel=backend, window=window, mesh=mesh, packing=packing)
    B, T, N, H = q.shape
    if slots := in_slots(T, packing):
        return _by_example(q, k, v, q_segments, slots, window)
    K, count = k.shape[2], -(-T // BLOCK)
    t = -(-T // count)
    padding = count * t - T
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q_segments = jnp.pad(q_segments, ((0, 0), (0, padding)))
    # The small arrays are turned, so that no array of scores ever is.
    blocks = jnp.einsum("BbtKGH->bBKGtH", q.reshape(B, count, t, K, N // K, H)).reshape(count, B, K, -1, H)
    k, v = jnp.einsum("BSKH->BKSH", k), jnp.einsum("BSKH->BKSH", v)
    q_places = (q_start + jnp.arange(count * t)).reshape(count, t)
    q_segments = jnp.moveaxis(q_segments.reshape(B, count, t), 1, 0)
    mixed = _mix(blocks, k, v, q_segments, q_places, k_segments, window).reshape(count, B, K, N // K, t, H)
    return jnp.einsum("bBKGtH->BbtKGH", mixed).reshape(B, count * t, N, H)[:, :T]


def in_slots(T: int, packing: Packing) -> Packing | None:
    """Slots for the examples of a row of T, where mixing them apart pays; None where the row is mixed whole."""
    P, E, M = packing
    M += -(P + M) % LANES
    return Packing(P, E, M) if 0 < E * M * (P + M) < WORTH * T * min(T, BLOCK) else None


def _by_example(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    packing: Packing,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Each example of a row as a row of its own, in a slot after what they share; that by itself before them all."""
    P, E, M = packing
    slots = slots_of(segments, packing)
    q, k, v = slots.sorted(q), slots.sorted(k), slots.sorted(v)
    shared, own = slots.filled[:, :P], slots.filled[:, P:].reshape(-1, M).astype(jnp.int32)
    before = jnp.repeat(jnp.where(shared, -1, 2), E, axis=0)  # 2 is no one's

    def apart(x: Array) -> Array:
        return x[:, P:].reshape(-1, M, *x.shape[2:])

    def keys(x: Array) -> Array:
        return jnp.concatenate([jnp.repeat(x[:, :P], E, axis=0), apart(x)], axis=1)

    mix = functools.partial(attention, window=window, backend="xla", mesh=None)
    seen = jnp.concatenate([before, own], axis=1)
    mixed = mix(apart(q), keys(k), keys(v), q_segments=own, k_segments=seen, q_start=P)
    mixed = mixed.reshape(len(q), E * M, *q.shape[2:])
    if P:
        ones = shared.astype(jnp.int32)
        first = mix(q[:, :P], k[:, :P], v[:, :P], q_segments=ones, k_segments=ones, q_start=0)
        mixed = jnp.concatenate([first, mixed], axis=1)
    return slots.laid(mixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _mix(
    q: Float[Array, "b B K Q H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int[Array, "b B t"],
    q_places: Int[Array, "b t"],
    k_segments: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "b B K Q H"]:
    """Block by block. The backward pass makes the scores again, and keeps of the forward pass what FlashAttention's
    does (Dao et al. 2022, arXiv:2205.14135, algorithm 4): the mixed values, and the logarithm of each softmax's sum.
    """
    return _forward(q, k, v, q_segments, q_places, k_segments, window)[0]


def _forward(
    q: Any, k: Any, v: Any, q_segments: Any, q_places: Any, k_segments: Any, window: int | None
) -> tuple[Float[Array, "b B K Q H"], tuple[Array, ...]]:
    def block(leaves: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, segments, places = jax.lax.optimization_barrier(leaves)  # else jax keeps the masks of all blocks at once
        scores = _scores(q, k, segments, places, k_segments, window)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("BKQS,BKSH->BKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / total).astype(v.dtype), largest + jnp.log(total)

    mixed, log_sums = checkpoint_name(jax.lax.map(block, (q, q_segments, q_places)), MIXED)
    return mixed, (q, k, v, q_segments, q_places, k_segments, mixed, log_sums)


def _backward(window: int | None, kept: tuple[Array, ...], gradient: Float[Array, "b B K Q H"]) -> tuple[Any, ...]:
    q, k, v, q_segments, q_places, k_segments, mixed, log_sums = kept

    def block(carry: tuple[Array, Array], leaves: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        of_k, of_v = carry
        q, segments, places, mixed, log_sums, of_mixed = jax.lax.optimization_barrier(leaves)
        weights = jnp.exp(_scores(q, k, segments, places, k_segments, window) - log_sums)
        of_weights = jnp.einsum("BKQH,BKSH->BKQS", of_mixed, v, preferred_element_type=jnp.float32)
        along = jnp.sum(of_mixed.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
        of_scores = (weights * (of_weights - along) * q.shape[-1] ** -0.5).astype(q.dtype)
        of_v += jnp.einsum("BKQS,BKQH->BKSH", weights.astype(v.dtype), of_mixed, preferred_element_type=jnp.float32)
        of_k += jnp.einsum("BKQS,BKQH->BKSH", of_scores, q, preferred_element_type=jnp.float32)
        return (of_k, of_v), jnp.einsum("BKQS,BKSH->BKQH", of_scores, k)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    leaves = (q, q_segments, q_places, mixed, log_sums, gradient)
    (of_k, of_v), of_q = jax.lax.scan(block, zeros, leaves)
    return of_q, of_k.astype(k.dtype), of_v.astype(v.dtype), None, None, None


_mix.defvjp(_forward, _backward)


def _scores(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K S H"],
    q_segments: Int[Array, "B t"],
    q_places: Int[Array, " t"],
    k_segments: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "B K Q S"]:
    """q k^T / sqrt(H) in float32; where a query does not see a key, as little as can be."""
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    own = q_segments[:, :, None] == k_segments[:, None, :]
    distance = q_places[:, None] - jnp.arange(k.shape[2])[None, :]
    if window is not None:
        own &= (distance < window)[None]
    seen = (own | (k_segments < 0)[:, None, :]) & (distance >= 0)[None]
    B, K, Q, S = scores.shape
    by_head = scores.reshape(B, K, -1, len(q_places), S)
    return jnp.where(seen[:, None, None], by_head, jnp.finfo(jnp.float32).min).reshape(B, K, Q, S)
