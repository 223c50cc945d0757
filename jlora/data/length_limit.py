"""Examples longer than `max_seq_length`: an error, cut, left out, or split; always counted."""

from typing import Any

import numpy as np

from jlora.common.errors import UserError
from jlora.data.chat import Example, Measured, sizes_of


class Pieces(Measured):
    """Parts of examples, as if they were examples.

    Args:
      source: the whole examples.
      bounds: [N, 3] the example, the first token and the token after the last of each part.
      sizes: [N, 3] what `sizes_of` says of each part.
    """

    def __init__(self, source: Measured, bounds: np.ndarray, sizes: np.ndarray) -> None:
        self._source, self._bounds, self.sizes = source, bounds, sizes
        self.prefix = 0 if bounds[:, 1].any() else source.prefix  # a later part begins with anything

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: Any) -> Any:
        row, start, stop = self._bounds[index].tolist()
        tokens, trained, where = self._source[row]
        return Example(tokens[start:stop], trained[start:stop], where)


def fit(examples: Measured, limit: int, overlong: str, name: str) -> tuple[Measured, str]:
    """Examples of at most `limit` tokens, and a sentence on what was done to reach that ("" where nothing was).

    Args:
      overlong: "error"; "drop" leaves the long ones out; "truncate" keeps their first `limit` tokens; "split" makes
        parts of them, each beginning with the last token of the one before, so that every target stays one.
      name: what the examples are, for messages.

    Raises:
      UserError: some are longer and `overlong` is "error", by row and length needed; or nothing would be left.
    """
    lengths = np.asarray(examples.sizes[:, 0])
    long = np.flatnonzero(lengths > limit).tolist()
    if not long:
        return examples, ""
    where = {row: examples[row].where for row in long[:5]}
    named = ", ".join(f"{place} ({lengths[row]})" for row, place in where.items())
    named += f" and {len(long) - 5} more" if len(long) > 5 else ""
    if overlong == "error":
        raise UserError(
            f"{name} data: {len(long)} example(s) are longer than max_seq_length={limit} tokens: {named}. "
            f"Set max_seq_length={lengths.max()}, shorten them, or choose overlong=truncate, drop or split"
        )
    short = np.flatnonzero(lengths <= limit)
    bounds = [np.stack([short, np.zeros_like(short), lengths[short]], axis=1)]
    sizes = [np.asarray(examples.sizes[short])]
    parts = cut = empty = 0
    for row in long if overlong != "drop" else []:
        trained = examples[row].trained
        starts = range(0, len(trained) - 1, limit - 1) if overlong == "split" else (0,)
        for start in starts:
            stop = min(start + limit, len(trained))
            size = sizes_of(trained[start:stop])
            targets = size[1]
            empty += not targets
            cut += bool(overlong == "truncate" and targets and trained[stop:].any())
            if targets:
                parts += 1
                bounds.append(np.array([[row, start, stop]]))
                sizes.append(np.array([size], np.int32))
    done = {
        "drop": "left out (overlong=drop)",
        "truncate": f"cut there (overlong=truncate); {cut} of their answers lose their end",
        "split": f"split (overlong=split) into {parts} parts",
    }[overlong]
    left_out = f"; {empty} part(s) without anything to train on are left out" if empty else ""
    said = f"{name}: {len(long)} of {len(examples)} examples are longer than {limit} tokens: {done}{left_out}: {named}"
    kept, measured = np.concatenate(bounds), np.concatenate(sizes)
    if not len(kept):
        raise UserError(f"{said}. That leaves nothing: set a larger max_seq_length")
    order = np.lexsort((kept[:, 1], kept[:, 0]))  # as in the files
    return Pieces(examples, kept[order], measured[order]), said
