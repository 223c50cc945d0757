"""Gzip and zip archives: their files are read as if they were unpacked, within limits, and nothing is left behind."""

import contextlib
import gzip
import io
import os
import tarfile
import tempfile
import zipfile

import pytest
from test_excel import HEADER, ONE, PAIRS, TWO, workbook
from test_formats_fuzz import as_parquet
from test_layouts import contents, jsonl, quoted, read

from jlora.common.errors import UserError
from jlora.data.readers import archives, files

ROWS = [{"question": q, "answer": a} for q, a in (ONE, TWO)]
FILES = {
    "rows.jsonl": jsonl(*ROWS).encode(),
    "rows.csv": quoted(",", HEADER, ONE, TWO).encode("utf-16"),
    "rows.tsv": quoted("\t", HEADER, ONE, TWO).encode("gb18030"),
    "rows.txt": f"User: {ONE[0]}\nLawyer: {ONE[1]}\n\nUser: {TWO[0]}\nLawyer: {TWO[1]}\n".encode(),
    "rows.parquet": as_parquet([ONE, TWO]),
    "rows.xlsx": workbook(Laws=[HEADER, ONE, TWO]),
}


def zipped(members, method=zipfile.ZIP_DEFLATED):
    """Returns a zip archive of (name, content), in this order."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, text in members:
            archive.writestr(name, text)
    return content.getvalue()


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The directory for temporary files, which is empty after each test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_compressed_file_is_read_as_the_file(file, name):
    path = file(gzip.compress(FILES[name]), f"{name}.gz")
    rows, said = read(path)
    assert contents(rows) == PAIRS and all(row.where.startswith((f"{path}:", f"{path}[Laws]:")) for row in rows)
    plain, plainly = read(file(FILES[name], name))
    assert [row.where.replace(".gz", "") for row in rows] == [row.where for row in plain]
    assert [line.replace(".gz", "") for line in said] == plainly


def test_the_content_shows_that_a_file_is_compressed(file):
    assert contents(read(file(gzip.compress(FILES["rows.csv"]), "rows.csv"))[0]) == PAIRS
    assert contents(read(file(FILES["rows.csv"], "rows.csv.gz"))[0]) == PAIRS
    assert contents(read(file(zipped([("rows.csv", FILES["rows.csv"])]), "rows.csv"))[0]) == PAIRS


def test_the_files_of_a_zip_are_read_in_order_of_names(file):
    path = file(zipped(reversed([(name, FILES[name]) for name in FILES])), "laws.zip")
    rows, _ = read(path)
    assert contents(rows) == PAIRS * len(FILES)
    names = sorted(FILES)
    assert [row.where.split(".zip/")[1].split(":")[0].removesuffix("[Laws]") for row in rows[::2]] == names


def test_files_in_a_zip_are_skipped_as_in_a_directory(file):
    skipped = ["README.md", "__MACOSX/._rows.csv", ".git/rows.csv", "sub\\.hidden.csv", "LICENSE", "a/Thumbs.db"]
    members = [(name, "not read") for name in skipped] + [("sub/", ""), ("./sub/rows.csv", FILES["rows.csv"])]
    assert contents(read(file(zipped(members), "laws.zip"))[0]) == PAIRS
    for content in (zipped(members[:-1]), zipped([])):
        with pytest.raises(UserError, match=r"laws.zip: The archive contains no data files"):
            read(file(content, "laws.zip"))


def test_a_file_without_a_name_is_read(file):
    content = zipped([("no-name", FILES["rows.csv"])]).replace(b"no-name", b"\0" * 7)
    assert contents(read(file(content, "laws.zip"))[0]) == PAIRS


def test_bad_rows_are_reported_by_archive_file_and_line(file):
    content = zipped([("faq/rows.jsonl", jsonl(ROWS[0], {"question": "c?", "answer": ""}, ROWS[1]))])
    path = file(content, "laws.zip")
    with pytest.raises(UserError, match=f"{path}/faq/rows.jsonl:2: The answer is empty"):
        read(path)
    rows, _ = read(path, bad_rows="drop")
    assert [row.where for row in rows] == [f"{path}/faq/rows.jsonl:1", f"{path}/faq/rows.jsonl:3"]
    with pytest.raises(UserError, match=r"rows.csv.gz:3: Expected 2 cells, got 1"):
        read(file(gzip.compress(b"question,answer\na,b\nc\n"), "rows.csv.gz"))
    with pytest.raises(UserError, match=r"laws.zip/laws.xlsx: 2 sheets have rows"):
        read(file(zipped([("laws.xlsx", workbook(A=[HEADER, ONE], B=[HEADER, TWO]))]), "laws.zip"))
    assert contents(read(f"{path}#B")[0]) == [[*TWO]]


@pytest.mark.parametrize("name", ["../../evil.jsonl", "/evil.jsonl", "..\\..\\evil.jsonl", "C:\\evil", "x/../../e"])
def test_names_that_point_elsewhere_are_harmless(file, tmp_path, name):
    path = file(zipped([(name, FILES["rows.jsonl"])]), "laws.zip")
    before = sorted(tmp_path.parent.rglob("*"))
    assert contents(read(path)[0]) == PAIRS
    assert sorted(tmp_path.parent.rglob("*")) == before and not os.path.exists("/evil.jsonl")


@pytest.mark.parametrize("outer", ["zip", "gzip"])
@pytest.mark.parametrize("inner", ["rows.zip", "rows.jsonl.gz"])
def test_archives_in_archives_are_refused(file, outer, inner):
    content = zipped([("rows.jsonl", FILES["rows.jsonl"])]) if inner == "rows.zip" else gzip.compress(b"a")
    packed = zipped([(inner, content)]) if outer == "zip" else gzip.compress(content)
    with pytest.raises(UserError, match=r"is an archive in an archive. Unpack .*, and pass the directory"):
        read(file(packed, "laws.archive"))


def test_tar_archives_are_refused(file):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(FILES["rows.jsonl"])
        archive.addfile(member, io.BytesIO(FILES["rows.jsonl"]))
    for name, packed in (("laws.tar", content.getvalue()), ("laws.tar.gz", gzip.compress(content.getvalue()))):
        with pytest.raises(UserError, match=f"{name} is a tar archive. Unpack it, and pass the directory"):
            read(file(packed, name))


def test_encrypted_files_are_refused_by_name(file):
    content = bytearray(zipped([("rows.jsonl", FILES["rows.jsonl"])]))
    content[content.index(b"PK\x03\x04") + 6] |= 1  # the flags, in the member's own header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(UserError, match=r"laws.zip/rows.jsonl is encrypted. Unpack it with its password"):
        read(file(bytes(content), "laws.zip"))


@pytest.mark.parametrize(("method", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")])
def test_other_compression_is_refused_by_name(file, method, name):
    with pytest.raises(UserError, match=f"laws.zip/rows.jsonl is compressed with {name}. Unpack"):
        read(file(zipped([("rows.jsonl", FILES["rows.jsonl"])], method), "laws.zip"))


def test_decompression_bombs_are_refused(file, temporary):
    row = jsonl({"question": "a?", "answer": "b" * 1_000_000}).encode()
    rows = row * 80
    limit = f"{archives.SMALL:,}"
    for name, content in (("a.jsonl.gz", gzip.compress(rows)), ("a.zip", zipped([("rows.jsonl", rows)]))):
        with pytest.raises(UserError, match=f"{name} contains more than {limit} bytes, over 200 times its size"):
            read(file(content, name))
    sheets = {f"xl/worksheets/sheet{number}.xml": bytes(30 << 20) for number in (1, 2, 3)}
    with pytest.raises(UserError, match=r"a.xlsx contains more than 67,108,864 bytes, over 200 times its size"):
        read(file(zipped([("xl/workbook.xml", ""), *sheets.items()]), "a.xlsx"))
    assert len(read(file(gzip.compress(row * 60), "a.jsonl.gz"))[0]) == 60  # a small archive may contain that much


def test_a_size_that_lies_is_an_error(file):
    content = bytearray(zipped([("rows.jsonl", FILES["rows.jsonl"] * 100)]))
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (10).to_bytes(4, "little")
    with pytest.raises(UserError, match=r"laws.zip is not a valid archive .*Bad CRC"):
        read(file(bytes(content), "laws.zip"))


def test_broken_archives_are_refused(file):
    for name, content in (
        ("laws.zip", zipped([("rows.jsonl", FILES["rows.jsonl"])])),
        ("rows.jsonl.gz", gzip.compress(FILES["rows.jsonl"])),
    ):
        for broken in (content[:-30], content[:40] + b"????" + content[44:]):
            with pytest.raises(UserError, match=f"{name} is not a valid archive .*Save it again"):
                read(file(broken, name))


@pytest.mark.parametrize(
    ("member", "kind"),
    [
        ("xl/workbook.bin", r"a binary Excel workbook. Save it as .xlsx"),
        ("ppt/presentation.xml", r"a PowerPoint file. Save its text as .txt"),
        ("META-INF/manifest.xml", r"an OpenDocument file. Save it as .xlsx or .docx"),
    ],
)
def test_other_office_files_are_refused_by_kind(file, member, kind):
    with pytest.raises(UserError, match=f"laws.x is {kind}"):
        read(file(zipped([("[Content_Types].xml", "x"), (member, "x")]), "laws.x"))


def test_a_full_disk_is_reported(file, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def full(prefix):
        (tmp_path / "full").mkdir()
        (tmp_path / "full/rows").symlink_to("/dev/full")
        yield str(tmp_path / "full")

    path = file(gzip.compress(FILES["rows.jsonl"]), "rows.jsonl.gz")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(UserError, match=r"rows.jsonl.gz cannot be unpacked to .*: No space left .* set TMPDIR"):
        read(path)


def test_nothing_is_left_if_reading_stops(file, temporary):
    path = file(zipped([("a.jsonl", FILES["rows.jsonl"]), ("b.jsonl", FILES["rows.jsonl"])]), "laws.zip")
    rows = files.iter_conversations(str(path), "train_data_dir")
    next(rows)
    assert len(list(temporary.rglob("rows"))) == 1
    rows.close()
    assert not list(temporary.iterdir())
