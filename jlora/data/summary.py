"""What will be trained on, in words, and what may not stand on both sides."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jlora.common.errors import UserError
from jlora.data.chat import Measured
from jlora.data.conversation import Conversation, Message

BARS, WIDTH = 8, 40  # of the length histogram


def refuse_overlap(train: Iterable[Conversation], held_out: list[Conversation]) -> None:
    """Raises UserError where a held-out question is also trained on, whatever its answer."""
    there = {_question(row): row.where for row in held_out}
    both = [(there[_question(row)], row.where) for row in train if _question(row) in there]
    if both:
        raise UserError(
            f"{len(both)} held-out question(s) are also trained on, so the held-out loss would mean nothing: "
            + ", ".join(f"{here} is {row}" for here, row in both[:5])
        )


def is_held_out(row: Conversation, share: float, seed: int) -> bool:
    """Is the row among the about `share` of all that are split off?

    It follows from its question and the seed alone: rows that are added later move none, and the same question never
    stands on both sides.
    """
    text = f"{seed}\n" + "\n".join(message.content for message in _question(row))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64 < share


def summary(name: str, examples: Measured) -> str:
    """One line: examples, tokens, share trained, longest."""
    total, trained = (int(column.sum(dtype=np.int64)) for column in examples.sizes[:, :2].T)
    longest = examples[int(np.argmax(examples.sizes[:, 0]))]
    return (
        f"{name}: {len(examples):,} examples, {total:,} tokens, {trained / total:.0%} of them trained on; "
        f"the longest has {len(longest.tokens)} ({Path(longest.where).name})"
    )


def histogram(lengths: np.ndarray) -> list[str]:
    """A bar for each range of lengths, in tokens."""
    step = -(-int(lengths.max()) // (16 * BARS)) * 16
    counts = np.bincount((lengths - 1) // step)
    last = f"{len(counts) * step}"
    return [
        f"{i * step + 1:>{len(last)}} to {(i + 1) * step:>{len(last)}} tokens  "
        f"{'#' * -(-WIDTH * count // counts.max()):<{WIDTH}} {count:,}"
        for i, count in enumerate(counts.tolist())
        if counts[: i + 1].any()
    ]


def _question(row: Conversation) -> tuple[Message, ...]:
    """What stands before the last answer, a system message left out; plain text as a whole."""
    return tuple(message for message in row.messages[:-1] or row.messages if message.role != "system")
