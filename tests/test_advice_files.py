"""The advice of every error message about files, paths, archives and office files is followed; then rows are read."""

import configparser
import gzip
import io
import json
import os
import sys
import tarfile
import zipfile

import openpyxl
import pytest
import tensorflow_datasets as tfds
from advice import PAIR, Case, case, follow, reader, sites, unmet
from conftest import ROOT
from test_archives import zipped
from test_bad_rows import HTML
from test_excel import edited, saved, workbook
from test_formats_fuzz import as_parquet
from test_layouts import contents, jsonl, read
from test_word import document

TEXT, CSV, ROWS = "User: a?\nLawyer: b\n", "question,answer\na?,b\n", jsonl({"q": "a?", "a": "b"})
TABLE, OLD = [("question", "answer"), ("a?", "b")], [("question", "answer"), ("c?", "d")]
UNPACKED, AS_TEXT, AS_CSV = {"laws/rows.jsonl": ROWS, "laws/README": ""}, {"a.txt": TEXT}, {"a.csv": CSV}
BOTH, PLAIN = [*PAIR, ["c?", "d"]], {"task_type": "plain-text"}
META = "file,prompt,response\none.csv,2,3\n"
EXCEPTIONS = {
    "{directory} cannot be read": "the system keeps a directory from a user; root may read all",
    "{file} cannot be read: {error.strerror or error}": "a disk fails, or the system keeps a file from a user",
    "Free some space, or set TMPDIR": "the disk is full; test_archives fills it",
}


def tar():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        info = tarfile.TarInfo("rows.jsonl")
        info.size = len(ROWS)
        archive.addfile(info, io.BytesIO(ROWS.encode()))
    return made.getvalue()


def encrypted():
    content = bytearray(zipped([("rows.jsonl", ROWS)]))
    content[content.index(b"PK\x03\x04") + 6] |= 1  # the flags, in the member's own header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def hidden():
    book = openpyxl.load_workbook(io.BytesIO(workbook(Laws=TABLE, Empty=[])))
    book["Laws"].sheet_state = "hidden"
    return saved(book)


BOMB, LZMA = zipped([("rows.jsonl", ROWS + " " * (65 << 20))]), zipped([("rows.jsonl", ROWS)], zipfile.ZIP_LZMA)
INNER = zipped([("a.txt", TEXT)])
GZIP = gzip.compress(ROWS.encode())
ARCHIVES = [
    case("laws.zip", BOMB, "over 200 times its size", "unpack it and pass the directory", UNPACKED),
    case("laws.zip", BOMB, "over 200 times its size", "save the table as CSV", AS_CSV),
    case("laws.tar", tar(), "is a tar archive", "Unpack it, and pass the directory", UNPACKED),
    case("a.zip", zipped([("README", "x")]), "no data files", "Put files with rows into it", INNER),
    case("rows.gz", GZIP[:-9], "rows.gz is not a valid archive", "Save it again", GZIP),
    case("a.xlsx", b"PK\x03\x04....", "a.xlsx is not a valid archive", "save its rows as CSV", AS_CSV),
    case("a.zip", zipped([("b.zip", INNER)]), "archive in an archive", "Unpack ", {"a/b.zip": INNER, "a/README": ""}),
    case("laws.zip", encrypted(), "is encrypted", "Unpack it with its password, and pass the directory", UNPACKED),
    case("laws.zip", LZMA, "is compressed with LZMA", "and pass the directory", UNPACKED),
]
BOOK, BOOKS = workbook(Laws=TABLE), workbook(Laws=TABLE, Old=OLD)
BROKEN = edited(BOOK, "xl/worksheets/sheet1.xml", b"</sheetData>", b"")
EXCEL = [
    case("a.xlsx", hidden(), "No visible sheet has rows", "Add #Laws to the path", {"sheet": "Laws"}),
    case("a.xlsx", workbook(Laws=[]), "No sheet has rows", "write rows into it", BOOK),
    case("a.xlsx", BOOKS, "2 sheets have rows: 'Laws', 'Old'", "as in a.xlsx#Laws", {"sheet": "Laws"}),
    case("a.xlsx", BOOKS, "2 sheets have rows", "add #* to read all of them", {"sheet": "*"}, gives=BOTH),
    case("a.xlsx", BOOKS, "no sheet 'laws'.*'Laws', 'Old'", "Name one of them", {"sheet": "Laws"}, sheet="laws"),
    case("a.xlsx", BROKEN, "cannot be read as an Excel workbook", "Save it again in Excel", BOOK),
    case("a.xlsx", BROKEN, "cannot be read as an Excel workbook", "save the table as CSV", AS_CSV),
    case("a.xlsb", zipped([("xl/workbook.bin", "x")]), "a binary Excel workbook", "Save it as .xlsx", {"a.xlsx": BOOK}),
    case("a.pptx", zipped([("ppt/presentation.xml", "x")]), "PowerPoint", "Save its text as .txt", AS_TEXT),
    case("a.ods", zipped([("META-INF/manifest.xml", "x")]), "OpenDocument", "Save it as .xlsx", {"a.xlsx": BOOK}),
]
ASKED, HEADED = ("Heading 2", "a?"), document(("Heading 2", "a?"), "b")
SPOKEN, PROSE = document("Q: a?", "A: b"), document("Leave", "Paid.")
DOCUMENT, PART = "word/document.xml", b"<w:t>A: b</w:t>"
CHANGED = edited(SPOKEN, DOCUMENT, PART, PART + b"</w:r><w:del/><w:r>")
TORN = edited(SPOKEN, DOCUMENT, b"<w:body>", b"<body>")
DATES = [("From", "To"), ("May", "June")]
PARTS = {"a/1.docx": document(TABLE), "a/2.docx": HEADED}
WORD = [
    case("a.docx", document(TABLE, ASKED, "b"), "Both table 1 and the", "Split the document", PARTS, gives=PAIR * 2),
    case("a.docx", PROSE, "Found no questions", "headings that end in a question mark", HEADED),
    case("a.docx", PROSE, "Found no questions", "lines that start with a role (`Q: ...`, `A: ...`)", SPOKEN),
    case("a.docx", PROSE, "Found no questions", "a table whose header names them", document(TABLE)),
    case("a.docx", document("Leave"), "Found no questions", "set task_type=plain-text", PLAIN, gives=[["Leave"]]),
    case("a.docx", document(ASKED, "b", DATES), "Table 1 is among the answers", "Write it as text", HEADED),
    case("a.docx", document(ASKED, "b", DATES), "Table 1", "before the first question", document(DATES, ASKED, "b")),
    case("a.docx", CHANGED, "has tracked changes", "Accept or reject them in Word, and save it", SPOKEN),
    case("a.docx", TORN, "cannot be read as a Word document", "Save it again as .docx", SPOKEN),
    case("a.docx", TORN, "cannot be read as a Word document", "save its text as .txt", AS_TEXT),
]
LATIN, UTF_8 = "User: a?\nLawyer: b\xe9".encode("latin-1"), "User: a?\nLawyer: b\xe9"
LONG = "b" * (17 << 20)
SPLIT = "\n".join(["b" * (1 << 20)] * 3)
KINDS = [
    case("a.doc", b"\xd0\xcf\x11\xe0", "an old Office file", "Save the table as CSV", AS_CSV),
    case("a.pdf", b"%PDF-1.7", "is a PDF", "Save its text as .txt", AS_TEXT),
    case("a.rtf", b"{\\rtf1 User: a?}", "a Rich Text document", "Save it as plain text (.txt)", AS_TEXT),
    case("a.zst", b"\x28\xb5\x2f\xfd", "compressed with zstd", "Decompress it", {"a.jsonl": ROWS}),
    case("a.feather", b"FEA1", "Feather file", "Save it as Parquet", {"a.parquet": as_parquet([("a?", "b")])}),
    case("a.db", b"SQLite format 3", "an SQLite database", "Save the table as CSV", AS_CSV),
    case("a.txt", LATIN, "a.txt:2: Not valid UTF-8", "Save the file as UTF-8", UTF_8, gives=[["a?", "b\xe9"]]),
    case("a.txt", LATIN, "a.txt:2: Not valid", "set encoding", {"encoding": "latin-1"}, gives=[["a?", "b\xe9"]]),
    case("a.txt", "", "The file is empty", "write rows into it", TEXT),
    case("a.txt", "\ufeff\n", "The file is empty", "Remove it", {"a/more.txt": TEXT, "a/README": ""}),
    case("a.txt", LONG, "a.txt:1: The line is longer than 16,777,216", "Split it into several", SPLIT, gives=[[SPLIT]]),
    case("a.html", HTML, "a.html is an HTML page", "Save its text as .txt", AS_TEXT),
    case("a.html", HTML, "a.html is an HTML page", "its table as CSV", AS_CSV),
    case("a.html", HTML, "a.html is an HTML page", "set task_type=plain-text", PLAIN, gives=[[HTML]]),
    case("a.parquet", b"PAR1....PAR1", "as Parquet after row 0", "Save it again", as_parquet([("a?", "b")])),
    case("a.csv", CSV, "Only Excel workbooks have sheets", "Remove #New", {"sheet": ""}, sheet="New"),
    case("a.csv", f"{CSV}a?\n", "a.csv:3: Expected 2 cells, got 1", "Expected 2 cells", f"{CSV}a?,b\n", gives=PAIR * 2),
    case("a.json", "[]", "contains no usable rows", "Add some", json.dumps([{"q": "a?", "a": "b"}])),
    case("a.csv", f"{CSV}c?,\nd?,\n", "2 of 3 rows cannot be used", "set bad_rows=drop", {"bad_rows": "drop"}),
    case("a.csv", f"{CSV}c?,\nd?,\n", "2 of 3 rows cannot be used", "Fix them", f"{CSV}a?,b\na?,b\n", gives=PAIR * 3),
]


def missing(package, module, content, name):
    def steps(place, patch):
        path = reader(place, {name: content}, {})
        patch.setitem(sys.modules, module, None)
        yield path
        patch.undo()
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert f"\n{package}>=" in setup["options.extras_require"]["office"]
        yield path

    return steps


def linked(make, mend):
    """Something else lies beside the rows: `make` puts it there, `mend` changes it."""

    def steps(place, patch):
        read_rows, other = reader(place, {"a.txt": TEXT, "README": ""}, {}), place / "other.txt"
        make(other)
        yield read_rows
        mend(other)
        yield read_rows

    return steps


def path_of(place, patch):
    read_rows = reader(place, {"a.txt": TEXT}, {})
    yield lambda: read(place / "b.txt")
    yield read_rows


def no_files(place, patch):
    place.mkdir(parents=True, exist_ok=True)
    yield lambda: read(place)
    yield reader(place, {"a.txt": TEXT}, {})


def kinds(place, patch):
    yield reader(place / "one", {"a.txt": TEXT, "b.txt": "Read me."}, {})
    yield reader(place / "two", {"a.txt": TEXT, "README": "Read me."}, {})


def kinds_as_text(place, patch):
    yield reader(place, {"a.txt": TEXT, "b.txt": "Read me."}, {})
    yield reader(place, {"a.txt": TEXT, "b.txt": "Read me."}, PLAIN)


def metadata(found, advice, before, name="meta.csv"):
    """Returns a directory of rows with a file for metadata_path, whose content changes."""

    def steps(place, patch):
        for number, (content, file) in enumerate([(before, name), (META, "meta.csv")]):
            rows, path = place / f"{number}/rows", place / f"{number}/{file}"
            settings = {"metadata_path": str(path), "train_data_dir": str(rows)}
            read_rows = reader(rows, {"one.csv": "x,a?,b\ny,a?,b\n", "README": ""}, settings)
            if content:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
            yield read_rows

    return Case(found, advice, steps, PAIR * 2)


class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        texts = tfds.features.FeaturesDict({"question": tfds.features.Text(), "answer": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=texts)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("a?"), "test": self._generate_examples("c?")}

    def _generate_examples(self, question):
        yield 0, {"question": question, "answer": "b"}


def prepare(place):
    builder = Pairs(data_dir=str(place), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def of_tfds(wrong):
    def steps(place, patch):
        directory = prepare(place)
        yield lambda: read(wrong.format(directory))
        yield lambda: contents(read(f"tfds:{directory}/train")[0])

    return steps


def part_of_tfds(place, patch):
    directory = prepare(place)
    yield lambda: read(next(directory.glob("*train.array_record*")))
    yield lambda: contents(read(f"tfds:{directory}/train")[0])


def other_format(place, patch):
    directory = prepare(place)
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    yield lambda: read(f"tfds:{directory}/train")
    prepared = prepare(place / "again")
    yield lambda: contents(read(f"tfds:{prepared}/train")[0])


def unlink(path):
    path.unlink()


PATHS = [
    Case("is an Excel workbook", "Run `pip install openpyxl`", missing("openpyxl", "openpyxl", BOOK, "a.xlsx")),
    Case("is a Word document", "Run `pip install python-docx`", missing("python-docx", "docx", SPOKEN, "a.docx")),
    Case("b.txt: No such file or directory", "Correct the path", path_of),
    Case("The directory contains no data files", "Put files with rows into it", no_files),
    Case("a link to one of its own parent", "Remove it", linked(lambda p: p.symlink_to(p.parent), unlink)),
    Case("is not a regular file", "Remove it", linked(os.mkfifo, unlink)),
    Case("is a broken symbolic link", "Remove or fix it", linked(lambda p: p.symlink_to("nothing"), unlink)),
    Case("b.txt:1 is plain text, but .*a.txt:1 is a conversation", "Keep one kind in train_data_dir=", kinds),
    Case("is plain text, but", "set task_type=plain-text", kinds_as_text, [[TEXT.strip()], ["Read me."]]),
    metadata("metadata_path=.*No such file", "Correct the path", ""),
    metadata("meta.xlsx is a zip archive", "Save the table as CSV", BOOK, "meta.xlsx"),
    metadata("meta.csv.gz is compressed with gzip", "Decompress it", gzip.compress(META.encode()), "meta.csv.gz"),
    metadata("meta.csv:1: ", "Expected the columns file, prompt and response", "name,prompt\na,b\n"),
    metadata("meta.csv:2: ", "Expected 2 cells", "file,prompt\none.csv\n"),
    metadata("meta.csv:2: File 'on.csv' does not exist", "Correct its name", META.replace("one", "on")),
    metadata("meta.csv:2: ", "Expected columns for prompt and response", "file,prompt\none.csv,2\n"),
    Case("is part of a TFDS data set", "dataset_info.json, as tfds:DIRECTORY/SPLIT", part_of_tfds),
    Case("where SPLIT is one of test, train", "/SPLIT", of_tfds("tfds:{}/dev")),
    Case("TFDS cannot load this data set", "as tfds:DIRECTORY/SPLIT", of_tfds("tfds:no_such_pairs/train")),
    Case("cannot be read: .*", "Prepare the data set with file_format='array_record'", other_format),
]
CASES = [*ARCHIVES, *EXCEL, *WORD, *KINDS, *PATHS]
FILES = "archives encoding excel files parquet_tfds source splits word".split()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.found[:40]}-{case.advice[:30]}")
def test_advice_is_followed(case, tmp_path, monkeypatch):
    follow(case, tmp_path, monkeypatch)


def test_every_message_about_files_has_a_case(tmp_path):
    found = sites(f"data/readers/{name}.py" for name in FILES)
    assert not unmet(CASES, found, EXCEPTIONS, tmp_path)
