"""A file of rows under the name that messages use, which is not its path if it was in an archive or on the hub."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

SKIPPED_FILES = {"Thumbs.db", "desktop.ini", "__MACOSX"}
SKIPPED_STEMS = {"", "readme", "license", "licence"}  # "" is the stem of hidden files


@dataclass(frozen=True)
class Source:
    """A file of rows; `str` gives its name in messages."""

    path: Path  # to its bytes
    shown: str  # in messages, before the line: "faq.zip/rows.csv" for a file that was unpacked elsewhere

    def __str__(self) -> str:
        return self.shown

    @property
    def name(self) -> str:
        """The last part of the shown name."""
        return PurePath(self.shown).name

    @property
    def suffix(self) -> str:
        """The ending of the shown name, without .gz."""
        return PurePath(self.shown.removesuffix(".gz")).suffix

    def open(self, mode: str = "r", encoding: str | None = None) -> IO[Any]:
        """Opens the file as `Path.open` does."""
        return self.path.open(mode, encoding=encoding)


def is_skipped(name: str) -> bool:
    """Returns whether a file or directory of this name holds no rows: hidden files, README, LICENSE."""
    return name in SKIPPED_FILES or name.split(".")[0].lower() in SKIPPED_STEMS
