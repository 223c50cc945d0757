"""Data files to conversations: finds the files, detects the format of each from its content, and selects the reader.

The formats are Parquet, TFDS, JSON, CSV, Excel, Word, text with roles, and plain text, also inside of gzip and zip
archives; the other modules of this package read them.
"""

import dataclasses
import functools
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.conversation import (
    PARTS,
    BadRows,
    Conversation,
    ReaderNotes,
    ReadOptions,
    join_limited,
    names_complete_row,
)
from jlora.data.readers import hub, parquet_tfds
from jlora.data.readers.archives import archive_kind, unpack
from jlora.data.readers.column_mapping import RowConverter
from jlora.data.readers.csv_files import detect_delimiter, looks_like_table, read_cells, read_table
from jlora.data.readers.encoding import GB18030, detect_encoding, first_lines, numbered_lines
from jlora.data.readers.excel import read_workbook
from jlora.data.readers.json_files import read_json
from jlora.data.readers.source import Source, is_skipped
from jlora.data.readers.text_files import Row, begins_with_role, read_text
from jlora.data.readers.word import read_document

JSON = re.compile(r'\s*(\{\s*("|\}|$)|\[\s*([\[{\]"]|$))')  # matches the start of JSON, and of hardly any text
# In metadata, the cell of one of these parts is a column name or, for text, the prefix of the part's role.
ROLE_PARTS = {"user": "prompt", "assistant": "response", "system": "system"}
FILE_NAMES = {"file", "file_name", "filename", "path", "文件"}
INFER_ALL = ReadOptions()


def read_conversations(
    path: str, key: str, options: ReadOptions = INFER_ALL, log: Callable[[str], object] = print
) -> list[Conversation]:
    """Returns all conversations of a file, a directory or a TFDS data set; see `iter_conversations`."""
    return list(iter_conversations(path, key, options, log))


def iter_conversations(
    path: str, key: str, options: ReadOptions = INFER_ALL, log: Callable[[str], object] = print
) -> Iterator[Conversation]:
    """Yields the conversations of a file, of a directory's files in order of their names, or of a TFDS data set.

    Args:
      path: the file, the directory, `tfds:NAME/SPLIT`, `hf:OWNER/NAME/SPLIT`, or `WORKBOOK#SHEET`.
      key: the config key that holds the path, for messages.
      options: how rows are written.
      log: receives one line for each thing that was inferred or left unused, after the last row.

    Raises:
      UserError: the path does not exist, or a file cannot be read; or, after the last row, there were unusable rows,
        listed by file and line, unless `bad_rows` is "drop", which reports and skips them.
    """
    notes, bad, used = ReaderNotes(), BadRows(), 0
    first: Conversation | None = None
    for row in _rows(path, key, options, notes):
        if isinstance(row, UserError):
            bad.add(str(row))
            continue
        first = first or row
        if row.plain != first.plain:
            raise UserError(
                f"{row.where} is {_kind(row)}, but {first.where} is {_kind(first)}. Keep one kind in {key}={path}, or "
                "set task_type=plain-text to read all files as plain text."
            )
        used += 1
        yield row
    share = f"{bad.count} of {plural(used + bad.count, 'row')}"
    if bad.count and options.bad_rows == "drop":
        log("\n  ".join([f"{key}: dropped {share} that cannot be used:", *bad.lines()]))
    elif bad.count == 1:
        raise UserError(bad.lines()[0])
    elif bad.count:
        heading = f"{key}={path}: {share} cannot be used. Fix them, or set bad_rows=drop:"
        raise UserError("\n  ".join([heading, *bad.lines()]))
    if not used:
        raise UserError("\n  ".join([f"{key}={path} contains no usable rows.", *notes.lines()]))
    for line in notes.lines():
        log(f"{key}: {line}")


def data_files(path: str, key: str) -> list[Path]:
    """Returns the files that hold rows; hidden files, README and LICENSE are skipped.

    Raises:
      UserError: the path does not exist, or something in it is not a regular file: a broken or circular link, a pipe.
    """
    root = Path(split_sheet(path)[0]).expanduser()
    if not root.exists():
        raise UserError(f"{key}={path}: No such file or directory.")
    files = sorted(_walk(root, ())) if root.is_dir() else [root]
    for file in files:
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                raise UserError(f"{file} is not a regular file (a pipe or a device?). Remove it.")
        except OSError as error:
            raise UserError(f"{file} is a broken symbolic link ({error.strerror}). Remove or fix it.") from None
    if not files:
        raise UserError(f"{key}={path}: The directory contains no data files.")
    return files


def split_sheet(path: str) -> tuple[str, str]:
    """Returns a path without its `#SHEET`, and the name of the sheet; "" if it has none."""
    file, _, sheet = path.rpartition("#")
    return (file, sheet) if file and sheet and not Path(path).expanduser().exists() else (path, "")


def hash_files(path: str, key: str, options: ReadOptions = INFER_ALL) -> str:
    """Returns a sha256 of the names and bytes of the data files and of `metadata_path`: equal hash, equal data."""
    digest = hashlib.sha256()
    if parquet_tfds.is_tfds(path):
        directory, split = parquet_tfds.find_tfds(path, key)
        digest.update(f"{split}\n".encode())
        path = str(directory)
    digest.update(split_sheet(path)[1].encode())
    files = _sources(path, key)
    if options.metadata_path:
        metadata = Path(options.metadata_path).expanduser()
        files.append(Source(metadata, str(metadata)))
    for file in files:
        digest.update(f"{file.path.name}\n{file.path.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def resolved_path(path: str, key: str) -> str:
    """Returns the path as a run's record stores it: absolute, or with the commit of a data set on the hub."""
    if path.startswith(hub.HUB):
        return hub.find_split(path, key).pinned
    return path if path.startswith(parquet_tfds.TFDS) else str(Path(path).expanduser().resolve())


def hub_commit(path: str, key: str) -> str:
    """Returns the commit of a data set on the hub; "" for other paths."""
    return hub.find_split(path, key).commit if path.startswith(hub.HUB) else ""


def _sources(path: str, key: str) -> list[Source]:
    """Returns the files that hold rows; those of a data set on the hub are downloaded first."""
    if path.startswith(hub.HUB):
        return list(hub.find_split(path, key).files)
    return [Source(file, str(file)) for file in data_files(path, key)]


def _walk(directory: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yields all files below a directory, following links."""
    real = directory.resolve()
    if real in above:
        raise UserError(f"{directory} is a link to one of its own parent directories. Remove it.")
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}.") from None
    for name in names:
        if is_skipped(name):
            continue
        if (directory / name).is_dir():
            yield from _walk(directory / name, (*above, real))
        else:
            yield directory / name


def _rows(path: str, key: str, options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    if parquet_tfds.is_tfds(path):
        yield from _convert_rows(parquet_tfds.read_tfds(path, key), options, notes)
        return
    own = _metadata(options)
    metadata = Path(options.metadata_path).expanduser().resolve() if options.metadata_path else None
    files = _sources(path, key)
    if path.startswith(hub.HUB) and hub.find_split(path, key).offline:
        notes.add("read from the hub's cache, because the hub could not be asked", hub.find_split(path, key).pinned)
    sheet = split_sheet(path)[1]
    if sheet and not any(archive_kind(file) in ("workbook", "zip") for file in files):
        raise UserError(f"{key}={path}: Only Excel workbooks have sheets. Remove #{sheet}.")
    for file in files:
        if file.path.resolve() == metadata:
            continue
        try:
            yield from _read_file(file, own.get(file.path.resolve(), options), notes, sheet)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None


def _read_file(file: Source, options: ReadOptions, notes: ReaderNotes, sheet: str) -> Iterator[Row]:
    """Reads the rows of one file with the reader of its format, or those of all files in an archive."""
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"PAR1":
        yield from _convert_rows(parquet_tfds.read_parquet(file), options, notes)
        return
    kind = archive_kind(file)
    if kind == "workbook":
        yield from _convert_rows(read_workbook(file, sheet, options, notes), options, notes)
        return
    if kind == "document":
        tables, text = read_document(file, options, notes)
        yield from _convert_rows(tables, options, notes)
        yield from text
        return
    if kind in ("gzip", "zip"):
        for member in unpack(file):
            yield from _read_file(member, options, notes, sheet)
        return
    if re.search(r"\.(array_record|tfrecord)", file.name):
        raise UserError(f"{file} is part of a TFDS data set. Pass its directory, the one with dataset_info.json.")
    encoding = detect_encoding(file, options.encoding)
    if encoding == GB18030 and not options.encoding:
        notes.add("read as GB18030, because it is not UTF-8", file.name)
    head = first_lines(file, encoding)
    if not head:
        raise UserError(f"{file}: The file is empty.")
    kind = _detect_format(file.suffix.lower(), head, options)
    if kind == "json":
        yield from _convert_rows(read_json(file, encoding, options, notes), options, notes)
    elif kind == "table":
        yield from _convert_rows(read_table(file, encoding, options, notes), options, notes)
    else:
        yield from read_text(file, functools.partial(numbered_lines, file, encoding), options, notes)


def _detect_format(ending: str, head: list[str], options: ReadOptions) -> str:
    """Returns "json", "table" or "text". The content overrides the file name, except that JSON names stay JSON."""
    table = ending in (".csv", ".tsv")
    if ending in (".json", ".jsonl", ".ndjson"):
        return "json"
    if options.plain:
        return "table" if table else "text"
    if JSON.match(head[0]):
        return "json"
    if begins_with_role(head[0], options):
        return "text"
    return "table" if table or looks_like_table(head) else "text"


def _convert_rows(rows: Iterator[tuple[str, Any]], options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    """Converts rows with named columns to conversations; errors are passed on."""
    converter = RowConverter(options, notes)
    for where, row in rows:
        try:
            yield from [row] if isinstance(row, UserError) else converter.conversations(row, where)
        except UserError as error:
            yield error


def _metadata(options: ReadOptions) -> dict[Path, ReadOptions]:
    """Reads `metadata_path`: a CSV with a column `file`, and the columns or prefixes of the parts of each file.

    Raises:
      UserError: it is not such a CSV, or names a file that does not exist.
    """
    if not options.metadata_path:
        return {}
    path = Path(options.metadata_path).expanduser()
    if not path.is_file():
        raise UserError(f"metadata_path={path}: No such file.")
    source = Source(path, str(path))
    encoding = detect_encoding(source, options.encoding)
    rows = read_cells(source, encoding, detect_delimiter(source, encoding))
    names = [ROLE_PARTS.get(name, name) for name in (cell.strip().lower() for cell in next(rows, (0, []))[1])]
    unknown = [name for name in names if name not in FILE_NAMES and name not in PARTS]
    if len(FILE_NAMES & set(names)) != 1 or unknown or len(names) < 2:
        raise UserError(
            f"{path}:1: Expected the columns file, prompt and response (or others of {', '.join(PARTS)}), got {names}."
        )
    given = (options.train_data_dir, options.eval_data_dir)
    roots = [path.parent, *(Path(split_sheet(p)[0]).expanduser() for p in given if p)]
    own = {}
    for number, cells in rows:
        if len(cells) != len(names):
            raise UserError(f"{path}:{number}: Expected {plural(len(names), 'cell')}, got {len(cells)}.")
        values = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
        name = next(values.pop(name) for name in FILE_NAMES if name in values)
        files = [f for root in roots for f in (root / name, root.parent / name) if f.is_file()]
        if not files:
            raise UserError(f"{path}:{number}: File {name!r} does not exist in {join_limited(map(str, roots))}.")
        columns = {part: column for part, column in values.items() if column}
        if not names_complete_row(columns):
            raise UserError(
                f"{path}:{number}: Expected columns for prompt and response, or messages, or text, got {columns}."
            )
        prefixes = {role: columns[part] for role, part in ROLE_PARTS.items() if part in columns}
        own[files[0].resolve()] = dataclasses.replace(options, columns=columns, role_prefixes=prefixes)
    return own


def _kind(row: Conversation) -> str:
    return "plain text" if row.plain else "a conversation"
