"""Data sets on the Hugging Face hub: downloads the files of a split to the hub's cache, or finds them there."""

import functools
import glob
import re
from pathlib import Path
from typing import NamedTuple

from jlora.common.errors import UserError
from jlora.data.conversation import join_limited
from jlora.data.readers.source import Source, is_skipped

HUB = "hf:"  # train_data_dir="hf:OWNER/NAME/SPLIT"
PATH = re.compile(r"hf:(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>refs/\w+/\w+|[^/]+))?(?:/(?P<split>.+))?")
FILE = re.compile(
    r"(?:(?P<folder>.+)/)?(?P<stem>[^/]+?)(?P<shard>-\d+-of-(?P<shards>\d+)(-\w+)?)?"
    r"\.(?P<ending>parquet|jsonl?|ndjson|csv|tsv)(\.gz)?"
)
DESCRIPTIONS = {"dataset_info", "dataset_infos", "dataset_dict", "state"}  # JSON files that hold no rows


class HubSplit(NamedTuple):
    """The files of one split, in the hub's cache."""

    name: str  # of the data set: OWNER/NAME
    split: str
    commit: str
    files: tuple[Source, ...]
    offline: bool  # whether the hub was not asked for the newest commit

    @property
    def pinned(self) -> str:
        """The path that always means this commit."""
        return f"{HUB}{self.name}@{self.commit}/{self.split}"


@functools.cache  # the revision may move on the hub; a run reads its rows several times
def find_split(path: str, key: str) -> HubSplit:
    """Returns the files of a split, downloaded now if necessary.

    Args:
      path: `hf:OWNER/NAME/SPLIT` or `hf:OWNER/NAME@REVISION/SPLIT`; a file of the data set may be named instead of a
        split, and a data set with one split needs no name. Splits in a directory are DIRECTORY/SPLIT.

    Raises:
      UserError: the hub cannot be reached and its cache does not have the data set; there is no such data set,
        revision or split; or it is not complete.
    """
    match = PATH.fullmatch(path)
    if not match:
        raise UserError(f"{key}={path}: Expected {HUB}OWNER/NAME/SPLIT or {HUB}OWNER/NAME@REVISION/SPLIT.")
    name, revision = match["id"], match["revision"]
    names, directory = _list_files(name, revision, f"{key}={path}")
    data_set = match[0].removesuffix(f"/{match['split']}")
    split, chosen = _choose(names, match["split"] or "", data_set, f"{key}={path}")
    downloaded = directory or _download(name, revision, chosen, f"{key}={path}")
    shards = FILE.fullmatch(chosen[0])
    expected = int(shards["shards"] or 0) if shards and split not in names else 0
    there, expected = sum((downloaded / file).is_file() for file in chosen), max(expected, len(chosen))
    if there < expected:
        named = f"on the hub. Name one of them, as in {data_set}/{chosen[0]}"
        where = "in the hub's cache. Read it once while the hub can be reached" if directory else named
        raise UserError(f"{key}={path}: Only {there} of the {expected} files of {split} are {where}.")
    files = tuple(Source(downloaded / file, f"{HUB}{name}/{file}") for file in chosen)
    return HubSplit(name, split, downloaded.name, files, directory is not None)


def _list_files(name: str, revision: str | None, setting: str) -> tuple[list[str], Path | None]:
    """Returns the names of a data set's files; and, if the hub cannot be reached, their directory in its cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:  # one request, which fails at once without a network
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision)
        return [file.rfilename for file in info.siblings or []], None
    except (errors.HFValidationError, errors.RevisionNotFoundError) as error:
        if isinstance(error, errors.RevisionNotFoundError):
            problem = f"{name} has no revision {revision!r} on the hub. Name one of its branches, tags or commits"
        else:
            problem = f"{name!r} is not a valid name on the hub. Expected OWNER/NAME"
        raise UserError(f"{setting}: {problem}.") from None
    except Exception as error:  # of the HTTP client, which differs between versions
        reason = error
    try:
        found = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=[]
        )
    except Exception:
        raise UserError(f"{setting}: {_explain(name, reason)}") from None
    directory = Path(found)
    return [str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()], directory


def _explain(name: str, reason: Exception) -> str:
    """Returns why a data set cannot be downloaded, and what to do."""
    from huggingface_hub import errors

    if isinstance(reason, errors.GatedRepoError):
        page = f"https://huggingface.co/datasets/{name}"
        return f"{name} is gated. Accept its terms on {page}, and log in with `hf auth login`."
    if isinstance(reason, errors.RepositoryNotFoundError):
        return f"The hub has no data set {name}, or it is private. Check the name, or log in with `hf auth login`."
    if isinstance(reason, errors.OfflineModeIsEnabled):
        return f"{name} is not in the hub's cache, and HF_HUB_OFFLINE is set. Download it once without HF_HUB_OFFLINE."
    text = (str(reason).strip().split("\n") or [""])[0] or type(reason).__name__
    return f"The hub cannot be reached ({text}), and {name} is not in its cache. Check the network and HF_ENDPOINT."


def _choose(names: list[str], wanted: str, data_set: str, setting: str) -> tuple[str, list[str]]:
    """Returns the name of the split, and its files in order."""
    splits: dict[str, list[str]] = {}
    for name in sorted(names):
        if split := _split_of(name):
            splits.setdefault(split, []).append(name)
    if wanted in names:
        return wanted, [wanted]
    if not splits:
        advice = f"If the hub has converted it, set {data_set.split('@')[0]}@refs/convert/parquet."
        raise UserError(f"{setting}: The data set has no Parquet, JSON or CSV files. {advice}")
    if not wanted and len(splits) == 1:
        wanted = next(iter(splits))
    if wanted not in splits:
        raise UserError(f"{setting}: Expected {data_set}/SPLIT, where SPLIT is one of {join_limited(splits, 20)}.")
    files = splits[wanted]
    if len({_kind(file) for file in files}) > 1:
        raise UserError(
            f"{setting}: Several files could be {wanted}. Name one of them, as in {data_set}/{files[0]}: "
            f"{join_limited(files)}."
        )
    return wanted, files


def _split_of(name: str) -> str:
    """Returns the split that a file belongs to by its name: data/train-00000-of-00002.parquet to train; "" if none."""
    match = FILE.fullmatch(name)
    if not match or match["stem"] in DESCRIPTIONS or any(map(is_skipped, name.split("/"))):
        return ""
    folder = match["folder"] or ""
    split = folder if match["stem"].isdigit() and folder else f"{folder}/{match['stem']}"
    return split.lstrip("/").removeprefix("data/")


def _kind(name: str) -> tuple[str | bool | None, ...]:
    """Returns what all files of one split have in common: the directory, the format, and whether they are numbered."""
    match = FILE.fullmatch(name)
    assert match is not None
    return match["folder"], match["ending"], match["shards"], match["stem"].isdigit()


def _download(name: str, revision: str | None, files: list[str], setting: str) -> Path:
    """Downloads files of a data set; returns their directory."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=[glob.escape(file) for file in files]
            )
        )
    except Exception as error:  # of the HTTP client, which differs between versions
        raise UserError(f"{setting}: {_explain(name, error)}") from None
