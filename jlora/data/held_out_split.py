"""The held-out set: split from the training rows, and kept apart from them."""

import hashlib
from collections.abc import Iterable

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.conversation import Conversation


def refuse_overlap(train: Iterable[Conversation], held_out: list[Conversation]) -> None:
    """Raises a UserError if a held-out question is also trained on, even with another answer."""
    held_out_at = {_question(row): row.where for row in held_out}
    both = [(held_out_at[_question(row)], row.where) for row in train if _question(row) in held_out_at]
    if both:
        raise UserError(
            f"{plural(len(both), 'held-out question', ('is', 'are'))} also trained on, so the held-out loss would be "
            f"meaningless: {', '.join(f'{here} equals {row}' for here, row in both[:5])}. Remove them from one side."
        )


def is_held_out(row: Conversation, share: float, seed: int) -> bool:
    """Returns whether the row belongs to the held-out set, which takes about `share` of all rows.

    The choice depends only on the row's question and the seed: adding rows moves no other row, and equal questions
    always end up on the same side.
    """
    text = f"{seed}\n" + "\n".join(_question(row))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64 < share


def _question(row: Conversation) -> tuple[str, ...]:
    """Returns the turns before the last answer, without the system message; of plain text, all of it."""
    return tuple(message.full_text for message in row.messages[:-1] or row.messages if message.role != "system")
