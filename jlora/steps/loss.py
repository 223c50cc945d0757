"""The cross-entropy of the supervised tokens and its gradient, a chunk of logits at a time.

Axes: R row, T place in a row, S target in a row, C chunk, s target in a row's chunk, D model, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.models.llama import scores

CHUNK = 256  # targets whose logits exist at the same time on a device: [CHUNK, V] float32

Chunk = tuple[Float[Array, "R s D"], Int[Array, "R s"], Float[Array, "R s"]]  # hidden states, targets, weights


def target_loss(
    table: Float[Array, "V D"],
    hidden: Float[Array, "R T D"],
    predict_at: Int[Array, "R S"],
    targets: Int[Array, "R S"],
    weights: Float[Array, "R S"],
    devices: int,
) -> Float[Array, ""]:
    """Summed cross-entropy of the targets in nats; logits are made for them alone, in chunks of columns.

    Rows stay whole, so that on `devices` devices each works on its own.
    """
    states = jnp.take_along_axis(hidden, predict_at[..., None], axis=1)
    rows, size = targets.shape
    count = -(-size * rows // (CHUNK * devices))
    width = -(-size // count)

    def chunked(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, count * width - size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    return _summed(table, chunked(states), chunked(targets), chunked(weights))


@jax.custom_vjp
def _summed(
    table: Float[Array, "V D"],
    states: Float[Array, "C R s D"],
    targets: Int[Array, "C R s"],
    weights: Float[Array, "C R s"],
) -> Float[Array, ""]:
    """The loss alone. Where a gradient is wanted, `_forward` makes it of the same logits: none is made twice."""
    return jnp.sum(jax.lax.map(lambda chunk: _losses(table, chunk)[0], (states, targets, weights)))


def _losses(table: Float[Array, "V D"], chunk: Chunk) -> tuple[Float[Array, ""], Float[Array, "R s V"]]:
    """A chunk's loss, and its gradient with respect to the logits."""
    states, targets, weights = chunk
    logits = scores(states, table)
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_targets = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    gradient = (jnp.exp(logits - log_sum) - hit) * weights[..., None]
    return jnp.sum((log_sum - of_targets)[..., 0] * weights), gradient


def _forward(table: Any, states: Any, targets: Any, weights: Any) -> tuple[Float[Array, ""], tuple[Any, Any]]:
    """The loss, and the gradients that `_backward` scales: of the states and, if it is trained, of the table."""
    dtype = states.value.dtype

    def step(carry: tuple[Array, Array | None], chunk: Chunk) -> tuple[Any, Float[Array, "R s D"]]:
        loss, gradient = _losses(table.value, chunk)
        gradient = gradient.astype(dtype)
        of_states = jnp.einsum("RsV,VD->RsD", gradient, table.value.astype(dtype))
        of_table = carry[1]
        if of_table is not None:
            of_table += jnp.einsum("RsV,RsD->VD", gradient, chunk[0], preferred_element_type=jnp.float32)
        return (carry[0] + loss, of_table), of_states

    nothing = jnp.zeros(table.value.shape, jnp.float32) if table.perturbed else None
    zero = (jnp.zeros((), jnp.float32), nothing)
    (loss, of_table), of_states = jax.lax.scan(step, zero, (states.value, targets.value, weights.value))
    return loss, (of_table, of_states)


def _backward(gradients: tuple[Any, Any], scale: Float[Array, ""]) -> tuple[Any, Any, None, None]:
    of_table, of_states = gradients
    scaled = (scale * of_states.astype(jnp.float32)).astype(of_states.dtype)
    return None if of_table is None else scale * of_table, scaled, None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
