"""What will be trained on: the gate before step 1, and its summary."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jlora.data.chat import Example
from jlora.data.formats import Conversation, prefix_of
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
    """Raises UserError where a held-out question is also trained on, whatever its answer."""
    seen = {row.messages[:-1]: row.where for row in train}
    both = [(row.where, seen[row.messages[:-1]]) for row in held_out if row.messages[:-1] in seen]
    if both:
        raise UserError(
            f"{len(both)} held-out question(s) are also trained on, so the held-out loss would mean nothing: "
            + ", ".join(f"{here} is {there}" for here, there in both[:5])
        )


def split(rows: list[Conversation], share: float, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Splits off about `share` of the rows as held-out; both parts keep the order of the files.

    A row's side follows from its question and the seed alone: rows that are added later move none, and the same
    question never stands on both sides.
    """

    def draw(row: Conversation) -> float:
        text = f"{seed}\n" + "\n".join(message.content for message in row.messages[:-1])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    held_out = [row for row in rows if draw(row) < share]
    train = [row for row in rows if draw(row) >= share]
    if not held_out or not train:
        side = "train on" if held_out else "hold out"
        raise UserError(f"eval_share={share} of {len(rows)} pairs leaves nothing to {side}")
    return train, held_out


def unread_prefixes(rows: list[Conversation]) -> str:
    """Line beginnings such as `Note:` that stand in the rows' text at least twice, with their counts."""
    lines = (line for row in rows for message in row.messages for line in message.content.split("\n"))
    counts = Counter(name for line in lines if (name := prefix_of(line)))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(8) if count > 1)


def summary(name: str, examples: Sequence[Example]) -> str:
    """One line: examples, tokens, share trained, longest."""
    total = sum(len(example.tokens) for example in examples)
    trained = sum(int(example.trained.sum()) for example in examples)
    longest = max(examples, key=lambda example: len(example.tokens))
    return (
        f"{name}: {len(examples)} examples, {total:,} tokens, {trained / total:.0%} of them trained on; "
        f"the longest has {len(longest.tokens)} ({Path(longest.where).name})"
    )
