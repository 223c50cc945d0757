"""Reads the sheets of Excel workbooks as tables, row by row.

Cells become text: numbers with the 15 digits that Excel keeps, dates as 2024-01-31, but without the cell's format.
"""

import datetime
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.conversation import ReaderNotes, ReadOptions
from jlora.data.readers.source import Source
from jlora.data.readers.tables import NoText, named_rows

LAST_ROW = 1 << 20  # of any sheet; a broken file may number its rows higher
ALL_SHEETS = "*"  # which no sheet can be called
ERRORS = {"#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A"}
FORMULA = re.compile(rb"<(\w+:)?f[ />]")
NO_RESULT = NoText("a formula without its result (save the file in Excel)")
FORMATTED = (float, datetime.date, datetime.time, datetime.timedelta)


def read_workbook(file: Source, sheet: str, options: ReadOptions, notes: ReaderNotes) -> Iterator[tuple[str, Any]]:
    """Yields rows by column name, each with `file[sheet]:row`.

    Args:
      sheet: the name of the sheet; "" for the only one with rows, "*" for all of them. A hidden sheet must be named.

    Raises:
      UserError: openpyxl is not installed; the workbook cannot be read; or it is unclear which sheet has the rows.
    """
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"{file} is an Excel workbook. Run `pip install openpyxl` to read it, or save the table as CSV."
        ) from None
    warnings.filterwarnings("ignore", module="openpyxl")  # about parts of workbooks that have no text
    try:
        with file.open("rb") as stream, file.open("rb") as again:
            values = openpyxl.load_workbook(stream, read_only=True, data_only=True, keep_links=False)
            names = _chosen(file, values, sheet, notes)
            formulas = None
            if _has_formulas(file):
                formulas = openpyxl.load_workbook(again, read_only=True, keep_links=False)
            for name in names:
                cells = _filled_rows(values[name], formulas[name] if formulas else None, notes)
                yield from named_rows(f"{file}[{name}]", cells, options, notes)
    except UserError:
        raise
    except Exception as error:  # openpyxl passes on whatever a broken workbook makes it raise
        reason = (str(error).strip().split("\n") or [""])[0] or type(error).__name__
        raise UserError(
            f"{file} cannot be read as an Excel workbook: {reason}. Save it again in Excel, or save the table as CSV."
        ) from None


def _chosen(file: Source, workbook: Any, sheet: str, notes: ReaderNotes) -> list[str]:
    """Returns the names of the sheets to read."""
    sheets = {each.title: each for each in workbook.worksheets}
    if sheet not in ("", ALL_SHEETS):
        if sheet not in sheets:
            raise UserError(
                f"{file} has no sheet {sheet!r}. Its sheets: {', '.join(map(repr, sheets))}. Name one of them."
            )
        return [sheet]
    filled = [name for name, each in sheets.items() if any(True for _ in _filled_rows(each, None, ReaderNotes()))]
    shown = [name for name in filled if sheets[name].sheet_state == "visible"]
    for name in filled:
        if name not in shown:
            notes.add("hidden sheets, not read (to read one, add #NAME to the path)", f"{file.name}[{name}]")
    if not shown:
        if filled:
            advice = f"Add #{filled[0]} to the path to read its hidden sheet."
            raise UserError(f"{file}: No visible sheet has rows. {advice}")
        raise UserError(f"{file}: No sheet has rows. Remove the file, or write rows into it.")
    if len(shown) > 1 and not sheet:
        raise UserError(
            f"{file}: {plural(len(shown), 'sheet')} have rows: {', '.join(map(repr, shown))}. Add one of the names to "
            f"the path that you set, as in {file.name}#{shown[0]}, or add #* to read all of them."
        )
    return shown


def _filled_rows(sheet: Any, formulas: Any, notes: ReaderNotes) -> Iterator[tuple[int, list[Any]]]:
    """Yields the number and the cells of each row that has text, up to its last cell with text.

    Args:
      formulas: the same sheet with formulas in place of their results; None if it has none.
    """
    sheet.reset_dimensions()  # which some programs write wrong, and rows beyond them would be lost
    rows = sheet.iter_rows(max_row=LAST_ROW, values_only=formulas is None)
    if formulas is not None:
        formulas.reset_dimensions()
        rows = map(_results, rows, formulas.iter_rows(max_row=LAST_ROW, values_only=True))
    for number, values in enumerate(rows, start=1):
        cells = list(map(_as_text, values))
        while cells and cells[-1] == "":
            cells.pop()
        if not any(isinstance(cell, NoText) or cell.strip() for cell in cells):
            continue
        if any(isinstance(value, FORMATTED) for value in values):
            notes.add("rows with numbers and dates, read without their format, as 0.035 and 2024-01-31", sheet.title)
        yield number, cells


def _results(cells: Sequence[Any], formulas: Sequence[Any]) -> list[Any]:
    """Returns the values of a row; `NO_RESULT` for a formula that was never computed, whose type is not text."""
    return [
        NO_RESULT if formula is not None and cell.value is None and cell.data_type == "n" else cell.value
        for cell, formula in zip(cells, formulas, strict=True)
    ]


def _as_text(value: Any) -> Any:
    """Returns the value of a cell as text; or the reason why it has none."""
    if value is None:
        return ""
    if isinstance(value, str):
        if value in ERRORS:
            return NoText(f"Excel's error {value}")
        return value.replace("_x000D_", "").replace("\r\n", "\n").replace("\r", "\n")  # XML's form of a line break
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, datetime.datetime):
        return str(value).removesuffix(" 00:00:00")
    return value if isinstance(value, NoText) else str(value)


def _has_formulas(file: Source) -> bool:
    """Returns whether any sheet has a formula; most have none, and then the workbook is read once, not twice."""
    with zipfile.ZipFile(file.path) as archive:
        for name in archive.namelist():
            if "worksheets/" in name and not name.endswith(".rels"):
                with archive.open(name) as xml:
                    end = b""
                    while chunk := xml.read(1 << 20):
                        if FORMULA.search(end + chunk):
                            return True
                        end = chunk[-20:]
    return False
