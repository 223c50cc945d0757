"""Keeps control characters of other people's files and models away from the terminal."""

import re
from collections.abc import Iterable
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# For a stream with progress bars, which return to the start of the line and move up one line.
CONTROL_BESIDE_BARS = re.compile(CONTROL.pattern.replace(r"\x0b-\x1f", r"\x0b\x0c\x0e-\x1a\x1c-\x1f") + r"|\x1b(?!\[A)")


def escape_controls(text: str, pattern: re.Pattern[str] = CONTROL) -> str:
    """Shows control characters and text direction marks as codes."""
    return pattern.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class EscapedStream:
    """A text stream that escapes control characters in all that is written to it; otherwise like `stream`."""

    def __init__(self, stream: Any, pattern: re.Pattern[str] = CONTROL) -> None:
        self.unescaped, self._pattern = stream, pattern

    def write(self, text: str) -> int:
        """Writes the escaped text; returns the number of characters of the original."""
        self.unescaped.write(escape_controls(text, self._pattern))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each escaped line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)
