"""Preview of training data for a terminal, a file or a browser: rows with trained tokens marked, and statistics."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.common.plural import plural
from jlora.common.terminal import escape_controls
from jlora.data.batches import Batches
from jlora.data.examples import Example, SizedExamples

GREEN, RESET = "\x1b[30;42m", "\x1b[0m"  # black on green
OPEN, CLOSE = "[[", "]]"  # mark trained text without color
BARS, BAR_WIDTH = 8, 40  # of the length histogram: maximum number of bars, characters
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .8em; border-radius: 4px }}
mark {{ background: #a6e3a1; color: #000 }} h2 {{ font-size: 1em; margin: 1.5em 0 .3em }}
</style></head><body><h1>{title}</h1>
<pre>{summary}</pre>
<p><mark>Marked</mark> text is trained on. The model receives the rest as its prompt.</p>
{rows}
</body></html>
"""


def split_by_mask(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """Splits an example's text where training starts or stops; special tokens are spelled out."""
    cuts = np.flatnonzero(np.diff(example.loss_mask)) + 1
    starts = [0, *cuts.tolist()]
    runs = np.split(example.tokens, cuts)
    return [
        (tokenizer.decode(run, clean_up_tokenization_spaces=False), bool(example.loss_mask[start]))
        for start, run in zip(starts, runs, strict=True)
    ]


def as_text(tokenizer: Any, example: Example, *, color: bool) -> str:
    """Returns an example for a terminal (with `color`) or a file; control characters are shown as codes."""
    parts = []
    for raw, trained in split_by_mask(tokenizer, example):
        text = escape_controls(raw)
        if trained and color:  # color each line on its own: terminals would color the space to its right as well
            text = "\n".join(f"{GREEN}{line}{RESET}" if line else "" for line in text.split("\n"))
        elif trained:
            text = f"{OPEN}{text}{CLOSE}"
        parts.append(text)
    return "".join(parts)


def as_html(tokenizer: Any, title: str, summary: Iterable[str], examples: Sequence[Example]) -> str:
    """Returns the examples as a self-contained HTML page with all text escaped."""
    rows = []
    for example in examples:
        parts = [
            f"<mark>{html.escape(escape_controls(text))}</mark>" if trained else html.escape(escape_controls(text))
            for text, trained in split_by_mask(tokenizer, example)
        ]
        rows.append(f"<h2>{html.escape(example_heading(example))}</h2>\n<pre>{''.join(parts)}</pre>")
    lines = "\n".join(escape_controls(line) for line in summary)
    return PAGE.format(title=html.escape(title), summary=html.escape(lines), rows="\n".join(rows))


def example_heading(example: Example) -> str:
    """Returns the place and size of an example."""
    return f"{example.where}: {plural(len(example.tokens), 'token')}, {np.count_nonzero(example.weights)} trained on"


def batch_summary(batches: Batches, steps: int, most: int = 10_000) -> str:
    """Describes the batches of a run: their shapes, and the share of padding in the first `most` steps."""
    counted = range(min(steps, most))
    computed = sum(batches.rows * batches.micro_batches * batches.shape(step).length for step in counted)
    used = sum(batches.positions_used(step) for step in counted)
    prefix = batches.prefix_note()
    shapes = ", ".join(f"{batches.rows} x {shape.length}" for shape in batches.shapes)
    return (
        f"{plural(steps, 'step')} of {plural(batches.batch_size * batches.micro_batches, 'example')}; "
        f"batch shapes to compile: {shapes} tokens; {1 - used / computed:.1%} padding{prefix and f'; {prefix}'}"
    )


def examples_summary(name: str, examples: SizedExamples) -> str:
    """Returns one line with the number of examples and tokens, the trained share, and the longest example."""
    total, trained = (int(column.sum(dtype=np.int64)) for column in examples.sizes[:, :2].T)
    longest = examples[int(np.argmax(examples.sizes[:, 0]))]
    return (
        f"{name}: {plural(len(examples), 'example')}, {plural(total, 'token')}, {trained / total:.0%} of them trained "
        f"on; the longest example has {plural(len(longest.tokens), 'token')} ({Path(longest.where).name})"
    )


def length_histogram(lengths: np.ndarray) -> list[str]:
    """Returns a bar for each range of example lengths, in tokens."""
    step = -(-int(lengths.max()) // (16 * BARS)) * 16
    counts = np.bincount((lengths - 1) // step)
    last = f"{len(counts) * step}"
    return [
        f"{i * step + 1:>{len(last)}} to {(i + 1) * step:>{len(last)}} tokens  "
        f"{'#' * -(-BAR_WIDTH * count // counts.max()):<{BAR_WIDTH}} {count:,}"
        for i, count in enumerate(counts.tolist())
        if counts[: i + 1].any()
    ]
