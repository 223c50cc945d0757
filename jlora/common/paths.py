"""Directories outside a run."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Returns the directory for files that jlora can rebuild: $XDG_CACHE_HOME/jlora, by default ~/.cache/jlora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jlora"
