"""The safetensors files of a model directory: what is in them, reading, and writing in shards."""

import errno
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

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The formats that are read, by safetensors' own name for them.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Weights:
    """All tensors of a model directory by name, mapped, each read when it is asked for.

    The files are those that transformers reads: `model.safetensors`, else the ones that the index names.

    Raises:
      UserError: there are none (pickled weights are named, with the way out), or a file or the index is broken.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Path] = {}
        self._headers: dict[str, dict[str, Any]] = {}
        self._mapped: dict[str, tuple[mmap.mmap, int]] = {}  # the file, and where in it the offsets begin to count
        index = {} if (directory / SINGLE).is_file() else _read_index(directory)
        for name in sorted(set(index.values())) or [SINGLE]:
            file = directory / name
            try:
                headers, mapped, start = _map(file)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{file} cannot be read as safetensors: {error}. Was it downloaded or copied whole?"
                ) from None
            if twice := self._files.keys() & headers.keys():
                raise UserError(f"{min(twice)} stands in both {self._files[min(twice)].name} and {name}")
            self._files.update(dict.fromkeys(headers, file))
            self._mapped.update(dict.fromkeys(headers, (mapped, start)))
            self._headers.update(headers)
        if lost := sorted(name for name, file in index.items() if self._files.get(name, Path()).name != file):
            raise UserError(
                f"{directory / INDEX} says that {lost[0]} stands in {index[lost[0]]}, and it does not "
                f"({len(lost)} such tensor(s))"
            )

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """As it lies on disk."""
        return tuple(self._headers[name]["shape"])

    def format(self, name: str) -> str:
        """safetensors' name of a tensor's dtype: F32, F16, BF16, or one that jlora does not read."""
        return self._headers[name]["dtype"]

    def read(self, name: str) -> np.ndarray:
        """A tensor in its own dtype, read-only and still on disk: only what is taken of it is read."""
        mapped, begin, end = self._place(name)
        values = np.frombuffer(mapped, np.uint8)[begin:end]
        return values.view(DTYPES[self.format(name)]).reshape(self.shape(name))

    def release(self, name: str) -> None:
        """Lets go of what was read of a tensor, which else counts as this process's memory; it may be read again."""
        mapped, begin, end = self._place(name)
        begin -= begin % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _place(self, name: str) -> tuple[mmap.mmap, int, int]:
        """The mapped file, and where in it a tensor begins and ends."""
        (mapped, start), (first, last) = self._mapped[name], self._headers[name]["data_offsets"]
        return mapped, start + first, start + last


def _map(file: Path) -> tuple[dict[str, dict[str, Any]], mmap.mmap, int]:
    """The header's entry of each tensor, the mapped file, and the place in it that its offsets count from.

    `safe_open` checks the file and copies what it reads; the layout is safetensors' own (github.com/huggingface/
    safetensors, "Format"): 8 bytes of length, little-endian; a JSON header of that length; the values.
    """
    with safe_open(file, framework="numpy"), file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        headers = json.loads(stream.read(size))
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    headers.pop("__metadata__", None)
    return headers, mapped, 8 + size


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, of a sharded model."""
    path = directory / INDEX
    if not path.is_file():
        raise UserError(f"base_model {directory}: {_nothing_found(directory)}")
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(listed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from None
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise UserError(f"{path} names {name!r}, which is not a file beside it")
    if not files:
        raise UserError(f"{path} names no tensor")
    return listed


def _nothing_found(directory: Path) -> str:
    """What stands there instead of weights, and the way out."""

    def there(*patterns: str) -> str:
        return ", ".join(sorted(path.name for pattern in patterns for path in directory.glob(pattern))[:3])

    if other := there("*.safetensors"):
        return f"expected {SINGLE} or {INDEX}, found {other}"
    if files := there("*.gguf"):
        return f"no safetensors files; set base_model to the GGUF file itself ({files})"
    if pickled := there("*.bin", "*.pt", "*.pth"):
        return (
            f"only pickled weights ({pickled}), which can run code when opened. Convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"expected {SINGLE} or {INDEX}, found neither"


def write_weights(
    directory: Path, sizes: dict[str, int], read: Callable[[str], np.ndarray], shard: int | str = "5GB"
) -> None:
    """Writes tensors into a directory as Hugging Face lays them out: one file, or shards with an index.

    Args:
      sizes: name -> bytes, in the order of writing.
      read: the tensor of a name; one file's tensors are in memory at a time.
      shard: bytes of a file at most.

    Raises:
      OSError: there is not enough room, said before anything is written.
    """
    size, free = sum(sizes.values()), shutil.disk_usage(directory).free
    if size > free:
        raise OSError(errno.ENOSPC, f"no room for {size / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free")
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: np.ascontiguousarray(read(name)) for name in names}
        target = directory / file
        target.touch()
        mode = target.stat().st_mode  # safetensors lets nobody else read what it writes
        save_file(tensors, target, metadata={"format": "pt"})
        target.chmod(mode)
    if plan.is_sharded:
        listed = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
