"""Adds an evaluation to an adapter's README.md, in the form that model hubs read (`model-index`)."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from jlora.common.atomic_io import replace_text
from jlora.evaluation import report
from jlora.evaluation.evaluate import Evaluation
from jlora.evaluation.subjects import BASE

HEAD = re.compile(r"---\n(?P<head>.*?\n)---\n", re.DOTALL)
HEADING = "## Evaluation"
SECTION = re.compile(rf"\n*{HEADING}\n.*?(?=\n## |\Z)", re.DOTALL)


def add_evaluation(card: Path, evaluation: Evaluation, adapter: str) -> None:
    """Adds the scores of an adapter to its card, or replaces those of an earlier evaluation.

    Raises:
      OSError: the card does not exist, or cannot be written.
    """
    text = card.read_text(encoding="utf-8")
    head = HEAD.match(text)
    values = yaml.safe_load(head["head"]) if head else {}
    body = SECTION.sub("", text[head.end() :] if head else text).rstrip("\n")
    if not isinstance(values, dict):
        return
    values["model-index"] = [{"name": adapter, "results": [_result(evaluation, adapter)]}]
    header, rows = report.table(evaluation)
    columns = [0, 1 + evaluation.models.index(BASE), 1 + evaluation.models.index(adapter)]
    chosen = [[row[column] for column in columns] for row in [header, *rows]]
    section = [HEADING, "", " ".join(report.verdict(evaluation, adapter)), ""]
    section += [*report.markdown_table(["", "base model", "adapter"], chosen[1:]), "", report.NOTE]
    head_text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=1000)
    replace_text(card, f"---\n{head_text}---\n{body}\n\n" + "\n".join(section) + "\n")


def _result(evaluation: Evaluation, adapter: str) -> dict[str, Any]:
    """Returns the scores as one result of `model-index`."""
    means = {score.name: (score.title, score.means[adapter].value) for score in evaluation.scores}
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": f"{len(evaluation.rows)} held-out rows", "type": "private"},
        "metrics": [
            {"type": name, "name": title, "value": round(value, 4)}
            for name, (title, value) in means.items()
            if math.isfinite(value)
        ],
    }
