"""The page of an evaluation: verdict, scores, and the rows where the models differ."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from jlora.evaluation import report
from jlora.evaluation.evaluate import Evaluation
from jlora.evaluation.scoring import Scored
from jlora.evaluation.subjects import BASE
from jlora.pages.charts import interval_chart, line_chart
from jlora.pages.page import render, section
from jlora.pages.rows import Row, row_list
from jlora.pages.tables import table

CHARTED = ("loss", "chrf")  # scores that get a chart beside those of the user's patterns
FORM = ("exact_match", "ended", "distinct")  # shares that are not of a pattern
SORTED_BY = "chrf"  # the score by whose change the rows are sorted


def as_html(evaluation: Evaluation, title: str, about: Mapping[str, Any]) -> str:
    """Returns a self-contained page."""
    adapters = [name for name in evaluation.models if name != BASE]
    summary = [sentence for name in adapters for sentence in report.verdict(evaluation, name)]
    header, rows = report.table(evaluation)
    sections = [section("Scores", table(header, rows), report.NOTE, *_charts(evaluation))]
    if curves := _curves(about.get("adapters", {})):
        sections.append(section("Losses while training", line_chart(curves, "step", "loss (nats per token)")))
    sections += [section(name, table(*parts)) for name, parts in report.other_tables(evaluation).items()]
    for name, found in evaluation.leaks.items():
        recited = [*found.recitation.recited_rows, *found.completed]
        if recited:
            sections.append(section(f"Rows that {name} recites", table(["row"], [[place] for place in recited])))
    if evaluation.rows:
        rows_of_page = row_list(_rows(evaluation), f"change of {SORTED_BY}")
        sections.append(section("Held-out rows", "The rows whose answers changed most come first.", rows_of_page))
    if evaluation.general:
        asked = [Row(row["question"], {name: row[name] for name in evaluation.models}) for row in evaluation.general]
        sections.append(section("General questions", "Neither model was trained on these here.", row_list(asked)))
    return render(title, summary, sections)


def _charts(evaluation: Evaluation) -> Iterator[Markup | str]:
    for score in evaluation.scores:
        means = list(score.means.values())
        pattern = score.percent and score.name not in FORM
        if not (score.name in CHARTED or pattern) or any(math.isnan(mean.value) for mean in means):
            continue
        values, lows, highs = zip(*means, strict=True)
        spec = ".0%" if score.percent else ".3g"
        yield Markup("<h3>{}</h3>").format(score.title)
        yield interval_chart(list(score.means), values, lows, highs, spec=spec, reference=means[0].value)


def _curves(adapters: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Returns the losses of the runs of which the adapters are, as far as they are there."""
    curves = {}
    for name, place in adapters.items():
        file = Path(place).resolve().parent / "metrics.jsonl"
        if not file.is_file():
            continue
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for key, title in (("loss", "training"), ("eval_loss", "held-out")):
            points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
            if points:
                curves[f"{name}, {title}"] = points
    return curves


def _rows(evaluation: Evaluation) -> Iterator[Row]:
    """Yields the held-out rows; those whose answers changed most come first."""
    by_name = {score.name: score for score in evaluation.scores}
    changes = _changes(by_name[SORTED_BY], evaluation.models)
    patterns = [score for score in evaluation.scores if score.name not in FORM and score.percent]
    for i in sorted(range(len(evaluation.rows)), key=lambda i: -abs(changes[i])):
        row = evaluation.rows[i]
        earlier = {f"turn {n + 1}: {m.role}": m.full_text for n, m in enumerate(row.messages[:-2])}
        texts = {**earlier, "question": row.messages[-2].full_text, "written answer": row.messages[-1].full_text}
        texts |= {name: evaluation.answers[name][i].text or "(no text)" for name in evaluation.models}
        yield Row(row.where, texts, _tags(evaluation, i, patterns), round(float(changes[i]), 2))


def _changes(score: Scored, models: list[str]) -> np.ndarray:
    """Returns how much the last adapter changes a score of each row; 0 if there is only the base model."""
    return np.nan_to_num(score.rows[models[-1]] - score.rows[models[0]])


def _tags(evaluation: Evaluation, i: int, patterns: list[Scored]) -> list[str]:
    """Returns the tags of a row, by which the page filters."""
    tags = []
    for name in evaluation.models:
        own = evaluation.answers[name][i]
        tags += [] if own.ended else [f"{name}: not ended"]
        tags += [f"{name}: {p.title}" for p in patterns if p.rows[name][i] == 1]
    if len({evaluation.answers[name][i].text for name in evaluation.models}) == 1:
        tags.append("all answers equal")
    return tags
