"""Reads Parquet and Arrow files and TFDS data sets: rows by column name, as a stream."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import tensorflow_datasets as tfds

from jlora.common.errors import UserError
from jlora.data.readers.source import Source

TFDS = "tfds:"  # train_data_dir="tfds:NAME/SPLIT"
STREAM = b"\xff\xff\xff\xff"  # before each message of Arrow's stream format
FORMATS = {b"PAR1": "Parquet", b"ARROW1": "Arrow", STREAM: "Arrow"}
BATCH = 128  # rows
Row = tuple[str, Any]


def columnar_format(file: Source) -> str:
    """Returns "Parquet" or "Arrow" if the file is one of these; else ""."""
    with file.open("rb") as stream:
        head = stream.read(max(map(len, FORMATS)))
    return next((name for magic, name in FORMATS.items() if head.startswith(magic)), "")


def read_columnar(file: Source, name: str) -> Iterator[Row]:
    """Yields rows by column name, each with `file:row`, counted from 1.

    Args:
      name: the format.

    Raises:
      UserError: the file is not valid in this format.
    """
    number = 0
    try:
        for batch in _parquet_batches(file) if name == "Parquet" else _arrow_batches(file):
            for start in range(0, batch.num_rows, BATCH):
                for row in batch.slice(start, BATCH).to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file} cannot be read as {name} after row {number}: {reason}. Save it again.") from None


def _parquet_batches(file: Source) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(file.path) as table:
        yield from table.iter_batches(batch_size=BATCH)


def _arrow_batches(file: Source) -> Iterator[pyarrow.RecordBatch]:
    """Yields the batches of an IPC stream, as the package `datasets` saves them, or of an IPC file (Feather)."""
    with pyarrow.OSFile(str(file.path)) as source:
        is_stream = source.read(len(STREAM)) == STREAM
        source.seek(0)
        if is_stream:
            batches: Iterator[pyarrow.RecordBatch] = iter(pyarrow.ipc.open_stream(source))
        else:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)  # offsets beyond the data would crash
            yield batch


def is_tfds(path: str) -> bool:
    """Returns whether the path is `tfds:...` or a directory prepared by TFDS."""
    return path.startswith(TFDS) or _is_prepared(Path(path).expanduser())


def find_tfds(path: str, key: str) -> tuple[Path, str]:
    """Returns the directory of a TFDS data set, prepared now if necessary, and the split.

    Raises:
      UserError: the data set or the split does not exist, or cannot be read without TensorFlow.
    """
    builder, split = _builder(path, key)
    return Path(builder.data_dir), split


def read_tfds(path: str, key: str) -> Iterator[Row]:
    """Yields rows by feature name, each with `NAME/SPLIT:row`, counted from 1; raises as `find_tfds` does."""
    builder, split = _builder(path, key)
    try:
        source = builder.as_data_source(split=split)
    except (NotImplementedError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{key}={path} cannot be read: {reason}. Prepare the data set with file_format='array_record'."
        ) from None
    for number in range(len(source)):
        yield f"{builder.info.name}/{split}:{number + 1}", _to_json_value(source[number])


def _is_prepared(directory: Path) -> bool:
    return (directory / "dataset_info.json").is_file() and (directory / "features.json").is_file()


def _builder(path: str, key: str) -> tuple[Any, str]:
    name = path.removeprefix(TFDS)
    directory, split = Path(name).expanduser(), ""
    if not _is_prepared(directory) and "/" in name:
        name, _, split = name.rpartition("/")
        directory = Path(name).expanduser()
    try:
        if _is_prepared(directory):
            builder = tfds.builder_from_directory(directory)
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:  # TFDS runs the data set's own code, which may raise anything
        reason = (str(error).strip().split("\n") or [""])[0]
        raise UserError(
            f"{key}={path}: TFDS cannot load this data set: {reason}. Correct its name, or pass the directory of a "
            f"prepared data set, as {TFDS}DIRECTORY/SPLIT."
        ) from None
    splits = sorted(builder.info.splits)
    if split not in splits and (split or len(splits) != 1):
        raise UserError(f"{key}={path}: Expected {TFDS}{name}/SPLIT, where SPLIT is one of {', '.join(splits)}.")
    return builder, split or splits[0]


def _to_json_value(value: Any) -> Any:
    """Converts a feature's value to JSON's types: text, numbers, lists, objects."""
    if isinstance(value, dict):
        return {name: _to_json_value(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):  # not text, but for example an image; fails only if it is used
            return value.decode()
    if isinstance(value, np.ndarray) and value.ndim:
        return [_to_json_value(inner) for inner in value]
    if isinstance(value, list | tuple):
        return [_to_json_value(inner) for inner in value]
    return value.item() if isinstance(value, np.generic | np.ndarray) else value
