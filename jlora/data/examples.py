"""An example: a conversation, or a part of one, as token ids with the weights of their loss."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """What the model sees of a conversation."""

    tokens: np.ndarray  # [T] int32
    weights: np.ndarray  # [T] float32: the weight of the loss on predicting this token; 0: not trained
    where: str  # file:line
    source: str = ""  # as in `Conversation`

    @property
    def loss_mask(self) -> np.ndarray:
        """[T] bool: whether each token is trained."""
        return self.weights > 0


class SizedExamples(Sequence[Example]):
    """Examples whose sizes are known without reading their tokens, so that batches can be planned from the sizes."""

    sizes: np.ndarray  # [N, 3] int32: `example_sizes` of each example
    prefix: int  # number of leading tokens that all examples share
    source_names: list[str]  # the sets of rows; [""] if there is one
    sources: np.ndarray  # [N] int32: the index of each example's set


def example_sizes(weights: np.ndarray) -> tuple[int, int, int]:
    """Returns an example's number of tokens, of targets, and of positions it takes in a row of a batch.

    The last target and the tokens after it predict nothing that is trained, so they take no position in a row.
    """
    targets = np.flatnonzero(weights[1:])  # no token predicts the first one
    return len(weights), len(targets), int(targets[-1]) + 1 if len(targets) else 1


def common_prefix(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the leading tokens that both arrays share."""
    length = min(len(some), len(others))
    same = some[:length] == others[:length]
    return some[: length if same.all() else int(np.argmin(same))]
