"""The token X-ray: rows as the model sees them, what is trained on set apart; for a terminal, a file, or a browser."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jlora.data.batches import Batches
from jlora.data.chat import Example

GREEN, PLAIN = "\x1b[30;42m", "\x1b[0m"  # black on green
OPEN, CLOSE = "[[", "]]"  # where there is no colour
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .8em; border-radius: 4px }}
mark {{ background: #a6e3a1; color: #000 }} h2 {{ font-size: 1em; margin: 1.5em 0 .3em }}
</style></head><body><h1>{title}</h1>
<pre>{summary}</pre>
<p>What is <mark>marked</mark> is trained on; the rest is what the model is given.</p>
{rows}
</body></html>
"""


def segments(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """An example's text, cut where it changes between trained and not; special tokens as they are written."""
    cuts = np.flatnonzero(np.diff(example.trained)) + 1
    starts = [0, *cuts.tolist()]
    runs = np.split(example.tokens, cuts)
    return [
        (tokenizer.decode(run, clean_up_tokenization_spaces=False), bool(example.trained[start]))
        for start, run in zip(starts, runs, strict=True)
    ]


def as_text(tokenizer: Any, example: Example, *, colour: bool) -> str:
    """One example for a terminal (`colour`) or a file; what would steer a terminal is shown as its code."""
    parts = []
    for said, trained in segments(tokenizer, example):
        text = visible(said)
        if trained and colour:  # line by line, or a terminal colours what is right of them too
            text = "\n".join(f"{GREEN}{line}{PLAIN}" if line else "" for line in text.split("\n"))
        elif trained:
            text = f"{OPEN}{text}{CLOSE}"
        parts.append(text)
    return "".join(parts)


def as_page(tokenizer: Any, title: str, summary: Iterable[str], examples: Sequence[Example]) -> str:
    """The same as a page that needs nothing else; every text is escaped."""
    rows = []
    for example in examples:
        parts = [
            f"<mark>{html.escape(visible(text))}</mark>" if trained else html.escape(visible(text))
            for text, trained in segments(tokenizer, example)
        ]
        rows.append(f"<h2>{html.escape(heading(example))}</h2>\n<pre>{''.join(parts)}</pre>")
    lines = "\n".join(visible(line) for line in summary)
    return PAGE.format(title=html.escape(title), summary=html.escape(lines), rows="\n".join(rows))


def heading(example: Example) -> str:
    """Where a row stands, and its size."""
    return f"{example.where}: {len(example.tokens)} tokens, {int(example.trained.sum())} trained on"


def visible(text: str) -> str:
    """Control characters, and those that turn the direction of reading, as codes."""
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def batch_line(batches: Batches, steps: int, most: int = 10_000) -> str:
    """What the steps of a run compute: sizes, and the share of padding (of the first `most` steps)."""
    looked = range(min(steps, most))
    computed = sum(batches.rows * batches.micro_batches * batches.shape(step).length for step in looked)
    real = sum(batches.laid(step) for step in looked)
    shared = batches.sharing()
    sizes = ", ".join(f"{batches.rows} x {shape.length}" for shape in batches.shapes)
    return (
        f"{steps:,} steps of {batches.batch_size * batches.micro_batches} examples, laid end to end; sizes to compile: "
        f"{sizes} tokens; {1 - real / computed:.1%} of what is computed is padding{shared and f'; {shared}'}"
    )
