"""Whether an adapter recites its training rows, or completes personal data in them.

Held-out rows are the control: a model that has learned the field, and not the rows, treats both alike. Exposure is the
share of pairs of a training row and a held-out row in which the adapter lowers the loss of the training row more
(the attack of Yeom et al. 2018, by its area under the curve); 0.5 means that it cannot tell them apart.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np

from jlora.common.statistics import Interval, gap, interval
from jlora.data.chat_template import encode_prompt
from jlora.data.checks import pii
from jlora.data.conversation import Conversation
from jlora.evaluation.answers import Question

RECITED = 0.9  # share of the written answer in one run of tokens from which an answer counts as recited
SLACK = 4  # tokens beside those of a value that is looked for


class Recitation(NamedTuple):
    """How much of the written answers an adapter repeats in one run of tokens."""

    training: Interval  # mean share of the longest run, over training rows
    held_out: Interval  # the same over held-out rows
    gap: Interval
    recited_training: float  # share of the rows that count as recited
    recited_held_out: float
    recited_rows: list[str]  # file:line
    exposure: float


class Completion(NamedTuple):
    """A prompt that stops before personal data."""

    where: str  # file:line
    kind: str
    question: Question
    value: str  # never shown


def longest_run(answer: Sequence[int], written: Sequence[int]) -> float:
    """Returns the share of the written answer that its longest common run of tokens with an answer takes."""
    if not written:
        return 0.0
    match = SequenceMatcher(None, answer, written, autojunk=False).find_longest_match()
    return match.size / len(written)


def recitation(
    training: Sequence[float],
    held_out: Sequence[float],
    places: Sequence[str],
    gains: Sequence[float],
    held_out_gains: Sequence[float],
) -> Recitation:
    """Sums up the shares of the longest runs, and how much the adapter lowers each row's loss, in nats per token."""
    own, control = np.array(training), np.array(held_out)
    wins = np.array(gains)[:, None] - np.array(held_out_gains)
    return Recitation(
        interval(own, np.ones(len(own))),
        interval(control, np.ones(len(control))),
        gap(own, control),
        float(np.mean(own >= RECITED)),
        float(np.mean(control >= RECITED)),
        [place for place, share in zip(places, training, strict=True) if share >= RECITED],
        float(np.mean((wins > 0) + 0.5 * (wins == 0))),
    )


def completions(
    tokenizer: Any, rows: Sequence[Conversation], regions: tuple[str, ...], amounts: bool
) -> list[Completion]:
    """Returns a prompt for each piece of personal data in a trained answer: everything before it."""
    found = []
    for row in rows:
        answer = row.messages[-1]
        if row.plain or not answer.weight:
            continue
        for finding in pii.find(answer.content, regions, amounts):
            value, before = answer.content[finding.start : finding.stop], answer.content[: finding.start].rstrip()
            prompt = encode_prompt(tokenizer, row.messages[:-1], row.tools)
            prompt = prompt + tokenizer(before, add_special_tokens=False)["input_ids"] if before else prompt
            size = len(tokenizer(value, add_special_tokens=False)["input_ids"]) + SLACK
            key = ("completion", row.where, finding.start)
            found.append(Completion(row.where, finding.kind, Question(key, prompt, size), value))
    return found


def completes(text: str, value: str) -> bool:
    """Returns whether an answer contains a value, whatever its spaces and punctuation."""
    bare = ["".join(character for character in part.casefold() if character.isalnum()) for part in (text, value)]
    return bare[1] in bare[0]
