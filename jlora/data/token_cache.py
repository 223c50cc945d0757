"""Cache of token ids and loss weights: a TFDS directory (array_record), written once, read without TensorFlow.

The directory's name is a hash of the rows, the tokenizer and the chat template, so a change to any of them makes a new
directory. The name starts with the hash of the first rows alone, so that new data is recognized without reading all of
it first. The sizes of the examples and their common prefix are stored beside them, so that batches can be planned
without reading any example.
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

from jlora.common.atomic_io import publish_directory, unnamed_directory
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.chat_template import states_date
from jlora.data.conversation import Conversation, Message
from jlora.data.examples import Example, SizedExamples, common_prefix, example_sizes
from jlora.data.loss_mask import encode_conversations

LAYOUT = 7  # raise it with any change to answer_text, loss_mask, tokenizer or the features that alters the stored data
SPLIT = "rows"
SIZES, PREFIX, LARGEST = "sizes.npy", "prefix.npy", "largest.npy"
NAMES, SOURCES = "source_names.npy", "sources.npy"
ROWS_PER_BATCH = 500  # rows encoded at once
BATCHES_AHEAD = 3  # such batches encoded while earlier ones are written
PROBE_ROWS = 100  # first rows, hashed alone to find out whether the cache can contain these rows


class CachedExamples(SizedExamples):
    """Examples on disk, read by index; `largest` is the largest token id."""

    def __init__(self, directory: Path) -> None:
        self._source = tfds.builder_from_directory(directory).as_data_source(split=SPLIT)
        self.sizes = np.load(directory / SIZES, mmap_mode="r")
        self.prefix = len(np.load(directory / PREFIX))
        self.largest = int(np.load(directory / LARGEST))
        self.source_names = np.load(directory / NAMES).tolist()
        self.sources = np.load(directory / SOURCES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._source[int(index)]
        weights = np.zeros(len(row["tokens"]), np.float32)
        for start, stop, weight in row["trained"]:
            weights[int(start) : int(stop)] = weight
        return Example(row["tokens"], weights, row["where"].decode(), self.source_names[self.sources[index]])


def load_or_tokenize(
    tokenizer: Any, ends: frozenset[int], rows: Iterable[Conversation], cache: Path, train_on: str = "assistant"
) -> CachedExamples:
    """Returns the rows as examples, from the cache or tokenized now. Memory does not grow with the number of rows.

    Args:
      ends: the token ids at which the served model stops.
      rows: at least one conversation; iterated more than once, so not an iterator.
      cache: the directory that holds cached data.
      train_on: as in `encode_conversations`.

    Raises:
      UserError: a row cannot be encoded, or the number of rows differs from when they were first read.
    """
    fingerprint = Fingerprint(tokenizer, ends, train_on)
    first = fingerprint.after(itertools.islice(rows, PROBE_ROWS))
    if any(cache.glob(f"{first}-*")):  # otherwise the cache cannot contain these rows, so do not hash all
        directory = cache / f"{first}-{fingerprint.after(rows)}"
        if directory.is_dir():
            return CachedExamples(directory)

    def encode(some: list[Conversation]) -> list[Example]:
        return encode_conversations(tokenizer, ends, some, train_on)

    gc.freeze()  # keeps the garbage collector from scanning all imported modules again and again
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache.chmod(0o700)  # the rows are private
        with unnamed_directory(cache) as made:
            expected = operator.length_hint(rows)
            _write(_encode_in_background(encode, fingerprint.update(rows)), made, expected)
            if expected and fingerprint.rows != expected:
                raise UserError(
                    f"The files changed while they were read: {plural(expected, 'row')} at first, "
                    f"{fingerprint.rows:,} when tokenizing. Start again."
                )
            for path in (made, *made.rglob("*")):
                path.chmod(0o700 if path.is_dir() else 0o600)
            directory = cache / f"{first}-{fingerprint}"
            with contextlib.suppress(FileExistsError):  # another process has written it in the meantime
                publish_directory(made, directory)
    except OSError as error:
        raise UserError(
            f"Tokenized data cannot be written to {cache}: {error}. Free some space, or set XDG_CACHE_HOME to another "
            "disk."
        ) from None
    finally:
        gc.unfreeze()
    return CachedExamples(directory)


class Fingerprint:
    """A sha256 of everything that decides the stored tokens and masks; str() gives its first 32 hexadecimal digits."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], train_on: str) -> None:
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        version = importlib.metadata.version("transformers")
        settings = [LAYOUT, version, tokenizer.chat_template, special, sorted(ends), train_on]
        settings += [tokenizer.chat_date if states_date(tokenizer) else "", getattr(tokenizer, "thinking", None)]
        self._digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        self._digest.update(tokenizer.backend_tokenizer.to_str().encode())
        self.rows = 0  # hashed so far

    def update(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        """Yields the rows, adding each to the hash."""
        for row in rows:
            turns = [[m.role, m.content, *([] if m == Message(m.role, m.content) else [repr(m)])] for m in row.messages]
            self._digest.update(json.dumps([row.where, turns, row.tools, row.source]).encode())
            self.rows += 1
            yield row

    def after(self, rows: Iterable[Conversation]) -> str:
        """Returns what the fingerprint would be after these rows, without changing it."""
        other = copy.copy(self)
        other._digest = self._digest.copy()
        deque(other.update(rows), maxlen=0)
        return str(other)

    def __str__(self) -> str:
        return self._digest.hexdigest()[:32]


def _encode_in_background(
    encode: Callable[[list[Conversation]], list[Example]], rows: Iterable[Conversation]
) -> Iterator[list[Example]]:
    """Yields encoded rows in order, in batches; the tokenizer releases the GIL, so the caller can write meanwhile."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its own threads would compete with these
    source = iter(rows)
    pending: deque[Future[list[Example]]] = deque()
    with ThreadPoolExecutor(BATCHES_AHEAD) as workers:
        while some := list(itertools.islice(source, ROWS_PER_BATCH)):
            pending.append(workers.submit(encode, some))
            if len(pending) > BATCHES_AHEAD:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def _stored(example: Example) -> dict[str, Any]:
    """Returns an example as it is stored: its weights as runs of tokens that have the same one."""
    weights = example.weights
    bounds = [0, *(np.flatnonzero(weights[1:] != weights[:-1]) + 1).tolist(), len(weights)]
    runs = [(start, stop, weights[start]) for start, stop in itertools.pairwise(bounds) if weights[start]]
    return {"tokens": example.tokens, "trained": np.array(runs, float).reshape(-1, 3), "where": example.where}


def _write(batches: Iterator[list[Example]], directory: Path, count: int) -> None:
    """Writes examples, sizes and prefix, for about `count` examples."""
    features = {  # encoded as bytes: takes a tenth of the time of lists of int64
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes"),
        "trained": tfds.features.Tensor(shape=(None, 3), dtype=np.float64, encoding="bytes"),  # start, stop, weight
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
    sizes, prefix, largest = array("i"), np.empty(0, np.int32), 0
    names, sources = dict[str, int](), array("i")
    with tqdm(total=count or None, unit="row", desc="tokenizing", leave=False, disable=None) as bar:
        for examples in batches:
            writer.add_examples({SPLIT: [_stored(example) for example in examples]})
            for example in examples:
                prefix = common_prefix(prefix, example.tokens) if sizes else example.tokens
                sizes.extend(example_sizes(example.weights))
                largest = max(largest, int(example.tokens.max()))
                sources.append(names.setdefault(example.source, len(names)))
            bar.update(len(examples))
    writer.close_all()
    np.save(directory / SIZES, np.array(sizes, np.int32).reshape(-1, 3))
    np.save(directory / PREFIX, prefix)
    np.save(directory / LARGEST, largest)
    np.save(directory / NAMES, np.array(list(names)))
    np.save(directory / SOURCES, np.array(sources, np.int32))
