"""Which settings go on, and which one wins: by the held-out loss, and the smaller rank if that is not worse."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import yaml

from jlora.sweep.grid import Grid, name_of
from jlora.sweep.trials import Trial, by_setting


class Standing(NamedTuple):
    """The result of a setting so far: its lowest held-out loss, and at which step."""

    setting: int
    loss: float  # nats per token; the mean over folds
    error: float  # standard error of the mean over folds; NaN without folds
    step: int
    steps: int  # trained so far
    base_loss: float | None  # of the base model, the mean over folds
    gains: bool  # whether the loss is lower; with folds, by more than two standard errors of the difference

    @property
    def text(self) -> str:
        """The loss with its standard error."""
        if math.isinf(self.loss):
            return "diverged"
        return f"{self.loss:.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


def standings(grid: Grid, trials: Sequence[Trial]) -> list[Standing]:
    """Returns the standing of every setting that has been evaluated, the best first."""
    found = []
    for number, own in enumerate(by_setting(grid, trials)):
        steps = sorted(set.intersection(*(set(trial.held_out_losses) for trial in own)))
        if any(trial.diverged for trial in own):
            found.append(Standing(number, math.inf, math.nan, 0, min(trial.step for trial in own), None, False))
            continue
        if not steps:
            continue
        losses = np.array([[trial.held_out_losses[step] for trial in own] for step in steps])
        at = int(np.argmin(losses.mean(axis=1)))
        count = losses.shape[1]
        error = float(losses[at].std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        base = np.array([trial.base_loss for trial in own])
        gain, spread = base - losses[at], (base - losses[at]).std(ddof=1) if count > 1 else 0.0
        gains = bool(gain.mean() > 2 * spread / math.sqrt(count))
        loss, done = float(losses[at].mean()), min(trial.step for trial in own)
        found.append(Standing(number, loss, error, steps[at], done, float(base.mean()), gains))
    return sorted(found, key=lambda standing: (standing.loss, grid.configs[standing.setting].lora_rank))


def survivors(grid: Grid, trials: Sequence[Trial], step: int, alive: Sequence[int]) -> list[int]:
    """Returns the settings that go on after a rung: the best 1/halving by their loss at this step."""
    own = by_setting(grid, trials)
    losses = {number: float(np.mean([trial.loss_at(step) for trial in own[number]])) for number in alive}
    ranked = sorted(alive, key=lambda number: (losses[number], grid.configs[number].lora_rank, number))
    return sorted(ranked[: -(-len(ranked) // grid.halving)])


def rungs(grid: Grid, steps: int) -> list[int]:
    """Returns the steps after which settings are left out, in order (Jamieson and Talwalkar 2016)."""
    if not grid.halving:
        return []
    rounds = int(math.log(len(grid.settings), grid.halving) + 1e-9)
    return sorted({max(1, steps // grid.halving**i) for i in range(1, rounds + 1)})


def winner(grid: Grid, found: Sequence[Standing]) -> tuple[Standing, str]:
    """Returns the winner and the reason in one sentence.

    With folds, a smaller rank wins if its loss is within one standard error of the best (Breiman et al. 1984).
    """
    best = found[0]
    assert best.base_loss is not None
    if not best.gains:
        name = name_of(grid.settings[best.setting])
        return (
            best,
            f"{name}: held-out loss {best.text}; no setting is better than the base model, {best.base_loss:.4f}",
        )
    full = [standing for standing in found if standing.steps >= best.steps]
    limit = best.loss + (0.0 if math.isnan(best.error) else best.error)
    close = [standing for standing in full if standing.loss <= limit]
    chosen = min(close, key=lambda standing: (grid.configs[standing.setting].lora_rank, standing.loss))
    sentence = f"{name_of(grid.settings[chosen.setting])}: held-out loss {chosen.text} after step {chosen.step}"
    if chosen is not best:
        other = name_of(grid.settings[best.setting])
        return chosen, f"{sentence}; {other} has {best.text}, which is not better by more than its standard error"
    if len(found) > 1:
        second = found[1]
        sentence += f"; the next is {name_of(grid.settings[second.setting])} with {second.text}"
    return chosen, sentence


def pasted(grid: Grid, setting: int) -> str:
    """Returns the lines of a YAML config that choose a setting."""
    settings = {key: list(own) if isinstance(own, tuple) else own for key, own in grid.settings[setting].items()}
    return str(yaml.safe_dump(settings, sort_keys=False)).strip()
