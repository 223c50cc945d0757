"""Self-attention in one kernel that holds no scores in memory: splash on TPU, Pallas-Triton on GPU, both jax's own.

(Dao et al. 2022, arXiv:2205.14135.) Axes as in attention.py; here S = T.

What was run, jax 0.10.2: numbers, forward and backward, in Pallas's interpreter on a CPU (tests); splash compiled for
TPU v5e by libtpu (a test); the GPU kernel compiled for A100, RTX 3090, 4090, 5090 and H100 by XLA's CUDA compiler
without a card (by hand; a test lowers it). Neither has run on an accelerator, so backend.py tries a kernel on the
device at hand before a run uses it.

Not here: cuDNN (jax.nn.dot_product_attention) takes no segment ids, only a mask [B, 1, T, T] in memory, and does not
even lower without a card; tokamax's public function asks for the same mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jlora.distributed.sharding import ROWS
from jlora.models.compute import Packing

LANES = 128  # rows are padded to blocks of multiples of this
BLOCK = 512  # places of a row at a time, at most
NONE = -2  # the segment of keys that no example sees
INTERPRET = False  # tests run the kernels on a CPU, instruction by instruction


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
    """attention.attention of a row to itself; `kernel` is a key of KERNELS.

    A kernel sees by equal segments alone. So what the examples of a row share stands before the row once for each of
    them, as a part of its segment, as it would if it were shared by none: attention gains nothing, all else does.

    On a mesh each device works on its own rows and heads, without communication: the compiler cannot split a kernel.
    """
    copies = packing.prefix * packing.examples
    if copies:
        k, v, segments = _with_copies(k, v, segments, packing.prefix, packing.examples)
        q = jnp.pad(q, ((0, 0), (copies, 0), (0, 0), (0, 0)))  # what these see is of no use
    T, block = q.shape[1], block_size(q.shape[1])
    padding, window = -T % block, None if window is None or window >= T else window

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    def mix(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return KERNELS[kernel](q, k, v, segments, window, block)

    if mesh is not None and mesh.size > 1:
        split, rows = PartitionSpec(ROWS, None, "tensor", None), PartitionSpec(ROWS, None)
        specs = (split, split, split, rows)
        mix = jax.shard_map(mix, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return mix(pad(q), pad(k), pad(v), pad(segments))[:, copies:T]


def _with_copies(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], segments: Int[Array, "B T"], prefix: int, most: int
) -> tuple[Float[Array, "B U K H"], Float[Array, "B U K H"], Int[Array, "B U"]]:
    """Rows with their first `prefix` keys before them `most` times, one for each segment; no segment's own where they
    are not shared. U = most prefix + T."""

    def copied(x: Array) -> Array:
        return jnp.concatenate([jnp.tile(x[:, :prefix], (1, most, *(1 for _ in x.shape[2:]))), x], axis=1)

    owners = jnp.repeat(jnp.arange(1, most + 1), prefix)
    owners = jnp.where(jnp.tile(segments[:, :prefix] < 0, (1, most)), owners, NONE)
    return copied(k), copied(v), jnp.concatenate([owners, segments], axis=1)


def block_size(T: int) -> int:
    """The block, a multiple of LANES, of which the fewest of at most BLOCK places cover a row of T."""
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
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # a third of a second, so only when wanted

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
    assert window is None, "the kernel has no window, and backend.py lets none reach it"
    # Blocks that fit the 99 KiB of shared memory of cards like the RTX 3090 at H = 128.
    sizes = gpu.BlockSizes(block_q=64, block_k=64, block_q_dkv=32, block_kv_dkv=64, block_q_dq=64, block_kv_dq=32)

    def group(q: Array) -> Array:
        return gpu.mha(q, k, v, segments, sm_scale=H**-0.5, causal=True, block_sizes=sizes, interpret=INTERPRET)

    grouped = q.reshape(B, T, k.shape[2], -1, H)  # the kernel knows no groups: all of them read the same k and v
    return jax.vmap(group, in_axes=3, out_axes=3)(grouped).reshape(B, T, N, H)


KERNELS: dict[str, Any] = {"splash": _splash, "pallas": _pallas}
