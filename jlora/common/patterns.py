"""Regular expressions that somebody else wrote: a broken one is an error, and a slow one is stopped."""

import contextlib
import functools
import time
from collections.abc import Iterator

import regex

from jlora.common.errors import UserError

SECONDS = 2.0  # for a search in a text, or for matching all names together
LONGEST = 10_000  # characters


class Pattern:
    """A compiled pattern.

    Raises:
      UserError: it is not a pattern.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise UserError(f"A pattern has {len(text):,} characters, expected at most {LONGEST:,}.")
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise UserError(f"{text[:80]!r} is not a valid regular expression: {error}.") from None
        self.text, self._seconds = text, SECONDS

    def found_in(self, text: str) -> bool:
        """Returns whether the pattern matches a part of a text; raises a UserError if that takes too long."""
        with self._limited():
            return self._compiled.search(text, timeout=SECONDS) is not None

    @property
    def groups(self) -> int:
        """The number of groups of the pattern."""
        return int(self._compiled.groups)

    def groups_in(self, text: str) -> tuple[str | None, ...] | None:
        """Returns the groups of the first match in a text; None without a match.

        Raises:
          UserError: matching takes too long.
        """
        with self._limited():
            found = self._compiled.search(text, timeout=SECONDS)
        return found.groups() if found else None

    def replaced(self, text: str, replacement: str) -> str:
        """Returns a text with all matches replaced literally; raises a UserError if that takes too long."""
        with self._limited():
            return self._compiled.sub(lambda _: replacement, text, timeout=SECONDS)

    def matches(self, name: str) -> bool:
        """Returns whether the pattern matches all of a name.

        Raises:
          UserError: matching takes too long.
        """
        start = time.monotonic()
        with self._limited():
            found = self._compiled.fullmatch(name, timeout=max(self._seconds, 0.01))
        self._seconds -= time.monotonic() - start
        return found is not None

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise UserError(
                f"The pattern {self.text[:80]!r} takes more than {SECONDS:g} s to match. Write a simpler one."
            ) from None


@functools.lru_cache
def _compiled(text: str) -> Pattern:
    return Pattern(text)


@functools.lru_cache(maxsize=1 << 16)
def matches(text: str, name: str) -> bool:
    """Returns whether a pattern matches all of a name; raises a UserError if it is broken or too slow."""
    return _compiled(text).matches(name)
