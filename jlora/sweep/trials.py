"""The trainings of a sweep. Each has a directory of its own, which is that of a run."""

import contextlib
import dataclasses
import json
import math
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
    """One training: a setting, on all training rows or without one fold."""

    setting: int  # its number in the grid
    fold: int  # from 0; -1: all rows
    config: Config  # as for a run of its own
    directory: Path
    batches: Batches
    held_out: Batches
    progress: Progress = dataclasses.field(default_factory=Progress)
    step: int = 0
    diverged: bool = False
    held_out_losses: dict[int, float] = dataclasses.field(default_factory=dict)  # by step

    def loss_at(self, step: int) -> float:
        """Returns the held-out loss at a step; infinity if the trial had diverged by then."""
        return self.held_out_losses.get(step, math.inf) if self.diverged else self.held_out_losses[step]

    @property
    def metrics(self) -> Path:
        """The file with the losses of its steps."""
        return self.directory / "metrics.jsonl"

    def log(self, step: int, **values: float) -> None:
        """Adds a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def record(self, step: int, loss: float) -> None:
        """Adds a held-out loss."""
        self.held_out_losses[step] = loss
        self.progress.record(step, loss)
        self.log(step, eval_loss=loss)

    def save(self, state: TrainState, loss: float | None) -> None:
        """Saves a state as a checkpoint of a run, and waits until it is written."""
        with contextlib.closing(Checkpoints(self.directory)) as checkpoints:
            checkpoints.save(state, self.progress, loss)

    def restore(self, like: TrainState) -> TrainState | None:
        """Reads the latest state and the losses up to there; None if nothing was saved."""
        if not self.directory.is_dir():
            return None
        with contextlib.closing(Checkpoints(self.directory)) as checkpoints:
            checkpoints.clean_up(keep_intact=True)
            steps, _ = checkpoints.intact_steps()
            if not steps:
                replace_text(self.metrics, "")
                return None
            state, self.progress = checkpoints.restore(steps[-1], like), checkpoints.progress(steps[-1])
        self.step = steps[-1]
        kept = keep_steps(self.metrics, self.step)
        self.held_out_losses = {
            line["step"]: line["eval_loss"] for line in kept if line["step"] and "eval_loss" in line
        }
        return state

    def start(self, record: dict[str, Any]) -> None:
        """Creates the directory, with the record of a run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_record(self.directory, {**record, "config": dataclasses.asdict(self.config)})


def trial_directory(output: Path, changes: dict[str, Any], fold: int) -> Path:
    """Returns the directory of a trial."""
    own = output / "trials" / name_of(changes).replace(" ", ",")
    return own if fold < 0 else own / f"fold-{fold + 1}"


def by_setting(grid: Grid, trials: Sequence[Trial]) -> list[list[Trial]]:
    """Returns the trials of each setting."""
    return [[trial for trial in trials if trial.setting == number] for number in range(len(grid.settings))]
