"""Several sets of rows in one run: how often an epoch takes each, and the order of its examples.

An epoch takes a share of each set, such as a fifth of its examples, or all of them twice. The examples of a set come
from endless passes over it, each in an order of its own, so an epoch continues where the last one stopped. The order is
a pure function of the seed and the epoch, so a run can continue at any step.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Portion(NamedTuple):
    """A set's examples, and how many of them an epoch takes."""

    name: str
    examples: np.ndarray  # their indices
    taken: int


def read_share(text: str) -> float | int | None:
    """Returns a share of a set's rows from text such as "0.2", or a number of rows from "500 rows"; None if neither."""
    if found := re.fullmatch(r"(\d+) ?rows?", text.strip()):
        return int(found[1]) or None
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share < 1e6 else None


@dataclass(frozen=True, eq=False)
class Mixture:
    """The sets of a run."""

    portions: tuple[Portion, ...]

    @property
    def taken(self) -> int:
        """How many examples an epoch takes."""
        return sum(portion.taken for portion in self.portions)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - all steps of an epoch ask for the same order
    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the indices of an epoch's examples in their order. NumPy guarantees RandomState's stream (NEP 19)."""
        chosen = []
        for number, (_, examples, taken) in enumerate(self.portions):
            first = epoch * taken
            passes = range(first // len(examples), -(-(first + taken) // len(examples)))
            orders = [np.random.RandomState([seed, number, each]).permutation(examples) for each in passes]
            start = first - passes.start * len(examples)
            chosen.append(np.concatenate(orders)[start : start + taken])
        return np.random.RandomState([seed, epoch]).permutation(np.concatenate(chosen))

    def by_set(self, size: int) -> list[tuple[str, np.ndarray]]:
        """Returns all examples in steps of at most `size`, none with examples of two sets, with the name of the set."""
        return [
            (name, examples[at : at + size])
            for name, examples, _ in self.portions
            for at in range(0, len(examples), size)
        ]


def mix(names: Sequence[str], sources: np.ndarray, shares: Mapping[str, float | int]) -> Mixture:
    """Returns the mixture of sets.

    Args:
      names: of the sets.
      sources: [N] the index of each example's set.
      shares: of each set, as from `read_share`; 1 if it has none.
    """
    portions = []
    for number, name in enumerate(names):
        examples, share = np.flatnonzero(sources == number), shares.get(name, 1.0)
        portions.append(
            Portion(name, examples, share if isinstance(share, int) else max(1, round(share * len(examples))))
        )
    return Mixture(tuple(portions))
