"""The report on an evaluation: its verdict, tables, JSON and Markdown."""

import json
import math
from collections.abc import Sequence
from typing import Any

from jlora.common.plural import plural
from jlora.common.statistics import Difference, Interval
from jlora.evaluation.evaluate import AdapterLeaks, Evaluation
from jlora.evaluation.judge import Preference
from jlora.evaluation.scoring import LOSS, Scored
from jlora.evaluation.subjects import BASE

LANGUAGES = {"en": "English texts", "zh": "Chinese texts", "own": "your own texts"}
FORGOTTEN = 0.05  # rise of the perplexity of general texts that the verdict mentions


def verdict(evaluation: Evaluation, adapter: str) -> list[str]:
    """Returns three sentences: the loss, the answers, and what the adapter forgot and recites."""
    loss, *others = evaluation.scores
    base, own = loss.means[BASE], loss.means[adapter]
    found = loss.verdict(adapter, BASE)
    claim = f"{adapter} is {found} than the base model"
    if found == "no difference shown":
        claim = f"No difference between {adapter} and the base model is shown"
    first = f"{claim} on the held-out rows: its loss is {_mean(own, loss)}, that of the base model {_mean(base, loss)}."
    return [first, _answers_sentence(others, adapter), _harm_sentence(evaluation, adapter)]


def _answers_sentence(scores: Sequence[Scored], adapter: str) -> str:
    judged = [score for score in scores if score.better]
    groups = {
        word: [score.title for score in judged if score.verdict(adapter, BASE) == word] for word in ("better", "worse")
    }
    parts = [f"{word} in {', '.join(titles)}" for word, titles in groups.items() if titles]
    rest = len(judged) - sum(map(len, groups.values()))
    parts += [f"no difference is shown in {plural(rest, 'other score')}"] if rest and parts else []
    if not judged:
        return "There are no answers to compare."
    return f"Its answers are {'; '.join(parts)}." if parts else "No difference of its answers is shown in any score."


def _harm_sentence(evaluation: Evaluation, adapter: str) -> str:
    changes = [
        f"{LANGUAGES[name]} ({math.expm1(found.change.value):+.0%})"
        for name, found in evaluation.forgetting[adapter].items()
        if found.change.shown and math.expm1(found.change.value) > FORGOTTEN
    ]
    forgot = (
        f"It raises the perplexity of {' and '.join(changes)}, so it has lost some of what the base model could do"
        if changes
        else f"It does not raise the perplexity of general texts by more than {FORGOTTEN:.0%}"
    )
    leaked = evaluation.leaks.get(adapter)
    if leaked is None:
        return f"{forgot}; whether it recites training rows was not measured."
    return f"{forgot}; {_leak_words(leaked)}."


def _leak_words(found: AdapterLeaks) -> str:
    recited = found.recitation
    words = (
        f"it recites {recited.recited_training:.0%} of the training answers, and {recited.recited_held_out:.0%} of the "
        "held-out ones"
    )
    if found.completed:
        words += f", and completes {plural(len(found.completed), 'piece')} of personal data"
    return words


def table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows of the table of scores."""
    adapters = [name for name in evaluation.models if name != BASE]
    header = ["", *evaluation.models, *(f"{name} against base" for name in adapters)]
    rows = [
        [
            score.title,
            *(_mean(score.means[name], score) for name in evaluation.models),
            *(_difference(score, name) for name in adapters),
        ]
        for score in evaluation.scores
    ]
    return header, rows


def short_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Returns the table of scores for a terminal: means, and what each adapter is beside the base model."""
    adapters = [name for name in evaluation.models if name != BASE]
    rows = [
        [
            score.title,
            *("-" if math.isnan(mean.value) else _number(mean.value, score) for mean in score.means.values()),
            *(score.verdict(name, BASE) for name in adapters),
        ]
        for score in evaluation.scores
    ]
    return ["", *evaluation.models, *(f"{name} is" for name in adapters)], rows


def other_tables(evaluation: Evaluation) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Returns the tables about forgetting and recitation, by title."""
    found = {}
    forgot = [
        [
            adapter,
            f"{LANGUAGES[name]} ({own.texts})",
            f"{math.exp(own.base_loss.value):.2f}",
            f"{math.exp(own.loss.value):.2f}",
            f"{math.expm1(own.change.value):+.1%} ({_p(own.change)})",
            f"{own.divergence.value:.4f}",
        ]
        for adapter, sets in evaluation.forgetting.items()
        for name, own in sets.items()
    ]
    header = ["adapter", "texts", "perplexity, base", "perplexity, adapter", "change", "KL to base (nats per token)"]
    found["Forgetting"] = header, forgot
    header = [
        *("adapter", "longest run, training rows", "longest run, held-out rows", "recited, training"),
        *("recited, held-out", "exposure", "personal data completed"),
    ]
    rows = [
        [
            adapter,
            _share(own.recitation.training),
            _share(own.recitation.held_out),
            f"{own.recitation.recited_training:.0%}",
            f"{own.recitation.recited_held_out:.0%}",
            f"{own.recitation.exposure:.0%}",
            f"{len(own.completed)} of {own.personal}",
        ]
        for adapter, own in evaluation.leaks.items()
    ]
    if rows:
        found["Recitation"] = header, rows
    if evaluation.preferences:
        header = ["judged", "against", "rows", "won", "tied", "lost", "unclear replies", "verdict"]
        rows = [
            [p.model, p.other, *map(str, (p.rows, p.won, p.rows - p.won - p.lost, p.lost, p.unclear)), _judged(p)]
            for p in evaluation.preferences
        ]
        found["Judge"] = header, rows
    if evaluation.tasks:
        found["Benchmarks"] = ["task and metric", *evaluation.tasks], _task_rows(evaluation.tasks)
    return found


def _task_rows(tasks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Returns a row for each metric of each task, with its standard error."""
    rows = []
    for task, metrics in next(iter(tasks.values())).items():
        for metric in metrics:
            name, _, which = metric.partition(",")
            if isinstance(metrics[metric], float) and not name.endswith("_stderr"):
                errors = [own[task].get(f"{name}_stderr,{which}") for own in tasks.values()]
                values = [own[task][metric] for own in tasks.values()]
                shown = [
                    f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
                    for value, error in zip(values, errors, strict=True)
                ]
                rows.append([f"{task}, {name}", *shown])
    return rows


def as_markdown(evaluation: Evaluation, title: str) -> str:
    """Returns the verdict and all tables as Markdown."""
    lines = [f"# {title}", ""]
    for adapter in evaluation.leaks or evaluation.forgetting:
        lines += [" ".join(verdict(evaluation, adapter)), ""]
    lines += [*markdown_table(*table(evaluation)), "", NOTE, ""]
    for name, (header, rows) in other_tables(evaluation).items():
        lines += [f"## {name}", "", *markdown_table(header, rows), ""]
    return "\n".join([*lines, *evaluation.remarks, ""])


NOTE = (
    "In parentheses: 95% intervals over the rows, by bootstrap, and by Wilson's formula for shares. p: randomization "
    "test. Of 20 comparisons, one is expected to show a difference by chance."
)


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    cells = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def as_json(evaluation: Evaluation, about: dict[str, Any]) -> str:
    """Returns all figures as JSON; the answers are in the journal beside it."""
    scores = [
        {
            "name": score.name,
            "title": score.title,
            "better": {1: "higher", -1: "lower", 0: "neither"}[score.better],
            "models": {name: mean._asdict() for name, mean in score.means.items()},
            "comparisons": [
                {
                    "model": c.model,
                    "other": c.other,
                    **c.difference._asdict(),
                    "verdict": score.verdict(c.model, c.other),
                }
                for c in score.comparisons
            ],
        }
        for score in evaluation.scores
    ]
    adapters = [name for name in evaluation.models if name != BASE]
    figures = {
        **about,
        "rows": len(evaluation.rows),
        "verdict": {name: verdict(evaluation, name) for name in adapters},
        "scores": scores,
        "forgetting": {
            name: {kind: _plain(found) for kind, found in sets.items()} for name, sets in evaluation.forgetting.items()
        },
        "leaks": {name: _plain(found) for name, found in evaluation.leaks.items()},
        "judge": [_plain(found) for found in evaluation.preferences],
        "tasks": {name: _numbers(found) for name, found in evaluation.tasks.items()},
        "remarks": evaluation.remarks,
    }
    return json.dumps(_finite(figures), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Returns named tuples as dictionaries."""
    if hasattr(value, "_asdict"):
        return {key: _plain(own) for key, own in value._asdict().items()}
    return value


def _numbers(tasks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the numbers of the results of tasks."""
    return {
        task: {metric: value for metric, value in found.items() if isinstance(value, int | float)}
        for task, found in tasks.items()
    }


def _finite(value: Any) -> Any:
    """Returns JSON values with null for what is not a number."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(mean: Interval, score: Scored) -> str:
    if math.isnan(mean.value):
        return "-"
    low, high = (_number(end, score) for end in (mean.low, mean.high))
    perplexity = f", perplexity {math.exp(mean.value):.2f}" if score.name == LOSS else ""
    return f"{_number(mean.value, score)} ({low} to {high}){perplexity}"


def _number(value: float, score: Scored) -> str:
    if score.percent:
        return f"{value:.0%}"
    return f"{value:.4f}" if score.name == LOSS else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _difference(score: Scored, adapter: str) -> str:
    found = next(c.difference for c in score.comparisons if (c.model, c.other) == (adapter, BASE))
    if math.isnan(found.value):
        return "-"
    shown = f"{found.value * 100:+.0f} points" if score.percent else f"{found.value:+.2f}"
    return f"{shown}, {score.verdict(adapter, BASE)} ({_p(found)})"


def _judged(found: Preference) -> str:
    return f"{found.verdict} ({_p(found.share)})" if found.rows else "not judged"


def _p(found: Difference) -> str:
    return "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}"


def _share(mean: Interval) -> str:
    return f"{mean.value:.0%} ({mean.low:.0%} to {mean.high:.0%})"
