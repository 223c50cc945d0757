"""Examples to batches with little padding, as a pure function of (seed, step).

An optimizer step takes exactly `batch_size` x `gradient_accumulation_steps` examples. They are packed end to end into
rows, each up to the token from which its last target is predicted. Segment ids separate them, and positions restart at
0. Rows are padded to one of a few lengths, which are chosen in advance from all steps of the run, so that few programs
are compiled.

A prefix that all examples share (the template's opening, a system prompt) can be stored once per row, before the
examples, and visible to all of them: a causal model computes the same values for it each time. An example's first own
token is still predicted separately for each example, from the prefix's last position.

Axes: A micro-batch, R row, T position in a row, S target in a row.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jlora.data.examples import Example, SizedExamples, common_prefix, example_sizes
from jlora.data.mixture import Mixture

ROUND = 8  # row lengths are multiples of this many tokens
PREFIX = -1  # the segment id of the shared prefix, which all other segments of its row attend to
Rows = list[list[int]]  # the indices of the examples in each row


class Batch(NamedTuple):
    """One optimizer step's input, on the host or on devices; a weight of 0 marks padding."""

    tokens: Any  # [A, R, T] int32
    segments: Any  # [A, R, T] int32, from 1; 0 is padding, PREFIX is the shared prefix of the row's examples
    positions: Any  # [A, R, T] int32
    predict_at: Any  # [A, R, S] int32: the position in the row whose hidden state predicts the target
    targets: Any  # [A, R, S] int32
    weights: Any  # [A, R, S] float32


class Shape(NamedTuple):
    """A compiled shape: tokens per row, T, and targets per row, S."""

    length: int
    targets: int


@functools.lru_cache(maxsize=2)  # all steps of an epoch ask for the same order
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of `count` examples in an epoch. NumPy guarantees RandomState's stream forever (NEP 19)."""
    return np.random.RandomState([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Batches:
    """All batches of a run over `examples`; `shapes` are their possible shapes, in ascending order."""

    examples: Sequence[Example]
    sizes: np.ndarray  # [N, 3]: tokens, targets, and positions after the prefix of each example
    prefix: int  # leading tokens that all examples share, stored once per row; 0 if not shared
    micro_batches: int  # A
    batch_size: int  # examples per micro-batch
    rows: int  # R
    seed: int | None  # None: always in the given order
    shapes: tuple[Shape, ...]
    examples_per_row: int = 0  # at most
    longest: int = 0  # tokens of an example in a row, without the prefix, at most
    local_rows: frozenset[int] | None = None  # rows that this process fills; the others stay zero; None: all rows
    mixture: Mixture | None = None  # of several sets; without a seed, no step has examples of two sets
    left_out: np.ndarray | None = None  # [N] bool: examples of weight 0; None: no example

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one takes the examples that are left."""
        if self.mixture and self.seed is None:
            return len(self._steps_by_set)
        return -(-(self.mixture.taken if self.mixture else len(self.examples)) // self._step_size)

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.micro_batches

    @property
    def _split(self) -> tuple[int, int, int]:
        return self.micro_batches, self.batch_size, self.rows

    @functools.cached_property
    def _steps_by_set(self) -> list[tuple[str, np.ndarray]]:
        assert self.mixture
        return self.mixture.by_set(self._step_size)

    def set_name(self, step: int) -> str:
        """Returns the name of the set that a step's examples are from; "" if they may be from several, or have none."""
        return self._steps_by_set[step][0] if self.mixture and self.seed is None else ""

    def example_indices(self, step: int) -> np.ndarray:
        """Returns the indices of the examples in a step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self.seed is None:
            if self.mixture:
                return self._steps_by_set[within][1]
            order = np.arange(len(self.examples))
        elif self.mixture:
            order = self.mixture.order(self.seed, epoch)
        else:
            order = epoch_order(len(self.examples), self.seed, epoch)
        return order[within * self._step_size : (within + 1) * self._step_size]

    def layout(self, step: int) -> list[Rows]:
        """Returns the rows of each micro-batch of a step."""
        return _layout(self.sizes, self.example_indices(step), self.micro_batches, self.batch_size, self.rows)

    def shape(self, step: int) -> Shape:
        """Returns the shape to which a step is padded."""
        return _smallest_shape(_required_shape(self.sizes, self.prefix, self.layout(step)), self.shapes)

    @property
    def packing(self) -> tuple[int, int, int]:
        """The fields of `models.compute_settings.Packing`, bounds on the rows."""
        return self.prefix, self.examples_per_row, self.longest

    def prefix_note(self) -> str:
        """Describes the shared prefix; "" if there is none."""
        return f"shared {self.prefix}-token prefix computed once per row" if self.prefix else ""

    def token_count(self, step: int) -> int:
        """Returns how many tokens the examples of a step have."""
        return int(self.sizes[self.example_indices(step), 0].sum())

    def positions_used(self, step: int) -> int:
        """Returns how many positions in the rows of a step are not padding."""
        return int(self.sizes[self.example_indices(step), 2].sum()) + self.prefix * self.rows_used(step)

    def rows_used(self, step: int) -> int:
        """Returns how many rows of a step contain an example; the last step of an epoch may leave some empty."""
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
                if self.local_rows is not None and r not in self.local_rows:
                    continue
                start, filled = prefix, 0
                for segment, index in enumerate(row, start=1):
                    example = self.examples[index]
                    own = start + np.arange(self.sizes[index, 2])
                    places = np.concatenate([np.arange(prefix), own])  # positions in the row of the example's tokens
                    tokens[a, r, places] = example.tokens[: len(places)]
                    segments[a, r, :prefix], segments[a, r, own] = PREFIX, segment
                    positions[a, r, places] = np.arange(len(places))
                    at = np.flatnonzero(example.weights[1:]) + 1  # no token predicts the first one
                    into = slice(filled, filled + len(at))
                    predict_at[a, r, into] = places[at - 1]
                    target[a, r, into] = example.tokens[at]
                    if self.left_out is None or not self.left_out[index]:
                        weights[a, r, into] = example.weights[at]
                    start, filled = start + len(own), into.stop
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
    mixture: Mixture | None = None,
) -> Batches:
    """Chooses the number of rows and the row lengths from the lengths of the examples in all steps.

    Args:
      batch_size: examples per micro-batch; a multiple of `devices`.
      devices: the number of rows is a multiple of it.
      steps: optimizer steps of the run; None is one epoch.
      seed: seed of the order; None keeps the given order.
      linear_cost: row length at which attention costs as much as the matrix products; decides the number of rows.
      max_shapes: maximum number of compiled shapes.
      share: store the prefix that all examples share once per row.
      mixture: of the sets that the examples are from, if there are several.
    """
    if isinstance(examples, SizedExamples):
        sizes, prefix = np.asarray(examples.sizes), examples.prefix
    else:
        sizes = np.array([example_sizes(example.weights) for example in examples])
        prefix = len(functools.reduce(common_prefix, (example.tokens for example in examples)))
    prefix = min(prefix, int(sizes[:, 2].min())) if share else 0
    sizes = sizes - (0, 0, prefix)
    rough = Batches(examples, sizes, prefix, micro_batches, batch_size, devices, seed, (), mixture=mixture)
    steps = rough.steps_per_epoch if steps is None else steps
    chosen = [rough.example_indices(step) for step in range(steps)]

    def required(rows: int, some: list[np.ndarray]) -> np.ndarray:
        layouts = (_layout(sizes, c, micro_batches, batch_size, rows) for c in some)
        return np.array([_required_shape(sizes, prefix, layout) for layout in layouts])

    def cost(rows: int) -> float:
        lengths = required(rows, chosen[:100])[:, 0].astype(float)
        return float(np.sum(rows * lengths * (linear_cost + lengths)))

    most = max(1, batch_size // devices)
    rows = min((devices * m for m in range(1, most + 1)), key=cost)
    needed = required(rows, chosen)
    shapes, examples_per_row = choose_shapes(needed[:, :2], max_shapes), int(needed[:, 2].max())
    longest = int(sizes[:, 2].max())
    return replace(rough, rows=rows, shapes=shapes, examples_per_row=examples_per_row, longest=longest)


def align_batches(several: Sequence[Batches], steps: Sequence[int], max_shapes: int = 4) -> list[Batches]:
    """Returns batches that share the number of rows, their shapes and all bounds, so that they share programs.

    Args:
      several: batches with the same shared prefix.
      steps: the number of steps of each.
    """
    first = several[0]
    assert len({own.prefix for own in several}) == 1, "the shared prefixes differ"
    needed = [
        _required_shape(own.sizes, own.prefix, _layout(own.sizes, own.example_indices(step), *first._split))
        for own, count in zip(several, steps, strict=True)
        for step in range(count)
    ]
    needs = np.array(needed)
    shapes, most = choose_shapes(needs[:, :2], max_shapes), int(needs[:, 2].max())
    longest = max(own.longest for own in several)
    return [replace(own, rows=first.rows, shapes=shapes, examples_per_row=most, longest=longest) for own in several]


def choose_shapes(needs: np.ndarray, count: int) -> tuple[Shape, ...]:
    """Returns at most `count` shapes that leave the least padding over all steps, by dynamic programming.

    Args:
      needs: [steps, 2], the tokens and the targets per row that each step requires.
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
    """Puts the longest example first, each into the row that is shortest so far."""
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


def _required_shape(sizes: np.ndarray, prefix: int, layout: list[Rows]) -> tuple[int, int, int]:
    """Returns the tokens, targets and examples per row that a layout requires."""
    needs = np.array([(*sizes[row].sum(axis=0), len(row)) for micro in layout for row in micro])
    _, targets, length, examples = needs.max(axis=0).tolist()
    return prefix + length, targets, examples


def _smallest_shape(need: tuple[int, int, int], shapes: tuple[Shape, ...]) -> Shape:
    return next(shape for shape in shapes if shape.length >= need[0] and shape.targets >= need[1])
