"""The trainings of a sweep. Each has a directory of its own, which is that of a run."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.common.atomic_io import replace_text
from jlora.config.schema import Config
from jlora.data.batches import Batches
from jlora.data.examples import SizedExamples
from jlora.steps.train_step import TrainState
from jlora.sweep.grid import Grid, name_of
from jlora.training.checkpoint import Checkpoints, Progress, write_record
from jlora.training.metrics import keep_steps


class Subset(SizedExamples):
    """Some of the examples of another sequence, in the same order."""

    def __init__(self, whole: SizedExamples, indices: np.ndarray) -> None:
        self._whole, self._indices = whole, indices
        self.sizes = whole.sizes[indices]
        self.prefix = min(whole.prefix, int(whole.sizes[:, 2].min()))  # the same for all parts
        self.source_names, self.sources = whole.source_names, whole.sources[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._whole[int(self._indices[index])]


def fold_indices(count: int, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the indices of the training and the held-out examples of each fold; each example is held out once."""
    order = np.random.RandomState([seed, folds]).permutation(count)
    parts = [np.sort(part) for part in np.array_split(order, folds)]
    return [(np.setdiff1d(np.arange(count), part), part) for part in parts]


@dataclasses.dataclass
class Trial:
    """One training: a setting, on all training rows or without one fold or group of them."""

    setting: int  # its number in the grid
    fold: int  # from 0; -1: none is left out
    group: int  # from 0; -1: none is left out
    config: Config  # as for a run of its own
    directory: Path
    batches: Batches
    held_out: Batches
    progress: Progress = dataclasses.field(default_factory=Progress)
    step: int = 0  # trained so far
    diverged: bool = False
    held_out_losses: dict[int, float] = dataclasses.field(default_factory=dict)  # by step
    held_out_sums: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # by step: [batches, 2]
    _known: bool = False  # whether what an earlier process left has been read

    def loss_at(self, step: int) -> float:
        """Returns the held-out loss at a step; infinity if the trial had diverged by then."""
        return self.held_out_losses.get(step, math.inf) if self.diverged else self.held_out_losses[step]

    @property
    def name(self) -> str:
        """The settings, and what is left out."""
        return str(self.directory).rpartition("/trials/")[2]

    @property
    def base_loss(self) -> float | None:
        """The base model's held-out loss."""
        return self.progress.base_loss

    @property
    def metrics(self) -> Path:
        """The file with the losses of its steps."""
        return self.directory / "metrics.jsonl"

    @property
    def sums(self) -> Path:
        """The file with the summed loss and the count of each held-out batch."""
        return self.directory / "held_out.jsonl"

    def log(self, step: int, **values: float) -> None:
        """Adds a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def record(self, step: int, loss: float, sums: np.ndarray) -> None:
        """Adds a held-out loss, and the summed loss and the count of each held-out batch, [batches, 2]."""
        self.held_out_losses[step], self.held_out_sums[step] = loss, sums
        self.progress.record(step, loss)
        self.log(step, eval_loss=loss)
        with self.sums.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "sums": sums.tolist()}) + "\n")

    def save(self, state: TrainState, loss: float | None) -> None:
        """Saves a state as a checkpoint of a run, and waits until it is written."""
        with contextlib.closing(Checkpoints(self.directory)) as checkpoints:
            checkpoints.save(state, self.progress, loss)
        self.step = int(state.step)

    def saved_step(self) -> int:
        """Returns the last saved step, 0 without one; sys.maxsize if the trial diverged, since it is at its end.

        The first call reads what an earlier process left.
        """
        if not self._known:
            self._known = True
            self._read()
        return sys.maxsize if self.diverged else self.step

    def _read(self) -> None:
        if not self.metrics.exists():
            return
        with contextlib.closing(Checkpoints(self.directory)) as checkpoints:
            checkpoints.clean_up(keep_intact=True)
            self.step = max(checkpoints.steps(), default=0)
        lines = keep_steps(self.metrics, sys.maxsize)
        ends = [line["step"] for line in lines if "diverged" in line]
        if ends:
            self.step, self.diverged = ends[0], True
        self._take(lines, self.step)

    def _take(self, lines: Sequence[dict[str, Any]], last: int) -> None:
        """Takes the held-out losses up to a step from the lines of metrics."""
        losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
        self.progress.base_loss = losses.pop(0, None)
        self.held_out_losses = {step: loss for step, loss in losses.items() if step <= last}
        kept = keep_steps(self.sums, last) if self.sums.exists() else []
        self.held_out_sums = {line["step"]: np.array(line["sums"]) for line in kept}

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of a saved step, and discards what is later."""
        with contextlib.closing(Checkpoints(self.directory)) as checkpoints:
            checkpoints.remove_after(step)
            state, self.progress = checkpoints.restore(step, like), checkpoints.progress(step)
        self.step = step
        self._take(keep_steps(self.metrics, step), step)
        return state

    def start(self, record: dict[str, Any]) -> None:
        """Creates the directory, with the record of a run; discards what a process that was killed left there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Checkpoints(self.directory)) as checkpoints:
            checkpoints.remove_after(0)
        write_record(self.directory, {**record, "config": dataclasses.asdict(self.config)})
        replace_text(self.metrics, "")
        self.sums.unlink(missing_ok=True)
        self.step, self.progress, self.held_out_losses, self.held_out_sums = 0, Progress(), {}, {}


def trial_directory(output: Path, changes: dict[str, Any], fold: int, group: int | None) -> Path:
    """Returns the directory of a trial; `group` is None in a sweep that leaves out none."""
    parts = [name_of(changes).replace(" ", ",")] if changes else []
    if group is not None:
        parts.append(f"without-group-{group + 1}" if group >= 0 else "all-rows")
    if fold >= 0:
        parts.append(f"fold-{fold + 1}")
    return Path(output, "trials", *parts)


def by_setting(grid: Grid, trials: Sequence[Trial]) -> list[list[Trial]]:
    """Returns the trials of each setting."""
    return [[trial for trial in trials if trial.setting == number] for number in range(len(grid.settings))]
