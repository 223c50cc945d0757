"""Groups of training rows, and what each does to the held-out loss: all rows are trained on, then all but one group.

A group is left out by giving its rows no weight. All other rows stay in the batches that they are in, so that the
difference to the training on all rows comes from the group alone, not from another order.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jlora.common.errors import UserError
from jlora.common.statistics import LEVEL, SIGNIFICANT, adjusted
from jlora.config.schema import Config
from jlora.data.checks.report import DataReport
from jlora.data.examples import SizedExamples
from jlora.planning.data_pipeline import RowSource
from jlora.sweep.trials import Trial

KINDS = "file, duplicates, report, or the name of a column"
SHOWN = 5  # rows listed for a group


class Group(NamedTuple):
    """Training rows that are left out together."""

    name: str
    rows: frozenset[str]  # `file:line` of each

    @property
    def places(self) -> str:
        """The first rows, by file and line."""
        listed = sorted(self.rows, key=_in_order)[:SHOWN]
        more = f" and {len(self.rows) - SHOWN} more" if len(self.rows) > SHOWN else ""
        return ", ".join(Path(place).name for place in listed) + more


class Effect(NamedTuple):
    """What a group does to the held-out loss, in nats per token."""

    group: Group
    value: float  # the loss if the group is trained on, less the loss without it: above 0, it does harm
    low: float  # of the interval
    high: float
    p: float  # of "it changes nothing", adjusted for the number of groups

    @property
    def verdict(self) -> str:
        """The effect in a word."""
        if self.p >= SIGNIFICANT:
            return "no clear effect"
        return "harms" if self.value > 0 else "helps"


def find_groups(config: Config, kind: str) -> list[Group]:
    """Reads the training rows and returns their groups.

    Args:
      kind: "file": the rows of each file; "duplicates": of each cluster of duplicates and near-duplicates; "report":
        what the report on the data names, such as contradictions; else the name of a column: the rows with each value.

    Raises:
      UserError: there are no such groups, or only one with all rows.
    """
    column = kind if kind not in ("file", "duplicates", "report") else ""
    source = RowSource(config, "train_data_dir", group_column=column)
    report = DataReport(config.pii_regions, "allow", config.pii_amounts)
    places, labels = [], []
    for row in report.inspect(source):
        places.append(row.where)
        labels.append(row.group if column else row.where.rpartition(":")[0])
    groups = [
        Group(name, frozenset(places[i] for i in rows)) for name, rows in _rows_by_name(kind, report, labels) if name
    ]
    if not groups or (len(groups) == 1 and len(groups[0].rows) == len(set(places))):
        found = "all rows are in one group" if groups else "no row is in a group"
        raise UserError(f"--groups {kind}: Expected {KINDS}, but with this, {found}.")
    return groups


def _rows_by_name(kind: str, report: DataReport, labels: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    if kind == "duplicates":
        yield from ((f"near-duplicates {i}", rows) for i, rows in enumerate(report.clusters(), 1))
    elif kind == "report":
        for name, several in report.conspicuous().items():
            yield from ((name if len(several) == 1 else f"{name} {i}", rows) for i, rows in enumerate(several, 1))
    else:
        for name in dict.fromkeys(labels):
            yield (Path(name).name if kind == "file" else name), [i for i, own in enumerate(labels) if own == name]


def left_out(examples: SizedExamples, groups: Sequence[Group]) -> list[np.ndarray]:
    """Returns, for each group, which examples are of its rows: [N] bool."""
    places = [example.where for example in examples] if groups else []
    return [np.array([place in group.rows for place in places]) for group in groups]


def effects(groups: Sequence[Group], trials: Sequence[Trial]) -> tuple[int, list[Effect]]:
    """Returns the step at which the loss of training on all rows is lowest, and each group's effect there.

    An effect is the mean over the pairs of trainings, with and without the group: one for each seed and fold. Its
    standard error has two parts: the pairs differ by chance, about as much for all groups; and so do the held-out rows.
    A group's own rows are no measure of it, so they are left out where they are held out. The worst groups come first.
    """
    from scipy import stats

    whole = [trial for trial in trials if trial.group < 0]
    steps = sorted(set.intersection(*(set(trial.held_out_losses) for trial in trials)))
    step = min(steps, key=lambda step: np.mean([trial.held_out_losses[step] for trial in whole]))
    pairs, rows_errors = [], []
    for number, group in enumerate(groups):
        without = [trial for trial in trials if trial.group == number]
        found = [_pair(group, *both, step) for both in zip(whole, without, strict=True)]
        pairs.append([changes.sum() / counts.sum() for changes, counts in found])
        rows_errors.append(_error_of_rows(found, [trial.fold for trial in whole]))
    values, count = np.array(pairs), len(whole)
    freedom = len(groups) * (count - 1)
    errors = np.sqrt(values.var(axis=1, ddof=1).mean() / count + np.square(rows_errors))
    means = values.mean(axis=1)
    p_values = adjusted(2 * stats.t.sf(np.abs(means) / errors, freedom))
    margins = stats.t.isf((1 - LEVEL) / 2, freedom) * errors
    effects = [
        Effect(group, float(mean), float(mean - margin), float(mean + margin), p)
        for group, mean, margin, p in zip(groups, means, margins, p_values, strict=True)
    ]
    return step, sorted(effects, key=lambda effect: -effect.value)


def _pair(group: Group, whole: Trial, without: Trial, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns by how much a group raises the summed loss of each held-out row, and the row's count; [rows] each."""
    keeps = ~_own_batches(whole, group)
    with_group, without_group = whole.held_out_sums[step], without.held_out_sums[step]
    return (with_group[:, 0] - without_group[:, 0]) * keeps, with_group[:, 1] * keeps


def _error_of_rows(found: Sequence[tuple[np.ndarray, np.ndarray]], folds: Sequence[int]) -> float:
    """Returns the standard error of an effect if the held-out rows were drawn again (of a ratio: Cochran 1977)."""
    by_fold = [
        np.mean([pair for pair, own in zip(found, folds, strict=True) if own == fold], axis=0)
        for fold in sorted(set(folds))
    ]
    changes, counts = np.concatenate(by_fold, axis=1)
    changes, counts = changes[counts > 0], counts[counts > 0]
    spread = changes - counts * changes.sum() / counts.sum()
    return float(np.sqrt(len(counts) / max(len(counts) - 1, 1) * np.square(spread).sum()) / counts.sum())


def _own_batches(trial: Trial, group: Group) -> np.ndarray:
    """Returns which held-out batches have a row of the group."""
    held_out = trial.held_out
    return np.array(
        [
            any(held_out.examples[i].where in group.rows for i in held_out.example_indices(step))
            for step in range(held_out.steps_per_epoch)
        ]
    )


def _in_order(place: str) -> tuple[str, int]:
    file, _, line = place.rpartition(":")
    return file, int(line) if line.isdecimal() else 0
