"""The report on a sweep: a table, sweep.json, and a page with loss curves and a heat map."""

import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from jlora.common.plural import plural
from jlora.pages.charts import line_chart
from jlora.pages.page import render, section
from jlora.pages.tables import heat_map, table
from jlora.sweep.choice import Standing, pasted, standings, winner
from jlora.sweep.grid import Grid, name_of
from jlora.sweep.trials import Trial, by_setting

CURVES = 6  # settings whose losses are drawn


def table_rows(
    grid: Grid, trials: Sequence[Trial], steps: int, alive: Sequence[int] = ()
) -> tuple[list[str], list[list[str]]]:
    """Returns the header and a row for each setting, the best first.

    Args:
      alive: the settings that go on, while the sweep is running.
    """
    found = standings(grid, trials)
    chosen, _ = winner(grid, found)
    rows = []
    for standing in found:
        state = "trained to the end" if standing.steps == steps else f"left out after step {standing.steps}"
        if math.isinf(standing.loss):
            state = f"diverged before step {standing.steps}"
        elif standing.setting in alive:
            state = "goes on"
        elif standing is chosen and not alive:
            state = "the winner"
        shown = [word.split("=", 1)[1] for word in name_of(grid.settings[standing.setting]).split(" ")]
        rows.append([*shown, standing.text, str(standing.step), state])
    return [*grid.settings[0], "held-out loss", "at step", ""], rows


def as_json(grid: Grid, trials: Sequence[Trial], steps: int, about: dict[str, Any]) -> str:
    """Returns all losses as JSON."""
    found = standings(grid, trials)
    chosen, reason = winner(grid, found)
    settings = [
        {
            "settings": grid.settings[standing.setting],
            "held_out_loss": standing.loss if math.isfinite(standing.loss) else None,
            "standard_error": None if math.isnan(standing.error) else standing.error,
            "step": standing.step,
            "steps": standing.steps,
            "held_out_losses": [trial.held_out_losses for trial in by_setting(grid, trials)[standing.setting]],
        }
        for standing in found
    ]
    about = {**about, "base_loss": chosen.base_loss}
    winning = {"settings": grid.settings[chosen.setting], "reason": reason}
    return json.dumps({**about, "steps": steps, "winner": winning, "settings": settings}, indent=2) + "\n"


def as_html(grid: Grid, trials: Sequence[Trial], steps: int, title: str) -> str:
    """Returns a self-contained page."""
    found = standings(grid, trials)
    chosen, reason = winner(grid, found)
    folds = f", each on {grid.folds} folds of the rows" if grid.folds else ""
    summary = [
        f"The winner is {reason}.",
        f"The base model's held-out loss is {chosen.base_loss:.4f}.",
        f"{plural(len(grid.settings), 'setting')}{folds}, {steps} steps each.",
    ]
    curves = {
        name_of(grid.settings[standing.setting]): _mean_curve(by_setting(grid, trials)[standing.setting])
        for standing in found[:CURVES]
    }
    parts = [section("Settings", table(*table_rows(grid, trials, steps)))]
    if shown := _heat_map(grid, found):
        parts.append(section("Held-out loss", shown))
    parts.append(section("Held-out loss while training", line_chart(curves, "step", "loss (nats per token)")))
    pasted_lines = Markup("<pre>{}</pre>").format(pasted(grid, chosen.setting))
    parts.append(section("The winner's settings, for a config", pasted_lines))
    return render(title, summary, parts)


def _mean_curve(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    steps = sorted(set.intersection(*(set(trial.held_out_losses) for trial in trials)))
    return [(step, sum(trial.held_out_losses[step] for trial in trials) / len(trials)) for step in steps]


def _heat_map(grid: Grid, found: Sequence[Standing]) -> Markup | None:
    """Returns the lowest loss for each pair of values of the first two settings that vary; None if only one does."""
    keys = [key for key in grid.settings[0] if len({str(own[key]) for own in grid.settings}) > 1][:2]
    if len(keys) < 2:
        return None
    rows, columns = ([*dict.fromkeys(own[key] for own in grid.settings)] for key in keys)
    lowest: dict[tuple[Any, Any], float] = {}
    for standing in found:
        own = grid.settings[standing.setting]
        pair = own[keys[0]], own[keys[1]]
        lowest[pair] = min(standing.loss, lowest.get(pair, math.inf))
    values = [[lowest.get((row, column)) for column in columns] for row in rows]
    labels = [
        [name_of({key: value}).split("=")[1] for value in given]
        for key, given in zip(keys, (rows, columns), strict=True)
    ]
    return heat_map(labels[0], labels[1], values, corner=f"{keys[0]} \\ {keys[1]}", spec=".4f", best=min)
