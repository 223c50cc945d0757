"""Rejects, truncates, drops or splits examples longer than `max_seq_length`, and reports how many."""

from typing import Any

import numpy as np

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.examples import Example, SizedExamples, example_sizes


class ExampleParts(SizedExamples):
    """Parts of examples, each an example of its own.

    Args:
      source: the whole examples.
      bounds: [N, 3] for each part: the index of its example, its first token, and the token after its last.
      sizes: [N, 3] `example_sizes` of each part.
    """

    def __init__(self, source: SizedExamples, bounds: np.ndarray, sizes: np.ndarray) -> None:
        self._source, self._bounds, self.sizes = source, bounds, sizes
        self.source_names, self.sources = source.source_names, source.sources[bounds[:, 0]]
        self.prefix = 0 if bounds[:, 1].any() else source.prefix  # a part that starts later does not share the prefix

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: Any) -> Any:
        row, start, stop = self._bounds[index].tolist()
        tokens, weights, where, source = self._source[row]
        return Example(tokens[start:stop], weights[start:stop], where, source)


def limit_length(examples: SizedExamples, limit: int, overlong: str, name: str) -> tuple[SizedExamples, str]:
    """Returns examples of at most `limit` tokens, and a line that reports the changes ("" if there were none).

    Args:
      overlong: "error" rejects longer examples; "drop" removes them; "truncate" keeps their first `limit` tokens;
        "split" cuts them into parts, each starting with the last token of the part before, so that no target is lost.
      name: the name of the examples in messages.

    Raises:
      UserError: `overlong` is "error" and examples are too long, listed with their lengths; or no example is left.
    """
    lengths = np.asarray(examples.sizes[:, 0])
    long = np.flatnonzero(lengths > limit).tolist()
    if not long:
        return examples, ""
    where = {row: examples[row].where for row in long[:5]}
    listed = ", ".join(f"{place} ({lengths[row]})" for row, place in where.items())
    listed += f" and {len(long) - 5} more" if len(long) > 5 else ""
    if overlong == "error":
        raise UserError(
            f"{name}: {plural(len(long), 'example', ('is', 'are'))} longer than max_seq_length={limit} tokens: "
            f"{listed}. Set max_seq_length={lengths.max()}, shorten them, or set overlong to truncate, drop or split."
        )
    short = np.flatnonzero(lengths <= limit)
    bounds = [np.stack([short, np.zeros_like(short), lengths[short]], axis=1)]
    sizes = [np.asarray(examples.sizes[short])]
    parts = shortened = empty = 0
    for row in long if overlong != "drop" else []:
        weights = examples[row].weights
        starts = range(0, len(weights) - 1, limit - 1) if overlong == "split" else (0,)
        for start in starts:
            stop = min(start + limit, len(weights))
            size = example_sizes(weights[start:stop])
            targets = size[1]
            empty += not targets
            shortened += bool(overlong == "truncate" and targets and weights[stop:].any())
            if targets:
                parts += 1
                bounds.append(np.array([[row, start, stop]]))
                sizes.append(np.array([size], np.int32))
    change = {
        "drop": "dropped {}",
        "truncate": f"truncated {{}}, so {plural(shortened, 'answer')} lost the end",
        "split": f"split {{}} into {plural(parts, 'part')}",
    }[overlong].format(f"{len(long)} of {len(examples)} examples longer than {limit} tokens")
    dropped = f", and dropped {plural(empty, 'part')} without trainable tokens" if empty else ""
    report = f"{name}: {change}{dropped} (overlong={overlong}): {listed}"
    kept, measured = np.concatenate(bounds), np.concatenate(sizes)
    if not len(kept):
        raise UserError(f"{report}. No examples are left. Set a larger max_seq_length.")
    order = np.lexsort((kept[:, 1], kept[:, 0]))  # the order of the files
    return ExampleParts(examples, kept[order], measured[order]), report
