"""Causal attention within segments: in XLA by blocks of queries, which runs anywhere, or in a kernel of the device
(splash_attention.py on TPU, cudnn_attention.py on NVIDIA GPUs).

Axes: B batch, T query position, S key position, N query heads, K kv heads, G=N/K, H head dim, b block, t query in a
block, Q=Gt: the queries of all heads that share a kv head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jlora.models.compute_settings import UNKNOWN, Packing
from jlora.models.cudnn_attention import cudnn
from jlora.models.remat import ATTENTION_OUTPUT
from jlora.models.splash_attention import copied_tokens, faster_in_slots, splash
from jlora.models.unpack_examples import make_slots, slot_sizes

BLOCK = 512  # queries computed at a time: the largest array is [B, N, BLOCK, S]
# Slots are used only if their scores are fewer than this share of a block's: moving the examples has a cost too.
MAX_SLOT_SHARE = 0.75
KERNELS: dict[str, Any] = {"splash": splash, "cudnn": cudnn}
LANES = 16  # float32 values in a CPU's widest registers; the number of keys per slot is a multiple


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
    """Computes softmax(q k^T / sqrt(H)) v, where a query sees the keys of its own segment up to its own position.

    Args:
      q_segments, k_segments: example that each token belongs to, from 1; 0 is padding, which no example sees. Segment
        -1 is a prefix at the start of a row: every later query sees it, regardless of the window.
      q_start: position of the first query among the keys (0 in training, `Cache.fill` in decoding).
      window: number of keys that a query sees at most, including its own; None means no limit.
      backend: a key of KERNELS, which needs keys and queries of the same row, or "xla".
      mesh: splits B and N; used by kernels only.
      packing: bounds on the rows if keys and queries are of the same row. Kernels support no prefix with a window.

    Returns:
      The attention output in v's dtype. Softmax is computed in float32.
    """
    if backend != "xla":
        return KERNELS[backend](q, k, v, q_segments, window=window, mesh=mesh, packing=packing)
    B, T, N, H = q.shape
    if layout := in_slots(T, packing):
        return _by_example(q, k, v, q_segments, layout, window)
    K, count = k.shape[2], -(-T // BLOCK)
    t = -(-T // count)
    padding = count * t - T
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q_segments = jnp.pad(q_segments, ((0, 0), (0, padding)))
    # Transposing the small arrays here avoids transposing the scores.
    blocks = jnp.einsum("BbtKGH->bBKGtH", q.reshape(B, count, t, K, N // K, H)).reshape(count, B, K, -1, H)
    k, v = jnp.einsum("BSKH->BKSH", k), jnp.einsum("BSKH->BKSH", v)
    q_positions = (q_start + jnp.arange(count * t)).reshape(count, t)
    q_segments = jnp.moveaxis(q_segments.reshape(B, count, t), 1, 0)
    out = _in_blocks(blocks, k, v, q_segments, q_positions, k_segments, window).reshape(count, B, K, N // K, t, H)
    return jnp.einsum("bBKGtH->BbtKGH", out).reshape(B, count * t, N, H)[:, :T]


def in_slots(T: int, packing: Packing) -> Packing | None:
    """Returns the layout of slots for rows of T tokens; None if attention over the whole row is cheaper."""
    P, E, M = packing
    M += -(P + M) % LANES
    return Packing(P, E, M) if 0 < E * M * (P + M) < MAX_SLOT_SHARE * T * min(T, BLOCK) else None


def pairs(backend: str, T: int, packing: Packing) -> float:
    """Returns how many pairs of a query and a key are compared in one row, by one head."""
    P, E, M = packing
    if backend == "splash" and not faster_in_slots(T, packing, None):
        return (T + copied_tokens(packing)) ** 2 / 2  # skips what is not causal
    if backend != "xla":
        return sum((P + size) ** 2 / 2 for size in slot_sizes(T, P, E, M, multiple=1))
    if slots := in_slots(T, packing):
        P, E, M = slots
        return float(P**2 + E * M * (P + M))
    return float(T**2)


def _by_example(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    packing: Packing,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attends within each example, in a slot of its own behind a copy of the shared prefix; then within the prefix."""
    P, E, M = packing
    slots = make_slots(segments, P, (M,) * E)
    q, k, v = slots.to_slots(q), slots.to_slots(k), slots.to_slots(v)
    shared, own = slots.filled[:, :P], slots.filled[:, P:].reshape(-1, M).astype(jnp.int32)
    before = jnp.repeat(jnp.where(shared, -1, 2), E, axis=0)  # no query has segment 2

    def per_slot(x: Array) -> Array:
        return x[:, P:].reshape(-1, M, *x.shape[2:])

    def keys(x: Array) -> Array:
        return jnp.concatenate([jnp.repeat(x[:, :P], E, axis=0), per_slot(x)], axis=1)

    attend = functools.partial(attention, window=window, backend="xla", mesh=None)
    seen = jnp.concatenate([before, own], axis=1)
    out = attend(per_slot(q), keys(k), keys(v), q_segments=own, k_segments=seen, q_start=P)
    out = out.reshape(len(q), E * M, *q.shape[2:])
    if P:
        ones = shared.astype(jnp.int32)
        first = attend(q[:, :P], k[:, :P], v[:, :P], q_segments=ones, k_segments=ones, q_start=0)
        out = jnp.concatenate([first, out], axis=1)
    return slots.to_rows(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _in_blocks(
    q: Float[Array, "b B K Q H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_segments: Int[Array, "b B t"],
    q_positions: Int[Array, "b t"],
    k_segments: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "b B K Q H"]:
    """Attends block by block. The backward pass recomputes the scores from the residuals that FlashAttention keeps
    (Dao et al. 2022, arXiv:2205.14135, algorithm 4): the output, and the logarithm of each softmax's denominator.
    """
    return _forward(q, k, v, q_segments, q_positions, k_segments, window)[0]


def _forward(
    q: Any, k: Any, v: Any, q_segments: Any, q_positions: Any, k_segments: Any, window: int | None
) -> tuple[Float[Array, "b B K Q H"], tuple[Array, ...]]:
    def block(leaves: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        # Without the barrier jax keeps the masks of all blocks at once.
        q, segments, positions = jax.lax.optimization_barrier(leaves)
        scores = _scores(q, k, segments, positions, k_segments, window)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("BKQS,BKSH->BKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / total).astype(v.dtype), largest + jnp.log(total)

    out, log_sums = checkpoint_name(jax.lax.map(block, (q, q_segments, q_positions)), ATTENTION_OUTPUT)
    return out, (q, k, v, q_segments, q_positions, k_segments, out, log_sums)


def _backward(window: int | None, residuals: tuple[Array, ...], gradient: Float[Array, "b B K Q H"]) -> tuple[Any, ...]:
    q, k, v, q_segments, q_positions, k_segments, out, log_sums = residuals

    def block(carry: tuple[Array, Array], leaves: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        dk, dv = carry
        q, segments, positions, out, log_sums, d_out = jax.lax.optimization_barrier(leaves)
        weights = jnp.exp(_scores(q, k, segments, positions, k_segments, window) - log_sums)
        d_weights = jnp.einsum("BKQH,BKSH->BKQS", d_out, v, preferred_element_type=jnp.float32)
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - delta) * q.shape[-1] ** -0.5).astype(q.dtype)
        dv += jnp.einsum("BKQS,BKQH->BKSH", weights.astype(v.dtype), d_out, preferred_element_type=jnp.float32)
        dk += jnp.einsum("BKQS,BKQH->BKSH", d_scores, q, preferred_element_type=jnp.float32)
        return (dk, dv), jnp.einsum("BKQS,BKSH->BKQH", d_scores, k)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    leaves = (q, q_segments, q_positions, out, log_sums, gradient)
    (dk, dv), dq = jax.lax.scan(block, zeros, leaves)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_in_blocks.defvjp(_forward, _backward)


def _scores(
    q: Float[Array, "B K Q H"],
    k: Float[Array, "B K S H"],
    q_segments: Int[Array, "B t"],
    q_positions: Int[Array, " t"],
    k_segments: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "B K Q S"]:
    """Returns q k^T / sqrt(H) in float32; the lowest float32 where a query does not see a key."""
    scores = jnp.einsum("BKQH,BKSH->BKQS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    own = q_segments[:, :, None] == k_segments[:, None, :]
    distance = q_positions[:, None] - jnp.arange(k.shape[2])[None, :]
    if window is not None:
        own &= (distance < window)[None]
    seen = (own | (k_segments < 0)[:, None, :]) & (distance >= 0)[None]
    B, K, Q, S = scores.shape
    by_head = scores.reshape(B, K, -1, len(q_positions), S)
    return jnp.where(seen[:, None, None], by_head, jnp.finfo(jnp.float32).min).reshape(B, K, Q, S)
