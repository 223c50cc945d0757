"""Self-attention by cuDNN on NVIDIA GPUs, through JAX's public function, without scores in memory.

cuDNN knows no segments, only a length for each row. So every example of a packed row moves to a slot of its own
(unpack_examples.py), behind a copy of the shared prefix. Axes as in attention.py, with S = T.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jlora.distributed.sharding import map_rows_and_heads
from jlora.models.compute_settings import Packing
from jlora.models.unpack_examples import Attend, attend_in_slots

BLOCK = 64  # tokens that cuDNN's kernels compute at a time; the size of a slot is a multiple
IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"  # tests set "xla", to run the same code on a CPU


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    mesh: Mesh | None,
    packing: Packing,
) -> Float[Array, "B T N H"]:
    """Computes `attention.attention` of a row to itself. A row beyond the bounds of `packing` is NaN, never wrong.

    Every row that has examples must begin with the whole prefix. On a mesh, each device works on its own rows and
    heads, without communication.
    """
    assert packing.examples, "the rows have no known bounds"
    assert not (packing.prefix and window), "a prefix that all examples share is not computed with a window"
    if packing.examples == 1:
        attend: Attend = functools.partial(_one_example, window=window)
    else:
        attend = attend_in_slots(functools.partial(_attend, window=window), packing, multiple=BLOCK)
    return map_rows_and_heads(attend, mesh)(q, k, v, segments)


def _one_example(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attends in rows of one example, which begins at the first position, as in batches.py."""
    tokens = jnp.sum(segments != 0, axis=1)
    fits = jnp.all((segments != 0) == (jnp.arange(segments.shape[1])[None] < tokens[:, None]), axis=1)
    fits &= jnp.max(segments, axis=1) <= 1
    return jnp.where(fits[:, None, None, None], _attend(q, k, v, tokens, window), jnp.nan)


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    tokens: Int[Array, " B"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attends causally within the first `tokens` of each row; the rest is arbitrary."""
    lengths = jnp.maximum(tokens, 1)  # of an empty slot, whose output nobody reads
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None or window >= q.shape[1] else (window - 1, 0),
        implementation=IMPLEMENTATION,
    )
