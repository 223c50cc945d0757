"""Reads and writes the safetensors files of a model directory."""

import errno
import functools
import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jlora.common.errors import UserError
from jlora.common.hf_names import NAMES
from jlora.common.typed_json import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TABLES = tuple(NAMES[table, "weight"] for table in ("embed_tokens", "lm_head"))
ROWS = 4096  # of two tensors, compared at once
# The safetensors name of each supported format -> dtype.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Weights:
    """The tensors of a model directory by name, memory-mapped and read on demand.

    Like transformers, reads `model.safetensors`, or else the files that the index lists.

    Args:
      added_rows: rows for new tokens that the token tables have beyond those on disk, each the mean of those.

    Raises:
      UserError: there are no safetensors files, or a file or the index is broken.
    """

    def __init__(self, directory: Path, added_rows: int = 0) -> None:
        self._added_rows = added_rows
        self._files: dict[str, Path] = {}
        self._headers: dict[str, dict[str, Any]] = {}
        self._mapped: dict[str, tuple[mmap.mmap, int]] = {}  # the file, and the offset of its data
        index = {} if (directory / SINGLE).is_file() else _read_index(directory)
        for name in sorted(set(index.values())) or [SINGLE]:
            file = directory / name
            try:
                headers, mapped, start = _map(file)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{file} cannot be read as safetensors: {error}. Check that it was downloaded or copied completely."
                ) from None
            if twice := self._files.keys() & headers.keys():
                raise UserError(f"{min(twice)} is in both {self._files[min(twice)].name} and {name}.")
            self._files.update(dict.fromkeys(headers, file))
            self._mapped.update(dict.fromkeys(headers, (mapped, start)))
            self._headers.update(headers)
        if lost := sorted(name for name, file in index.items() if self._files.get(name, Path()).name != file):
            raise UserError(
                f"{directory / INDEX} says that {lost[0]} is in {index[lost[0]]}, but it is not there "
                f"({len(lost)} tensor{'' if len(lost) == 1 else 's'} in all)."
            )

    def names(self) -> set[str]:
        """Returns the names of all tensors."""
        return set(self._files)

    def version(self) -> tuple[tuple[Path, int], ...]:
        """Returns the files and the times at which they were changed, in nanoseconds."""
        return tuple((file, file.stat().st_mtime_ns) for file in sorted(set(self._files.values())))

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape: that on disk, and the added rows."""
        rows = self._headers[name]["shape"][:1]
        return (*(count + self._rows_beyond(name) for count in rows), *self._headers[name]["shape"][1:])

    def _rows_beyond(self, name: str) -> int:
        return self._added_rows if name in TABLES else 0

    def format(self, name: str) -> str:
        """Returns the safetensors name of a tensor's dtype: F32, F16, BF16, or one that jlora does not support."""
        return self._headers[name]["dtype"]

    def equal(self, first: str, second: str) -> bool:
        """Returns whether two tensors are equal, reading a slice of their rows at a time."""
        if (self.format(first), self.shape(first)) != (self.format(second), self.shape(second)):
            return False
        one, other = self.read(first), self.read(second)
        same = all(np.array_equal(one[i : i + ROWS], other[i : i + ROWS]) for i in range(0, len(one), ROWS))
        self.release(first)
        self.release(second)
        return same

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in its own dtype: a read-only view of the file, or a copy if it has added rows."""
        mapped, begin, end = self._place(name)
        values = np.frombuffer(mapped, np.uint8)[begin:end].view(DTYPES[self.format(name)])
        values = values.reshape(self._headers[name]["shape"])
        if count := self._rows_beyond(name):
            mean = values.mean(axis=0, dtype=np.float32).astype(values.dtype)
            values = np.concatenate([values, np.tile(mean, (count, 1))])
        return values

    def release(self, name: str) -> None:
        """Frees the memory of a tensor's pages, which otherwise count as this process's; it can be read again."""
        mapped, begin, end = self._place(name)
        begin -= begin % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _place(self, name: str) -> tuple[mmap.mmap, int, int]:
        """Returns the mapped file, and the offsets of a tensor's first byte and end."""
        (mapped, start), (first, last) = self._mapped[name], self._headers[name]["data_offsets"]
        return mapped, start + first, start + last


def equal_tensors(directory: Path, first: str, second: str) -> bool:
    """Returns whether two tensors of a model directory are equal; true if it lacks weights, or one of the two."""
    if not any((directory / name).is_file() for name in (SINGLE, INDEX)):
        return True
    weights = Weights(directory)
    return not {first, second} <= weights.names() or _equal(directory, weights.version(), first, second)


@functools.lru_cache
def _equal(directory: Path, version: tuple[tuple[Path, int], ...], first: str, second: str) -> bool:
    """Compares two tensors of one version of the files, once: they are large, and a config is read many times."""
    return Weights(directory).equal(first, second)


def _map(file: Path) -> tuple[dict[str, dict[str, Any]], mmap.mmap, int]:
    """Returns the header's entry for each tensor, the mapped file, and the offset of its data.

    `safe_open` validates the file, but copies what it reads. The layout (github.com/huggingface/safetensors, "Format")
    is 8 bytes of length, little-endian; a JSON header of that length; and the values.
    """
    with safe_open(file, framework="numpy"), file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        headers = json.loads(stream.read(size))
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    headers.pop("__metadata__", None)
    return headers, mapped, 8 + size


def _read_index(directory: Path) -> dict[str, str]:
    """Returns tensor name -> file name for a sharded model."""
    path = directory / INDEX
    if not path.is_file():
        raise UserError(f"base_model={directory}: {_missing_weights(directory)}")
    try:
        listed = read_object(path)["weight_map"]
        files = sorted(set(listed.values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}.") from None
    present = {file.name for file in directory.iterdir() if file.is_file()}
    for name in files:
        if name not in present:
            raise UserError(f"{path} lists {str(name)[:80]!r}, which is not a file in the same directory.")
    if not files:
        raise UserError(f"{path} lists no tensors.")
    return listed


def _missing_weights(directory: Path) -> str:
    """Describes the files found instead of safetensors weights, and what to do."""

    def found(*patterns: str) -> str:
        return ", ".join(sorted(path.name for pattern in patterns for path in directory.glob(pattern))[:3])

    if other := found("*.safetensors"):
        return f"Expected {SINGLE} or {INDEX}, found {other}."
    if files := found("*.gguf"):
        return f"Found no safetensors files. Set base_model to the GGUF file itself ({files})."
    if pickled := found("*.bin", "*.pt", "*.pth"):
        return (
            f"Found only pickled weights ({pickled}), which can run code when loaded. If you trust them, convert them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"Expected {SINGLE} or {INDEX}, found neither."


def write_weights(
    directory: Path, sizes: dict[str, int], read: Callable[[str], np.ndarray], shard: int | str = "5GB"
) -> None:
    """Writes tensors to a directory in Hugging Face's layout: one file, or shards with an index.

    Args:
      sizes: name -> size in bytes, in the order to write.
      read: returns the tensor with a name. Only the tensors of one file are in memory at a time.
      shard: largest size of a file, in bytes or as a string such as "5GB".

    Raises:
      OSError: the disk lacks space for all of them; nothing has been written.
    """
    size, free = sum(sizes.values()), shutil.disk_usage(directory).free
    if size > free:
        raise OSError(errno.ENOSPC, f"the weights need {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB is free")
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: np.ascontiguousarray(read(name)) for name in names}
        target = directory / file
        target.touch()
        mode = target.stat().st_mode  # safetensors makes files readable by their owner only
        save_file(tensors, target, metadata={"format": "pt"})
        target.chmod(mode)
    if plan.is_sharded:
        listed = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
