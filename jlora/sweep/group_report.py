"""The report on groups of rows that were left out: a table, sweep.json, and a page with a chart of the effects."""

import json
from collections.abc import Sequence
from typing import Any

from jlora.common.plural import plural
from jlora.pages.charts import interval_chart
from jlora.pages.page import render, section
from jlora.pages.tables import table
from jlora.sweep.groups import Effect

HEADER = ["group", "rows", "effect on the loss", "interval", "p", "", "places"]


def table_rows(found: Sequence[Effect]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and a row for each group, the worst first."""
    return HEADER, [
        [
            effect.group.name,
            str(len(effect.group.rows)),
            f"{effect.value:+.4f}",
            f"{effect.low:+.4f} to {effect.high:+.4f}",
            f"{effect.p:.3f}",
            effect.verdict,
            effect.group.places,
        ]
        for effect in found
    ]


def summary(found: Sequence[Effect], step: int) -> list[str]:
    """Returns the finding in a few lines."""
    harmful = [effect for effect in found if effect.verdict == "harms"]
    if not harmful:
        return [f"No group clearly harms the held-out loss (after step {step})."]
    lines = [f"{plural(len(harmful), 'group', ('harms', 'harm'))} the held-out loss (after step {step}):"]
    return lines + [f"{effect.group.name}: {effect.group.places}" for effect in harmful]


def as_json(found: Sequence[Effect], step: int, about: dict[str, Any]) -> str:
    """Returns all effects as JSON."""
    groups = [
        {
            "group": effect.group.name,
            "rows": sorted(effect.group.rows),
            "effect": effect.value,
            "interval": [effect.low, effect.high],
            "p": effect.p,
            "verdict": effect.verdict,
        }
        for effect in found
    ]
    return json.dumps({**about, "step": step, "groups": groups}, indent=2, ensure_ascii=False) + "\n"


def as_html(found: Sequence[Effect], step: int, title: str) -> str:
    """Returns a self-contained page."""
    about = (
        f"Each group was left out of some trainings. Its effect is the held-out loss after step {step} if all rows are "
        "learned, less the loss if the group is not: above 0, the model is better without the group."
    )
    chart = interval_chart(
        [effect.group.name for effect in found],
        [effect.value for effect in found],
        [effect.low for effect in found],
        [effect.high for effect in found],
        spec="+.4f",
        reference=0.0,
    )
    parts = [section("Effect on the held-out loss", chart), section("Groups", table(*table_rows(found)))]
    return render(title, [*summary(found, step), about], parts)
