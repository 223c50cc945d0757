"""Scores of every model over all held-out rows: means with intervals, and every pair of models compared."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from jlora.common.statistics import Difference, Interval, difference, interval
from jlora.evaluation.text_scores import Answer, Score, Written

LOSS = "loss"


class Comparison(NamedTuple):
    """How much higher one model scores than another on the same rows."""

    model: str
    other: str
    difference: Difference


class Scored(NamedTuple):
    """One score of every model."""

    name: str
    title: str
    percent: bool
    better: int  # 1: higher, -1: lower, 0: neither
    means: dict[str, Interval]
    comparisons: list[Comparison]
    rows: dict[str, np.ndarray]  # value of each row: [N]; NaN where the score does not apply

    def verdict(self, model: str, other: str) -> str:
        """Returns "better", "worse", "different" or "no difference shown" for a model against another."""
        found = next(c.difference for c in self.comparisons if (c.model, c.other) == (model, other))
        if not found.shown:
            return "no difference shown"
        if not self.better:
            return "different"
        return "better" if found.value * self.better > 0 else "worse"


def score_answers(
    scores: Sequence[Score], answers: Mapping[str, Sequence[Answer]], written: Sequence[Written]
) -> list[Scored]:
    """Returns the scores of each model's answers, in the order of the written ones."""
    measured = {}
    with tqdm(total=len(answers) * len(written), desc="Scoring", unit="answer", leave=False, disable=None) as bar:
        for model, own in answers.items():
            rows = []
            for answer, expected in zip(own, written, strict=True):
                rows.append([score.measure(answer, expected) for score in scores])
                bar.update()
            measured[model] = np.array(rows, np.float64).reshape(len(written), len(scores), 2)
    return [
        summed_up(
            *score[:4],
            {model: rows[:, i, 0] * rows[:, i, 1] for model, rows in measured.items()},
            {model: rows[:, i, 1] for model, rows in measured.items()},
        )
        for i, score in enumerate(scores)
    ]


def score_losses(sums: Mapping[str, np.ndarray], targets: np.ndarray) -> Scored:
    """Returns the held-out loss from each row's summed loss [N] and its number of targets [N]."""
    weights = dict.fromkeys(sums, targets)
    return summed_up(LOSS, "held-out loss (nats per token)", False, -1, sums, weights)


def summed_up(
    name: str,
    title: str,
    percent: bool,
    better: int,
    values: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
) -> Scored:
    """Returns the means of rows, and all comparisons; the first model is the one that the others are compared with."""
    comparisons = []
    for other, model in itertools.combinations(values, 2):
        both = (weights[model] > 0) & (weights[other] > 0)
        comparisons.append(
            Comparison(model, other, difference(values[model], values[other], np.where(both, weights[model], 0.0)))
        )
    means = {model: interval(own, weights[model]) for model, own in values.items()}
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = {model: own / weights[model] for model, own in values.items()}
    return Scored(name, title, percent, better, means, comparisons, rows)
