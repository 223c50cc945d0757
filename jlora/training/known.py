"""Numbers that were computed before, kept in the user's cache directory under a hash of all that they follow from."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jlora
from jlora.common import paths
from jlora.common.atomic_io import replace_text


class Known:
    """One number. jlora's own code is among what it follows from, so that none outlives a change of it.

    Args:
      values: what else it follows from, of JSON's kinds ...
      arrays: ... and arrays, by their bytes.
    """

    def __init__(self, values: dict[str, Any], arrays: Iterable[Any]) -> None:
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        for file in sorted(Path(jlora.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        self._file = paths.cache_directory() / "known" / digest.hexdigest()

    def get(self) -> float | None:
        """The number; None where it was not computed yet."""
        with contextlib.suppress(OSError, ValueError):
            return float(self._file.read_text())
        return None

    def put(self, value: float) -> None:
        """Keeps it; a cache that cannot be written keeps nothing."""
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._file, repr(value))
