"""The text of an answer while its tokens arrive: whole characters, up to a stop string, after the output rules."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jlora.serve.output_rules import Filter, Rules

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of sentencepiece's that is one byte


class AnswerText:
    """Text that can be passed on while an answer grows; the result does not depend on how its tokens arrive.

    Args:
      stops: the answer ends before the first of these strings.
      rules: output rules, which see the answer up to there.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), rules: Rules = ()) -> None:
        self._tokenizer, self._stops, self._filter = tokenizer, stops, Filter(rules)
        self._ids: list[int] = []
        self._from, self._to = 0, 0  # tokens whose text was added last; what follows is decoded with them
        self._decoded = ""  # all whole characters so far
        self._passed = 0  # characters of them that the rules have seen
        self.stopped = False  # whether a stop string was found

    def push(self, ids: Iterable[int]) -> str:
        """Adds tokens, and returns the text that is final with them and was not before."""
        for token in ids:
            self._ids.append(token)
            self._decoded += self._new_text()
        return self._filter.push(self._next(self._held_back()))

    def close(self) -> str:
        """Returns the rest of the text, after the last token."""
        if not self.stopped:  # incomplete characters
            self._decoded = self._decode(self._ids)
        return self._filter.push(self._next(0)) + self._filter.close()

    def _new_text(self) -> str:
        """Returns the text of the tokens after `_to`, or "" if the next ones may change it."""
        # Incomplete characters make all bytes before them unreadable, back to the last token that is not a byte.
        if BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(self._ids[-1]) or ""):
            return ""
        before, after = (self._decode(self._ids[self._from : end]) for end in (self._to, len(self._ids)))
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._from, self._to = self._to, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _next(self, held_back: int) -> str:
        """Returns the text that no rule has seen, without the last characters, or up to a stop string."""
        if self.stopped:
            return ""
        found = [at for at in (self._decoded.find(stop, self._passed) for stop in self._stops) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else max(len(self._decoded) - held_back, self._passed)
        text, self._passed = self._decoded[self._passed : end], end
        return text

    def _held_back(self) -> int:
        """Returns how many of the last characters may be the start of a stop string."""
        return max(
            (size for stop in self._stops for size in range(len(stop)) if self._decoded.endswith(stop[:size])),
            default=0,
        )
