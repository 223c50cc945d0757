"""Finds the data files of a path, and tells training, held-out and test files of a directory apart by their names."""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jlora.common.errors import UserError
from jlora.common.paths import looked_for
from jlora.data.conversation import ReadOptions, join_limited
from jlora.data.readers.hub import HUB
from jlora.data.readers.parquet_tfds import is_tfds
from jlora.data.readers.source import is_skipped

# Descriptions of a data set, and copies of its rows that the package `datasets` keeps beside them.
METADATA = re.compile(r"(dataset_infos?|dataset_dict|croissant)\.json|CITATION\.(cff|bib)|cache-[0-9a-f]+.*\.arrow")
TRAIN, HELD_OUT, TEST = "train", "held_out", "test"
EVAL = "eval"  # what eval_data_dir reads: the held-out files, or else the test files, or else all files
SPLITS = {
    **dict.fromkeys("train training 训练".split(), TRAIN),
    **dict.fromkeys("valid validation val dev eval evaluation heldout holdout 验证".split(), HELD_OUT),
    **dict.fromkeys("test testing 测试".split(), TEST),
}
WORD = re.compile(r"训练|验证|测试|[a-z]+|[^\W\d_a-z]+?(?=训练|验证|测试|[\W\d_a-z]|$)")
FILLER = re.compile(r"(set|split|data|集|数据)+$")  # train_data, testset
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
TWO_WORDS = re.compile(r"(held|hold)[-_ ]out")


@dataclass(frozen=True)
class Splits:
    """The data files of a path by what their names say; a file whose name says nothing is a training file."""

    root: Path
    train: list[Path]
    held_out: list[Path]
    test: list[Path]

    def files(self, use: str) -> list[Path]:
        """Returns the files for TRAIN, HELD_OUT or EVAL."""
        if use == HELD_OUT:
            return self.held_out if self.train else []
        everything = sorted([*self.train, *self.held_out, *self.test])
        return self.train or everything if use == TRAIN else self.held_out or self.test or everything

    def remarks(self, use: str, instead: str = "") -> list[str]:
        """Returns a line for each split of a directory that has several, to say what it is used for.

        Args:
          use: TRAIN or EVAL.
          instead: with TRAIN, the key that sets the held-out rows, if one does.
        """
        if sum(map(bool, (self.train, self.held_out, self.test))) < 2:
            return []
        chosen = self.files(use)
        if use == EVAL:
            why = "" if self.held_out else ", because no name says that a file is held out"
            others = [file for file in (*self.train, *self.test) if file not in chosen]
            said = {f"held-out files{why}": chosen, "files left out": others}
        elif not self.train:
            said = {"all files are training files, because no name says train": chosen}
        else:
            held_out = f"held-out files, left out because {instead} is set" if instead else "held-out files"
            test = "test files, which are neither trained on nor used to choose a checkpoint"
            said = {"training files": chosen, held_out: self.held_out, test: self.test}
        names = {words: join_limited(str(f.relative_to(self.root)) for f in files) for words, files in said.items()}
        return [f"{words}: {listed}" for words, listed in names.items() if listed]


def find_splits(path: str, key: str, options: ReadOptions) -> Splits:
    """Returns the files that hold rows; hidden files, README, LICENSE, metadata of data sets are skipped.

    A name says what a file is for if it consists of a word of SPLITS and numbers, as `valid-00000-of-00002.parquet`, or
    is below such a directory. If some name says train, it is enough that the others contain such a word, as
    `law_valid.jsonl`.

    Raises:
      UserError: the path does not exist, or something in it is not a regular file: a broken or circular link, a pipe.
    """
    root = Path(split_sheet(path)[0]).expanduser()
    if is_tfds(path) or path.startswith(HUB):
        return Splits(root, [], [], [])
    if not root.exists():
        raise UserError(f"{key}={path}: No such file or directory.{looked_for(path)} Correct the path.")
    if not root.is_dir():
        return Splits(root, [_check_regular(root)], [], [])
    files = [_check_regular(file) for file in sorted(walk(root))]
    metadata = Path(options.metadata_path).expanduser().resolve() if options.metadata_path else None
    files = [file for file in files if not _is_metadata(file) and file.resolve() != metadata]
    if not files:
        raise UserError(f"{key}={path}: The directory contains no data files. Put files with rows into it.")
    said = {file: _named_split(file.relative_to(root)) for file in files}
    trains = any(split == TRAIN for split, _ in said.values())
    groups: dict[str, list[Path]] = {TRAIN: [], HELD_OUT: [], TEST: []}
    for file, (split, alone) in said.items():
        groups[split if split and (alone or trains) else TRAIN].append(file)
    return Splits(root, groups[TRAIN], groups[HELD_OUT], groups[TEST])


def split_sheet(path: str) -> tuple[str, str]:
    """Returns a path without its `#SHEET`, and the name of the sheet; "" if it has none."""
    file, _, sheet = path.rpartition("#")
    return (file, sheet) if file and sheet and not Path(path).expanduser().exists() else (path, "")


def walk(directory: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields all files below a directory, following links; hidden files, README and LICENSE are skipped."""
    real = directory.resolve()
    if real in above:
        raise UserError(f"{directory} is a link to one of its own parent directories. Remove it.")
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}. Check its permissions.") from None
    for name in names:
        if is_skipped(name):
            continue
        if (directory / name).is_dir():
            yield from walk(directory / name, (*above, real))
        else:
            yield directory / name


def _check_regular(file: Path) -> Path:
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not a regular file (a pipe or a device?). Remove it.")
    except OSError as error:
        raise UserError(f"{file} is a broken symbolic link ({error.strerror}). Remove or fix it.") from None
    return file


def _is_metadata(file: Path) -> bool:
    if file.name == "state.json":  # of a directory that `save_to_disk` wrote
        return (file.parent / "dataset_info.json").is_file()
    return bool(METADATA.fullmatch(file.name))


def _named_split(file: Path) -> tuple[str, bool]:
    """Returns the split that a path's names say, the nearest to the file first, and whether the word is alone."""
    found = [_split_in(name) for name in (file.stem, *(folder.name for folder in file.parents))]
    return next((one for alone in (True, False) for one in found if one[0] and one[1] == alone), ("", False))


def _split_in(name: str) -> tuple[str, bool]:
    stem = TWO_WORDS.sub(r"\1out", SHARD.sub("", name.lower()))
    words = [word for word in (FILLER.sub("", word) for word in WORD.findall(stem)) if word]
    splits = {SPLITS[word] for word in words if word in SPLITS}
    return (splits.pop() if len(splits) == 1 else ""), all(word in SPLITS for word in words)
