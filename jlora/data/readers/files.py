"""Data files to conversations: finds the files, detects the format of each from its content, and selects the reader.

The formats are Parquet, Arrow, TFDS, JSON, YAML, CSV, Excel, Word, text with roles, and plain text, also inside of gzip
and zip archives; the other modules of this package read them.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.common.paths import looked_for
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
from jlora.data.readers import chat_markup, hub, parquet_tfds, splits
from jlora.data.readers.archives import archive_kind, unpack
from jlora.data.readers.column_mapping import RowConverter
from jlora.data.readers.csv_files import detect_delimiter, looks_like_table, read_cells, read_table
from jlora.data.readers.encoding import GB18030, HTML, detect_encoding, first_lines, numbered_lines
from jlora.data.readers.excel import read_workbook
from jlora.data.readers.json_files import read_json
from jlora.data.readers.source import Source
from jlora.data.readers.text_files import Row, begins_with_role, read_text
from jlora.data.readers.word import read_document
from jlora.data.readers.yaml_files import read_yaml

JSON = re.compile(r'\s*(\{\s*("|\}|$)|\[\s*([\[{\]"]|$))')  # matches the start of JSON, and of hardly any text
# In metadata, the cell of one of these parts is a column name or, for text, the prefix of the part's role.
ROLE_PARTS = {"user": "prompt", "assistant": "response", "system": "system"}
FILE_NAMES = {"file", "file_name", "filename", "path", "文件"}
JSON_ENDINGS, TABLE_ENDINGS, YAML_ENDINGS = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".yml", ".yaml")
INFER_ALL = ReadOptions()


def read_conversations(
    path: str,
    key: str,
    options: ReadOptions = INFER_ALL,
    log: Callable[[str], object] = print,
    use: str = splits.TRAIN,
) -> list[Conversation]:
    """Returns all conversations of a file, a directory or a TFDS data set; see `iter_conversations`."""
    return list(iter_conversations(path, key, options, log, use))


def iter_conversations(
    path: str,
    key: str,
    options: ReadOptions = INFER_ALL,
    log: Callable[[str], object] = print,
    use: str = splits.TRAIN,
) -> Iterator[Conversation]:
    """Yields the conversations of a file, of a directory's files in order of their names, or of a TFDS data set.

    Args:
      path: the file, the directory, `tfds:NAME/SPLIT`, `hf:OWNER/NAME/SPLIT`, or `WORKBOOK#SHEET`.
      key: the config key that holds the path, for messages.
      options: how rows are written.
      log: receives one line for each thing that was inferred or left unused, after the last row.
      use: which files of a directory to read, if their names say what they are for; see `splits.Splits.files`.

    Raises:
      UserError: the path does not exist, or a file cannot be read; or, after the last row, there were unusable rows,
        listed by file and line, unless `bad_rows` is "drop", which reports and skips them.
    """
    notes, bad, used = ReaderNotes(), BadRows(), 0
    first: Conversation | None = None
    for row in _rows(path, key, options, notes, use):
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
        which = " (its held-out files)" if use == splits.HELD_OUT else ""
        heading = f"{key}={path}{which} contains no usable rows. Add some, or correct those that are left out."
        raise UserError("\n  ".join([heading, *notes.lines()]))
    for line in notes.lines():
        log(f"{key}: {line}")


def hash_files(path: str, key: str, options: ReadOptions = INFER_ALL, use: str = splits.TRAIN) -> str:
    """Returns a sha256 of the names and bytes of the files read and of `metadata_path`: equal hash, equal data."""
    digest = hashlib.sha256()
    if parquet_tfds.is_tfds(path):
        directory, split = parquet_tfds.find_tfds(path, key)
        digest.update(f"{split}\n".encode())
        paths = sorted(splits.walk(directory))
    else:
        digest.update(splits.split_sheet(path)[1].encode())
        paths = [source.path for source in _sources(path, key, options, use)]
    metadata = [Path(options.metadata_path).expanduser()] if options.metadata_path else []
    for file in [*paths, *metadata]:
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
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


def _sources(path: str, key: str, options: ReadOptions, use: str) -> list[Source]:
    """Returns the files to read; those of a data set on the hub are downloaded first."""
    if path.startswith(hub.HUB):
        return list(hub.find_split(path, key).files)
    return [Source(file, str(file)) for file in splits.find_splits(path, key, options).files(use)]


def _rows(path: str, key: str, options: ReadOptions, notes: ReaderNotes, use: str) -> Iterator[Row]:
    if parquet_tfds.is_tfds(path):
        yield from _convert_rows(parquet_tfds.read_tfds(path, key), options, notes)
        return
    own = _metadata(options)
    if path.startswith(hub.HUB) and hub.find_split(path, key).offline:
        notes.add("read from the hub's cache, because the hub could not be asked", hub.find_split(path, key).pinned)
    sources, sheet = _sources(path, key, options, use), splits.split_sheet(path)[1]
    if sheet and not any(archive_kind(file) in ("workbook", "zip") for file in sources):
        raise UserError(f"{key}={path}: Only Excel workbooks have sheets. Remove #{sheet}.")
    for file in sources:
        try:
            yield from _read_file(file, own.get(file.path.resolve(), options), notes, sheet)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}.") from None


def _read_file(file: Source, options: ReadOptions, notes: ReaderNotes, sheet: str) -> Iterator[Row]:
    """Reads the rows of one file with the reader of its format, or those of all files in an archive."""
    if name := parquet_tfds.columnar_format(file):
        yield from _convert_rows(parquet_tfds.read_columnar(file, name), options, notes, table=True)
        return
    kind = archive_kind(file)
    if kind == "workbook":
        yield from _convert_rows(read_workbook(file, sheet, options, notes), options, notes, table=True)
        return
    if kind == "document":
        tables, text = read_document(file, options, notes)
        yield from _convert_rows(tables, options, notes, table=True)
        yield from text
        return
    if kind in ("gzip", "zip"):
        for member in unpack(file):
            yield from _read_file(member, options, notes, sheet)
        return
    if re.search(r"\.(array_record|tfrecord)", file.name):
        advice = "Pass its directory, the one with dataset_info.json, as tfds:DIRECTORY/SPLIT."
        raise UserError(f"{file} is part of a TFDS data set. {advice}")
    encoding = detect_encoding(file, options.encoding)
    if encoding == GB18030 and not options.encoding:
        notes.add("read as GB18030, because it is not UTF-8", file.name)
    head = first_lines(file, encoding)
    if not head:
        raise UserError(f"{file}: The file is empty. Remove it, or write rows into it.")
    if not options.plain and HTML.match("\n".join(head)):
        advice = "Save its text as .txt, or its table as CSV. To train on its source, set task_type=plain-text."
        raise UserError(f"{file} is an HTML page. {advice}")
    ending = file.suffix.lower()
    free = not (options.plain or options.role_prefixes or ending in (*JSON_ENDINGS, *TABLE_ENDINGS, *YAML_ENDINGS))
    style = chat_markup.find_style(file, head) if free else None
    kind = _detect_format(ending, head, options)
    if style:
        yield from chat_markup.read_markup(file, encoding, style, notes)
    elif kind == "json":
        yield from _convert_rows(read_json(file, encoding, options, notes), options, notes)
    elif kind == "yaml":
        yield from _convert_rows(read_yaml(file, encoding, options, notes), options, notes)
    elif kind == "table":
        yield from _convert_rows(read_table(file, encoding, options, notes), options, notes, table=True)
    else:
        yield from read_text(file, functools.partial(numbered_lines, file, encoding), options, notes)


def _detect_format(ending: str, head: list[str], options: ReadOptions) -> str:
    """Returns "json", "yaml", "table" or "text".

    The content overrides the file name, except for names of JSON and YAML.
    """
    table = ending in TABLE_ENDINGS
    if ending in JSON_ENDINGS:
        return "json"
    if options.plain:
        return "table" if table else "text"
    if ending in YAML_ENDINGS:
        return "yaml"
    if JSON.match(head[0]):
        return "json"
    if begins_with_role(head[0], options):
        return "text"
    return "table" if table or looks_like_table(head) else "text"


def _convert_rows(
    rows: Iterator[tuple[str, Any]], options: ReadOptions, notes: ReaderNotes, *, table: bool = False
) -> Iterator[Row]:
    """Converts rows with named columns to conversations; errors are passed on."""
    converter = RowConverter(options, notes, table=table)
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
        raise UserError(f"metadata_path={path}: No such file.{looked_for(path)} Correct the path.")
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
    roots = [path.parent, *(Path(splits.split_sheet(p)[0]).expanduser() for p in given if p)]
    own = {}
    for number, cells in rows:
        if len(cells) != len(names):
            raise UserError(f"{path}:{number}: Expected {plural(len(names), 'cell')}, got {len(cells)}.")
        values = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
        name = next(values.pop(name) for name in FILE_NAMES if name in values)
        files = [f for root in roots for f in (root / name, root.parent / name) if f.is_file()]
        if not files:
            searched = join_limited(map(str, roots))
            raise UserError(f"{path}:{number}: File {name!r} does not exist in {searched}. Correct its name.")
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
