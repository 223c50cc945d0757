"""What an adapter changed where it should not: general texts and questions that have nothing to do with its field."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.common.statistics import Difference, Interval, difference, interval
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Conversation, Message
from jlora.data.loss_mask import encode_conversations
from jlora.evaluation.answers import Question
from jlora.evaluation.journal import Journal
from jlora.evaluation.likelihood import Likelihood
from jlora.evaluation.subjects import BASE

FILE = Path(__file__).parent / "general.jsonl"  # texts of several kinds and questions, in English and Chinese
QUESTION = "question"  # the kind of its rows that are asked
MAX_NEW_TOKENS = 80


class Forgetting(NamedTuple):
    """How one adapter treats general texts, for one language. Losses are in nats per token."""

    texts: int
    base_loss: Interval
    loss: Interval
    change: Difference
    divergence: Interval  # KL(base model || adapter)


def read_general() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns the general texts and questions that come with jlora: `kind`, `language` and `text`."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] != QUESTION], [row for row in rows if row["kind"] == QUESTION]


def general_questions(tokenizer: Any, questions: Sequence[Mapping[str, str]]) -> list[Question]:
    """Returns the questions as prompts; none for a model without a chat template."""
    if not tokenizer.chat_template:
        return []
    turns = [(Message("user", question["text"]),) for question in questions]
    return [Question(("general", i), encode_prompt(tokenizer, turn), MAX_NEW_TOKENS) for i, turn in enumerate(turns)]


def measure_texts(
    likelihood: Likelihood, tokenizer: Any, ends: frozenset[int], texts: Sequence[str], journal: Journal, name: str
) -> None:
    """Measures plain texts under every model, and keeps the sums in the journal: (name, number of the text)."""
    if all((name, i) in journal for i in range(len(texts))):
        return
    rows = [Conversation((Message("text", text),), f"{name} text {i + 1}") for i, text in enumerate(texts)]
    examples = encode_conversations(tokenizer, ends, rows, "assistant")
    for i, found in enumerate(likelihood.measure(examples)):
        if (name, i) not in journal:
            sums = {
                model: [-float(own.log_probs.sum()), float(own.divergence.sum()), len(own.log_probs)]
                for model, own in found.items()
            }
            journal.add((name, i), sums)


def forgetting(sums: Sequence[Mapping[str, Sequence[float]]], adapter: str) -> Forgetting:
    """Compares an adapter with the base model on texts, from what `measure_texts` kept."""
    base, own = (np.array([row[name] for row in sums]) for name in (BASE, adapter))
    losses, before, counts = own[:, 0], base[:, 0], own[:, 2]
    return Forgetting(
        len(sums),
        interval(before, counts),
        interval(losses, counts),
        difference(losses, before, counts),
        interval(own[:, 1], counts),
    )
