"""Atomic file and directory writes: readers see the complete result or nothing, even if the writer is killed."""

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock, so leftovers of killed writers stay there
    fcntl = None  # type: ignore[assignment]

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
    """Yields an empty directory for `publish_directory` to move into `parent`; removes it if that does not happen.

    A lock on its parent shows that the writer lives; what killed writers left beside it is removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    unnamed = tempfile.TemporaryDirectory(dir=parent, prefix=UNFINISHED, ignore_cleanup_errors=True)
    with unnamed as scratch, _locked(Path(scratch)):
        made = Path(scratch) / "new"
        made.mkdir(parents=True)
        yield made


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Locks a directory, unless it is locked; yields whether it is locked by us now."""
    if not fcntl:
        yield False
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # by its writer; or the file system has no locks
            yield False
            return
        yield True
    finally:
        os.close(opened)


def _remove_leftovers(parent: Path) -> None:
    """Removes the unfinished directories whose writer is gone; in its first seconds it may not have locked its own."""
    for path in parent.glob(UNFINISHED + "[a-z0-9_]" * 8):  # as tempfile names them
        with suppress(OSError):  # just removed, or not ours
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and time.time() - status.st_ctime > 10:
                with _locked(path) as gone:
                    if gone:
                        shutil.rmtree(path, ignore_errors=True)


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
