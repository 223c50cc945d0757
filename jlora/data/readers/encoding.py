"""Text files: detection of the encoding, by decoding the whole file, and its lines as a stream."""

import codecs
import re
from collections.abc import Iterator

from jlora.common.errors import UserError
from jlora.data.conversation import MAX_ROW
from jlora.data.readers.source import Source

CHUNK = 1 << 20  # bytes
HEAD = 1 << 16  # characters
UTF_8, GB18030 = "utf-8", "gb18030"
BOMS = {  # longer byte order marks first: UTF-32's starts like UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
COMMON = re.compile(r"[\t\n\r -~\u00a0-\u024f\u0400-\u04ff\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uff60]")
BINARY = {  # first bytes of files that are not text -> the rest of the error: the kind of file, and the fix
    b"PK\x03\x04": "a zip archive (.xlsx and .docx files are, too). Save the table as CSV, or the text as .txt.",
    b"\xd0\xcf\x11\xe0": "an old Office file. Save the table as CSV, or the text as .txt.",
    b"%PDF": "a PDF. Save its text as .txt.",
    b"{\\rtf": "a Rich Text document. Save it as plain text (.txt).",
    b"\x1f\x8b": "compressed with gzip. Decompress it.",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Decompress it.",
    b"FEA1": "a Feather file of the first version. Save it as Parquet.",
    b"SQLite format 3": "an SQLite database. Save the table as CSV.",
}


# An HTML page: its first tag, and the end of its head, title or body. Text about HTML hardly has both.
HTML = re.compile(
    r"\s*(<\?xml[^>]*>\s*)?(<!--((?!-->).)*-->\s*)*<(!doctype\s+html|html)\b.*</(head|title|body)\s*>",
    re.IGNORECASE | re.DOTALL,
)


def detect_encoding(file: Source, named: str = "") -> str:
    """Returns Python's name of a file's encoding: UTF-8, UTF-16 or UTF-32, with or without a BOM, or GB18030.

    Args:
      named: the config's `encoding`; "" detects it from the bytes.

    Raises:
      UserError: the file is empty, is not text, or is in none of these encodings; with the line if there is one.
    """
    with file.open("rb") as stream:
        head = stream.read(CHUNK)
    if not head.strip():
        raise UserError(f"{file}: The file is empty. Remove it, or write rows into it.")
    if kind := next((kind for magic, kind in BINARY.items() if head.startswith(magic)), ""):
        raise UserError(f"{file} is {kind}")
    marked = next((name for bom, name in BOMS.items() if head.startswith(bom)), "")
    encoding = named or marked or _detect_without_bom(head)
    wrong = _first_undecodable_line(file, encoding)
    if wrong is None:
        return encoding
    if encoding == UTF_8 and not named and _first_undecodable_line(file, GB18030) is None and _is_chinese(file):
        return GB18030
    expected = named or marked or "UTF-8, UTF-16 or GB18030"
    raise UserError(f"{file}:{wrong}: Not valid {expected}. Save the file as UTF-8, or set encoding.")


def numbered_lines(file: Source, encoding: str, longest: int = MAX_ROW) -> Iterator[tuple[int, str]]:
    """Yields line numbers, from 1, and lines; every kind of newline is read as a line feed.

    Raises:
      UserError: a line has more than `longest` characters.
    """
    with file.open(encoding=encoding) as stream:
        number = 0
        while line := stream.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise UserError(
                    f"{file}:{number}: The line is longer than {longest:,} characters. Split it into several."
                )
            yield number, line


def first_lines(file: Source, encoding: str) -> list[str]:
    """Returns the non-blank lines of the first 65,536 characters that have any, enough to detect the format."""
    with file.open(encoding=encoding) as stream:
        while (text := stream.read(HEAD)) and not text.strip():
            pass
    head = text.split("\n")
    whole = head[:-1] if len(text) == HEAD and len(head) > 1 else head  # the last line may be incomplete
    return [line for line in whole if line.strip()]


def is_encoding(name: str) -> bool:
    """Returns whether Python has a text encoding of this name."""
    try:
        "".encode(name)
    except LookupError:
        return False
    return True


def _detect_without_bom(head: bytes) -> str:
    """Detects UTF-16 without a BOM: it has zero bytes, and only one byte order decodes to common characters."""
    if b"\0" not in head:
        return UTF_8
    scores = {}
    for order in ("utf-16-le", "utf-16-be"):
        text = codecs.decode(head[:4096], order, "ignore")
        usual = [c for c in COMMON.findall(text) if ord(c) % 256 or c == "一"]  # byte-swapped ASCII is U+xx00
        scores[order] = len(usual) / max(1, len(text))
    best = max(scores, key=lambda order: scores[order])
    return best if scores[best] > 0.9 and min(scores.values()) < scores[best] - 0.3 else UTF_8


def _first_undecodable_line(file: Source, encoding: str) -> int | None:
    """Returns the line of the first bytes that are not valid in this encoding; None if all are valid."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with file.open("rb") as stream:
        try:
            while chunk := stream.read(CHUNK):
                line += decoder.decode(chunk).count("\n")
            decoder.decode(b"", final=True)
        except UnicodeError as error:
            if not isinstance(error, UnicodeDecodeError):  # UTF-16 was set, and the file has no BOM
                return line
            return line + codecs.decode(error.object[: error.start], encoding, "ignore").count("\n")
    return None


def _is_chinese(file: Source) -> bool:
    """Returns whether most non-ASCII characters are among GB 2312's 3,755 common ones or its punctuation.

    The check is needed because nearly any bytes decode as GB18030.
    """
    beyond = ""
    with file.open(encoding=GB18030) as stream:
        while len(beyond) < 10_000 and (text := stream.read(CHUNK)):
            beyond += "".join(c for c in text if not c.isascii())
    leads = beyond.encode("gb2312", "ignore")[::2]
    common = sum(0xA1 <= lead <= 0xD7 and lead not in (0xA4, 0xA5) for lead in leads)  # kana would mean EUC-JP
    return 2 * common >= len(beyond)
