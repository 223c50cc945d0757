"""Tokens and masks on disk: a TFDS directory (array_record), written once, read at random without TensorFlow.

Its name is a hash of the rows, the tokenizer and the chat template, so a change of any of them makes a new one; it
begins with the hash of the first rows alone, so that new rows need not be read twice. The sizes of the examples, and
the tokens that all begin with, lie beside them, so that batches can be planned without reading any.
"""

import contextlib
import copy
import gc
import hashlib
import importlib.metadata
import itertools
import json
import operator
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jlora.common.atomic_io import give_name, unnamed_directory
from jlora.common.errors import UserError
from jlora.data.chat import Example, Measured, common, encode_batch, sizes_of
from jlora.data.conversation import Conversation

LAYOUT = 4  # a change of chat.py or of the features below that alters what is stored raises it
SPLIT = "rows"
SIZES, PREFIX = "sizes.npy", "prefix.npy"
TOGETHER = 500  # rows that are encoded at once
AHEAD = 3  # such batches under way
FIRST = 100  # rows that tell whether rows like these were ever here


class Prepared(Measured):
    """Examples on disk, by index from 0."""

    def __init__(self, directory: Path) -> None:
        self._source = tfds.builder_from_directory(directory).as_data_source(split=SPLIT)
        self.sizes = np.load(directory / SIZES, mmap_mode="r")
        self.prefix = len(np.load(directory / PREFIX))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._source[int(index)]
        return Example(row["tokens"], row["trained"], row["where"].decode())


def prepare(
    tokenizer: Any, ends: frozenset[int], rows: Iterable[Conversation], cache: Path, train_on: str = "assistant"
) -> Prepared:
    """The rows as examples, encoded now or at an earlier run. Memory does not grow with the number of rows.

    Args:
      ends: the tokens at which the served model stops.
      rows: at least one conversation; gone through anew each time, so no iterator.
      cache: where prepared data is kept.
      train_on: as for `encode_batch`.

    Raises:
      UserError: a row that the chat template cannot take; other rows than were counted before.
    """
    whole = Fingerprint(tokenizer, ends, train_on)
    first = whole.over(itertools.islice(rows, FIRST))
    if any(cache.glob(f"{first}-*")):  # else these rows were never here, and need not be gone through to know it
        directory = cache / f"{first}-{whole.over(rows)}"
        if directory.is_dir():
            return Prepared(directory)

    def encode(some: list[Conversation]) -> list[Example]:
        return encode_batch(tokenizer, ends, some, train_on)

    gc.freeze()  # else its collections would look through all that is imported, again and again
    try:
        with unnamed_directory(cache) as made:
            expected = operator.length_hint(rows)
            written = _write(_ahead(encode, whole.watch(rows)), made, expected)
            if expected and written != expected:
                raise UserError(f"{expected} rows were read and {written} prepared: the files changed on the way")
            directory = cache / f"{first}-{whole}"
            with contextlib.suppress(FileExistsError):  # another process may be faster
                give_name(made, directory)
    except OSError as error:
        raise UserError(f"prepared data cannot be written to {cache}: {error}. Set XDG_CACHE_HOME elsewhere") from None
    finally:
        gc.unfreeze()
    return Prepared(directory)


class Fingerprint:
    """A sha256 over all that decides the stored tokens and masks; its text is the first 32 hexadecimal digits."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], train_on: str) -> None:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        version = importlib.metadata.version("transformers")
        said = [LAYOUT, version, tokenizer.chat_template, special, sorted(ends), train_on]
        self._digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        self._digest.update(tokenizer.backend_tokenizer.to_str().encode())

    def watch(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        """The same rows; they count as they go by."""
        for row in rows:
            self._digest.update(json.dumps([row.where, [[m.role, m.content] for m in row.messages]]).encode())
            yield row

    def over(self, rows: Iterable[Conversation]) -> str:
        """What the text would be after these rows."""
        other = copy.copy(self)
        other._digest = self._digest.copy()
        deque(other.watch(rows), maxlen=0)
        return str(other)

    def __str__(self) -> str:
        return self._digest.hexdigest()[:32]


def _ahead(
    encode: Callable[[list[Conversation]], list[Example]], rows: Iterable[Conversation]
) -> Iterator[list[Example]]:
    """Encoded rows in order, some at a time; the tokenizer, which is not Python, works beside what writes them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of its own would only be in the way of these
    source = iter(rows)
    under_way: deque[Future[list[Example]]] = deque()
    with ThreadPoolExecutor(AHEAD) as workers:
        while some := list(itertools.islice(source, TOGETHER)):
            under_way.append(workers.submit(encode, some))
            if len(under_way) > AHEAD:
                yield under_way.popleft().result()
        for following in under_way:
            yield following.result()


def _write(batches: Iterator[list[Example]], directory: Path, count: int) -> int:
    """Writes examples, sizes and prefix; returns how many there were."""
    features = {  # as bytes: a tenth of the time that lists of int64 take
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes"),
        "trained": tfds.features.Tensor(shape=(None,), dtype=np.bool_, encoding="bytes"),
        "where": tfds.features.Text(),
    }
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="examples", version=tfds.core.Version(f"{LAYOUT}.0.0"), data_dir=str(directory), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=1 << 20, overwrite=False, file_format="array_record"
    )
    writer.initialize_splits([SPLIT])
    sizes, prefix = array("i"), np.empty(0, np.int32)
    with tqdm(total=count or None, unit="row", desc="tokenizing", leave=False, disable=None) as bar:
        for examples in batches:
            writer.add_examples({SPLIT: [example._asdict() for example in examples]})
            for example in examples:
                prefix = common(prefix, example.tokens) if sizes else example.tokens
                sizes.extend(sizes_of(example.trained))
            bar.update(len(examples))
    writer.close_all()
    np.save(directory / SIZES, np.array(sizes, np.int32).reshape(-1, 3))
    np.save(directory / PREFIX, prefix)
    return len(sizes) // 3
