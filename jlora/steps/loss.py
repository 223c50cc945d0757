"""Training losses as functions of the targets' log-probabilities, and those log-probabilities in chunks of logits.

Axes: R row, T position in a row, S target in a row, C chunk, s target in a row's chunk, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.data.batches import Batch
from jlora.models.llama import scores

CHUNK = 256  # targets whose logits exist at the same time on a device: [CHUNK, V] float32

Chunk = tuple[Float[Array, "R s D"], Int[Array, "R s"]]  # hidden states, targets


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a run minimizes: `total`, summed over all micro-batches, divided by the sum of `count`.

    Both must be sums over examples, or over pairs of examples in the same micro-batch, because the step adds up the
    micro-batches.

    Args:
      total: maps the targets' log-probabilities [R, S] (float32, nats) and their micro-batch to the summed loss.
        Padding targets have a finite log-probability and weight 0.
      count: maps a batch, with or without the leading micro-batch axis, to the number of terms in the sum.
      linear: whether `total` is linear in the log-probabilities. If so, a trained output embedding gets its gradient
        in the pass that makes the logits; any other loss needs a second pass for it.
    """

    total: Callable[[Float[Array, "R S"], Batch], Float[Array, ""]]
    count: Callable[[Batch], Float[Array, ""]]
    linear: bool

    def __call__(
        self, hidden: Float[Array, "R T D"], table: Float[Array, "V D"], batch: Batch, devices: int
    ) -> Float[Array, ""]:
        """Returns the summed loss of a micro-batch, from what `Llama.head` returns."""
        slopes = None
        if self.linear:
            slopes = jax.grad(self.total)(jnp.zeros(batch.targets.shape, jnp.float32), batch)
        log_probs = target_log_probs(table, hidden, batch.predict_at, batch.targets, devices, slopes)
        return self.total(log_probs, batch)


def _negative_log_likelihood(log_probs: Float[Array, "R S"], batch: Batch) -> Float[Array, ""]:
    return -jnp.sum(log_probs * batch.weights)


def _target_count(batch: Batch) -> Float[Array, ""]:
    return jnp.sum(batch.weights)


CROSS_ENTROPY = Loss(_negative_log_likelihood, _target_count, linear=True)  # supervised fine-tuning; nats per target


def target_log_probs(
    table: Float[Array, "V D"],
    hidden: Float[Array, "R T D"],
    predict_at: Int[Array, "R S"],
    targets: Int[Array, "R S"],
    devices: int,
    slopes: Float[Array, "R S"] | None = None,
) -> Float[Array, "R S"]:
    """Returns the targets' log-probabilities, in nats; differentiable with respect to `table` and `hidden`.

    Logits exist for the targets alone, one chunk of columns at a time.

    Args:
      table: the output embedding.
      hidden: final hidden states.
      predict_at: position in its row whose hidden state predicts each target.
      targets: token ids.
      devices: number of devices that share the rows. Rows stay whole, so that each device works on its own.
      slopes: gradient of the loss with respect to the log-probabilities, up to a common factor, if it is known
        beforehand. It saves a second pass where the table is trained.
    """
    states = jnp.take_along_axis(hidden, predict_at[..., None], axis=1)
    rows, size = targets.shape
    count = -(-size * rows // (CHUNK * devices))
    width = -(-size // count)

    def chunked(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, count * width - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    chunks = chunked(states), chunked(targets)
    log_probs = _log_probs(table, *chunks, None if slopes is None else chunked(slopes))
    return jnp.moveaxis(log_probs, 0, 1).reshape(rows, count * width)[:, :size]


@jax.custom_vjp
def _log_probs(
    table: Float[Array, "V D"],
    states: Float[Array, "C R s D"],
    targets: Int[Array, "C R s"],
    slopes: Float[Array, "C R s"] | None,
) -> Float[Array, "C R s"]:
    return jax.lax.map(lambda chunk: _one_chunk(table, chunk)[0], (states, targets))


def _one_chunk(table: Float[Array, "V D"], chunk: Chunk) -> tuple[Float[Array, "R s"], Float[Array, "R s V"]]:
    """Returns the log-probabilities of a chunk's targets, and the gradient of each with respect to its logits."""
    states, targets = chunk
    logits = scores(states, table)
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    one_hot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    return (target_logits - log_sum)[..., 0], one_hot - jnp.exp(logits - log_sum)


def _table_gradient(
    gradient: Float[Array, "R s V"], states: Float[Array, "R s D"], slopes: Float[Array, "R s"]
) -> Float[Array, "V D"]:
    weighted = (gradient * slopes[..., None]).astype(states.dtype)
    return jnp.einsum("RsV,RsD->VD", weighted, states, preferred_element_type=jnp.float32)


def _forward(table: Any, states: Any, targets: Any, slopes: Any) -> tuple[Float[Array, "C R s"], tuple[Any, ...]]:
    """Computes log-probabilities, and from the same logits the gradient of each with respect to its hidden state."""
    trained, table, chunks = table.perturbed, table.value, (states.value, targets.value)
    slopes = None if slopes is None or not trained else slopes.value

    def step(d_table: Array | None, leaves: tuple[Chunk, Array | None]) -> tuple[Array | None, tuple[Array, Array]]:
        chunk, slopes = leaves
        states, dtype = chunk[0], chunk[0].dtype
        log_probs, gradient = _one_chunk(table, chunk)
        if d_table is not None and slopes is not None:
            d_table += _table_gradient(gradient, states, slopes)
        d_states = jnp.einsum("RsV,VD->RsD", gradient.astype(dtype), table.astype(dtype))
        return d_table, (log_probs, d_states)

    zeros = None if slopes is None else jnp.zeros(table.shape, jnp.float32)
    d_table, (log_probs, d_states) = jax.lax.scan(step, zeros, (chunks, slopes))
    return log_probs, (d_states, d_table, slopes, (table, chunks) if trained and slopes is None else None)


def _backward(residuals: tuple[Any, ...], cotangents: Float[Array, "C R s"]) -> tuple[Any, Any, None, None]:
    """Scales the gradients from the forward pass; computes a trained table's now if the slopes were unknown there."""
    d_states, d_table, slopes, inputs = residuals
    if d_table is not None:
        steepest = jnp.argmax(jnp.abs(slopes))
        slope = slopes.ravel()[steepest]
        d_table *= jnp.where(slope == 0, 0.0, cotangents.ravel()[steepest] / slope)
    elif inputs is not None:
        table, chunks = inputs
        d_table = _second_pass(table, chunks, cotangents)
    return d_table, (cotangents[..., None] * d_states.astype(jnp.float32)).astype(d_states.dtype), None, None


def _second_pass(table: Float[Array, "V D"], chunks: Any, cotangents: Float[Array, "C R s"]) -> Float[Array, "V D"]:
    """Returns the table's gradient from recomputed logits: a cotangent may depend on all log-probabilities."""
    largest = jnp.max(jnp.abs(cotangents))
    scale = jnp.where(largest == 0, 1.0, largest)  # otherwise small cotangents would vanish in float16

    def step(total: Float[Array, "V D"], leaves: tuple[Chunk, Float[Array, "R s"]]) -> tuple[Array, None]:
        chunk, slopes = leaves
        return total + _table_gradient(_one_chunk(table, chunk)[1], chunk[0], slopes), None

    zeros = jnp.zeros(table.shape, jnp.float32)
    return scale * jax.lax.scan(step, zeros, (chunks, cotangents / scale))[0]


_log_probs.defvjp(_forward, _backward, symbolic_zeros=True)
