"""Estimates the time of a step on the devices of this machine, so that nobody waits in vain for the first one.

No maker publishes the speed of a CPU, and no device reaches its peak. So two programs are timed on the device: a matrix
product of the base model's size, and its attention, whose work grows with the square of a row's length.

On two CPU cores that other programs used too, rows of 1,500 to 10,000 tokens took 0.4 to 1.6 times the estimate (a
random 3-layer model; SmolLM2-135M), and the batches of configs/law.py up to 3 times. Other devices are not measured.
"""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jlora.common.errors import UserError
from jlora.data.batches import Batches
from jlora.models.attention import BLOCK, attention
from jlora.planning.forecast import Job, Work
from jlora.steps.compilation import Compiler

LONG = 60.0  # seconds of a step that the log mentions
# Seconds of a step beyond which training does not start. Nothing is logged, saved or stopped within a step, and the 150
# steps of a small run would take a day.
BOUND = 600.0
SLOWEST = {"cpu": 1e10}  # FLOP/s of a slow device, to time only what could be long; other platforms: 1e12
TIMED = 0.2  # seconds that each program is timed
KEYS = 1024  # keys of the timed attention


def check_step_time(job: Job, work: Work, batches: Batches, first: int, log: Callable[[str], None]) -> None:
    """Logs the estimated time of the longest step if it is long.

    Args:
      job: with the largest of the batches' shapes.
      first: the number of steps done before.

    Raises:
      UserError: it takes longer than BOUND, and the config does not set `yes`.
    """
    seconds = estimate_seconds(job, work)
    if seconds < LONG:
        return
    which = "first" if batches.shape(first) == job.shape else "longest"
    line = (
        f"The {which} step takes about {_in_words(seconds)} ({job.micro_batches * job.rows} x {job.shape.length} "
        "tokens, without compiling; the estimate may be wrong by a factor of 3)"
    )
    if seconds <= BOUND or job.config.yes:
        log(line)
        return
    row = int(batches.sizes[:, 0].argmax())
    sizes = [key for key in ("batch_size", "gradient_accumulation_steps") if getattr(job.config, key) > 1]
    ways = ["max_seq_length with overlong=truncate, split or drop", *sizes]
    raise UserError(
        f"{line}. More than {_in_words(BOUND)} is refused, because nothing is logged or saved within a step. The "
        f"longest example has {batches.sizes[row, 0]} tokens ({batches.examples[row].where}). Set a smaller "
        f"{', or a smaller '.join(ways)}, or use a faster device. To train nevertheless, set --config.yes=true."
    )


def estimate_seconds(job: Job, work: Work) -> float:
    """Returns the estimated seconds of a job's step; 0.0 if even a slow device needs less than LONG.

    The devices of a CPU share its cores, so each waits for the others of its process.
    """
    own = [device for device in job.mesh.devices.flat if device.process_index == jax.process_index()]
    sharing = len(own) if own[0].platform == "cpu" else 1
    if sharing * work.flops < LONG * SLOWEST.get(own[0].platform, 1e12):
        return 0.0
    model, dtype = job.model, job.compute.compute_dtype
    size, inner, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads

    def ones(*shape: int) -> jax.Array:
        return jax.device_put(np.ones(shape, dtype), own[0])

    per_flop = _best_seconds(own[0], jnp.matmul, ones(BLOCK, size), ones(size, inner)) / (2 * BLOCK * size * inner)
    per_attention_flop = per_flop
    if job.compute.attention == "xla":  # a kernel is as fast as a product
        q, k = ones(1, BLOCK, heads, model.head_dim), ones(1, KEYS, model.num_key_value_heads, model.head_dim)
        per_attention_flop = _best_seconds(own[0], _attend, q, k) / (4 * BLOCK * KEYS * heads * model.head_dim)
    return sharing * ((work.flops - work.attention) * per_flop + work.attention * per_attention_flop)


def _attend(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the attention of the last block of queries in a row of KEYS tokens."""
    segments = jnp.ones((1, KEYS), jnp.int32)
    return attention(
        q,
        k,
        k,
        q_segments=segments[:, :BLOCK],
        k_segments=segments,
        q_start=KEYS - BLOCK,
        window=None,
        backend="xla",
        mesh=None,
    )


def _best_seconds(device: jax.Device, function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Returns the seconds of the fastest of the calls within TIMED."""
    program = Compiler(device.platform)("", lambda: jax.jit(function).lower(*arguments), lambda line: None)
    program(*arguments).block_until_ready()
    best, until = math.inf, time.perf_counter() + TIMED
    while best == math.inf or time.perf_counter() < until:
        start = time.perf_counter()
        program(*arguments).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


def _in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
