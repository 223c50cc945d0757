"""Where jlora keeps what it can make again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where models that jlora converts are kept: $XDG_CACHE_HOME/jlora, by default ~/.cache/jlora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jlora"
