"""CSV and TSV -> rows, as a stream: the delimiter and whether there is a header, found in the first rows."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import Notes, Reading, listing
from jlora.data.readers.columns import NAMES, find_parts
from jlora.data.readers.encoding import lines

DELIMITERS = "\t,;|"
SOME = 50  # rows from which the form is told
SEPARATOR = re.compile(r"sep=(.)$")  # Excel's own first line
SENTENCE = re.compile(r"[?？。！!]|\.(\s|$)")
KNOWN = frozenset().union(*NAMES.values())


def read_table(file: Path, encoding: str, reading: Reading, notes: Notes) -> Iterator[tuple[str, Any]]:
    """Rows by column name, each with the `file:line` where it begins; one with too many or few cells as an error.

    Raises:
      UserError: the file as a whole is not CSV, or its columns are not obvious.
    """
    delimiter = find_delimiter(file, encoding)
    rows = cells_of(file, encoding, delimiter)
    first_line, first = next(rows, (0, []))
    if not first:
        raise UserError(f"{file}: no rows in it")
    header = _header(file, first, list(itertools.islice(cells_of(file, encoding, delimiter), 1, SOME)), reading)
    if header is None:
        header = [str(number) for number in range(1, len(first) + 1)]
        rows = itertools.chain([(first_line, first)], rows)
        if not reading.columns.keys() - {"rows"}:
            header = ["prompt", "response"]
            notes.add("no header: the first column is taken to ask, the second to answer", file.name)
    for number, cells in rows:
        where = f"{file}:{number}"
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            count = f"expected {len(header)} cells, got {len(cells)}"
            yield where, UserError(f"{where}: {count}: put quotes around a cell that holds {delimiter!r}")


def find_delimiter(file: Path, encoding: str) -> str:
    """The character that divides most of the first rows into equally many cells, two at least; "," if there is none."""
    first = next((line for _, line in lines(file, encoding) if line.strip()), "")
    if given := SEPARATOR.match(first):
        return given[1]

    def score(delimiter: str) -> tuple[int, float]:
        try:
            widths = [len(cells) for _, cells in itertools.islice(cells_of(file, encoding, delimiter), SOME)]
        except UserError:
            return 0, 0.0
        width, often = Counter(widths).most_common(1)[0] if widths else (1, 0)
        named = sum(_plain(cell) in KNOWN for cell in first.split(delimiter))
        return (named, often / len(widths)) if width > 1 else (0, 0.0)

    best = max(DELIMITERS, key=score)
    return best if score(best) > (0, 0.0) else ","


def looks_like_table(head: list[str]) -> bool:
    """Have these lines, of a file without the ending of a table, the form of one?

    That is a header that names who asks and who answers, or one tab in every line.
    """
    for delimiter in DELIMITERS:
        cells = {_plain(cell) for cell in head[0].split(delimiter)}
        if cells & NAMES["prompt"] and cells & NAMES["response"]:
            return True
    return all(line.count("\t") == 1 and not line.startswith("\t") for line in head)


def _header(file: Path, first: list[str], others: list[tuple[int, list[str]]], reading: Reading) -> list[str] | None:
    """The column names; None where the first row is one of the data."""
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(first, start=1)]
    wanted = [column for part, column in reading.columns.items() if part != "rows"]
    if wanted and not set(wanted) & set(names) and all(column.isdigit() for column in wanted):
        return None
    if not wanted and not any(_plain(name) in KNOWN for name in names):
        lengths = [len(cell) for _, cells in others for cell in cells] or [0]
        label = all(len(name) <= 30 and not SENTENCE.search(name) for name in names)
        if len(names) == 2 and not (label and max(map(len, names)) < sum(lengths) / len(lengths)):
            return None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{file}: two columns are called {twice[0]!r}: rename one; got {listing(names, 20)}")
    try:
        find_parts(names, reading)
    except UserError as error:
        numbers = "" if wanted else '; without a header, name columns by number, as in columns={"prompt": "1", ...}'
        raise UserError(f"{file}: {error}{numbers}") from None
    return names


def cells_of(file: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line where each row begins, and its cells; rows without any text are none."""
    texts = ("\n" if number == 1 and SEPARATOR.match(line) else line for number, line in lines(file, encoding))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = str(error)
            if "unexpected end" in reason:
                reason = "a quote that is opened here is never closed"
            elif "field limit" in reason:
                reason = f"a cell of more than {csv.field_size_limit():,} characters; is a quote left open?"
            raise UserError(f"{file}:{begins}: not CSV: {reason}") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield begins, cells


def _plain(cell: str) -> str:
    return cell.strip(' "\n').lower().replace(" ", "_")
