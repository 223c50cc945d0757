"""Files and directories that are written whole or not at all, whatever stops the writer."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished-"  # how the names begin of what a killed writer may leave


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one move."""
    new = path.with_name(f"{UNFINISHED}{path.name}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def names_in(directory: Path) -> set[str]:
    """What stands in a directory, but for what a killed writer left."""
    return {path.name for path in directory.iterdir() if not path.name.startswith(UNFINISHED)}


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` in one move when the `with` ends well.

    Raises:
      FileExistsError: `target` stands there by then; what was filled is dropped.
      OSError: it cannot be written.
    """
    with unnamed_directory(target.parent) as made:
        yield made
        give_name(made, target)


@contextmanager
def unnamed_directory(parent: Path) -> Iterator[Path]:
    """A directory to fill, for `give_name` to move to a place in `parent`; dropped where that does not happen."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=UNFINISHED) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        yield made


def give_name(made: Path, target: Path) -> None:
    """Moves a filled directory to its place.

    Raises:
      FileExistsError: `target` stands there by then.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists")
    try:
        made.rename(target)
    except OSError as error:  # it came to be in between
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(f"{target} exists") from None
