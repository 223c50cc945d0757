"""Runs a sweep: every setting trains on the same base model, as in a run of its own, and the best is exported.

Learning rate and weight decay are arrays, so that settings whose adapters have the same form share a program. Several
adapters that train in one step have one padded form (padded.py), in which scale and dropout are arrays too. Each
training's directory is that of a run: it can be exported, and is what a sweep that was stopped continues from.
"""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jlora
from jlora.adapters.settings import spec_of
from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError
from jlora.common.text_table import text_table
from jlora.config.schema import Config
from jlora.data.batches import align_batches
from jlora.data.examples import Example, SizedExamples
from jlora.distributed.sharding import data_parallel_size
from jlora.distributed.stop_signal import StopSignal
from jlora.models import hf_loader
from jlora.planning.data_pipeline import make_run_batches
from jlora.sweep import group_report, report
from jlora.sweep.choice import pasted, rungs, standings, survivors, winner
from jlora.sweep.grid import Grid, name_of, read_grid
from jlora.sweep.groups import Group, effects, find_groups, left_out
from jlora.sweep.padded import padded_config
from jlora.sweep.trainer import Trainer, make_teams, team_size
from jlora.sweep.trials import Subset, Trial, by_setting, fold_indices, trial_directory
from jlora.training import resume
from jlora.training.checkpoint import read_record, write_record
from jlora.training.run import load
from jlora.training.setup import RunSetup, prepare_run

TOGETHER = 8  # adapters that train in one step on a GPU or TPU, at most; each has its own activations


class Sweep(NamedTuple):
    """A sweep that is ready to train."""

    grid: Grid
    groups: list[Group]  # of training rows, each left out of a training
    setup: RunSetup  # of the padded config
    trials: list[Trial]
    steps: int
    output: Path
    record: dict[str, Any]  # contents of config.json


@contextlib.contextmanager
def prepared(config: Config) -> Iterator[Sweep]:
    """Reads rows and settings, and creates or checks the directory, which stays locked until the `with` block ends.

    Raises:
      UserError: the settings, the rows or the directory must change.
    """
    grid, output = read_grid(config), Path(config.output_dir)
    if jax.process_count() > 1:
        raise UserError("A sweep runs in one process. Set num_processes=1.")
    groups = find_groups(config, grid.groups) if grid.groups else []
    grid.check_size(len(groups))
    setup = prepare_run(padded_config(config, grid.configs))
    _check_width(grid, setup)
    steps, trials = make_trials(grid, groups, setup, output)
    record = {**setup.record, "config": {**setup.record["config"], "sweep": json.loads(json.dumps(dict(config.sweep)))}}
    with resume.lock_run_directory(output):
        if (output / "config.json").exists():
            setup = _continue(output, record, setup)
        write_record(output, record)
        yield Sweep(grid, groups, setup, trials, steps, output, record)


def make_trials(grid: Grid, groups: Sequence[Group], setup: RunSetup, output: Path) -> tuple[int, list[Trial]]:
    """Returns the number of steps of all trials, and the trials; their batches have the same shapes.

    Raises:
      UserError: there are no held-out rows, or fewer rows than folds.
    """
    trials, all_steps, devices = [], [], data_parallel_size(setup.mesh)
    parts = [(*part, left_out(part[1], groups)) for part in _parts(grid, setup)]
    for number, config in enumerate(grid.configs):
        alike = dataclasses.replace(config, lora_dropout=setup.config.lora_dropout)  # which rules out a prefix
        for fold, examples, left, masks in parts:
            steps, batches, held_out = make_run_batches(alike, setup.model, examples, left, devices)
            if groups:  # the losses of single rows are compared
                single = dataclasses.replace(alike, batch_size=devices, gradient_accumulation_steps=1)
                _, _, held_out = make_run_batches(single, setup.model, examples, left, devices)
            assert held_out is not None
            for group, mask in enumerate([None, *masks], start=-1):
                own = dataclasses.replace(batches, left_out=mask)
                directory = trial_directory(output, grid.settings[number], fold, group if groups else None)
                run = dataclasses.replace(config, output_dir=str(directory))
                trials.append(Trial(number, fold, group, run, directory, own, held_out))
                all_steps.append(steps)
    once = [trial.held_out.steps_per_epoch for trial in trials]
    aligned = align_batches([trial.batches for trial in trials], all_steps)
    aligned_held_out = align_batches([trial.held_out for trial in trials], once, 1)
    for trial, own, rows in zip(trials, aligned, aligned_held_out, strict=True):
        trial.batches, trial.held_out = own, rows
    return min(all_steps), trials


def _parts(grid: Grid, setup: RunSetup) -> list[tuple[int, SizedExamples, Sequence[Example]]]:
    """Returns the training and held-out examples of each fold; or those of the config, as fold -1."""
    if not grid.folds:
        if setup.held_out is None:
            raise UserError("A sweep compares held-out losses. Set eval_data_dir, eval_share or --sweep.folds.")
        return [(-1, setup.examples, setup.held_out.examples)]
    if len(setup.examples) < 2 * grid.folds:
        raise UserError(f"--sweep.folds={grid.folds} needs at least {2 * grid.folds} training rows.")
    return [
        (fold, Subset(setup.examples, kept), Subset(setup.examples, left))
        for fold, (kept, left) in enumerate(fold_indices(len(setup.examples), grid.folds, setup.config.seed))
    ]


def train(sweep: Sweep) -> signal.Signals | None:
    """Trains all trials to the end, or until their settings are left out; returns the signal that stopped it."""
    grid, setup, trials = sweep.grid, sweep.setup, sweep.trials
    on_cpu = setup.mesh.devices.flat[0].platform == "cpu"  # which is busy with one adapter
    most = setup.record["runtime"].get("team") or grid.together or (1 if on_cpu else TOGETHER)
    setup = setup._replace(batches=trials[0].batches, held_out=trials[0].held_out, steps=sweep.steps)
    size = team_size(trials, most)
    if size == 1:  # each trains in its own form
        largest = max(grid.configs, key=_memory)
        setup = setup._replace(config=dataclasses.replace(largest, remat=setup.config.remat))
    trainer = Trainer(setup, load(setup, 0, team=size), sweep.steps, len(trials))
    most = setup.record["runtime"]["team"]
    write_record(sweep.output, sweep.record)  # a sweep that continues has the same teams
    alive, every = list(range(len(grid.settings))), setup.config.eval_steps or trials[0].batches.steps_per_epoch
    stages = sorted({*range(every, sweep.steps, every), *rungs(grid, sweep.steps), sweep.steps})
    with StopSignal() as stop, trainer:
        for until in stages:
            left = [trial for trial in trials if trial.setting in alive]
            size = team_size(left, most)
            for team in make_teams(left, size):
                if not trainer.train(team, size, until, stop):
                    return stop.received
            diverged = [trial.diverged for trial in left]
            if all(diverged) or (sweep.groups and any(diverged)):
                raise UserError(
                    f"{'All settings' if all(diverged) else 'Some trainings'} diverged. Lower learning_rate."
                )
            if until in rungs(grid, sweep.steps):
                alive = survivors(grid, trials, until, alive)
            if until < sweep.steps:
                trainer.print_lines(f"\nAfter step {until} of {sweep.steps}:", *_table(sweep, alive), "")
    return None


def _memory(config: Config) -> tuple[bool, int]:
    """Returns a measure of the memory that a training takes."""
    spec = spec_of(dataclasses.asdict(config))
    return spec.draws, spec.rank * len(spec.target_modules)


def _table(sweep: Sweep, alive: Sequence[int] = ()) -> list[str]:
    if sweep.groups:
        return text_table(*group_report.table_rows(effects(sweep.groups, sweep.trials)[1]))
    return text_table(*report.table_rows(sweep.grid, sweep.trials, sweep.steps, alive))


def finish_groups(sweep: Sweep) -> None:
    """Writes and prints what each group of rows does."""
    output, (step, found) = sweep.output, effects(sweep.groups, sweep.trials)
    about = {"jlora": jlora.__version__, "base_model": sweep.setup.config.base_model}
    replace_text(output / "sweep.json", group_report.as_json(found, step, about))
    replace_text(output / "sweep.html", group_report.as_html(found, step, f"Groups of rows in {output.name}"))
    rows = text_table(*group_report.table_rows(found))
    print("", *rows, "", *group_report.summary(found, step), sep="\n")


def finish(sweep: Sweep) -> tuple[Path, str]:
    """Writes and prints the report; returns the winner's run, and its settings as YAML."""
    grid, output = sweep.grid, sweep.output
    chosen, reason = winner(grid, standings(grid, sweep.trials))
    best = by_setting(grid, sweep.trials)[chosen.setting][0]
    about = {"jlora": jlora.__version__, "base_model": sweep.setup.config.base_model}
    replace_text(output / "sweep.json", report.as_json(grid, sweep.trials, sweep.steps, about))
    replace_text(output / "sweep.html", report.as_html(grid, sweep.trials, sweep.steps, f"Sweep in {output.name}"))
    base = f"The base model's held-out loss is {chosen.base_loss:.4f}."
    print("", *_table(sweep), "", f"The winner is {reason}.", base, sep="\n")
    return best.directory, pasted(grid, chosen.setting)


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


def _continue(output: Path, record: dict[str, Any], setup: RunSetup) -> RunSetup:
    """Returns the setup with the teams and the `remat` of the sweep that continues, for the same bits.

    Raises:
      UserError: the directory has another sweep.
    """
    old = read_record(output, "output_dir")
    changes = list(resume.describe_changes(old, record).values())
    if dict(old["config"]["sweep"]) != record["config"]["sweep"]:
        changes.append(f"sweep changed from {dict(old['config']['sweep'])} to {record['config']['sweep']}")
    if changes:
        raise UserError(
            f"The sweep in {output} cannot continue: {'; '.join(changes)}. Undo these changes, or set another "
            "output_dir."
        )
    if "team" in old["runtime"]:  # it had started to train
        record["runtime"].update(team=old["runtime"]["team"], remat=old["runtime"]["remat"])
        return setup._replace(config=dataclasses.replace(setup.config, remat=old["runtime"]["remat"]))
    return setup
