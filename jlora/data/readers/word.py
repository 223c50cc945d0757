"""Reads Word documents: tables of questions and answers, lines such as `Q: ...`, or headings that ask.

A document is read in one of these forms; if it is not clear in which, it is refused.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jlora.common.errors import UserError
from jlora.data.conversation import Message, ReaderNotes, ReadOptions, Turn
from jlora.data.readers.column_mapping import map_columns
from jlora.data.readers.source import Source
from jlora.data.readers.tables import NoText, column_names, named_rows
from jlora.data.readers.text_files import Row, begins_with_role, make_row, read_text

HEADING = re.compile(r"(?:heading (\d)|title)$", re.IGNORECASE)  # names of styles; Word translates only what it shows
BOLD = 10  # the level of a bold line that asks, below the levels of headings
QUESTION = ("?", "？")
CHANGED = "//w:ins | //w:del | //w:moveFrom | //w:moveTo"
NOT_READ = "//w:body//w:sdt[.//w:t] | //w:body//w:txbxContent[.//w:t]"
WIDEST = 63  # columns of a table in Word
Rows = list[tuple[int, list[Any]]]  # the number and the cells of each row of a table


class Line(NamedTuple):
    """A line of a paragraph."""

    number: int  # of the paragraph, from 1
    text: str
    level: int  # of the heading that this is; else 0
    table: int = 0  # the number of the table that is in this place; else 0

    @property
    def asks(self) -> bool:
        """Whether this is a heading that is a question."""
        return self.level > 0 and self.text.rstrip().endswith(QUESTION)


def read_document(
    file: Source, options: ReadOptions, notes: ReaderNotes
) -> tuple[Iterator[tuple[str, Any]], Iterator[Row]]:
    """Returns the rows of a document's tables, with their place `file[table 1]:row`, and its conversations.

    A document has one or the other.

    Raises:
      UserError: python-docx is not installed; the document cannot be read; or it is not clear where its rows are.
    """
    tables, lines = _content(file, notes)
    if options.plain:
        return iter(()), _paragraphs(file, lines, options, notes)
    spoken = any(begins_with_role(line.text, options) for line in lines)
    if spoken or any(line.asks and line.level < BOLD for line in lines):
        lines = [line._replace(level=line.level % BOLD) for line in lines]  # then bold lines are like all others
    asked = [at for at, line in enumerate(lines) if (begins_with_role(line.text, options) if spoken else line.asks)]
    headed = [number for number, rows in tables.items() if _is_header(rows[0][1], options)]
    if headed and asked:
        text = lines[asked[0]].text.strip()[:60]
        raise UserError(f"{file}: Both table {headed[0]} and the text have questions ({text!r}). Split the document.")
    if headed or (not asked and _is_only_table(tables, lines, options)):
        chosen = {number: rows for number, rows in tables.items() if number in headed or not headed}
        _note_unused(file, [line for line in lines if line.table not in chosen], notes)
        return _table_rows(file, chosen, options, notes), iter(())
    if not asked:
        raise UserError(
            f"{file}: Found no questions and answers. Expected a table whose header names them, lines that start with "
            "a role (`Q: ...`, `A: ...`), or headings that end in a question mark. To train on its paragraphs as plain "
            "text, set task_type=plain-text."
        )
    start = asked[0]
    if inside := [line.table for line in lines[start:] if line.table]:
        raise UserError(
            f"{file}: Table {inside[0]} is among the answers, and jlora cannot read it as part of one. Write it as "
            "text, or move it before the first question."
        )
    _note_unused(file, lines[:start], notes)
    return iter(()), (_dialogue if spoken else _answers)(file, lines[start:], options, notes)


def _content(file: Source, notes: ReaderNotes) -> tuple[dict[int, Rows], list[Line]]:
    """Returns the rows of each table that has text, by the table's number from 1, and the lines."""
    try:
        import docx
        from docx.table import Table
    except ImportError:
        raise UserError(
            f"{file} is a Word document. Run `pip install python-docx` to read it, or save its text as .txt."
        ) from None
    try:
        with file.open("rb") as stream:
            document = docx.Document(stream)
        body = document.element
        if body.xpath(CHANGED):
            raise UserError(f"{file} has tracked changes. Accept or reject them in Word, and save it.")
        if body.xpath(NOT_READ):
            notes.add("text in boxes, forms or tables of contents, not read", file.name)
        levels = _heading_levels(document)
        tables: dict[int, Rows] = {}
        lines: list[Line] = []
        paragraphs = numbers = 0
        for block in document.iter_inner_content():
            if isinstance(block, Table):
                numbers += 1
                if rows := list(_filled_rows(block._tbl)):
                    tables[numbers] = rows
                    lines.append(Line(paragraphs, "", 0, numbers))
                continue
            paragraphs += 1
            level = levels.get(block._p.style or "", 0)
            for text, bold in _lines(block._p):
                asks = bold and text.rstrip().endswith(QUESTION)
                lines.append(Line(paragraphs, text, level or (BOLD if asks else 0)))
    except UserError:
        raise
    except Exception as error:  # python-docx passes on whatever a broken document makes it raise
        reason = (str(error).strip().split("\n") or [""])[0] or type(error).__name__
        raise UserError(
            f"{file} cannot be read as a Word document: {reason}. Save it again as .docx, or save its text as .txt."
        ) from None
    return tables, lines


def _heading_levels(document: Any) -> dict[str, int]:
    """Returns the level of each paragraph style that is a heading or is based on one; a title has level 1."""
    styles = {style.style_id: style for style in document.styles}
    names = {key: HEADING.match(style.name or "") for key, style in styles.items()}
    bases = {key: style.element.basedOn_val for key, style in styles.items()}
    levels = {}
    for key in styles:
        base = key
        for _ in range(9):  # styles of a broken document may be based on each other in a circle
            if match := names.get(base):
                levels[key] = int(match[1] or 1)
                break
            base = bases.get(base)
    return levels


def _runs(paragraph: Any) -> list[Any]:
    """Returns the runs of text in a paragraph, with those of its links and fields."""
    return list(paragraph.xpath(".//w:r[not(ancestor::w:txbxContent)]"))


def _lines(paragraph: Any) -> list[tuple[str, bool]]:
    """Returns the lines of a paragraph, which manual line breaks separate, and whether each is bold."""
    lines: list[list[tuple[str, bool]]] = [[]]
    for run in _runs(paragraph):
        bold = bool(run.xpath("./w:rPr/w:b[not(@w:val='0' or @w:val='false')]"))
        first, *others = run.text.split("\n")
        lines[-1].append((first, bold))
        lines += [[(text, bold)] for text in others]
    return [("".join(text for text, _ in line), all(bold for text, bold in line if text.strip())) for line in lines]


def _filled_rows(table: Any) -> Iterator[tuple[int, list[Any]]]:
    """Yields the number and the cells of each row that has text.

    A cell that spans columns has its text in the first of them, and one that spans rows has it in each of them.
    """
    above: list[Any] = []
    for number, row in enumerate(table.tr_lst, start=1):
        cells: list[Any] = []
        for cell in row.tc_lst:
            at = len(cells)
            text: Any = "\n".join(text for paragraph in cell.xpath("./w:p") for text, _ in _lines(paragraph))
            if cell.vMerge == "continue" and at < len(above):
                text = above[at]
            elif cell.xpath("./w:tbl"):
                text = NoText("a table in a cell")
            cells += [text, *[""] * (min(cell.grid_span, WIDEST) - 1)]
        above = cells
        if any(isinstance(cell, NoText) or cell.strip() for cell in cells):
            yield number, cells


def _is_only_table(tables: dict[int, Rows], lines: list[Line], options: ReadOptions) -> bool:
    """Returns whether the document is one table, with hardly any text beside it."""
    texts = sum(bool(line.text.strip()) for line in lines)
    return len(tables) == 1 and (bool(options.columns) or all(texts <= len(rows) for rows in tables.values()))


def _is_header(cells: list[Any], options: ReadOptions) -> bool:
    """Returns whether the first row of a table names the columns of question and answer."""
    try:
        map_columns(column_names(cells), options)
    except UserError:
        return False
    return True


def _table_rows(
    file: Source, tables: dict[int, Rows], options: ReadOptions, notes: ReaderNotes
) -> Iterator[tuple[str, Any]]:
    for number, rows in tables.items():
        yield from named_rows(f"{file}[table {number}]", iter(rows), options, notes)


def _dialogue(file: Source, lines: list[Line], options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    """Reads lines that start with roles as a text file; headings between them belong to no answer."""
    headings = [line.level > 0 and not begins_with_role(line.text, options) for line in lines]
    _note_unused(file, [line for line, heading in zip(lines, headings, strict=True) if heading], notes)
    kept = [(line.number, f"{line.text}\n") for line, heading in zip(lines, headings, strict=True) if not heading]
    yield from read_text(_text_of(file), functools.partial(iter, kept), options, notes)


def _paragraphs(file: Source, lines: list[Line], options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    """Reads each paragraph as plain text."""
    for table in (line.table for line in lines if line.table):
        notes.add("tables, not read as plain text", f"{file.name}[table {table}]")
    kept: list[tuple[int, str]] = []
    for line in lines:
        if kept and line.number != kept[-1][0]:
            kept.append((kept[-1][0], "\n"))
        kept.append((line.number, f"{line.text}\n"))
    yield from read_text(_text_of(file), functools.partial(iter, kept), options, notes)


def _answers(file: Source, lines: list[Line], options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    """Yields a row for each heading that asks: the text up to the next heading that is not below it answers."""
    if lines[0].level == BOLD:
        notes.add("bold lines that end in a question mark are read as questions", file.name)
    question: Line | None = None
    answer: list[Line] = []
    for line in [*lines, Line(0, "", 1)]:
        if line.level and (line.asks or not question or line.level <= question.level):
            if question:
                yield _row(file, question, answer)
            question, answer = (line if line.asks else None), []
        if not question:
            _note_unused(file, [line], notes)
        elif line != question:
            answer.append(line)


def _row(file: Source, question: Line, answer: list[Line]) -> Row:
    where = f"{_text_of(file)}:{question.number}"
    turns = [Turn(Message("user", question.text), where)]
    text = "\n".join(line.text for line in answer)
    if text.strip():
        turns.append(Turn(Message("assistant", text), where))
    return make_row(turns, where)


def _text_of(file: Source) -> Source:
    """Returns the paragraphs of a document as a source of their own, for messages."""
    return Source(file.path, f"{file}[paragraphs]")


def _note_unused(file: Source, lines: list[Line], notes: ReaderNotes) -> None:
    for line in lines:
        if line.table:
            notes.add("tables without questions and answers, not read", f"{file.name}[table {line.table}]")
        elif line.text.strip():
            notes.add("lines outside of questions and answers, not read", file.name)
