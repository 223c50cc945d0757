"""Tokens and masks on disk: a TFDS directory (array_record), written once, read at random without TensorFlow.

Its name is a hash of the rows, the tokenizer and the chat template, so a change of any of them makes a new one.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import transformers

from jlora.data.chat import Example, encode
from jlora.data.formats import Conversation
from jlora.errors import UserError
from jlora.whole import new_directory

LAYOUT = 1  # a change of chat.py or of the features below that alters what is stored raises it
SPLIT = "rows"


class Prepared(Sequence[Example]):
    """Examples on disk, by index from 0."""

    def __init__(self, directory: Path) -> None:
        self._source = tfds.builder_from_directory(directory).as_data_source(split=SPLIT)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self._source[int(index)]
        return Example(row["tokens"], row["trained"], row["where"].decode())


def prepare(tokenizer: Any, ends: frozenset[int], rows: list[Conversation], cache: Path) -> Sequence[Example]:
    """The rows as examples, encoded now or at an earlier run.

    Args:
      ends: the tokens at which the served model stops.
      rows: at least one conversation.
      cache: where prepared data is kept.

    Raises:
      UserError: a row that the chat template cannot take.
    """
    directory = cache / fingerprint(tokenizer, ends, rows)
    if not directory.is_dir():
        try:
            # another process may be faster
            with contextlib.suppress(FileExistsError), new_directory(directory) as made:
                _write((encode(tokenizer, ends, row) for row in rows), made)
        except OSError as error:
            raise UserError(
                f"prepared data cannot be written to {cache}: {error}. Set XDG_CACHE_HOME elsewhere"
            ) from None
    return Prepared(directory)


def fingerprint(tokenizer: Any, ends: frozenset[int], rows: list[Conversation]) -> str:
    """sha256 over all that decides the stored tokens and masks."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    said = [LAYOUT, transformers.__version__, tokenizer.chat_template, special, sorted(ends)]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for row in rows:
        digest.update(json.dumps([row.where, [[m.role, m.content] for m in row.messages]]).encode())
    return digest.hexdigest()


def _write(examples: Iterator[Example], directory: Path) -> None:
    features = {
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "trained": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
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
    for example in examples:
        writer.add_examples({SPLIT: [example._asdict()]})
    writer.close_all()
