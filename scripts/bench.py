"""Compares jlora with PyTorch PEFT on the same work: base model, rows, batches, initial adapter and loss, in turns.

    python scripts/bench.py                                  # SmolLM2-135M on this machine, three runs each
    python scripts/bench.py --contenders jlora peft trl      # TRL's SFTTrainer too (pip install trl)
    python scripts/bench.py --shape llama-2-7b --runs 1      # random weights of that shape; no download

Each run is a process of its own; jlora's is `python -m jlora.train`, as a user runs it. Real tokens per second exclude
padding. The share of the matrix peak is useful work, relative to a large matrix product measured in the same run:

    useful FLOPs = 4 x parameters x real tokens
                 + 12 x layers x heads x head size x t (t + 1) / 2, summed over examples of t tokens

The parameters are all matrices that multiply activations, including the head: 2 FLOPs per parameter forward, 2 for the
gradient of the activations; frozen weights have no gradient. Attention is causal, once forward and twice backward. The
first share counts this for every token of every example. But jlora computes logits only where the loss needs them, the
shared prefix only once per row, and no tokens after the last target: the second share, "done", counts only what it
computes. The table, and a JSON file with versions and the device, are written to scripts/results/.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = Path(__file__).parent / "contenders.py"
PACKAGES = "jlora jax jaxlib flax torch peft transformers trl".split()
WARMUP = 3  # first steps, which are not timed


@dataclasses.dataclass
class Run:
    """The measurements of one process."""

    losses: list[float]  # of each step, nats per target
    seconds: list[float]  # of each step
    first_step: float  # seconds from the start of the process to the end of step 1
    compiling: float  # seconds, for all programs
    peak: int  # bytes, resident in host memory
    device_peak: int  # bytes; 0 if the device does not report it


def launch(command: list[str], environment: dict[str, str]) -> tuple[list[str], float, int]:
    """Runs a process; returns its output lines, the seconds until its first step, and its peak resident bytes."""
    start, first, lines = time.perf_counter(), 0.0, []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if not first and (line.startswith(("Step 1 of", '{"step": 1,'))):
            first = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit("\n".join([f"{command[:3]} failed:", *lines[-30:]]))
    return lines, first, usage.ru_maxrss * 1024


def run_jlora(work: dict[str, Any], scratch: Path, number: int, overrides: list[str]) -> Run:
    """Runs `python -m jlora.train`; its compiled programs stay in `scratch` for the next run."""
    output = scratch / f"jlora-{number}"
    settings = {
        **work["settings"],
        "init_adapter": work["adapter"],
        "output_dir": str(output),
        "logging_steps": 1,
        "save_steps": 10**6,
        "sample_questions": 0,
    }
    command = [sys.executable, "-m", "jlora.train", "--config", work["config"], *overrides]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    lines, first, peak = launch(command, {"JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled")})
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in logged if "loss" in entry]
    took = [tokens / entry["tokens_per_second"] for tokens, entry in zip(work["tokens_of_steps"], steps, strict=True)]
    compiling = sum(float(match[1]) for line in lines if (match := re.match(r"[Cc]ompiled in ([\d.]+) s", line)))
    device = max((entry.get("device_memory_peak", 0) for entry in steps), default=0)
    return Run([entry["loss"] for entry in steps], took, first, compiling, peak, device)


def run_torch(name: str, work: dict[str, Any], scratch: Path) -> Run:
    """Runs one of contenders.py on the batches of jlora."""
    lines, first, peak = launch([sys.executable, str(CONTENDERS), name, str(scratch / "work.json")], {})
    steps = [json.loads(line) for line in lines if line.startswith('{"step"')]
    device = max((step.get("device_peak", 0) for step in steps), default=0)
    return Run([step["loss"] for step in steps], [step["seconds"] for step in steps], first, 0.0, peak, device)


def matrix_peak() -> dict[str, float]:
    """Measures the FLOP/s of a large matrix product in jax and in torch, each in its own process."""
    found = {}
    for name in ("jax", "torch"):
        lines, _, _ = launch([sys.executable, str(CONTENDERS), f"peak-{name}"], {})
        found[name] = float(lines[-1])
    return found


def useful_flops(work: dict[str, Any], steps: range, *, done: bool) -> float:
    """Counts FLOPs by the formula above, over some steps; `done`: only those that jlora computes."""

    def layers(tokens: int) -> float:
        heads = work["layers"] * work["heads"] * work["head_size"]
        return 4.0 * work["layer_parameters"] * tokens + 12.0 * heads * tokens * (tokens + 1) / 2

    total, shared = 0.0, layers(work["prefix"]) if done else 0.0
    for step in steps:
        total += shared * work["rows_of_steps"][step]
        for tokens, targets, places in work["sizes_of_steps"][step]:
            read, scored = (places, targets) if done else (tokens, tokens)
            total += layers(read) - shared + 4.0 * work["head_parameters"] * scored
    return total


def summary(work: dict[str, Any], runs: dict[str, list[Run]], peaks: list[float]) -> list[dict[str, Any]]:
    """Returns one row per contender: medians over its runs."""
    timed = range(WARMUP, len(work["tokens_of_steps"]))
    tokens = sum(work["tokens_of_steps"][step] for step in timed)
    rows = []
    for name, some in runs.items():
        seconds = [sum(run.seconds[step] for step in timed) for run in some]
        took = statistics.median(seconds)
        shares = [useful_flops(work, timed, done=done) / took / statistics.median(peaks) for done in (False, True)]
        against = max(abs(a / b - 1) for run in some for a, b in zip(run.losses, runs["jlora"][0].losses, strict=True))
        rows.append(
            {
                "contender": name,
                "tokens_per_second": tokens / took,
                "tokens_per_second_of_runs": [tokens / s for s in seconds],
                "step_seconds": statistics.median(s for run in some for s in run.seconds[WARMUP:]),
                "first_step_cold": some[0].first_step,
                "first_step_warm": statistics.median(run.first_step for run in some[1:] or some),
                "compiling_cold": some[0].compiling,
                "peak_bytes": max(run.peak for run in some),
                "device_peak_bytes": max(run.device_peak for run in some),
                "share_of_peak": shares[0],
                "share_of_peak_done": shares[1],
                "largest_loss_difference": against,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows as Markdown."""
    first = rows[0]["tokens_per_second"]
    lines = [
        "| | real tokens/s | speedup of jlora | step | first step, cold / warm | host peak | device peak "
        "| share of matrix peak (done) | loss difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        device = f"{row['device_peak_bytes'] / 2**30:.2f} GiB" if row["device_peak_bytes"] else "-"
        lines.append(
            f"| {row['contender']} | {row['tokens_per_second']:.0f} | {first / row['tokens_per_second']:.2f} x "
            f"| {row['step_seconds'] * 1e3:.0f} ms | {row['first_step_cold']:.1f} / {row['first_step_warm']:.1f} s "
            f"| {row['peak_bytes'] / 2**30:.2f} GiB | {device} | {row['share_of_peak']:.0%} "
            f"({row['share_of_peak_done']:.0%}) | {row['largest_loss_difference']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prepares the work, runs the contenders in turns, prints and saves the results."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Further options (--config.KEY=VALUE) are passed to jlora.train.",
    )
    parser.add_argument("--config", default="configs/law.py")
    parser.add_argument("--shape", default="", help="a file in scripts/shapes, to use a base model with random weights")
    parser.add_argument("--contenders", nargs="+", default=["jlora", "peft"], choices=("jlora", "peft", "trl"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--name", default="", help="name of the files in scripts/results; default: the base model's name"
    )
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare = [sys.executable, str(CONTENDERS), "prepare", str(scratch), arguments.config, arguments.shape]
        launch(
            [*prepare, str(arguments.steps), *overrides], {}
        )  # in a process of its own, so that this one stays small
        work = json.loads((scratch / "work.json").read_text())
        runs: dict[str, list[Run]] = {name: [] for name in arguments.contenders}
        peaks = []
        for number in range(arguments.runs):
            peaks.append(matrix_peak())
            for name, some in runs.items():
                done = (
                    run_jlora(work, scratch, number, overrides) if name == "jlora" else run_torch(name, work, scratch)
                )
                some.append(done)
                print(
                    f"run {number + 1}, {name}: {statistics.median(done.seconds[WARMUP:]) * 1e3:.0f} ms per step",
                    flush=True,
                )
    best = [max(peak.values()) for peak in peaks]
    rows = summary(work, runs, best)
    words = f"{work['base']}, {work['device']}: matrix peak {statistics.median(best) / 1e9:,.0f} GFLOP/s"
    result = {
        "when": datetime.date.today().isoformat(),
        "base": work["base"],
        "device": work["device"],
        "overrides": overrides,
        "steps": arguments.steps,
        "matrix_peak_flops": peaks,
        "rows": rows,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
    }
    name = arguments.name or f"bench-{arguments.shape or 'smollm2-135m'}-{work['device_name']}"
    target = ROOT / "scripts" / "results" / name
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(f"{words}\n\n{table(rows)}\n")
    print(f"\n{words}\n\n{table(rows)}\n\nsaved as {target}.json and .md")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
