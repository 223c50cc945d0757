"""Preview of training data for a terminal, a file or a browser: rows with trained tokens marked, and statistics."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from jlora.common.plural import plural
from jlora.common.terminal import escape_controls
from jlora.data.batches import Batches
from jlora.data.examples import Example, SizedExamples
from jlora.pages.charts import bar_chart
from jlora.pages.page import render, section
from jlora.pages.rows import Row, row_list

GREEN, RESET = "\x1b[30;42m", "\x1b[0m"  # black on green
OPEN, CLOSE = "[[", "]]"  # mark trained text without color
BARS, BAR_WIDTH = 8, 40  # of the length histogram: maximum number of bars, characters
EXPLANATION = Markup("<p><mark>Marked</mark> text is trained on. The model receives the rest as its prompt.</p>")


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


def as_html(
    tokenizer: Any, title: str, summary: Iterable[str], lengths: np.ndarray, examples: Sequence[Example]
) -> str:
    """Returns the examples as a self-contained HTML page, with the lengths of all examples as a chart."""
    rows = [
        Row(example_heading(example), {"": marked(tokenizer, example)}, (), len(example.tokens)) for example in examples
    ]
    sections = [
        section("Lengths of the examples", bar_chart(*count_lengths(lengths))),
        section("Rows", EXPLANATION, row_list(rows, "number of tokens")),
    ]
    return render(title, summary, sections)


def marked(tokenizer: Any, example: Example) -> Markup:
    """Returns the text of an example as HTML, with the trained parts marked."""
    return Markup("").join(
        Markup("<mark>{}</mark>" if trained else "{}").format(escape_controls(text))
        for text, trained in split_by_mask(tokenizer, example)
    )


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


def count_lengths(lengths: np.ndarray) -> tuple[list[str], list[int]]:
    """Returns ranges of example lengths, such as "1 to 16 tokens", and the number of examples in each."""
    step = -(-int(lengths.max()) // (16 * BARS)) * 16
    counts = np.bincount((lengths - 1) // step)
    first, digits = int(np.flatnonzero(counts)[0]), len(f"{len(counts) * step}")
    labels = [f"{i * step + 1:>{digits}} to {(i + 1) * step:>{digits}} tokens" for i in range(first, len(counts))]
    return labels, counts[first:].tolist()


def length_histogram(lengths: np.ndarray) -> list[str]:
    """Returns a bar for each range of example lengths, for the terminal."""
    labels, counts = count_lengths(lengths)
    return [
        f"{label}  {'#' * -(-BAR_WIDTH * count // max(counts)):<{BAR_WIDTH}} {count:,}"
        for label, count in zip(labels, counts, strict=True)
    ]
