"""Files -> conversations. Nothing about tokens.

What a file is follows from what is in it: Parquet, JSON, a table, text with roles, text without. The rooms beside this
one read each; here they are found, told apart and put together.
"""

import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import PARTS, BadRows, Conversation, Notes, Reading, is_whole, listing
from jlora.data.readers import datasets
from jlora.data.readers.columns import Records
from jlora.data.readers.encoding import GB18030, detect, first_lines
from jlora.data.readers.json_rows import read_json
from jlora.data.readers.tables import cells_of, find_delimiter, looks_like_table, read_table
from jlora.data.readers.text import Row, begins_with_role, read_text

SKIPPED = {"Thumbs.db", "desktop.ini"}
ABOUT = {"", "readme", "license", "licence"}  # "": what is hidden
JSON = re.compile(r'\s*(\{\s*("|\}|$)|\[\s*([\[{\]"]|$))')  # how JSON begins, and hardly any text
# In metadata a part's cell is its column, or of text the prefix of the role that says it.
ROLE_PARTS = {"user": "prompt", "assistant": "response", "system": "system"}
FILE_NAMES = {"file", "file_name", "filename", "path", "文件"}
AS_FOUND = Reading()


def read_conversations(
    path: str, key: str, reading: Reading = AS_FOUND, say: Callable[[str], object] = print
) -> list[Conversation]:
    """All conversations of a file, a directory or a TFDS data set; see `iter_conversations`."""
    return list(iter_conversations(path, key, reading, say))


def iter_conversations(
    path: str, key: str, reading: Reading = AS_FOUND, say: Callable[[str], object] = print
) -> Iterator[Conversation]:
    """The conversations of a file, of a directory's files by name, or of a TFDS data set, as a stream.

    Args:
      path: the file, the directory, or `tfds:NAME/SPLIT`.
      key: the config key that named it, for messages.
      reading: what the config says about how rows are written.
      say: takes the lines about what was told by content or not used, after the last row.

    Raises:
      UserError: nothing there, a file that cannot be read, or, after the last row, the rows that cannot be used, by
        file and line; unless `bad_rows` is "drop", which counts them.
    """
    notes, bad, used = Notes(), BadRows(), 0
    first: Conversation | None = None
    for row in _rows(path, key, reading, notes):
        if isinstance(row, UserError):
            bad.add(str(row))
            continue
        first = first or row
        if row.plain != first.plain:
            raise UserError(
                f"{row.where} is {_kind(row)}, and {first.where} is {_kind(first)}: keep one kind in {key}={path}, or "
                "set task_type=plain-text for text alone"
            )
        used += 1
        yield row
    share = f"{bad.count} of {used + bad.count} rows cannot be used"
    if bad.count and reading.bad_rows == "drop":
        say("\n  ".join([f"{key}: {share} and are dropped:", *bad.lines()]))
    elif bad.count == 1:
        raise UserError(bad.lines()[0])
    elif bad.count:
        raise UserError("\n  ".join([f"{key}={path}: {share} (mend them, or set bad_rows=drop):", *bad.lines()]))
    if not used:
        raise UserError(f"{key}={path}: no rows in it that can be used")
    for line in notes.lines():
        say(f"{key}: {line}")


def data_files(path: str, key: str) -> list[Path]:
    """The files that hold the rows; what is hidden, README and LICENSE are passed over.

    Raises:
      UserError: nothing there, or something that is no file: a link that leads nowhere or in a circle, a pipe.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{key}={path}: no such file or directory")
    files = sorted(_walk(root, ())) if root.is_dir() else [root]
    for file in files:
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                raise UserError(f"{file} is not a file (a pipe or a device?): remove it")
        except OSError as error:
            raise UserError(f"{file} leads nowhere ({error.strerror}): remove the link, or mend it") from None
    if not files:
        raise UserError(f"{key}={path}: no file in this directory")
    return files


def hash_files(path: str, key: str, reading: Reading = AS_FOUND) -> str:
    """sha256 over the files' names and bytes, the `metadata_path` among them: the same hash, the same data."""
    digest = hashlib.sha256()
    if datasets.is_tfds(path):
        directory, split = datasets.find_tfds(path, key)
        digest.update(f"{split}\n".encode())
        path = str(directory)
    files = data_files(path, key)
    if reading.metadata_path:
        files.append(Path(reading.metadata_path).expanduser())
    for file in files:
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def place(path: str) -> str:
    """The path in full, as a run's record keeps it."""
    return path if path.startswith(datasets.TFDS) else str(Path(path).expanduser().resolve())


def _walk(directory: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All that is in a directory and those below, links followed."""
    real = directory.resolve()
    if real in above:
        raise UserError(f"{directory} is a link to a directory above it: remove it")
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from None
    for name in names:
        if name in SKIPPED or name.split(".")[0].lower() in ABOUT:
            continue
        if (directory / name).is_dir():
            yield from _walk(directory / name, (*above, real))
        else:
            yield directory / name


def _rows(path: str, key: str, reading: Reading, notes: Notes) -> Iterator[Row]:
    if datasets.is_tfds(path):
        yield from _of_records(datasets.read_tfds(path, key), reading, notes)
        return
    own = _metadata(reading)
    metadata = Path(reading.metadata_path).expanduser().resolve() if reading.metadata_path else None
    for file in data_files(path, key):
        if file.resolve() == metadata:
            continue
        try:
            yield from _read_file(file, own.get(file.resolve(), reading), notes)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def _read_file(file: Path, reading: Reading, notes: Notes) -> Iterator[Row]:
    """The rows of one file, of whatever kind it is."""
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"PAR1":
        yield from _of_records(datasets.read_parquet(file), reading, notes)
        return
    if re.search(r"\.(array_record|tfrecord)", file.name):
        raise UserError(f"{file}: TFDS stores rows in it: name the directory that holds dataset_info.json")
    encoding = detect(file, reading.encoding)
    if encoding == GB18030 and not reading.encoding:
        notes.add("not UTF-8, read as GB18030", file.name)
    head = first_lines(file, encoding)
    if not head:
        raise UserError(f"{file}: the file is empty")
    kind = _told(file.suffix.lower(), head, reading)
    if kind == "json":
        yield from _of_records(read_json(file, encoding, reading, notes), reading, notes)
    elif kind == "table":
        yield from _of_records(read_table(file, encoding, reading, notes), reading, notes)
    else:
        yield from read_text(file, encoding, reading, notes)


def _told(ending: str, head: list[str], reading: Reading) -> str:
    """JSON, a table or text? What the first lines say goes before the ending, but for broken JSON."""
    table = ending in (".csv", ".tsv")
    if ending in (".json", ".jsonl", ".ndjson"):
        return "json"
    if reading.plain:
        return "table" if table else "text"
    if JSON.match(head[0]):
        return "json"
    if begins_with_role(head[0], reading):
        return "text"
    return "table" if table or looks_like_table(head) else "text"


def _of_records(rows: Iterator[tuple[str, Any]], reading: Reading, notes: Notes) -> Iterator[Row]:
    """Rows with named columns as conversations; an error stays one."""
    records = Records(reading, notes)
    for where, row in rows:
        try:
            made: Row = row if isinstance(row, UserError) else records.conversation(row, where)
        except UserError as error:
            made = error
        yield made


def _metadata(reading: Reading) -> dict[Path, Reading]:
    """What `metadata_path` says: a CSV with a column `file`, and of each file the columns or prefixes of its parts.

    Raises:
      UserError: it is not such a CSV, or names a file that is not there.
    """
    if not reading.metadata_path:
        return {}
    path = Path(reading.metadata_path).expanduser()
    if not path.is_file():
        raise UserError(f"metadata_path={path}: no such file")
    encoding = detect(path, reading.encoding)
    rows = cells_of(path, encoding, find_delimiter(path, encoding))
    names = [ROLE_PARTS.get(name, name) for name in (cell.strip().lower() for cell in next(rows, (0, []))[1])]
    unknown = [name for name in names if name not in FILE_NAMES and name not in PARTS]
    if len(FILE_NAMES & set(names)) != 1 or unknown or len(names) < 2:
        raise UserError(f"{path}:1: expected columns file, prompt and response (or {', '.join(PARTS)}); got {names}")
    roots = [path.parent, *(Path(p).expanduser() for p in (reading.train_data_dir, reading.eval_data_dir) if p)]
    own = {}
    for number, cells in rows:
        if len(cells) != len(names):
            raise UserError(f"{path}:{number}: expected {len(names)} cells, got {len(cells)}")
        said = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
        name = next(said.pop(name) for name in FILE_NAMES if name in said)
        files = [f for root in roots for f in (root / name, root.parent / name) if f.is_file()]
        if not files:
            raise UserError(f"{path}:{number}: there is no file {name!r} in {listing(map(str, roots))}")
        columns = {part: column for part, column in said.items() if column}
        if not is_whole(columns):
            raise UserError(f"{path}:{number}: expected prompt and response, or messages, or text; got {columns}")
        prefixes = {role: columns[part] for role, part in ROLE_PARTS.items() if part in columns}
        own[files[0].resolve()] = dataclasses.replace(reading, columns=columns, role_prefixes=prefixes)
    return own


def _kind(row: Conversation) -> str:
    return "plain text" if row.plain else "a conversation"
