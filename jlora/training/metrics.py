"""Progress bar, metrics.jsonl and trackers."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from jlora.common.atomic_io import replace_text
from jlora.training.trackers import Tracker, failure


class Logger:
    """A context manager that writes each logged step to the progress bar, to `metrics.jsonl` and to trackers.

    Args:
      run: the run's directory; steps after `first` that an interrupted run logged are removed, as they run again.
      first: the number of steps done before.
      steps: the number of steps in the whole run.
      trackers: by name; the logger closes them. One that fails is left out from then on.
      silent: show and write nothing, for all processes but the first.
    """

    def __init__(
        self, run: Path, first: int, steps: int, trackers: dict[str, Tracker], *, silent: bool = False
    ) -> None:
        path = Path(os.devnull) if silent else run / "metrics.jsonl"
        if not silent and path.exists():
            keep_steps(path, first)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = dict(trackers)
        self._bar = tqdm(
            total=steps, initial=first, unit="step", dynamic_ncols=True, smoothing=0.1, disable=silent or None
        )
        self._steps = steps
        self._since = time.perf_counter()
        self._tokens = 0

    def __enter__(self) -> "Logger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._report(lambda tracker: tracker.close())
        self._file.close()

    def restart_clock(self) -> None:
        """Restarts the clock, so that tokens/s excludes compilation, evaluation and saving."""
        self._since, self._tokens = time.perf_counter(), 0

    def step(self, tokens: int) -> None:
        """Counts one finished step and its tokens, without padding."""
        self._bar.update(1)
        self._tokens += tokens

    def log(self, step: int, **values: float | int) -> None:
        """Writes a step's values everywhere; tokens/s is added to training losses."""
        if "loss" in values:
            seconds = time.perf_counter() - self._since
            values["tokens_per_second"] = round(self._tokens / max(seconds, 1e-9), 1)
            shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{values['tokens_per_second']:.0f}"}
            if "skipped_steps" in values:
                skipped = values["skipped_steps"]
                shown["skipped"] = "1 step" if skipped == 1 else f"{skipped} steps"
            self._bar.set_postfix(shown)
            if self._bar.disable:  # not a terminal: print lines instead of a bar
                self.print_line(f"Step {step} of {self._steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
            self.restart_clock()
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._report(lambda tracker: tracker.log(step, values))

    def log_text(self, step: int, name: str, text: str) -> None:
        """Gives the trackers a text, such as an answer of the adapter at a step."""
        self._report(lambda tracker: tracker.log_text(step, name, text))

    def _report(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:  # of any kind, from the network or a library
                del self._trackers[name]
                self.print_line(failure(name, error))

    def print_line(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text)
        sys.stdout.flush()


def keep_steps(metrics: Path, last: int) -> list[dict[str, Any]]:
    """Removes the lines after a step, and half a line at the end; returns the values of those that are kept."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    complete = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, values) for line, values in complete if values["step"] <= last]
    replace_text(metrics, "".join(line for line, _ in kept))
    return [values for _, values in kept]


def loading_bar(size: int, *, silent: bool) -> tqdm:
    """Returns a progress bar over `size` bytes, shown only on a terminal."""
    return tqdm(
        total=size, unit="B", unit_scale=True, desc="Loading the base model", leave=False, disable=silent or None
    )
