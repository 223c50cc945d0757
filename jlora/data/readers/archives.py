"""Archives of rows: the files in gzip and zip archives are unpacked to a temporary directory, one at a time.

Excel and Word files are zip archives too; their content tells them apart.
"""

import contextlib
import errno
import gzip
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from jlora.common.errors import UserError
from jlora.data.readers.source import Source, is_skipped

GZIP, ZIP = b"\x1f\x8b", (b"PK\x03\x04", b"PK\x05\x06")
CHUNK = 1 << 20  # bytes
# Text becomes about ten times smaller, and a decompression bomb a thousand times. A small archive may always contain
# SMALL bytes.
MOST_TIMES, SMALL = 200, 1 << 26
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Python decompresses any amount of the others at once
OTHER_METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}
OFFICE = {r"xl/workbook\d*\.xml": "workbook", r"word/document\d*\.xml": "document"}  # member -> kind of file
NOT_READ = {
    "xl/workbook.bin": "a binary Excel workbook. Save it as .xlsx, or the table as CSV.",
    "ppt/presentation.xml": "a PowerPoint file. Save its text as .txt.",
    "META-INF/manifest.xml": "an OpenDocument file. Save it as .xlsx or .docx, or the table as CSV.",
}
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError, OverflowError)


def archive_kind(file: Source) -> str:
    """Returns "gzip", "zip", "workbook" for Excel, "document" for Word, or "" if the file is not an archive.

    Raises:
      UserError: the archive is broken, of an unknown kind, or would unpack to too many bytes.
    """
    with file.open("rb") as stream:
        head = stream.read(512)
    if head[257:262] == b"ustar":
        raise UserError(f"{file} is a tar archive. Unpack it, and pass the directory.")
    if head.startswith(GZIP):
        return "gzip"
    if not head.startswith(ZIP):
        return ""
    with _opened(file) as archive:
        names, size = archive.namelist(), sum(member.file_size for member in archive.infolist())
    if problem := next((text for name, text in NOT_READ.items() if name in names), ""):
        raise UserError(f"{file} is {problem}")
    if size > _limit(file):
        raise _too_large(file)
    return next((kind for pattern, kind in OFFICE.items() if any(re.fullmatch(pattern, name) for name in names)), "zip")


def unpack(file: Source) -> Iterator[Source]:
    """Yields the files in a gzip or zip archive, in order of their names; each exists until the next one is yielded.

    Raises:
      UserError: the archive is broken or encrypted, contains another archive, or unpacks to too many bytes.
    """
    with tempfile.TemporaryDirectory(prefix="jlora-") as scratch:
        unpacked = Path(scratch) / "rows"  # not the member's own name, which may point out of the directory
        for shown, read in _members(file):
            left = _limit(file)
            with _explained(file), unpacked.open("wb") as out:
                while chunk := read(CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise _too_large(file)
                    out.write(chunk)
            member = Source(unpacked, shown)
            if archive_kind(member) in ("gzip", "zip"):
                raise UserError(f"{shown} is an archive in an archive. Unpack {file}, and pass the directory.")
            yield member


def _members(file: Source) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    """Yields the name in messages of each file in an archive, and the function that reads it."""
    if archive_kind(file) == "gzip":
        with gzip.open(file.path) as packed:
            yield file.shown, packed.read
        return
    with _opened(file) as archive:
        members = [member for member in archive.infolist() if _holds_rows(member.filename)]
        if not members:
            raise UserError(f"{file}: The archive contains no data files. Put files with rows into it.")
        for member in sorted(members, key=lambda member: member.filename):
            shown = f"{file}/{member.filename}"
            if member.flag_bits & 1:
                raise UserError(f"{shown} is encrypted. Unpack it with its password, and pass the directory.")
            if member.compress_type not in METHODS:
                method = OTHER_METHODS.get(member.compress_type, f"method {member.compress_type}")
                raise UserError(f"{shown} is compressed with {method}. Unpack {file}, and pass the directory.")
            with archive.open(member) as content:
                yield shown, content.read


def _holds_rows(name: str) -> bool:
    return not name.endswith("/") and not any(is_skipped(part) for part in re.split(r"[/\\]", name) if part.strip("."))


@contextlib.contextmanager
def _opened(file: Source) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive."""
    with _explained(file), zipfile.ZipFile(file.path) as archive:
        yield archive


@contextlib.contextmanager
def _explained(file: Source) -> Iterator[None]:
    """Turns the errors of a broken archive or of a full disk into a UserError."""
    try:
        yield
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f"{file} cannot be unpacked to {tempfile.gettempdir()}: {error.strerror}"
            raise UserError(f"{place}. Free some space, or set TMPDIR to another directory.") from None
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(
            f"{file} is not a valid archive (.xlsx and .docx files are zip archives): {error}. Save it again, or save "
            "its rows as CSV."
        ) from None


def _limit(file: Source) -> int:
    """Returns how many bytes an archive may contain."""
    return max(SMALL, MOST_TIMES * file.path.stat().st_size)


def _too_large(file: Source) -> UserError:
    return UserError(
        f"{file} contains more than {_limit(file):,} bytes, over {MOST_TIMES} times its size, as a decompression bomb "
        "does. If you trust it, unpack it and pass the directory, or save the table as CSV."
    )
