"""Parquet files and TFDS directories -> rows, a batch at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds

from jlora.common.errors import UserError

TFDS = "tfds:"  # train_data_dir="tfds:NAME/SPLIT"
Row = tuple[str, Any]


def read_parquet(file: Path) -> Iterator[Row]:
    """Rows by column name, each with `file:row`, from 1.

    Raises:
      UserError: the file is not Parquet.
    """
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=128):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file}: not Parquet after row {number}: {reason}") from None


def is_tfds(path: str) -> bool:
    """Is this `tfds:...`, or a directory that TFDS prepared?"""
    return path.startswith(TFDS) or _is_prepared(Path(path).expanduser())


def find_tfds(path: str, key: str) -> tuple[Path, str]:
    """The directory where TFDS holds `path`, prepared first where it need be, and the split.

    Raises:
      UserError: there is no such data set or split, or it cannot be read without TensorFlow.
    """
    builder, split = _builder(path, key)
    return Path(builder.data_dir), split


def read_tfds(path: str, key: str) -> Iterator[Row]:
    """Rows by feature name, each with `NAME/SPLIT:row`, from 1; raises as `find_tfds` does."""
    builder, split = _builder(path, key)
    try:
        source = builder.as_data_source(split=split)
    except (NotImplementedError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{key}={path} cannot be read: {reason}. Prepare it with file_format='array_record'") from None
    for number in range(len(source)):
        yield f"{builder.info.name}/{split}:{number + 1}", _plain(source[number])


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
    except Exception as error:  # TFDS runs the data set's own code: whatever it raises, there are no rows
        reason = (str(error).strip().split("\n") or [""])[0]
        raise UserError(f"{key}={path}: TFDS cannot give it: {reason}") from None
    splits = sorted(builder.info.splits)
    if split not in splits and (split or len(splits) != 1):
        raise UserError(f"{key}={path}: expected {TFDS}{name}/SPLIT with a split of {', '.join(splits)}")
    return builder, split or splits[0]


def _plain(value: Any) -> Any:
    """A feature's value as JSON has it: text, numbers, lists, objects."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):  # an image, say: not text, and no one's concern unless it is used
            return value.decode()
    if isinstance(value, np.ndarray) and value.ndim:
        return [_plain(inner) for inner in value]
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic | np.ndarray) else value
