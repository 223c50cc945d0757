"""Runs a sweep: every setting trains on the same base model, with the same compiled program, and the best is exported.

All settings share one padded form (padded.py), whose scale, dropout, learning rate and weight decay are arrays. Each
trains exactly as a run of its own would. Its directory is that of a run: it can be exported, and is what a sweep that
was stopped continues from.
"""

import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.adapters.settings import spec_of
from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.common.text_table import text_table
from jlora.config.schema import Config
from jlora.data.batches import align_batches
from jlora.data.examples import Example
from jlora.distributed.sharding import data_parallel_size, place, places_of
from jlora.distributed.stop_signal import StopSignal
from jlora.models import hf_loader
from jlora.planning.data_pipeline import make_run_batches
from jlora.steps import optim
from jlora.steps.programs import Programs, fresh_state, state_shapes
from jlora.steps.train_step import TrainState
from jlora.sweep import report
from jlora.sweep.choice import pasted, rungs, standings, survivors, winner
from jlora.sweep.grid import Grid, name_of, read_grid
from jlora.sweep.padded import cut, pad, padded_config
from jlora.sweep.trials import Subset, Trial, by_setting, fold_indices, trial_directory
from jlora.training import resume
from jlora.training.checkpoint import read_record, write_record
from jlora.training.run import first_adapter, load
from jlora.training.setup import RunSetup, prepare_run

STEPS_IN_FLIGHT = 2  # steps that may be queued on the devices at a time


class Sweep(NamedTuple):
    """A sweep that is ready to train."""

    grid: Grid
    setup: RunSetup  # of the padded config
    trials: list[Trial]
    steps: int
    output: Path


@contextlib.contextmanager
def prepared(config: Config) -> Iterator[Sweep]:
    """Reads rows and settings, and creates or checks the directory, which stays locked until the `with` block ends.

    Raises:
      UserError: the settings, the rows or the directory must change.
    """
    grid, output = read_grid(config), Path(config.output_dir)
    if jax.process_count() > 1:
        raise UserError("A sweep runs in one process. Set num_processes=1.")
    setup = prepare_run(padded_config(config, grid.configs))
    _check_width(grid, setup)
    steps, trials = make_trials(grid, setup, output)
    record = {**setup.record, "config": {**setup.record["config"], "sweep": json.loads(json.dumps(dict(config.sweep)))}}
    with resume.lock_run_directory(output):
        _check_record(output, record)
        write_record(output, record)
        yield Sweep(grid, setup, trials, steps, output)


def make_trials(grid: Grid, setup: RunSetup, output: Path) -> tuple[int, list[Trial]]:
    """Returns the number of steps of all trials, and the trials; their batches have the same shapes.

    Raises:
      UserError: there are no held-out rows, or fewer rows than folds.
    """
    parts: list[tuple[int, Sequence[Example], Sequence[Example]]] = []
    if grid.folds:
        if len(setup.examples) < 2 * grid.folds:
            raise UserError(f"--sweep.folds={grid.folds} needs at least {2 * grid.folds} training rows.")
        for fold, (kept, left_out) in enumerate(fold_indices(len(setup.examples), grid.folds, setup.config.seed)):
            parts.append((fold, Subset(setup.examples, kept), Subset(setup.examples, left_out)))
    elif setup.held_out is None:
        raise UserError("A sweep compares held-out losses. Set eval_data_dir, eval_share or --sweep.folds.")
    else:
        parts.append((-1, setup.examples, setup.held_out.examples))
    trials, all_steps, devices = [], [], data_parallel_size(setup.mesh)
    for number, config in enumerate(grid.configs):
        for fold, examples, held_out_examples in parts:
            alike = dataclasses.replace(config, lora_dropout=setup.config.lora_dropout)  # which rules out a prefix
            steps, batches, held_out = make_run_batches(alike, setup.model, examples, held_out_examples, devices)
            assert held_out is not None
            directory = trial_directory(output, grid.settings[number], fold)
            own = dataclasses.replace(config, output_dir=str(directory))
            trials.append(Trial(number, fold, own, directory, batches, held_out))
            all_steps.append(steps)
    once = [trial.held_out.steps_per_epoch for trial in trials]
    aligned = align_batches([trial.batches for trial in trials], all_steps)
    aligned_held_out = align_batches([trial.held_out for trial in trials], once, 1)
    for trial, batches, held_out in zip(trials, aligned, aligned_held_out, strict=True):
        trial.batches, trial.held_out = batches, held_out
    return min(all_steps), trials


def train(sweep: Sweep, say: Callable[[str], None]) -> signal.Signals | None:
    """Trains all trials to the end, or until their settings are left out; returns the signal that stopped it."""
    grid, setup, trials = sweep.grid, sweep.setup, sweep.trials
    longest = max(trials, key=lambda trial: trial.batches.packing[1:])
    programs = load(setup._replace(batches=longest.batches, held_out=trials[0].held_out), 0, swept=True)
    trainer = Trainer(setup, programs, sweep.steps)
    alive, every = list(range(len(grid.settings))), setup.config.eval_steps or trials[0].batches.steps_per_epoch
    stages = sorted({*range(every, sweep.steps, every), *rungs(grid, sweep.steps), sweep.steps})
    with StopSignal() as stop:
        for until in stages:
            for trial in trials:
                if trial.setting in alive and not trainer.train(trial, until, stop, say):
                    return stop.received
            if all(trial.diverged for trial in trials if trial.setting in alive):
                raise UserError("All settings diverged. Lower learning_rate.")
            if until in rungs(grid, sweep.steps):
                alive = survivors(grid, trials, until, alive)
            best = standings(grid, trials)[0]
            say(
                f"Step {until} of {sweep.steps}: {plural(len(alive), 'setting')} left; the best is "
                f"{name_of(grid.settings[best.setting])} with a held-out loss of {best.text}"
            )
    return None


def finish(sweep: Sweep) -> tuple[Path, str]:
    """Exports the winner's adapter and writes the report; returns the adapter and the winner's settings as YAML."""
    grid, output = sweep.grid, sweep.output
    chosen, reason = winner(grid, standings(grid, sweep.trials))
    best = by_setting(grid, sweep.trials)[chosen.setting][0]
    about = {"jlora": jlora.__version__, "base_model": sweep.setup.config.base_model}
    replace_text(output / "sweep.json", report.as_json(grid, sweep.trials, sweep.steps, about))
    replace_text(output / "sweep.html", report.as_html(grid, sweep.trials, sweep.steps, f"Sweep in {output.name}"))
    rows = text_table(*report.table_rows(grid, sweep.trials, sweep.steps))
    print("", *rows, "", f"The winner is {reason}.", sep="\n")
    return best.directory, pasted(grid, chosen.setting)


class Trainer:
    """Trains one trial after the other with the programs of the sweep."""

    def __init__(self, setup: RunSetup, programs: Programs, steps: int) -> None:
        self._setup, self._programs, self._steps = setup, programs, steps
        self._base_losses: dict[int, float] = {}  # by fold
        spec = dataclasses.replace(spec_of(setup.record["config"]), swept=True)
        _, shapes, _ = hf_loader.abstract_model(setup.model, spec, setup.compute)
        optimizer = programs.optimizer
        self._like = state_shapes(shapes, optimizer, setup.mesh, setup.compute.compute_dtype)

    def train(self, trial: Trial, until: int, stop: StopSignal, say: Callable[[str], None]) -> bool:
        """Trains a trial up to a step, evaluates and saves it; returns whether no signal stopped it.

        A trial that is there already is left as it is.
        """
        if trial.diverged:
            return True
        own = self._start(trial)
        if trial.step >= until:
            return True
        like, config = jax.tree.map(_shape, own), trial.config
        state = place(pad(own, config, self._like), places_of(self._like))
        if trial.progress.base_loss is None:
            trial.progress.base_loss = self._base_loss(trial, state, say)
            trial.log(0, eval_loss=trial.progress.base_loss)
        key = jax.jit(lambda: jax.random.key(config.seed + 1), out_shardings=self._programs.everywhere)()
        pending: list[Any] = []
        for done in range(trial.step + 1, until + 1):
            if stop.received or trial.diverged:
                break
            state, metrics = self._programs.train_step(state, trial.batches[done - 1], say, key)
            pending.append(metrics)
            if len(pending) > STEPS_IN_FLIGHT:
                jax.block_until_ready(pending[-1 - STEPS_IN_FLIGHT])
            trial.step = done
            if done % config.logging_steps == 0 or done == until:
                self._log(trial, pending)
        if pending:
            self._log(trial, pending)
        loss = None
        if not (stop.received or trial.diverged):
            loss = self._programs.held_out_loss(state.lora, trial.held_out, say)
            trial.diverged = not math.isfinite(loss)
        if trial.diverged:  # nothing is saved: a sweep that continues gets here again
            say(f"{trial.directory.name} diverged before step {trial.step}")
            return True
        if loss is not None:
            trial.record(until, loss)
        trial.save(cut(jax.device_get(state), like), loss)
        return not stop.received

    def _base_loss(self, trial: Trial, state: TrainState, say: Callable[[str], None]) -> float:
        """Returns the base model's loss on a trial's held-out rows, which is computed once for all settings."""
        if trial.fold not in self._base_losses:
            neutral = self._programs.neutral(state.lora)
            self._base_losses[trial.fold] = self._programs.held_out_loss(neutral, trial.held_out, say)
        return self._base_losses[trial.fold]

    def _start(self, trial: Trial) -> TrainState:
        """Returns the state of a trial in a run's own form: where it stopped, or fresh."""
        setup, spec = self._setup, spec_of(dataclasses.asdict(trial.config))
        _, shapes, _ = hf_loader.abstract_model(setup.model, spec, setup.compute)
        optimizer = optim.make_optimizer(trial.config, spec, self._steps)
        like = state_shapes(shapes, optimizer, setup.mesh, setup.compute.compute_dtype)
        if (saved := trial.restore(like)) is not None:
            return saved
        trial.start(setup.record)
        adapter = first_adapter(trial.config, setup.model, setup.compute, self._programs.base)
        return fresh_state(adapter, optimizer, setup.mesh, setup.compute.compute_dtype)

    def _log(self, trial: Trial, pending: list[Any]) -> None:
        """Logs the mean loss of the steps since the last line, or marks the trial as diverged."""
        fetched = jax.device_get(pending)
        pending.clear()
        trial.diverged = any(metrics.broken() for metrics in fetched)
        if not trial.diverged:
            targets = sum(metrics.targets for metrics in fetched)
            trial.log(trial.step, loss=float(sum(m.loss * m.targets for m in fetched) / targets))


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.asarray(leaf).dtype)


def _check_width(grid: Grid, setup: RunSetup) -> None:
    spec = spec_of(setup.record["config"])
    _, shapes, _ = hf_loader.abstract_model(setup.model, spec, setup.compute)
    widths = [size for leaf in jax.tree.leaves(shapes) for size in leaf.shape[1:]]
    narrow = min(size for size in widths if size != spec.rank) if any(s != spec.rank for s in widths) else spec.rank
    for changes, config in zip(grid.settings, grid.configs, strict=True):
        if config.lora_rank > narrow:
            raise UserError(
                f"{name_of(changes)}: lora_rank={config.lora_rank} is above the width of a projection, {narrow}. Set a "
                "smaller rank."
            )


def _check_record(output: Path, record: dict[str, Any]) -> None:
    """Raises a UserError if the directory has another sweep."""
    if not (output / "config.json").exists():
        return
    old = read_record(output, "output_dir")
    changes = list(resume.describe_changes(old, record).values())
    if dict(old["config"]["sweep"]) != record["config"]["sweep"]:
        changes.append(f"sweep changed from {dict(old['config']['sweep'])} to {record['config']['sweep']}")
    if changes:
        raise UserError(
            f"The sweep in {output} cannot continue: {'; '.join(changes)}. Undo these changes, or set another "
            "output_dir."
        )
