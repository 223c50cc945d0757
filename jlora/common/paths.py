"""Directories outside a run, and where a relative path starts: in the working directory."""

import argparse
import os
from pathlib import Path


def cache_directory() -> Path:
    """Returns the directory for files that jlora can rebuild: $XDG_CACHE_HOME/jlora, by default ~/.cache/jlora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jlora"


def looked_for(path: str | Path) -> str:
    """Returns a sentence that tells which absolute path a relative one means; "" for an absolute path."""
    full = Path(path).expanduser()
    return "" if Path(path).is_absolute() else f" Looked for {full.absolute()}."


def path_problem(path: str) -> str:
    """Returns why no file can have this path; "" if one can."""
    try:
        Path(path).expanduser().exists()
    except RuntimeError:
        return f"There is no user {path.split('/')[0].removeprefix('~')!r}, whose home directory it names."
    except OSError as error:
        return f"{error.strerror}."
    return ""


def user_path(text: str) -> Path:
    """Returns the path that an argument of a command names; `~` is the home directory, as in `--output=~/adapter`.

    Raises:
      argparse.ArgumentTypeError: no file can have this path.
    """
    if problem := path_problem(text):
        raise argparse.ArgumentTypeError(f"{text[:100]}: {problem}")
    return Path(text).expanduser()
