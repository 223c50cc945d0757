"""What will be trained on: the gate before step 1, and its summary."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlora.data.chat import Example
from jlora.data.formats import Conversation
from jlora.errors import UserError


def refuse_long(examples: Sequence[Example], max_seq_length: int, key: str) -> None:
    """Raises UserError where examples are longer than `max_seq_length` tokens, with the length that would hold them."""
    long = [(len(example.tokens), example.where) for example in examples if len(example.tokens) > max_seq_length]
    if long:
        named = ", ".join(f"{where} ({length})" for length, where in long[:5])
        more = f" and {len(long) - 5} more" if len(long) > 5 else ""
        raise UserError(
            f"{key}: {len(long)} example(s) are longer than max_seq_length={max_seq_length} tokens: {named}{more}. "
            f"Set max_seq_length={max(long)[0]}, or shorten them"
        )


def refuse_overlap(train: list[Conversation], held_out: list[Conversation]) -> None:
    """Raises UserError where a held-out example also stands among the training examples."""
    seen = {row.messages: row.where for row in train}
    both = [(row.where, seen[row.messages]) for row in held_out if row.messages in seen]
    if both:
        raise UserError(
            f"{len(both)} held-out example(s) are also trained on, so the held-out loss would mean nothing: "
            + ", ".join(f"{here} is {there}" for here, there in both[:5])
        )


def split(rows: list[Conversation], share: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Splits off `share` of the rows, at least one, as held-out; both parts keep the order of the files."""
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise UserError(f"eval_share={share} of {len(rows)} pairs leaves nothing to train on")
    out = set(np.random.RandomState(seed).permutation(len(rows))[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in out], [r for i, r in enumerate(rows) if i in out]


def summary(name: str, examples: Sequence[Example]) -> str:
    """One line: examples, tokens, share trained, longest."""
    total = sum(len(example.tokens) for example in examples)
    trained = sum(int(example.trained.sum()) for example in examples)
    longest = max(examples, key=lambda example: len(example.tokens))
    return (
        f"{name}: {len(examples)} examples, {total:,} tokens, {trained / total:.0%} of them trained on; "
        f"the longest has {len(longest.tokens)} ({Path(longest.where).name})"
    )
