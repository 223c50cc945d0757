"""Self-attention in one fused kernel, without scores in memory (Dao et al. 2022, arXiv:2205.14135).

The kernels are part of JAX: splash on TPU, Pallas-Triton on GPU. The axes are those of attention.py, with S = T.

Tested with jax 0.10.2: the numbers, forward and backward, in Pallas's interpreter on a CPU (a test); splash compiled
for TPU v5e with libtpu (a test); the GPU kernel compiled for A100, RTX 3090, 4090, 5090 and H100 with XLA's CUDA
compiler, without a card (by hand; a test lowers it). Neither kernel has run on an accelerator, so attention_backend.py
tries it on the device before a run uses it.

cuDNN (jax.nn.dot_product_attention) is not used: it takes no segment ids, only a mask [B, 1, T, T] in memory, and does
not lower without a card. tokamax's public function needs the same mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jlora.distributed.sharding import BATCH_AXES
from jlora.models.compute_settings import Packing

LANES = 128  # the block size is a multiple
BLOCK = 512  # largest block size, in tokens
NO_SEGMENT = -2  # segment of keys that no example sees
INTERPRET = False  # tests set this to run the kernels on a CPU


def flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    kernel: str,
    window: int | None,
    mesh: Mesh | None,
    packing: Packing,
) -> Float[Array, "B T N H"]:
    """Computes `attention.attention` of a row to itself with `kernel`, a key of KERNELS.

    A kernel compares segments for equality only. So the shared prefix is copied once per example, into that example's
    segment: attention saves nothing by sharing, but all other layers do.

    On a mesh each device works on its own rows and heads, without communication: the compiler cannot split a kernel.
    """
    copies = packing.prefix * packing.examples
    if copies:
        k, v, segments = _with_prefix_copies(k, v, segments, packing.prefix, packing.examples)
        q = jnp.pad(q, ((0, 0), (copies, 0), (0, 0), (0, 0)))  # the outputs of these queries are dropped
    T, block = q.shape[1], block_size(q.shape[1])
    padding, window = -T % block, None if window is None or window >= T else window

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    def attend(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return KERNELS[kernel](q, k, v, segments, window, block)

    if mesh is not None and mesh.size > 1:
        split, rows = PartitionSpec(BATCH_AXES, None, "tensor", None), PartitionSpec(BATCH_AXES, None)
        specs = (split, split, split, rows)
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
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


def _splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    window: int | None,
    block: int,
) -> Float[Array, "B T N H"]:
    from jax.experimental.pallas.ops.tpu import (
        splash_attention as splash,
    )  # takes a third of a second, so only when needed

    _, T, N, H = q.shape
    mask = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), offset=0)
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    sizes: dict[str, Any] = dict.fromkeys(names.split(), block)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

    q, k, v = (jnp.einsum("BTNH->BNTH", x) for x in (q * H**-0.5, k, v))
    return jnp.einsum("BNTH->BTNH", jax.vmap(row)(q, k, v, segments))


def _pallas(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    window: int | None,
    block: int,
) -> Float[Array, "B T N H"]:
    from jax.experimental.pallas.ops.gpu import attention as gpu

    B, T, N, H = q.shape
    assert window is None, "attention_backend.py selects no kernel without windows for a model with one"
    # These blocks fit into the 99 KiB of shared memory of an RTX 3090 at H = 128.
    sizes = gpu.BlockSizes(block_q=64, block_k=64, block_q_dkv=32, block_kv_dkv=64, block_q_dq=64, block_kv_dq=32)

    def group(q: Array) -> Array:
        return gpu.mha(q, k, v, segments, sm_scale=H**-0.5, causal=True, block_sizes=sizes, interpret=INTERPRET)

    grouped = q.reshape(
        B, T, k.shape[2], -1, H
    )  # the kernel has no grouped queries, so vmap over G with the same k and v
    return jax.vmap(group, in_axes=3, out_axes=3)(grouped).reshape(B, T, N, H)


KERNELS: dict[str, Any] = {"splash": _splash, "pallas": _pallas}
