"""Moves each example of a packed row to a slot of its own, so that attention never compares two examples.

Axes: B row, T position in a row, P position in the shared prefix, E example of a row, M position in a slot,
U = P + E M: the prefix and then the slots, end to end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.models.compute_settings import Packing


class Slots(NamedTuple):
    """Indices that move values from rows to slots and back."""

    from_row: Int[Array, "B U"]  # row position of each slot position; arbitrary where not `filled`
    filled: Bool[Array, "B U"]
    from_slots: Int[Array, "B T"]  # slot position of each row position; arbitrary where not `real`
    real: Bool[Array, "B T"]  # not padding
    fits: Bool[Array, " B"]  # whether the slots have room for the whole row

    def to_slots(self, x: Float[Array, "B T *N"]) -> Float[Array, "B U *N"]:
        """Moves values from rows to slots; empty slot positions hold arbitrary values."""
        return _permuted(x, self.from_row, self.from_slots, self.real)

    def to_rows(self, x: Float[Array, "B U *N"]) -> Float[Array, "B T *N"]:
        """Moves values back; padding holds arbitrary values, and a row that does not fit is NaN, never wrong."""
        x = _permuted(x, self.from_slots, self.from_row, self.filled)
        return jnp.where(_expanded(self.fits[:, None], x), x, jnp.nan)


def make_slots(segments: Int[Array, "B T"], packing: Packing) -> Slots:
    """Assigns the prefix (segment -1) to its own positions, and example e (from 1) to slot e - 1."""
    B, T = segments.shape
    P, E, M = packing
    own = segments[:, None] == jnp.arange(1, E + 1)[None, :, None]
    first, count = jnp.argmax(own, axis=-1, keepdims=True), jnp.sum(own, axis=-1, keepdims=True)
    of_row, in_slot = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.arange(M)[None, None]
    from_row = jnp.concatenate([of_row[:, :P], (first + in_slot).reshape(B, -1)], axis=1)
    filled = jnp.concatenate([segments[:, :P] < 0, (in_slot < count).reshape(B, -1)], axis=1)
    example = jnp.maximum(segments - 1, 0)
    slot = P + example * M + of_row - jnp.take_along_axis(first[..., 0], example, axis=1)
    from_slots = jnp.where(segments < 0, of_row, jnp.clip(slot, 0, P + E * M - 1))
    fits = (
        jnp.all(count[..., 0] <= M, axis=1) & (jnp.max(segments, axis=1) <= E) & jnp.all(segments[:, P:] >= 0, axis=1)
    )
    return Slots(jnp.minimum(from_row, T - 1), filled, from_slots, segments != 0, fits)


@jax.custom_vjp
def _permuted(x: Array, source: Array, inverse: Array, kept: Array) -> Array:
    """Returns x[source] along the second axis; its gradient is a gather by `inverse`, 0 where not `kept`."""
    return _gathered(x, source)


def _forward(x: Array, source: Array, inverse: Array, kept: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gathered(x, source), (inverse, kept)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None, None]:
    inverse, kept = residuals
    return jnp.where(_expanded(kept, gradient), _gathered(gradient, inverse), 0), None, None, None


def _gathered(x: Array, source: Array) -> Array:
    return jnp.take_along_axis(x, _expanded(source, x), axis=1, mode="promise_in_bounds")


def _expanded(indices: Array, x: Array) -> Array:
    return indices.reshape(*indices.shape, *(1 for _ in x.shape[2:]))


_permuted.defvjp(_forward, _backward)
