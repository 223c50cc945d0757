"""Cache of the base model's held-out loss, which runs on the same base model and held-out set share."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import jlora
from jlora.common import paths
from jlora.common.atomic_io import replace_text


def cache_file(values: dict[str, Any], arrays: Iterable[np.ndarray]) -> Path:
    """Returns the cache file of the loss that depends on these JSON values and arrays, and on jlora's own code."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for source in sorted(Path(jlora.__file__).parent.rglob("*.py")):  # a fixed bug must not leave its number behind
        digest.update(source.read_bytes())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return paths.cache_directory() / "base_loss" / digest.hexdigest()


def read_loss(file: Path) -> float | None:
    """Returns the cached loss; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return float(file.read_text())
    return None


def write_loss(file: Path, loss: float) -> None:
    """Caches a loss; a cache directory that cannot be written is ignored."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, repr(loss))
