"""Hands mutated files to every reader of files that somebody else wrote.

    python scripts/fuzz.py                                  # 10,000 inputs of each kind; hours on two cores
    python scripts/fuzz.py --inputs 200 --kind config.json  # one kind, quickly

For each kind it prints how many inputs were accepted and how many were refused with a message. Exits with 1 if an input
led to another exception than a UserError, computed for more than 10 s, took more than 1 GiB, or wrote a file outside
of its directory; the smallest such input that hypothesis finds is printed.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_inputs import KINDS, Kind
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jlora.common.errors import UserError

SECONDS, MEMORY = 10, 2**30
WAITING = 60  # seconds by the clock: a busy machine is slow, and only waiting takes so long
SCRATCH = tempfile.gettempdir()


class TooSlow(BaseException):
    """An input took too long; no `except Exception` catches it."""


class Watch:
    """Limits the time and memory of one input, and records files that are written outside of the directory `inside`."""

    def __init__(self) -> None:
        self.inside, self.outside, self._running = "", list[str](), False
        for kind in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(kind, self._stop)
        sys.addaudithook(self._record)

    def _stop(self, *_: Any) -> None:
        raise TooSlow(f"more than {SECONDS} s of computing, or {WAITING} s of waiting")

    def _record(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._running and event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not os.path.realpath(path).startswith((self.inside, "/dev/")):
                self.outside.append(path)

    def run(self, action: Callable[[], object]) -> str:
        """Runs an action within the limits; returns "accepted" or "refused"."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(WAITING)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        self._running, self.outside = True, []
        try:
            action()
            outcome = "accepted"
        except UserError as error:
            assert str(error).strip(), "an error without words"
            outcome = "refused"
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            self._running = False
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < MEMORY, f"needs {grown / 2**20:.0f} MiB"
        assert not self.outside, f"wrote {self.outside}"
        return outcome


def check_kinds(names: list[str], inputs: int, seed: int, results: Any) -> None:
    """Tries many inputs of each kind in this process, and puts the figures into `results`, kind by kind."""
    watch = Watch()
    for name in names:
        results.put(check_kind(KINDS[name], watch, inputs, seed))


def check_kind(kind: Kind, watch: Watch, inputs: int, seed: int) -> tuple[dict[str, int], str, float]:
    """Tries many inputs of one kind; returns the counts, the first failure and the seconds it took."""
    root = Path(tempfile.mkdtemp(prefix="jlora-fuzz-", dir=SCRATCH)).resolve()
    os.environ["XDG_CACHE_HOME"], tempfile.tempdir = str(root / "cache"), str(root)
    os.environ["HF_HUB_OFFLINE"] = "1"
    seeds = kind.make(root / "valid")
    counts: Counter[str] = Counter()
    watch.inside = str(root)
    kind.read(root / "valid")  # imports, which take longer than an input

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=seed == 0,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.sampled_from(seeds).flatmap(lambda name: st.tuples(st.just(name), kind.mutated(root / "valid" / name))))
    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        place = root / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(root / "valid", place)
        (place / name).write_bytes(content)
        counts[watch.run(lambda: kind.read(place))] += 1

    failure, start = "", time.monotonic()
    devnull = open(os.devnull, "w")  # noqa: SIM115 - readers print remarks
    sys.stdout, out = devnull, sys.stdout
    try:
        check()
    except BaseException as error:
        note = "\n".join(getattr(error, "__notes__", []))
        failure = f"{type(error).__name__}: {error}\n{note}"[:3000]
    finally:
        sys.stdout = out
        shutil.rmtree(root, ignore_errors=True)
    return dict(counts), failure, time.monotonic() - start


def main() -> None:
    """Runs the kinds one after another in a process of their own."""
    parser = argparse.ArgumentParser(description="Hands mutated files to every reader.")
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS), help="kinds; default: all")
    parser.add_argument("--seed", type=int, default=0, help="0: the same inputs every time")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    context, figures = multiprocessing.get_context("spawn"), dict[str, Any]()
    while rest := [name for name in arguments.kind if name not in figures]:
        results = context.Queue()
        process = context.Process(target=check_kinds, args=(rest, arguments.inputs, arguments.seed, results))
        process.start()
        for name in rest:
            while process.is_alive() and results.empty():
                process.join(0.1)
            counts, failure, seconds = ({}, "the process died", 0.0) if results.empty() else results.get()
            figures[name] = {**counts, "failure": failure, "seconds": round(seconds)}
            print(f"{name:24} {counts} {seconds:.0f} s {'FAILED: ' + failure if failure else ''}", flush=True)
            if failure == "the process died":  # the next process goes on with the other kinds
                break
        process.join()
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(any(figure["failure"] for figure in figures.values()))


if __name__ == "__main__":
    main()
