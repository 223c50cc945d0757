"""An example: one conversation as token ids, with its loss mask."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """One conversation as the model sees it."""

    tokens: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool: True where the loss trains the model to predict this token
    where: str  # file:line


class SizedExamples(Sequence[Example]):
    """Examples whose sizes are known without reading their tokens, so that batches can be planned from the sizes."""

    sizes: np.ndarray  # [N, 3] int32: `example_sizes` of each example
    prefix: int  # number of leading tokens that all examples share


def example_sizes(loss_mask: np.ndarray) -> tuple[int, int, int]:
    """Returns an example's number of tokens, of targets, and of positions it takes in a row of a batch.

    The last target and the tokens after it predict nothing that is trained, so they take no position in a row.
    """
    targets = np.flatnonzero(loss_mask[1:])  # no token predicts the first one
    return len(loss_mask), len(targets), int(targets[-1]) + 1 if len(targets) else 1


def common_prefix(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the leading tokens that both arrays share."""
    length = min(len(some), len(others))
    same = some[:length] == others[:length]
    return some[: length if same.all() else int(np.argmin(same))]
