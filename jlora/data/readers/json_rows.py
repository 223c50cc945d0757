"""JSON -> rows, as a stream: lines of objects, a list of them, or an object with that list under one key."""

import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import MAX_ROW, Notes, Reading
from jlora.data.readers.columns import NAMES
from jlora.data.readers.encoding import lines

CHUNK = 1 << 16  # characters
TAIL = 16  # a mistake nearer than this to the end of what was read may be but a word cut in two
SPACE = re.compile(r"\s*")
Row = tuple[str, Any]  # where it stands, and the row; a UserError in its place where it cannot be read


def read_json(file: Path, encoding: str, reading: Reading, notes: Notes) -> Iterator[Row]:
    """Rows of a JSON file, each with its `file:line`; a line that is not JSON comes as the error that names it.

    Raises:
      UserError: the file as a whole is not JSON, or has its rows in more than one place.
    """
    if _is_lines(file, encoding):
        for number, line in lines(file, encoding):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    yield where, _decode(line)
                except (ValueError, RecursionError) as error:
                    yield where, UserError(f"{where}: not JSON: {_reason(error)}")
        return
    yield from _Document(file, encoding, reading, notes).rows()


def _is_lines(file: Path, encoding: str) -> bool:
    """Are there several lines, the first an object of its own, or meant to be: the next begins one too?"""
    seen: list[str] = []
    try:
        for _, line in lines(file, encoding, CHUNK):
            if line.strip():
                seen.append(line)
            if len(seen) == 2:
                break
    except UserError:  # a long line: read as a document, which goes piece by piece
        return False
    begins = [line.lstrip().startswith("{") for line in seen]
    return len(seen) == 2 and begins[0] and (begins[1] or _is_object(seen[0]))


def _is_object(line: str) -> bool:
    try:
        return isinstance(_decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; json by itself keeps the last of two values under one key, and loses the other."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_decode = _DECODER.decode


def _reason(error: Exception) -> str:
    return "too deeply nested" if isinstance(error, RecursionError) else str(error)


class _Document:
    """A JSON text that does not go line by line, read piece by piece."""

    def __init__(self, file: Path, encoding: str, reading: Reading, notes: Notes) -> None:
        self._file, self._encoding, self._notes = file, encoding, notes
        self._wanted = reading.columns.get("rows", "")
        self._whole = {reading.columns.get("messages", ""), reading.columns.get("history", "")}
        self._lists: list[str] = []  # the keys under which rows were found
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def rows(self) -> Iterator[Row]:
        with self._file.open(encoding=self._encoding) as self._stream:
            while first := self._peek():
                where = self._where()
                if first == "[":
                    yield from self._elements()
                elif first == "{":
                    value, found = yield from self._object("")
                    if not found:
                        yield where, value
                    else:
                        for key in value:
                            self._notes.add("keys not used", key)
                else:
                    yield where, self._value()
        if self._wanted and not self._lists:
            raise UserError(f"{self._file}: columns names the rows {self._wanted!r}, and no list of them is there")

    def _elements(self) -> Iterator[Row]:
        """The rows of a list."""
        self._take("[")
        if self._peek() == "]":
            self._take("]")
            return
        while True:
            self._peek()
            yield self._where(), self._value()
            if self._peek() == "]":
                self._take("]")
                return
            self._take(",")

    def _object(self, path: str) -> Generator[Row, None, tuple[dict[str, Any], bool]]:
        """An object without its lists of rows, which are yielded; and whether there were any."""
        value: dict[str, Any] = {}
        found = False
        self._take("{")
        while self._peek() != "}":
            self._expect('"')
            key = self._value()
            self._peek()
            self._take(":")
            name, start = f"{path}{key}", self._peek()
            if start == "[" and self._holds_rows(name, key):
                if self._lists and self._lists != [name]:
                    raise UserError(
                        f"{self._where()}: rows lie under {self._lists[0]} and under {name}: set "
                        f'columns={{"rows": "{name}"}}, or give each a file of its own'
                    )
                self._lists, found = [name], True
                yield from self._elements()
            elif start == "{":
                value[key], inside = yield from self._object(f"{name}.")
                found = found or inside
                if inside and not value[key]:
                    del value[key]
            elif key in value:
                raise UserError(f"{self._where()}: the key {key!r} stands twice")
            else:
                value[key] = self._value()
            if self._peek() != "}":
                self._take(",")
                self._peek()
                self._expect('"')
        self._take("}")
        return value, found

    def _holds_rows(self, name: str, key: str) -> bool:
        if self._wanted:
            return name == self._wanted
        if key in self._whole or key.lower() in NAMES["messages"] | NAMES["history"]:
            return False
        while True:
            space = SPACE.match(self._buffer, self._at + 1)
            if space and space.end() < len(self._buffer):
                return self._buffer[space.end()] == "{"
            if self._ended:
                return False
            self._read()

    def _peek(self) -> str:
        """The next character that is not space; "" at the end."""
        while True:
            space = SPACE.match(self._buffer, self._at)
            assert space is not None
            self._move(space.end())
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._read()

    def _take(self, char: str) -> None:
        self._expect(char)
        self._move(self._at + 1)

    def _expect(self, char: str) -> None:
        got = self._peek()
        if got != char:
            found = f"got {self._buffer[self._at : self._at + 20]!r}" if got else "the file ends"
            raise UserError(f"{self._where()}: not JSON: expected {char!r}, {found}")

    def _value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                at = getattr(error, "pos", 0)
                cut = at > len(self._buffer) - TAIL or str(error).startswith("Unterminated string")
                if self._ended or not cut:
                    self._move(max(at, self._at))
                    reason = getattr(error, "msg", _reason(error))
                    raise UserError(f"{self._where()}: not JSON: {reason}") from None
            else:
                if end < len(self._buffer) or self._ended:  # a number may go on
                    self._move(end)
                    return value
            if len(self._buffer) - self._at > MAX_ROW:
                raise UserError(f"{self._where()}: a row of more than {MAX_ROW:,} characters: is the file broken?")
            self._read()

    def _read(self) -> None:
        """More text, twice what is at hand, so that a long value is not tried too often."""
        rest = self._buffer[self._at :]
        more = self._stream.read(max(CHUNK, len(rest)))
        self._buffer, self._at, self._ended = rest + more, 0, not more

    def _move(self, to: int) -> None:
        self._line += self._buffer.count("\n", self._at, to)
        self._at = to

    def _where(self) -> str:
        return f"{self._file}:{self._line}"
