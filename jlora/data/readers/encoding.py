"""Bytes -> lines of text: which encoding a file is in, told by a pass over all of it, and its lines as a stream."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from jlora.common.errors import UserError
from jlora.data.conversation import MAX_ROW

CHUNK = 1 << 20  # bytes
HEAD = 1 << 16  # characters
UTF_8, GB18030 = "utf-8", "gb18030"
MARKS = {  # the longer first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
COMMON = re.compile(r"[\t\n\r -~\u00a0-\u024f\u0400-\u04ff\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uff60]")
BINARY = {  # how files begin that are not text, and what to do about it
    b"PK\x03\x04": "a zip archive (.xlsx and .docx are): save the table as CSV, or the text as .txt",
    b"\xd0\xcf\x11\xe0": "an old Office file: save the table as CSV, or the text as .txt",
    b"%PDF": "a PDF: save its text as .txt",
    b"\x1f\x8b": "compressed (gzip): unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): unpack it",
    b"ARROW1": "Arrow: save it as Parquet",
    b"SQLite format 3": "a SQLite database: save the table as CSV",
}


def detect(file: Path, named: str = "") -> str:
    """The Python name of a text file's encoding: UTF-8, UTF-16 or UTF-32 with or without a mark, or GB18030.

    Args:
      named: the config's `encoding`; "" tells it from the bytes.

    Raises:
      UserError: the file is empty, is not text, or is in none of them; by line where that helps.
    """
    with file.open("rb") as stream:
        head = stream.read(CHUNK)
    if not head.strip():
        raise UserError(f"{file}: the file is empty")
    if kind := next((kind for magic, kind in BINARY.items() if head.startswith(magic)), ""):
        raise UserError(f"{file} is {kind}")
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    encoding = named or marked or _without_mark(head)
    wrong = _first_wrong(file, encoding)
    if wrong is None:
        return encoding
    if encoding == UTF_8 and not named and _first_wrong(file, GB18030) is None and _is_chinese(file):
        return GB18030
    expected = named or marked or "UTF-8, UTF-16 or GB18030"
    raise UserError(f"{file}:{wrong}: not {expected}: save the file as UTF-8, or set encoding to what it is")


def lines(file: Path, encoding: str, longest: int = MAX_ROW) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, each with its newline, whatever the system that wrote them.

    Raises:
      UserError: a line has more than `longest` characters.
    """
    with file.open(encoding=encoding) as stream:
        number = 0
        while line := stream.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise UserError(f"{file}:{number}: a line of more than {longest:,} characters: is the file broken?")
            yield number, line


def first_lines(file: Path, encoding: str) -> list[str]:
    """Lines with words, from the first 65,536 characters that have any: enough to tell what a file is."""
    with file.open(encoding=encoding) as stream:
        while (text := stream.read(HEAD)) and not text.strip():
            pass
    head = text.split("\n")
    whole = head[:-1] if len(text) == HEAD and len(head) > 1 else head  # the last may be cut
    return [line for line in whole if line.strip()]


def is_encoding(name: str) -> bool:
    """Does Python know such an encoding of text?"""
    try:
        "".encode(name)
    except LookupError:
        return False
    return True


def _without_mark(head: bytes) -> str:
    """UTF-16 without a mark: it has zeros, and reads as text in one order of its bytes but not in the other."""
    if b"\0" not in head:
        return UTF_8
    scores = {}
    for order in ("utf-16-le", "utf-16-be"):
        text = codecs.decode(head[:4096], order, "ignore")
        usual = [c for c in COMMON.findall(text) if ord(c) % 256 or c == "一"]  # ASCII, turned round, is U+xx00
        scores[order] = len(usual) / max(1, len(text))
    best = max(scores, key=lambda order: scores[order])
    return best if scores[best] > 0.9 and min(scores.values()) < scores[best] - 0.3 else UTF_8


def _first_wrong(file: Path, encoding: str) -> int | None:
    """The line of the first bytes that are not in this encoding; None where all are."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with file.open("rb") as stream:
        try:
            while chunk := stream.read(CHUNK):
                line += decoder.decode(chunk).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            if not isinstance(error, UnicodeDecodeError):  # UTF-16 named, and no mark
                return line
            return line + codecs.decode(error.object[: error.start], encoding, "ignore").count("\n")
    return None


def _is_chinese(file: Path) -> bool:
    """Nearly any bytes decode as GB18030; of Chinese, most are GB 2312's 3,755 common characters and punctuation."""
    beyond = ""
    with file.open(encoding=GB18030) as stream:
        while len(beyond) < 10_000 and (text := stream.read(CHUNK)):
            beyond += "".join(c for c in text if not c.isascii())
    leads = beyond.encode("gb2312", "ignore")[::2]
    common = sum(0xA1 <= lead <= 0xD7 and lead not in (0xA4, 0xA5) for lead in leads)  # kana would be EUC-JP
    return 2 * common >= len(beyond)
