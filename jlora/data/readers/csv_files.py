"""Reads CSV and TSV files as a stream; the delimiter and the header are detected from the first rows."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.conversation import ReaderNotes, ReadOptions, join_limited
from jlora.data.readers.column_mapping import NAMES, map_columns
from jlora.data.readers.encoding import numbered_lines

DELIMITERS = "\t,;|"
SAMPLE_ROWS = 50  # first rows, from which delimiter and header are detected
SEPARATOR = re.compile(r"sep=(.)$")  # the first line that Excel writes to declare the delimiter
SENTENCE = re.compile(r"[?？。！!]|\.(\s|$)")
KNOWN = frozenset().union(*NAMES.values())


def read_table(file: Path, encoding: str, options: ReadOptions, notes: ReaderNotes) -> Iterator[tuple[str, Any]]:
    """Yields rows by column name, each with the `file:line` where it starts; a wrong number of cells as a UserError.

    Raises:
      UserError: the file is not valid CSV as a whole, or its columns cannot be identified.
    """
    delimiter = detect_delimiter(file, encoding)
    rows = read_cells(file, encoding, delimiter)
    first_line, first = next(rows, (0, []))
    if not first:
        raise UserError(f"{file}: The file contains no rows.")
    header = _header(
        file, first, list(itertools.islice(read_cells(file, encoding, delimiter), 1, SAMPLE_ROWS)), options
    )
    if header is None:
        header = [str(number) for number in range(1, len(first) + 1)]
        rows = itertools.chain([(first_line, first)], rows)
        if not options.columns.keys() - {"rows"}:
            header = ["prompt", "response"]
            notes.add("no header, so the first column is the question, the second the answer", file.name)
    for number, cells in rows:
        where = f"{file}:{number}"
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            problem = f"Expected {plural(len(header), 'cell')}, got {len(cells)}."
            yield where, UserError(f"{where}: {problem} Put quotes around cells that contain {delimiter!r}.")


def detect_delimiter(file: Path, encoding: str) -> str:
    """Returns the delimiter that splits most of the first rows into the same number of cells (at least 2), else ","."""
    first = next((line for _, line in numbered_lines(file, encoding) if line.strip()), "")
    if given := SEPARATOR.match(first):
        return given[1]

    def score(delimiter: str) -> tuple[int, float]:
        try:
            widths = [len(cells) for _, cells in itertools.islice(read_cells(file, encoding, delimiter), SAMPLE_ROWS)]
        except UserError:
            return 0, 0.0
        width, often = Counter(widths).most_common(1)[0] if widths else (1, 0)
        known = sum(_plain(cell) in KNOWN for cell in first.split(delimiter))
        return (known, often / len(widths)) if width > 1 else (0, 0.0)

    best = max(DELIMITERS, key=score)
    return best if score(best) > (0, 0.0) else ","


def looks_like_table(head: list[str]) -> bool:
    """Returns whether lines of a file without a table's file name are a table.

    They are if a header names question and answer, or if every line has exactly one tab.
    """
    for delimiter in DELIMITERS:
        cells = {_plain(cell) for cell in head[0].split(delimiter)}
        if cells & NAMES["prompt"] and cells & NAMES["response"]:
            return True
    return all(line.count("\t") == 1 and not line.startswith("\t") for line in head)


def _header(
    file: Path, first: list[str], others: list[tuple[int, list[str]]], options: ReadOptions
) -> list[str] | None:
    """Returns the column names; None if the first row is data."""
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(first, start=1)]
    wanted = [column for part, column in options.columns.items() if part != "rows"]
    if wanted and not set(wanted) & set(names) and all(column.isdigit() for column in wanted):
        return None
    if not wanted and not any(_plain(name) in KNOWN for name in names):
        lengths = [len(cell) for _, cells in others for cell in cells] or [0]
        label = all(len(name) <= 30 and not SENTENCE.search(name) for name in names)
        if len(names) == 2 and not (label and max(map(len, names)) < sum(lengths) / len(lengths)):
            return None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        columns = join_limited(names, 20)
        raise UserError(f"{file}: Two columns are named {twice[0]!r}. Rename one of them. Columns: {columns}.")
    try:
        map_columns(names, options)
    except UserError as error:
        numbers = "" if wanted else ' If the file has no header, use numbers, as in columns={"prompt": "1", ...}.'
        raise UserError(f"{file}: {error}{numbers}") from None
    return names


def read_cells(file: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the line on which each row starts, and its cells; skips rows without text."""
    texts = ("\n" if number == 1 and SEPARATOR.match(line) else line for number, line in numbered_lines(file, encoding))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = str(error)
            if "unexpected end" in reason:
                reason = "the quote opened here is never closed"
            elif "field limit" in reason:
                reason = f"a cell is longer than {csv.field_size_limit():,} characters. Check for an unclosed quote"
            raise UserError(f"{file}:{start}: Not valid CSV: {reason}.") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield start, cells


def _plain(cell: str) -> str:
    return cell.strip(' "\n').lower().replace(" ", "_")
