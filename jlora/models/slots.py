"""A row's examples, each moved to a slot of its own, so that attention compares no token with another example's.

Axes: B row, T place in a row, P place of what a row begins with, E example of a row, M place in a slot,
U = P + E M: the prefix and then the slots, end to end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlora.models.compute import Packing


class Slots(NamedTuple):
    """Which place of a row each place of its slots holds, and the other way round."""

    from_row: Int[Array, "B U"]
    filled: Bool[Array, "B U"]  # where it holds nothing, `from_row` is some place or other
    from_slots: Int[Array, "B T"]
    real: Bool[Array, "B T"]  # of padding, `from_slots` is some place or other
    hold: Bool[Array, " B"]  # whether there is room for all of the row

    def sorted(self, x: Float[Array, "B T *N"]) -> Float[Array, "B U *N"]:
        """Rows as slots; anything where they hold nothing."""
        return _moved(x, self.from_row, self.from_slots, self.real)

    def laid(self, x: Float[Array, "B U *N"]) -> Float[Array, "B T *N"]:
        """Slots as rows; anything in the padding, and NaN in a row that they do not hold: never a wrong number."""
        x = _moved(x, self.from_slots, self.from_row, self.filled)
        return jnp.where(_over(self.hold[:, None], x), x, jnp.nan)


def slots_of(segments: Int[Array, "B T"], packing: Packing) -> Slots:
    """Where the tokens go: -1, what a row begins with, to its own place; the examples, from 1, to their slots."""
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
    hold = (
        jnp.all(count[..., 0] <= M, axis=1) & (jnp.max(segments, axis=1) <= E) & jnp.all(segments[:, P:] >= 0, axis=1)
    )
    return Slots(jnp.minimum(from_row, T - 1), filled, from_slots, segments != 0, hold)


@jax.custom_vjp
def _moved(x: Array, source: Array, back: Array, kept: Array) -> Array:
    """x[source], along the second axis; its gradient is moved by `back`, not added up, and is 0 where not `kept`."""
    return _taken(x, source)


def _forward(x: Array, source: Array, back: Array, kept: Array) -> tuple[Array, tuple[Array, Array]]:
    return _taken(x, source), (back, kept)


def _backward(moves: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None, None]:
    back, kept = moves
    return jnp.where(_over(kept, gradient), _taken(gradient, back), 0), None, None, None


def _taken(x: Array, source: Array) -> Array:
    return jnp.take_along_axis(x, _over(source, x), axis=1, mode="promise_in_bounds")


def _over(places: Array, x: Array) -> Array:
    return places.reshape(*places.shape, *(1 for _ in x.shape[2:]))


_moved.defvjp(_forward, _backward)
