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

LANES = 128  # the block size is a multiple
BLOCK = 512  # largest block size, in tokens
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

    The kernel compares segments for equality only. So the shared prefix is copied once per example, into that example's
    segment: attention saves nothing by sharing, but all other layers do.

    On a mesh, each device works on its own rows and heads, without communication.
    """
    copies = packing.prefix * packing.examples
    if copies:
        k, v, segments = _with_prefix_copies(k, v, segments, packing.prefix, packing.examples)
        q = jnp.pad(q, ((0, 0), (copies, 0), (0, 0), (0, 0)))  # the outputs of these queries are dropped
    T, block = q.shape[1], block_size(q.shape[1])
    padding, window = -T % block, None if window is None or window >= T else window

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    attend = map_rows_and_heads(functools.partial(_kernel, window=window, block=block), mesh)
    return attend(pad(q), pad(k), pad(v), pad(segments))[:, copies:T]


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
