"""Archives of rows for `fuzz.py`: an Excel workbook, Word documents, a gzip file and a zip file."""

import datetime
import gzip
import json
import zipfile
from pathlib import Path

import docx
import openpyxl

PAIRS = [{"question": f"Is it {i}?", "answer": f"It is {i}."} for i in range(6)]
CSV = "question,answer\n" + "".join(f"Is it {i}?,It is {i}.\n" for i in range(6))


def make_workbook(directory: Path) -> list[str]:
    """Writes rows as an Excel workbook, with a number, a date and a formula."""
    directory.mkdir(parents=True)
    book = openpyxl.Workbook()
    for row in [("question", "answer", "more"), *(tuple(pair.values()) for pair in PAIRS)]:
        book.active.append(row)
    for cell, value in {"C2": 0.5, "C3": datetime.date(2024, 1, 31), "C4": "=A2"}.items():
        book.active[cell] = value
    book.create_sheet("Empty").sheet_state = "hidden"
    book.save(directory / "rows.xlsx")
    return ["rows.xlsx"]


def make_documents(directory: Path) -> list[str]:
    """Writes rows as Word documents: a table, headings that ask, and lines with roles."""
    directory.mkdir(parents=True)
    table, headings, lines = docx.Document(), docx.Document(), docx.Document()
    rows = [("question", "answer"), *(tuple(pair.values()) for pair in PAIRS)]
    cells = table.add_table(len(rows), 2)
    for number, row in enumerate(rows):
        for column, text in enumerate(row):
            cells.cell(number, column).text = text
    for question, answer in rows[1:]:
        headings.add_heading(question, 2)
        headings.add_paragraph(answer)
        lines.add_paragraph(f"Q: {question}\nA: {answer}")
    made = {"table.docx": table, "headings.docx": headings, "lines.docx": lines}
    for name, document in made.items():
        document.save(str(directory / name))
    return list(made)


def make_zip(directory: Path) -> list[str]:
    """Writes rows as a zip archive of two files."""
    directory.mkdir(parents=True)
    with zipfile.ZipFile(directory / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", "\n".join(map(json.dumps, PAIRS)))
        archive.writestr("more/rows.csv", CSV)
    return ["rows.zip"]


def make_gzip(directory: Path) -> list[str]:
    """Writes rows as a gzip file."""
    directory.mkdir(parents=True)
    (directory / "rows.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    return ["rows.csv.gz"]
