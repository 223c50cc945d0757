"""Atomic file and directory writes: readers see the complete result or nothing, even if the writer is killed."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished-"  # name prefix of files that a killed writer may leave behind


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically, replacing an existing one."""
    new = path.with_name(f"{UNFINISHED}{path.name}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def finished_names(directory: Path) -> set[str]:
    """Returns the names in a directory, without leftovers of a killed writer."""
    return {path.name for path in directory.iterdir() if not path.name.startswith(UNFINISHED)}


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory to fill; it is renamed to `target` if the `with` block succeeds.

    Raises:
      FileExistsError: `target` exists by then; the new directory is removed.
      OSError: the directory cannot be written.
    """
    with unnamed_directory(target.parent) as made:
        yield made
        publish_directory(made, target)


@contextmanager
def unnamed_directory(parent: Path) -> Iterator[Path]:
    """Yields an empty directory for `publish_directory` to move into `parent`; removes it if that does not happen."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=UNFINISHED) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        yield made


def publish_directory(made: Path, target: Path) -> None:
    """Renames a filled directory to `target`.

    Raises:
      FileExistsError: `target` exists.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists")
    try:
        made.rename(target)
    except OSError as error:  # created since the check
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(f"{target} exists") from None
