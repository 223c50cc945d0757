"""Reads CSV and TSV files as a stream; the delimiter is detected from the first rows."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import ReaderNotes, ReadOptions
from jlora.data.readers.column_mapping import NAMES
from jlora.data.readers.encoding import numbered_lines
from jlora.data.readers.source import Source
from jlora.data.readers.tables import SAMPLE_ROWS, is_known, named_rows, plain_name

DELIMITERS = "\t,;|"
SEPARATOR = re.compile(r"sep=(.)$")  # the first line that Excel writes to declare the delimiter


def read_table(file: Source, encoding: str, options: ReadOptions, notes: ReaderNotes) -> Iterator[tuple[str, Any]]:
    """Yields rows by column name, each with the `file:line` where it starts; a wrong number of cells as a UserError.

    Raises:
      UserError: the file is not valid CSV as a whole, or its columns cannot be identified.
    """
    delimiter = detect_delimiter(file, encoding)
    yield from named_rows(str(file), read_cells(file, encoding, delimiter), options, notes, delimiter)


def detect_delimiter(file: Source, encoding: str) -> str:
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
        known = sum(is_known(cell) for cell in first.split(delimiter))
        return (known, often / len(widths)) if width > 1 else (0, 0.0)

    best = max(DELIMITERS, key=score)
    return best if score(best) > (0, 0.0) else ","


def looks_like_table(head: list[str]) -> bool:
    """Returns whether lines of a file without a table's file name are a table.

    They are if a header names question and answer, or if every line has exactly one tab.
    """
    for delimiter in DELIMITERS:
        cells = {plain_name(cell) for cell in head[0].split(delimiter)}
        if cells & NAMES["prompt"] and cells & NAMES["response"]:
            return True
    return all(line.count("\t") == 1 and not line.startswith("\t") for line in head)


def read_cells(file: Source, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
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
                reason = "the quote opened here is never closed. Close it"
            elif "field limit" in reason:
                most = f"{csv.field_size_limit():,} characters"
                reason = f"a cell is longer than {most}. Close its quote, or save the rows as JSON lines"
            else:
                reason += ". In a cell in quotes, write each quote twice"
            raise UserError(f"{file}:{start}: Not valid CSV: {reason}.") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield start, cells
