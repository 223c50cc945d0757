"""Trains the trials of a sweep in teams: the trials of a team see the same batches and share each step."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

from jlora.adapters import params
from jlora.adapters.settings import spec_of
from jlora.adapters.spec import AdapterSpec
from jlora.config.schema import Config
from jlora.data.batches import Batch
from jlora.distributed.sharding import place, places_of
from jlora.distributed.stop_signal import StopSignal
from jlora.models import hf_loader
from jlora.planning.forecast import Job, make_run_programs
from jlora.steps import optim
from jlora.steps.programs import Programs, first_state, stacked_shapes, state_shapes
from jlora.steps.train_step import TrainState
from jlora.sweep.padded import cut, pad, stack, unstack
from jlora.sweep.trials import Trial
from jlora.training.run import make_run_job
from jlora.training.setup import RunSetup

Item = TypeVar("Item")
STEPS_IN_FLIGHT = 2  # steps that may be queued on the devices at a time


def make_teams(trials: Sequence[Trial], size: int) -> list[list[Trial]]:
    """Returns the trials in teams of this size; the batches of a team have the same examples.

    The last team of those with the same batches may have fewer.
    """
    alike: dict[tuple[int, int], list[Trial]] = {}
    for trial in trials:
        alike.setdefault((trial.config.seed, trial.fold), []).append(trial)
    return [some[i : i + size] for some in alike.values() for i in range(0, len(some), size)]


def team_size(trials: Sequence[Trial], most: int) -> int:
    """Returns the size of equal teams of these trials, at most `most`."""
    largest = max(Counter((trial.config.seed, trial.fold) for trial in trials).values())
    return -(-largest // -(-largest // most))


class Form(NamedTuple):
    """What trainings whose adapters have the same form share."""

    shapes: TrainState  # the state of a run of its own, as shapes
    first: Callable[[Any, int], TrainState]  # base model, seed -> the state before step 1


class TeamPrograms(NamedTuple):
    """What a team trains with: a single trial in its own form, several in the padded form."""

    steps: Programs
    shapes: TrainState  # of one trial
    size: int  # a smaller team is filled up with its last trial


class Trainer:
    """A context manager that trains teams, and shows a progress bar on a terminal.

    Args:
      programs: of the first teams, for the adapter of the setup's config.
      steps: of each whole training.
      trainings: the number of trainings, if none stops early.
    """

    def __init__(self, setup: RunSetup, programs: Programs, steps: int, trainings: int) -> None:
        self._setup, self._base, self._steps = setup, programs.base, steps
        self._base_losses: dict[int, float] = {}  # by fold
        self._forms: dict[AdapterSpec, Form] = {}
        self._make_keys = jax.jit(jax.vmap(jax.random.key), out_shardings=programs.everywhere)
        self._bar = tqdm(total=steps * trainings, unit="step", dynamic_ncols=True, smoothing=0.1, disable=None)
        job = self._job(setup.config, setup.record["runtime"]["team"])
        self._programs = {job.spec: self._team_programs(job, programs)}

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def print_lines(self, *lines: str) -> None:
        """Prints lines above the progress bar."""
        for line in lines:
            self._bar.write(line)

    def train(self, team: Sequence[Trial], size: int, until: int, stop: StopSignal) -> bool:
        """Trains a team up to a step, evaluates and saves all its trials; returns whether no signal stopped it.

        All of them continue from the last step that each has saved. Trials that diverged are left as they are.

        Args:
          size: of the program; a smaller team is filled up with its last trial.
        """
        start = min(trial.saved_step() for trial in team)
        for trial in team:
            if trial.base_loss is not None:  # reused, as other forms round differently
                self._base_losses.setdefault(trial.fold, trial.base_loss)
        team = [trial for trial in team if not trial.diverged]
        if start >= until or not team:
            return True
        self._bar.set_description(f"{team[0].name}{f' and {len(team) - 1} more' if len(team) > 1 else ''}")
        programs = self._programs_for(team, size)
        own = [self._start(trial, start) for trial in team]
        state = _place_together(own, team, programs)
        for trial in team:
            if trial.base_loss is None:
                loss = trial.progress.base_loss = self._base_loss(trial, state, programs.steps)
                trial.log(0, eval_loss=loss)
        state, done = self._run(team, programs, state, start, until, stop)
        losses: list[float | None] = [None] * len(team)
        if not stop.received and not all(trial.diverged for trial in team):
            losses = self._evaluate(team, state, until, programs.steps)
        self._save(team, own, state, done, losses)
        return not stop.received

    def _run(
        self,
        team: Sequence[Trial],
        programs: TeamPrograms,
        state: TrainState,
        start: int,
        until: int,
        stop: StopSignal,
    ) -> tuple[TrainState, int]:
        """Trains up to a step, a signal, or the divergence of all; returns the state and the steps done."""
        keys = self._make_keys(np.array(_filled([trial.config.seed + 1 for trial in team], programs.size)))
        every = self._setup.config.logging_steps
        pending: list[Any] = []
        done = start
        while done < until and not stop.received and not all(trial.diverged for trial in team):
            batch = _joint_batch(team, programs.size, done)
            state, metrics = programs.steps.train_step(state, batch, self.print_lines, keys)
            pending.append(metrics)
            if len(pending) > STEPS_IN_FLIGHT:
                jax.block_until_ready(pending[-1 - STEPS_IN_FLIGHT])
            done += 1
            self._bar.update(len(team))
            if done % every == 0 or done == until:
                _log(team, done, pending)
        if pending:
            _log(team, done, pending)
        return state, done

    def _evaluate(self, team: Sequence[Trial], state: TrainState, step: int, programs: Programs) -> list[float | None]:
        """Records the held-out losses of a team; None for trials that diverged."""
        sums = programs.held_out_sums(state.lora, team[0].held_out, self.print_lines)
        total, count = sums.sum(axis=0)
        losses: list[float | None] = []
        for trial, loss, own in zip(team, (total / count).tolist(), np.moveaxis(sums, 2, 0), strict=False):
            trial.diverged |= not math.isfinite(loss)
            losses.append(None if trial.diverged else loss)
            if not trial.diverged:
                trial.record(step, loss, own)
                self.print_lines(f"{trial.name}: held-out loss {loss:.4f} after step {step}")
        return losses

    def _save(
        self,
        team: Sequence[Trial],
        own: Sequence[TrainState],
        state: TrainState,
        step: int,
        losses: Sequence[float | None],
    ) -> None:
        """Saves all trials; those that diverged are marked at the end, so that a kill does not divide the team."""
        whole = jax.device_get(state)
        for i, trial in enumerate(team):
            if not trial.diverged:
                trial.save(cut(unstack(whole, i), jax.tree.map(_shape, own[i])), losses[i])
        for trial in team:
            if trial.diverged:
                trial.log(trial.step, diverged=True)
                self.print_lines(f"{trial.name} diverged before step {trial.step}")

    def _job(self, config: Config, size: int) -> Job:
        runtime = self._setup.record["runtime"]
        return make_run_job(self._setup._replace(config=config), size).with_remat(runtime["remat"])

    def _team_programs(self, job: Job, programs: Programs) -> TeamPrograms:
        mesh, dtype = self._setup.mesh, self._setup.compute.compute_dtype
        _, adapter, _ = hf_loader.abstract_model(self._setup.model, job.spec, job.compute)
        return TeamPrograms(programs, state_shapes(adapter, programs.optimizer, mesh, dtype), job.team)

    def _programs_for(self, team: Sequence[Trial], size: int) -> TeamPrograms:
        """Returns what a team of this size trains with, not compiled yet if it is new."""
        job = self._job(team[0].config if size == 1 else self._setup.config, size)
        if any(own.size != size for own in self._programs.values()):  # settings were left out
            self._programs.clear()
        if job.spec not in self._programs:
            programs, _ = make_run_programs(job, self._steps)
            programs.base = self._base
            self._programs[job.spec] = self._team_programs(job, programs)
        return self._programs[job.spec]

    def _base_loss(self, trial: Trial, state: TrainState, programs: Programs) -> float:
        """Returns the base model's loss on a trial's held-out rows, which is computed once for all settings."""
        if trial.fold not in self._base_losses:
            sums = programs.held_out_sums(programs.neutral(state.lora), trial.held_out, self.print_lines)
            total, count = sums[..., 0].sum(axis=0)
            self._base_losses[trial.fold] = float(total / count)
        return self._base_losses[trial.fold]

    def _start(self, trial: Trial, step: int) -> TrainState:
        """Returns the state of a trial after a step that it has saved, or before its first, in a run's own form."""
        spec = spec_of(dataclasses.asdict(trial.config))
        if spec not in self._forms:
            self._forms[spec] = self._form(trial.config, spec)
        form = self._forms[spec]
        if step:
            return trial.restore(step, form.shapes)
        trial.start(self._setup.record)
        return form.first(self._base, trial.config.seed)

    def _form(self, config: Config, spec: AdapterSpec) -> Form:
        setup, dtype = self._setup, self._setup.compute.compute_dtype
        _, adapter, _ = hf_loader.abstract_model(setup.model, spec, setup.compute)
        optimizer = optim.make_optimizer(config, spec, self._steps)  # of which only the form of its state counts here
        shapes = state_shapes(adapter, optimizer, setup.mesh, dtype)

        def first(base: Any, seed: Int[Array, ""]) -> TrainState:
            return first_state(params.start(spec, adapter, base, jax.random.key(seed)), optimizer, dtype)

        return Form(shapes, jax.jit(first, out_shardings=places_of(shapes)))


def _place_together(own: Sequence[TrainState], team: Sequence[Trial], programs: TeamPrograms) -> TrainState:
    """Returns states of runs in the form that the team trains in, stacked, on the mesh."""
    padded = [pad(state, trial.config, programs.shapes) for state, trial in zip(own, team, strict=True)]
    return place(stack(_filled(padded, programs.size)), places_of(stacked_shapes(programs.shapes, programs.size)))


def _joint_batch(team: Sequence[Trial], size: int, step: int) -> Batch:
    """Returns the batch of a step, counted from 0; each trial has its own weights."""
    whole = dataclasses.replace(team[0].batches, left_out=None)
    batch = whole[step]
    weights = [batch.weights if trial.group < 0 else trial.batches[step].weights for trial in team]
    return batch._replace(weights=np.stack(_filled(weights, size)))


def _filled(items: list[Item], size: int) -> list[Item]:
    """Returns the items of a team, filled up with the last one to the size of the program."""
    return items + items[-1:] * (size - len(items))


def _log(team: Sequence[Trial], step: int, pending: list[Any]) -> None:
    """Logs the mean losses of the steps since the last line, and finds the trials that diverged."""
    fetched = jax.device_get(pending)
    pending.clear()
    for i, trial in enumerate(team):
        own = [unstack(metrics, i) for metrics in fetched]
        if trial.diverged:
            continue
        trial.step = step
        trial.diverged = any(metrics.broken() for metrics in own)
        if not trial.diverged:
            targets = max(sum(metrics.targets for metrics in own), 1)
            trial.log(step, loss=float(sum(metrics.loss * metrics.targets for metrics in own) / targets))


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.asarray(leaf).dtype)
