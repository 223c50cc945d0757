"""What is shown and logged: the progress bar, TensorBoard events, metrics.jsonl."""

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from jlora.common.atomic_io import replace_text


class Logger:
    """Writes each logged step to the bar, to `logs/` and to `metrics.jsonl`. A context manager.

    Args:
      run: the run's directory; lines that an interrupted run logged beyond `first` are dropped, as they come again.
      first: steps done before.
      steps: of the whole run.
      silent: shows and writes nothing, for the processes that are not the first.
    """

    def __init__(self, run: Path, first: int, steps: int, *, silent: bool = False) -> None:
        from tensorboardX import SummaryWriter  # here, as it imports PyTorch where that is installed

        path = Path(os.devnull) if silent else run / "metrics.jsonl"
        if not silent and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            replace_text(path, "".join(line for line in whole if json.loads(line)["step"] <= first))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run / "logs"), purge_step=first + 1, write_to_disk=not silent)
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
        self._events.close()
        self._file.close()

    def restart_clock(self) -> None:
        """Leaves out of tokens/s what was not training: compilation, evaluation, saving."""
        self._since, self._tokens = time.perf_counter(), 0

    def step(self, tokens: int) -> None:
        """Counts one step of so many real tokens."""
        self._bar.update(1)
        self._tokens += tokens

    def log(self, step: int, **values: float | int) -> None:
        """Writes values of a step everywhere; training values get tokens/s."""
        if "loss" in values:
            seconds = time.perf_counter() - self._since
            values["tokens_per_second"] = round(self._tokens / max(seconds, 1e-9), 1)
            shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{values['tokens_per_second']:.0f}"}
            if "skipped_steps" in values:
                shown["skipped"] = f"{values['skipped_steps']} steps"
            self._bar.set_postfix(shown)
            if self._bar.disable:  # not a terminal: a line instead of a bar
                self.say(f"step {step} of {self._steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
            self.restart_clock()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._bar.write(text)
        sys.stdout.flush()


def loading_bar(size: int, *, silent: bool) -> tqdm:
    """A bar over `size` bytes, shown on a terminal."""
    return tqdm(total=size, unit="B", unit_scale=True, desc="loading the base", leave=False, disable=silent or None)
