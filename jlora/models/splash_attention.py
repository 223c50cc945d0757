"""Self-attention on TPU in JAX's splash kernel, without scores in memory (Dao et al. 2022, arXiv:2205.14135).

The axes are those of attention.py, with S = T.

Tested with jax 0.10.2: the numbers, forward and backward, in Pallas's interpreter on a CPU; compiled for TPU v5e with
libtpu. It has not run on a TPU, so attention_backend.py tries it on the device before a run uses it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jlora.distributed.sharding import map_rows_and_heads
from jlora.models.compute_settings import Packing
from jlora.models.unpack_examples import attend_in_slots, slot_sizes

LANES = 128  # the block size is a multiple
BLOCK = 512  # largest block size, in tokens
# Pairs that a head computes in the time in which a position moves to a slot and back, forward and backward: from the
# bytes of programs compiled for TPU v5e, with 32 heads of size 128, and the peaks of its arithmetic and memory.
PAIRS_PER_MOVE = 800
NO_SEGMENT = -2  # segment of keys that no example sees
INTERPRET = False  # tests set this to run the kernels on a CPU


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    mesh: Mesh | None,
    packing: Packing,
) -> Float[Array, "B T N H"]:
    """Computes `attention.attention` of a row to itself.

    The kernel compares segments for equality only. So the shared prefix is copied once per example: before the row,
    into the example's segment; or, where that is faster, before the example's own slot (unpack_examples.py). There,
    every row that has examples must begin with the whole prefix, and a row beyond the bounds of `packing` is NaN.

    On a mesh, each device works on its own rows and heads, without communication.
    """
    if faster_in_slots(q.shape[1], packing, window):
        attend = attend_in_slots(_first_tokens, packing, multiple=LANES)
    else:
        attend = functools.partial(_whole_rows, window=window, packing=packing)
    return map_rows_and_heads(attend, mesh)(q, k, v, segments)


def faster_in_slots(T: int, packing: Packing, window: int | None) -> bool:
    """Returns whether attention in slots saves more pairs of queries and keys than the moves to slots and back cost."""
    P, E, _ = packing
    if E < 2 or T <= P or window:  # a window skips pairs without slots
        return False
    sizes = [P + size for size in slot_sizes(T, *packing, multiple=LANES)]
    saved = computed_pairs(T + copied_tokens(packing)) - sum(map(computed_pairs, sizes))
    return saved > PAIRS_PER_MOVE * sum(sizes)


def copied_tokens(packing: Packing) -> int:
    """Returns the tokens of all copies of the prefix before a row; the prefix of a single example is its beginning."""
    return packing.prefix * packing.examples if packing.examples > 1 else 0


def computed_pairs(T: int) -> int:
    """Returns how many query-key pairs a head computes in a row: all those of each block with a causal pair."""
    block = block_size(T)
    count = -(-T // block)
    return count * (count + 1) // 2 * block**2


def _whole_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    packing: Packing,
) -> Float[Array, "B T N H"]:
    copies = copied_tokens(packing)
    if packing.examples == 1:
        segments = jnp.abs(segments)  # one segment: the prefix, -1, and the example, 1
    if copies:
        k, v, segments = _with_prefix_copies(k, v, segments, packing.prefix, packing.examples)
        q = jnp.pad(q, ((0, 0), (copies, 0), (0, 0), (0, 0)))  # the outputs of these queries are dropped
    return _in_whole_blocks(q, k, v, segments, window)[:, copies:]


def _first_tokens(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """Attends causally within the first `tokens` of each row; the rest is arbitrary."""
    segments = (jnp.arange(q.shape[1])[None] < tokens[:, None]).astype(jnp.int32)
    return _in_whole_blocks(q, k, v, segments, None)


def _in_whole_blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attends within the segments of rows of any length."""
    T, block = q.shape[1], block_size(q.shape[1])
    padding, window = -T % block, None if window is None or window >= T else window

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    return _kernel(pad(q), pad(k), pad(v), pad(segments), window=window, block=block)[:, :T]


def _with_prefix_copies(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], segments: Int[Array, "B T"], prefix: int, count: int
) -> tuple[Float[Array, "B U K H"], Float[Array, "B U K H"], Int[Array, "B U"]]:
    """Puts `count` copies of the first `prefix` keys before each row, copy e in segment e; in no segment if the row
    has no shared prefix. U = count prefix + T."""

    def with_copies(x: Array) -> Array:
        return jnp.concatenate([jnp.tile(x[:, :prefix], (1, count, *(1 for _ in x.shape[2:]))), x], axis=1)

    owners = jnp.repeat(jnp.arange(1, count + 1), prefix)
    owners = jnp.where(jnp.tile(segments[:, :prefix] < 0, (1, count)), owners, NO_SEGMENT)
    return with_copies(k), with_copies(v), jnp.concatenate([owners, segments], axis=1)


def block_size(T: int) -> int:
    """Returns the smallest multiple of LANES with which no more blocks cover T tokens than with BLOCK."""
    count = -(-T // BLOCK)
    return -(-T // (count * LANES)) * LANES


def _kernel(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    block: int,
) -> Float[Array, "B T N H"]:
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # takes a third of a second to import

    _, T, N, H = q.shape
    mask = pallas.CausalMask((T, T)) if window is None else pallas.LocalMask((T, T), (window - 1, 0), offset=0)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    sizes: dict[str, Any] = dict.fromkeys(names.split(), block)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * N),
        block_sizes=pallas.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return kernel(q, k, v, segment_ids=pallas.SegmentIds(segments, segments))

    q, k, v = (jnp.einsum("BTNH->BNTH", x) for x in (q * H**-0.5, k, v))
    return jnp.einsum("BNTH->BTNH", jax.vmap(row)(q, k, v, segments))
