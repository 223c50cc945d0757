"""Measures a sweep beside runs of their own: time, CPU time and peak memory, and whether the losses are equal.

    python scripts/sweep_cost.py --config configs/law.py --work /tmp/sweep-cost

It trains 12 settings for 3 epochs: half of the runs, a sweep with halving, the other half, and the sweep without. It
takes about 75 times as long as one run of an epoch. Writes a table to standard output, and `figures.json` to --work.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

RANKS, RATES = (4, 8, 16), ("5e-4", "1e-3", "2e-3", "4e-3")


def measured(words: list[str], log: Path) -> dict[str, float]:
    """Runs a program of jlora and returns its seconds, CPU-seconds, and peak memory in MiB."""
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)} failed; see {log}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }


def losses(run: Path) -> dict[tuple[str, int], float]:
    """Returns the training and held-out losses of a run, by name and step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(name, line["step"]): line[name] for line in lines for name in ("loss", "eval_loss") if name in line}


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/law.py")
    parser.add_argument("--work", type=Path, required=True, help="a new directory")
    parser.add_argument("--epochs", default="3")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True)
    common = ["--config", arguments.config, f"--config.epochs={arguments.epochs}", "--config.sample_questions=0"]
    common += ["--config.logging_steps=1", "--config.save_steps=1000000"]  # the same lines in both logs
    sweep = [f"--sweep.lora_rank={','.join(map(str, RANKS))}", f"--sweep.learning_rate={','.join(RATES)}"]

    def alone(rank: int, rate: str) -> dict[str, float]:
        name = f"lora_rank={rank},learning_rate={float(rate):g}"
        own = [f"--config.lora_rank={rank}", f"--config.learning_rate={rate}", f"--config.output_dir={work / name}"]
        return measured(["jlora.train", *common, *own], work / f"{name}.log")

    def together(name: str, *own: str) -> dict[str, float]:
        return measured(
            ["jlora.sweep", *common, *sweep, f"--config.output_dir={work / name}", *own], work / f"{name}.log"
        )

    pairs = [*itertools.product(RANKS, RATES)]
    runs = [alone(*pair) for pair in pairs[::2]]
    halved = together("halving", "--sweep.halving=3")
    runs += [alone(*pair) for pair in pairs[1::2]]
    whole = together("whole")
    summed = {key: sum(own[key] for own in runs) for key in ("seconds", "cpu_seconds")}
    summed["peak_mib"] = max(own["peak_mib"] for own in runs)
    differences = [
        abs(loss / alone[key] - 1)
        for trial in (work / "whole/trials").iterdir()
        for alone in [losses(work / trial.name)]
        for key, loss in losses(trial).items()
    ]
    print("| | seconds | share | CPU-seconds | share | peak memory (MiB) |\n|---|---|---|---|---|---|")
    for name, own in ((f"{len(runs)} runs", summed), ("sweep", whole), ("sweep, halving=3", halved)):
        shares = [own[key] / summed[key] for key in ("seconds", "cpu_seconds")]
        print(
            f"| {name} | {own['seconds']:.0f} | {shares[0]:.2f} | {own['cpu_seconds']:.0f} | {shares[1]:.2f} | "
            f"{own['peak_mib']:.0f} |"
        )
    print(
        f"\n{len(differences)} losses compared with those of the runs; they differ by {max(differences):.1e} at most."
    )
    (work / "figures.json").write_text(json.dumps({"runs": runs, "halving": halved, "whole": whole}, indent=2))


if __name__ == "__main__":
    main()
