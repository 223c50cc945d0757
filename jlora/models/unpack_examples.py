"""Moves each example of a packed row to a slot of its own, so that attention never compares two examples.

Axes: B row, T position in a row, P position in the shared prefix, E example of a row, U = P + the sizes of all slots:
the prefix and then the slots, end to end.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jlora.models.compute_settings import Packing

Attend = Callable[[Array, Array, Array, Array], Array]


class Slots(NamedTuple):
    """Indices that move values from rows to slots and back."""

    from_row: Int[Array, "B U"]  # row position of each slot position; arbitrary where not `filled`
    filled: Bool[Array, "B U"]
    from_slots: Int[Array, "B T"]  # slot position of each row position; arbitrary where not `real`
    real: Bool[Array, "B T"]  # not padding
    fits: Bool[Array, " B"]  # whether the slots have room for the whole row
    tokens: Int[Array, "B E"]  # in each slot

    def to_slots(self, x: Float[Array, "B T *N"]) -> Float[Array, "B U *N"]:
        """Moves values from rows to slots; empty slot positions hold arbitrary values."""
        return _permuted(x, self.from_row, self.from_slots, self.real)

    def to_rows(self, x: Float[Array, "B U *N"]) -> Float[Array, "B T *N"]:
        """Moves values back; padding holds arbitrary values, and a row that does not fit is NaN, never wrong."""
        x = _permuted(x, self.from_slots, self.from_row, self.filled)
        return jnp.where(_expanded(self.fits[:, None], x), x, jnp.nan)


def make_slots(segments: Int[Array, "B T"], prefix: int, sizes: tuple[int, ...]) -> Slots:
    """Assigns the prefix (segment -1) to its own positions, and the longest example to the first slot, and so on.

    Args:
      prefix: P.
      sizes: tokens that fit in each of the E slots, in descending order.
    """
    B, T = segments.shape
    P, E, starts = prefix, len(sizes), prefix + np.cumsum((0, *sizes))
    own = segments[:, None] == jnp.arange(1, E + 1)[None, :, None]
    count = jnp.sum(own, axis=-1)
    longest_first = jnp.argsort(-count, axis=1)  # stable: of examples as long, the first in the row first
    rank = jnp.argsort(longest_first, axis=1)
    first = jnp.argmax(own, axis=-1)
    tokens, from_first = (jnp.take_along_axis(x, longest_first, axis=1) for x in (count, first))
    slot_of, in_slot = np.repeat(np.arange(E), sizes), np.arange(sum(sizes)) - np.repeat(starts[:-1] - P, sizes)
    of_row = jnp.broadcast_to(jnp.arange(T), (B, T))
    from_row = jnp.concatenate([of_row[:, :P], from_first[:, slot_of] + in_slot[None]], axis=1)
    filled = jnp.concatenate([segments[:, :P] < 0, in_slot[None] < tokens[:, slot_of]], axis=1)
    example = jnp.clip(segments - 1, 0, E - 1)
    start = jnp.asarray(starts)[rank] - first
    slot = of_row + jnp.take_along_axis(start, example, axis=1)
    from_slots = jnp.where(segments < 0, of_row, jnp.clip(slot, 0, P + sum(sizes) - 1))
    fits = (
        jnp.all(tokens <= jnp.asarray(sizes)[None], axis=1)
        & (jnp.max(segments, axis=1) <= E)
        & jnp.all(segments[:, P:] >= 0, axis=1)
    )
    return Slots(jnp.minimum(from_row, T - 1), filled, from_slots, segments != 0, fits, tokens)


def slot_sizes(T: int, prefix: int, examples: int, longest: int, multiple: int) -> tuple[int, ...]:
    """Returns slots into which every row fits: of T tokens, with at most `examples` of at most `longest` tokens.

    The k-th longest example has at most 1/k of the row. So one slot of T tokens, two of T / 2, four of T / 4 and so on
    always suffice. All sizes are rounded up to a multiple.
    """
    own = T - prefix

    def size(rank: int) -> int:
        most = min(longest, own // (1 << (rank.bit_length() - 1)))
        return max(multiple, -(-most // multiple) * multiple)

    return tuple(size(rank) for rank in range(1, min(examples, own) + 1))


def attend_in_slots(attend: Attend, packing: Packing, *, multiple: int) -> Attend:
    """Returns `f(q, k, v, segments)`, which attends within each example, behind a copy of the shared prefix.

    Every row that has examples must begin with the whole prefix. A row beyond the bounds of `packing` is NaN.

    Args:
      attend: f(q [b, n, N, H], k, v, tokens [b]) -> [b, n, N, H], causal within the first `tokens` of each of b rows.
      multiple: of the sizes of slots.
    """
    P = packing.prefix

    def in_slots(q: Array, k: Array, v: Array, segments: Array) -> Array:
        B, T, N, H = q.shape
        sizes = slot_sizes(T, *packing, multiple=multiple)
        slots = make_slots(segments, P, sizes)
        empty = jnp.max(segments, axis=1) == 0
        slots = slots._replace(fits=slots.fits & (jnp.all(segments[:, :P] < 0, axis=1) | empty))
        q, k, v = slots.to_slots(q), slots.to_slots(k), slots.to_slots(v)
        outputs: list[Array] = []
        start, ranks = P, iter(range(len(sizes)))
        for size, group in itertools.groupby(sizes):
            count = len(list(group))
            end = start + count * size

            def behind_prefix(x: Array) -> Array:
                own = x[:, start:end].reshape(B * count, size, *x.shape[2:])  # noqa: B023
                return jnp.concatenate([jnp.repeat(x[:, :P], count, axis=0), own], axis=1)  # noqa: B023

            tokens = slots.tokens[:, list(itertools.islice(ranks, count))].reshape(-1)
            out = attend(behind_prefix(q), behind_prefix(k), behind_prefix(v), P + tokens)
            if not outputs:
                outputs.append(out.reshape(B, count, -1, N, H)[:, 0, :P])
            outputs.append(out[:, P:].reshape(B, count * size, N, H))
            start = end
        return slots.to_rows(jnp.concatenate(outputs, axis=1))

    return in_slots


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
