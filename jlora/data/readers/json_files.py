"""Reads JSON files as a stream: JSON lines, a list of rows, or an object that holds the list under one of its keys."""

import json
import re
from collections.abc import Generator, Iterator
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import MAX_ROW, ReaderNotes, ReadOptions
from jlora.data.readers.column_mapping import NAMES, makes_row
from jlora.data.readers.encoding import numbered_lines
from jlora.data.readers.source import Source

CHUNK = 1 << 16  # characters
LONGEST_ROW = 1 << 20  # characters; a longer object is read as a list of rows, piece by piece
TAIL = 16  # characters: an error this close to the end of the text read so far may be caused by an incomplete token
SPACE = re.compile(r"\s*")
FIX = "Correct it, or write the rows with a JSON library."  # for JSON that is not valid
Row = tuple[str, Any]  # file:line and the row, or a UserError if the row cannot be read


def read_json(file: Source, encoding: str, options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    """Yields the rows of a JSON file, each with its `file:line`; an invalid line is yielded as its UserError.

    Raises:
      UserError: the file is not valid JSON as a whole, or has rows in more than one place.
    """
    if _is_lines(file, encoding):
        for number, line in numbered_lines(file, encoding):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    yield where, _decode(line)
                except (ValueError, RecursionError) as error:
                    yield where, UserError(f"{where}: Not valid JSON: {_reason(error)}. {FIX}")
        return
    yield from _JsonDocument(file, encoding, options, notes).rows()


def _is_lines(file: Source, encoding: str) -> bool:
    """Returns whether the file is JSON lines: two lines, the first an object, or both starting one."""
    seen: list[str] = []
    try:
        for _, line in numbered_lines(file, encoding, CHUNK):
            if line.strip():
                seen.append(line)
            if len(seen) == 2:
                break
    except UserError:  # a long line, which `_JsonDocument` reads piece by piece
        return False
    begins = [line.lstrip().startswith("{") for line in seen]
    return len(seen) == 2 and begins[0] and (begins[1] or _is_object(seen[0]))


def _is_object(line: str) -> bool:
    try:
        return isinstance(_decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object; rejects duplicate keys, of which the json module would silently keep only the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_duplicates)
_decode = _DECODER.decode


def _reason(error: Exception) -> str:
    return "too deeply nested" if isinstance(error, RecursionError) else str(error)


class _JsonDocument:
    """Incremental parser of JSON that spans lines: keeps only the current row in memory."""

    def __init__(self, file: Source, encoding: str, options: ReadOptions, notes: ReaderNotes) -> None:
        self._file, self._encoding, self._notes = file, encoding, notes
        self._options = options
        self._wanted = options.columns.get("rows", "")
        self._part_lists = {options.columns.get("messages", ""), options.columns.get("history", "")}  # part of a row
        self._lists: list[str] = []  # the key under which rows were found
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def rows(self) -> Iterator[Row]:
        with self._file.open(encoding=self._encoding) as self._stream:
            while first := self._peek():
                where = self._where()
                if first == "[":
                    yield from self._elements()
                elif first == "{":
                    row, end = self._next_value()
                    if isinstance(row, dict) and not self._wanted and makes_row(tuple(row), self._options):
                        self._move(end)
                        yield where, row
                        continue
                    value, found = yield from self._object("")
                    if not found:
                        yield where, value
                    else:
                        for key in value:
                            self._notes.add("unused keys", key)
                else:
                    yield where, self._value()
        if self._wanted and not self._lists:
            raise UserError(
                f"{self._file}: The key columns sets rows to {self._wanted!r}, but no list of rows has that key. "
                "Correct it."
            )

    def _next_value(self) -> tuple[Any, int]:
        """Parses the next value without consuming it, and returns where it ends; None if it is long, or not valid."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError):
                end = 0
            if end and (end < len(self._buffer) or self._ended):
                return value, end
            if self._ended or len(self._buffer) - self._at > LONGEST_ROW:
                return None, 0
            self._read()

    def _elements(self) -> Iterator[Row]:
        """Yields the elements of a list."""
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
        """Yields the rows in an object's list; returns the rest of the object, and whether it had such a list."""
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
                        f"{self._where()}: Both {self._lists[0]} and {name} hold rows. Set "
                        f'columns={{"rows": "{name}"}}, or split the file.'
                    )
                self._lists, found = [name], True
                yield from self._elements()
            elif start == "{":
                value[key], inside = yield from self._object(f"{name}.")
                found = found or inside
                if inside and not value[key]:
                    del value[key]
            elif key in value:
                raise UserError(f"{self._where()}: Not valid JSON: duplicate key {key!r}. {FIX}")
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
        if key in self._part_lists or key.lower() in NAMES["messages"] | NAMES["history"]:
            return False
        while True:
            space = SPACE.match(self._buffer, self._at + 1)
            if space and space.end() < len(self._buffer):
                return self._buffer[space.end()] == "{"
            if self._ended:
                return False
            self._read()

    def _peek(self) -> str:
        """Returns the next character that is not a space, without consuming it; "" at the end."""
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
            found = f"got {self._buffer[self._at : self._at + 20]!r}" if got else "but the file ends"
            raise UserError(f"{self._where()}: Not valid JSON: Expected {char!r}, {found}. {FIX}")

    def _value(self) -> Any:
        """Parses the next value."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                at = getattr(error, "pos", 0)
                incomplete = at > len(self._buffer) - TAIL or str(error).startswith("Unterminated string")
                if self._ended or not incomplete:
                    self._move(max(at, self._at))
                    reason = getattr(error, "msg", _reason(error))
                    raise UserError(f"{self._where()}: Not valid JSON: {reason}. {FIX}") from None
            else:
                if end < len(self._buffer) or self._ended:  # otherwise a number may continue in the next chunk
                    self._move(end)
                    return value
            if len(self._buffer) - self._at > MAX_ROW:
                raise UserError(
                    f"{self._where()}: The row is longer than {MAX_ROW:,} characters. Split it into several."
                )
            self._read()

    def _read(self) -> None:
        """Reads at least as much as is left, so that a long value is parsed only a few times."""
        rest = self._buffer[self._at :]
        more = self._stream.read(max(CHUNK, len(rest)))
        self._buffer, self._at, self._ended = rest + more, 0, not more

    def _move(self, to: int) -> None:
        self._line += self._buffer.count("\n", self._at, to)
        self._at = to

    def _where(self) -> str:
        return f"{self._file}:{self._line}"
