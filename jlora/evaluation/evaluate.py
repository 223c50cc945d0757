"""Evaluates adapters: their answers to held-out questions, what they forgot, and what they recite."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jlora.config.schema import Config
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Conversation
from jlora.data.examples import Example
from jlora.evaluation import forgetting, leaks
from jlora.evaluation.answers import Question, ask, kept
from jlora.evaluation.forgetting import Forgetting
from jlora.evaluation.journal import Journal
from jlora.evaluation.judge import Judge, Preference
from jlora.evaluation.leaks import Recitation
from jlora.evaluation.likelihood import Likelihood
from jlora.evaluation.scoring import Scored, score_answers, score_losses
from jlora.evaluation.subjects import BASE, Subjects
from jlora.evaluation.text_scores import Answer, Written, text_scores

JOURNAL = "answers.jsonl"
SPARE = 40  # tokens that an answer may have beside twice those of the written one
TRAINING_ROWS = 100  # at most, for the search for recited rows


class Rows(NamedTuple):
    """The rows of an evaluation."""

    held_out: Sequence[Conversation]
    training: Sequence[Conversation] = ()  # a part of the training rows; () if they are not known
    personal: Sequence[Conversation] = ()  # training rows with personal data in the answer


class Material(NamedTuple):
    """All that the models are measured on."""

    rows: Rows
    examples: Sequence[Example]  # of the held-out rows
    training_examples: Sequence[Example]
    own_general: Sequence[str]  # general texts of the user's own
    max_new_tokens: int = 0  # of an answer to a held-out question; 0: SPARE and twice those of the written one


class AdapterLeaks(NamedTuple):
    """What an adapter recites of its training rows."""

    recitation: Recitation
    personal: int  # pieces of personal data that were looked for
    completed: list[str]  # file:line and kind of those that the adapter completes, and the base model does not


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation. Models have the names that the user gave them; `base` is the base model."""

    rows: Sequence[Conversation]
    scores: list[Scored]
    answers: dict[str, list[Answer]]  # of the held-out rows
    general: list[dict[str, Any]]  # `question`, and the answer of each model
    forgetting: dict[str, dict[str, Forgetting]]  # adapter -> language, or "own"
    leaks: dict[str, AdapterLeaks]  # {}: the training rows are not known
    preferences: list[Preference]  # of the judge; []: not judged
    remarks: list[str]
    models: list[str]
    tasks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # model -> task -> metric -> value


def evaluate(subjects: Subjects, config: Config, material: Material, journal: Journal) -> Evaluation:
    """Measures everything that the journal does not have yet, and sums it up.

    Args:
      config: `answer_patterns`, and the settings for personal data and for what is trained.
    """
    generator, models = subjects.generator, list(subjects.mixtures)
    tokenizer, likelihood = generator.tokenizer, Likelihood(subjects)
    _measure_losses(likelihood, material.examples, journal, "loss", "Held-out loss")
    asked = [row for row in material.rows.held_out if not row.plain]
    questions = held_out_questions(tokenizer, asked, material.max_new_tokens)
    ask(subjects, questions, journal, "Answers to held-out questions")
    written = [written_answer(tokenizer, row) for row in asked]
    answers = {name: [kept(subjects, journal, question, name) for question in questions] for name in models}
    scores = [_loss_scores(journal, models, len(material.examples))]
    if asked:
        scores += score_answers(text_scores(config.answer_patterns), answers, written)
    general = _general(subjects, journal)
    forgotten = _forgetting(subjects, likelihood, material.own_general, journal)
    leaked = _leaks(subjects, likelihood, config, material, journal, answers, written) if material.rows.training else {}
    preferences, remark = _judged(config, asked, answers, journal)
    remarks = [remark] if remark else []
    return Evaluation(asked, scores, answers, general, forgotten, leaked, preferences, remarks, models)


def held_out_questions(tokenizer: Any, rows: Sequence[Conversation], limit: int = 0) -> list[Question]:
    """Returns the rows' prompts, with room for `limit` tokens, or for answers of over twice the written length."""
    if limit:
        return _questions(tokenizer, rows, "held_out", spare=limit, factor=0)
    return _questions(tokenizer, rows, "held_out", spare=SPARE, factor=2)


def written_answer(tokenizer: Any, row: Conversation) -> Written:
    """Returns the answer that a row has."""
    text = row.messages[-1].full_text
    return Written(text, tokenizer(text, add_special_tokens=False)["input_ids"])


def hash_rows(rows: Sequence[Conversation]) -> str:
    """Returns a hash of the turns of rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.messages, row.tools)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _questions(
    tokenizer: Any, rows: Sequence[Conversation], kind: str, *, spare: int = 0, factor: int = 1
) -> list[Question]:
    """Returns the rows' prompts, with room for `factor` times the written answer and `spare` tokens."""
    made = []
    for i, row in enumerate(rows):
        prompt = encode_prompt(tokenizer, row.messages[:-1], row.tools, bool(row.messages[-1].thoughts[0]))
        made.append(Question((kind, i), prompt, factor * len(written_answer(tokenizer, row).tokens) + spare))
    return made


def _measure_losses(
    likelihood: Likelihood, examples: Sequence[Example], journal: Journal, kind: str, title: str
) -> None:
    """Keeps each example's summed loss under every model, and its number of targets, under (kind, number)."""
    first = next((i for i in range(len(examples)) if (kind, i) not in journal), len(examples))
    rest = [examples[i] for i in range(first, len(examples))] if first else examples
    with tqdm(total=len(examples), initial=first, desc=title, unit="row", disable=None) as bar:
        for i, found in enumerate(likelihood.measure(rest), first):
            sums = {name: -float(own.log_probs.sum()) for name, own in found.items()}
            journal.add((kind, i), [sums, len(next(iter(found.values())).log_probs)])
            bar.update()


def _loss_scores(journal: Journal, models: list[str], count: int) -> Scored:
    rows = [journal["loss", i] for i in range(count)]
    sums = {name: np.array([own[name] for own, _ in rows]) for name in models}
    return score_losses(sums, np.array([targets for _, targets in rows], np.float64))


def _judged(
    config: Config, rows: Sequence[Conversation], answers: Mapping[str, list[Answer]], journal: Journal
) -> tuple[list[Preference], str]:
    """Returns what the judge prefers, and a remark if there is none or it stopped."""
    if not config.judge_url or not rows:
        return [], "Not judged: judge_url is not set." if rows else ""
    judge = Judge(config.judge_url, config.judge_model)
    stopped = judge.judge_all(rows, answers, journal)
    return judge.preferences(len(rows), list(answers), journal), stopped


def _general(subjects: Subjects, journal: Journal) -> list[dict[str, Any]]:
    """Returns the general questions with every model's answer."""
    _, rows = forgetting.read_general()
    questions = forgetting.general_questions(subjects.generator.tokenizer, rows)
    ask(subjects, questions, journal, "Answers to general questions")
    return [
        {"question": row["text"], **{name: kept(subjects, journal, q, name).text for name in subjects.mixtures}}
        for row, q in zip(rows, questions, strict=False)
    ]


def _forgetting(
    subjects: Subjects, likelihood: Likelihood, own: Sequence[str], journal: Journal
) -> dict[str, dict[str, Forgetting]]:
    tokenizer, ends = subjects.generator.tokenizer, subjects.generator.ends
    texts, _ = forgetting.read_general()
    sets = {language: [row["text"] for row in texts if row["language"] == language] for language in ("en", "zh")}
    sets |= {"own": list(own)} if own else {}
    for name, some in sets.items():
        forgetting.measure_texts(likelihood, tokenizer, ends, some, journal, name)
    return {
        adapter: {
            name: forgetting.forgetting([journal[name, i] for i in range(len(some))], adapter)
            for name, some in sets.items()
        }
        for adapter in subjects.mixtures
        if adapter != BASE
    }


def _leaks(
    subjects: Subjects,
    likelihood: Likelihood,
    config: Config,
    material: Material,
    journal: Journal,
    answers: Mapping[str, Sequence[Answer]],
    written: Sequence[Written],
) -> dict[str, AdapterLeaks]:
    """Compares each adapter on training rows with the same adapter on held-out rows."""
    tokenizer = subjects.generator.tokenizer
    rows = [row for row in material.rows.training if not row.plain]
    if not rows or not written:
        return {}
    _measure_losses(likelihood, material.training_examples, journal, "training_loss", "Loss of training rows")
    questions = _questions(tokenizer, rows, "training")
    prompts = leaks.completions(tokenizer, material.rows.personal, config.pii_regions, config.pii_amounts)
    adapters = {name: mixture for name, mixture in subjects.mixtures.items() if name != BASE}
    ask(subjects._replace(mixtures=adapters), questions, journal, "Answers to training questions")
    ask(subjects, [prompt.question for prompt in prompts], journal, "Completions of personal data")
    expected = [written_answer(tokenizer, row) for row in rows]
    found = {}
    for name in adapters:
        runs = [
            leaks.longest_run(kept(subjects, journal, question, name).tokens, own.tokens)
            for question, own in zip(questions, expected, strict=True)
        ]
        control = [
            leaks.longest_run(own.tokens[: len(expected.tokens)], expected.tokens)
            for own, expected in zip(answers[name], written, strict=True)
        ]
        gains = (
            _gains(journal, kind, name, count)
            for kind, count in (("training_loss", len(material.training_examples)), ("loss", len(material.examples)))
        )
        completed = [
            f"{prompt.where} ({leaks.pii.KINDS[prompt.kind]})"
            for prompt in prompts
            if leaks.completes(kept(subjects, journal, prompt.question, name).text, prompt.value)
            and not leaks.completes(kept(subjects, journal, prompt.question, BASE).text, prompt.value)
        ]
        recited = leaks.recitation(runs, control, [row.where for row in rows], *gains)
        found[name] = AdapterLeaks(recited, len(prompts), completed)
    return found


def _gains(journal: Journal, kind: str, model: str, count: int) -> list[float]:
    """Returns how much a model lowers the loss of each row below the base model's, in nats per token."""
    rows = [journal[kind, i] for i in range(count)]
    return [(sums[BASE] - sums[model]) / max(targets, 1) for sums, targets in rows]
