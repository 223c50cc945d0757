"""Examples -> batches without padding, a pure function of (seed, step).

An optimizer step takes exactly `batch_size` x `gradient_accumulation_steps` examples. They are laid end to end in rows,
each up to the token that its last target is predicted from, told apart by segment ids, each with positions from 0; a
row is then rounded up to one of a few lengths, chosen ahead from all steps of the run: few programs are compiled.

What all examples begin with (the template's opening, a system prompt) may be laid once in a row, before them, for all
of them to see: a causal model makes the same of it each time. Then a target's prediction is still read where it was:
that of an example's first own token at the prefix's last place, for each example anew.

Axes: A micro-batch, R row, T place in a row, S target in a row.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jlora.data.chat import Example, Measured, common, sizes_of

ROUND = 8  # lengths are multiples of this
PREFIX = -1  # the segment that all others of its row see
Rows = list[list[int]]  # the examples of each row


class Batch(NamedTuple):
    """One optimizer step's input, on the host or on devices; a weight of 0 is filling."""

    tokens: Any  # [A, R, T] int32
    segments: Any  # [A, R, T] int32, from 1; 0 is padding, PREFIX what the examples of a row begin with
    positions: Any  # [A, R, T] int32
    predict_at: Any  # [A, R, S] int32: the place whose hidden state predicts the target
    targets: Any  # [A, R, S] int32
    weights: Any  # [A, R, S] float32


class Shape(NamedTuple):
    """A compiled size: row length T and targets a row S."""

    length: int
    targets: int


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for the same
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` examples in one epoch. NumPy keeps RandomState's stream fixed for ever (NEP 19)."""
    return np.random.RandomState([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Batches:
    """All batches of a run over `examples`; `shapes` are the sizes they come in, ascending."""

    examples: Sequence[Example]
    sizes: np.ndarray  # [N, 3]: tokens, targets, and places after the prefix of each example
    prefix: int  # tokens that all examples begin with, laid once in a row
    micro_batches: int  # A
    batch_size: int  # examples in a micro-batch
    rows: int  # R
    seed: int | None  # None: always in the given order
    shapes: tuple[Shape, ...]
    together: int = 0  # examples in a row, at most
    read: frozenset[int] | None = None  # rows whose tokens are read, the others stay empty; None: all

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last takes what is left."""
        return -(-len(self.examples) // (self.batch_size * self.micro_batches))

    def chosen(self, step: int) -> np.ndarray:
        """Which examples step number `step` (from 0) takes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.batch_size * self.micro_batches
        count = len(self.examples)
        places = np.arange(count) if self.seed is None else order(count, self.seed, epoch)
        return places[within * size : (within + 1) * size]

    def layout(self, step: int) -> list[Rows]:
        """The rows of each micro-batch of a step."""
        return _layout(self.sizes, self.chosen(step), self.micro_batches, self.batch_size, self.rows)

    def shape(self, step: int) -> Shape:
        """The size that a step is rounded up to."""
        return _fit(_need(self.sizes, self.prefix, self.layout(step)), self.shapes)

    @property
    def packing(self) -> tuple[int, int, int]:
        """What `Compute.packing` says of the model that these are for."""
        return self.prefix, self.together, int(self.sizes[:, 2].max())

    def sharing(self) -> str:
        """What is laid once, in words; "" where nothing is."""
        return f"the {self.prefix} tokens that all begin with are computed once a row" if self.prefix else ""

    def tokens(self, step: int) -> int:
        """How many the examples of a step have, all of them real."""
        return int(self.sizes[self.chosen(step), 0].sum())

    def laid(self, step: int) -> int:
        """How many places of a step's rows are no padding."""
        return int(self.sizes[self.chosen(step), 2].sum()) + self.prefix * self.filled(step)

    def filled(self, step: int) -> int:
        """How many rows of a step hold an example: in the last of an epoch, not all need to."""
        return sum(bool(row) for micro in self.layout(step) for row in micro)

    def __getitem__(self, step: int) -> Batch:
        layout, prefix = self.layout(step), self.prefix
        length, targets = self.shape(step)
        size = (self.micro_batches, self.rows)
        tokens, segments, positions = (np.zeros((*size, length), np.int32) for _ in range(3))
        predict_at, target = (np.zeros((*size, targets), np.int32) for _ in range(2))
        weights = np.zeros((*size, targets), np.float32)
        for a, rows in enumerate(layout):
            for r, row in enumerate(rows):
                if self.read is not None and r not in self.read:
                    continue
                place, filled = prefix, 0
                for segment, index in enumerate(row, start=1):
                    example = self.examples[index]
                    own = place + np.arange(self.sizes[index, 2])
                    places = np.concatenate([np.arange(prefix), own])  # in the row, of the example's tokens
                    tokens[a, r, places] = example.tokens[: len(places)]
                    segments[a, r, :prefix], segments[a, r, own] = PREFIX, segment
                    positions[a, r, places] = np.arange(len(places))
                    trained = np.flatnonzero(example.trained[1:]) + 1  # nothing predicts a first token
                    into = slice(filled, filled + len(trained))
                    predict_at[a, r, into] = places[trained - 1]
                    target[a, r, into] = example.tokens[trained]
                    weights[a, r, into] = 1.0
                    place, filled = place + len(own), into.stop
        return Batch(tokens, segments, positions, predict_at, target, weights)


def plan_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    micro_batches: int,
    devices: int,
    steps: int | None,
    seed: int | None,
    linear_cost: float,
    max_shapes: int = 4,
    share: bool = False,
) -> Batches:
    """Chooses rows and row lengths from the real lengths of all steps.

    Args:
      batch_size: examples in a micro-batch; a multiple of `devices`.
      devices: rows come in multiples of it.
      steps: optimizer steps of the run; None is one epoch.
      seed: of the order; None keeps the given order.
      linear_cost: row length at which attention costs as much as the matrices; it decides how many rows there are.
      max_shapes: compiled sizes at most.
      share: what all examples begin with is laid once in a row.
    """
    if isinstance(examples, Measured):
        sizes, prefix = np.asarray(examples.sizes), examples.prefix
    else:
        sizes = np.array([sizes_of(example.trained) for example in examples])
        prefix = len(functools.reduce(common, (example.tokens for example in examples)))
    prefix = min(prefix, int(sizes[:, 2].min())) if share else 0
    sizes = sizes - (0, 0, prefix)
    rough = Batches(examples, sizes, prefix, micro_batches, batch_size, devices, seed, ())
    steps = rough.steps_per_epoch if steps is None else steps
    chosen = [rough.chosen(step) for step in range(steps)]

    def needs(rows: int, some: list[np.ndarray]) -> np.ndarray:
        return np.array([_need(sizes, prefix, _layout(sizes, c, micro_batches, batch_size, rows)) for c in some])

    def cost(rows: int) -> float:
        lengths = needs(rows, chosen[:100])[:, 0].astype(float)
        return float(np.sum(rows * lengths * (linear_cost + lengths)))

    most = max(1, batch_size // devices)
    rows = min((devices * m for m in range(1, most + 1)), key=cost)
    needed = needs(rows, chosen)
    shapes, together = choose_shapes(needed[:, :2], max_shapes), int(needed[:, 2].max())
    return Batches(examples, sizes, prefix, micro_batches, batch_size, rows, seed, shapes, together)


def choose_shapes(needs: np.ndarray, count: int) -> tuple[Shape, ...]:
    """The at most `count` lengths that leave the least padding over all steps, by dynamic programming.

    Args:
      needs: [steps, 2], the row length and the targets a row that each step needs.
    """
    rounded = -(-needs // ROUND) * ROUND
    lengths, steps_at = np.unique(rounded[:, 0], return_counts=True)
    below = np.concatenate([[0], np.cumsum(steps_at)])
    size = len(lengths)
    cost = np.full((count + 1, size + 1), np.inf)  # cost[k, j]: k shapes cover the j smallest lengths
    cost[:, 0] = 0
    cut = np.zeros((count + 1, size + 1), int)
    for k in range(1, count + 1):
        for j in range(1, size + 1):
            options = cost[k - 1, :j] + lengths[j - 1] * (below[j] - below[:j])
            cut[k, j] = int(np.argmin(options))
            cost[k, j] = options[cut[k, j]]
    tops, j, k = [], size, count
    while j > 0:
        tops.append(int(lengths[j - 1]))
        j, k = int(cut[k, j]), k - 1
    shapes, floor = [], 0
    for top in sorted(tops):
        within = (rounded[:, 0] > floor) & (rounded[:, 0] <= top)
        shapes.append(Shape(top, int(rounded[within, 1].max())))
        floor = top
    return tuple(shapes)


def _layout(sizes: np.ndarray, chosen: np.ndarray, micro_batches: int, batch_size: int, rows: int) -> list[Rows]:
    """Longest first, each to the row that is shortest so far."""
    layout: list[Rows] = []
    for a in range(micro_batches):
        micro = chosen[a * batch_size : (a + 1) * batch_size].tolist()
        filled: Rows = [[] for _ in range(rows)]
        loads = [0] * rows
        for index in sorted(micro, key=lambda i: (-sizes[i, 2], i)):
            row = loads.index(min(loads))
            filled[row].append(index)
            loads[row] += sizes[index, 2]
        layout.append(filled)
    return layout


def _need(sizes: np.ndarray, prefix: int, layout: list[Rows]) -> tuple[int, int, int]:
    """Row length, targets a row and examples a row that a layout takes."""
    needs = np.array([(*sizes[row].sum(axis=0), len(row)) for micro in layout for row in micro])
    _, targets, length, together = needs.max(axis=0).tolist()
    return prefix + length, targets, together


def _fit(need: tuple[int, int, int], shapes: tuple[Shape, ...]) -> Shape:
    return next(shape for shape in shapes if shape.length >= need[0] and shape.targets >= need[1])
