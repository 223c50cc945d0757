"""Tables to rows by column name, whether CSV, Excel or Word holds them; the header is detected from the first rows."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.conversation import ReaderNotes, ReadOptions, join_limited
from jlora.data.readers.column_mapping import NAMES, map_columns

SAMPLE_ROWS = 50  # first rows, from which the header is detected
SENTENCE = re.compile(r"[?？。！!]|\.(\s|$)")
KNOWN = frozenset().union(*NAMES.values())


class NoText:
    """A cell that cannot be read as text, and the reason, which becomes an error if the row needs this cell."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __repr__(self) -> str:
        return self._reason


def named_rows(
    table: str, rows: Iterator[tuple[int, list[Any]]], options: ReadOptions, notes: ReaderNotes, delimiter: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields rows by column name, each with its place, `table:number`.

    Args:
      table: the name of the table in messages.
      rows: the number and the cells of each row that has any text.
      delimiter: of a CSV file, where a wrong number of cells is an error, yielded as a UserError. In other tables,
        missing cells are empty, and cells beyond the header belong to a column without a name.

    Raises:
      UserError: there are no rows, or the columns cannot be identified.
    """
    sample = list(itertools.islice(rows, SAMPLE_ROWS))
    if not sample:
        raise UserError(f"{table}: The table contains no rows. Write rows into it.")
    first = sample[0][1]
    header = _header(table, first, [cells for _, cells in sample[1:]], options)
    rows = itertools.chain(sample if header is None else sample[1:], rows)
    if header is None:
        header = [str(number) for number in range(1, len(first) + 1)]
        if not options.columns.keys() - {"rows"}:
            header = ["prompt", "response"]
            remark = "no header, so the first column is the question, the second the answer"
            notes.add(remark, PurePath(table).name)
    for number, cells in rows:
        where = f"{table}:{number}"
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        elif delimiter:
            problem = f"Expected {plural(len(header), 'cell')}, got {len(cells)}."
            yield where, UserError(f"{where}: {problem} Put quotes around cells that contain {delimiter!r}.")
        else:
            names = [*header, *map(_unnamed, range(len(header) + 1, len(cells) + 1))]
            yield where, dict(itertools.zip_longest(names, cells, fillvalue=""))


def column_names(first: list[Any]) -> list[str]:
    """Returns the names in a header; a column without one is called by its number."""
    return [str(cell).strip() or _unnamed(number) for number, cell in enumerate(first, start=1)]


def is_known(cell: str) -> bool:
    """Returns whether a cell is a usual name of a column."""
    return plain_name(cell) in KNOWN


def plain_name(cell: str) -> str:
    """Returns a column's name as `NAMES` writes it."""
    return cell.strip(' "\n').lower().replace(" ", "_")


def _header(table: str, first: list[Any], others: list[list[Any]], options: ReadOptions) -> list[str] | None:
    """Returns the column names; None if the first row is data."""
    names = column_names(first)
    wanted = [column for part, column in options.columns.items() if part != "rows"]
    if wanted and not set(wanted) & set(names) and all(column.isdigit() for column in wanted):
        return None
    if not wanted and not any(map(is_known, names)):
        lengths = [len(str(cell)) for cells in others for cell in cells] or [0]
        label = all(len(name) <= 30 and not SENTENCE.search(name) for name in names)
        if len(names) == 2 and not (label and max(map(len, names)) < sum(lengths) / len(lengths)):
            return None
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        columns = join_limited(names, 20)
        raise UserError(f"{table}: Two columns are named {twice[0]!r}. Rename one of them. Columns: {columns}.")
    try:
        map_columns(names, options)
    except UserError as error:
        numbers = "" if wanted else ' If the file has no header, use numbers, as in columns={"prompt": "1", ...}.'
        raise UserError(f"{table}: {error}{numbers}") from None
    return names


def _unnamed(number: int) -> str:
    return f"column {number}"
