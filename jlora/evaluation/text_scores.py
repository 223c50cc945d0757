"""Scores of one answer against the written one: chrF, BLEU, ROUGE-L, form, and the patterns of the user's field."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import regex

from jlora.common.patterns import Pattern

HAN = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")
# Characters of scripts without spaces, and words; of ASCII text, the words that rouge_score itself would find.
WORDS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[[^\W_]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]]+", regex.V1
)
REPEATED = 4  # tokens of an n-gram that should not occur twice


class Answer(NamedTuple):
    """An answer of a model."""

    text: str
    tokens: list[int]  # without the end token
    ended: bool  # whether the model ended it


class Written(NamedTuple):
    """The answer in the data."""

    text: str
    tokens: list[int]


class Score(NamedTuple):
    """A measure of each row: `measure` returns a value and its weight; rows of weight 0 are left out."""

    name: str
    title: str
    percent: bool  # whether it is shown as a share
    better: int  # 1: higher, -1: lower, 0: neither
    measure: Callable[[Answer, Written], tuple[float, float]]


def text_scores(patterns: Mapping[str, str]) -> list[Score]:
    """Returns all scores of answers.

    Args:
      patterns: `answer_patterns` of the config: name -> regular expression.

    Raises:
      UserError: a pattern is not a regular expression.
    """
    return [*SCORES, *(score for name, text in patterns.items() for score in _pattern_scores(name, Pattern(text)))]


def _pattern_scores(name: str, pattern: Pattern) -> list[Score]:
    def matches(answer: Answer, written: Written) -> tuple[float, float]:
        return float(pattern.groups_in(answer.text) is not None), 1.0

    def equal(answer: Answer, written: Written) -> tuple[float, float]:
        expected = pattern.groups_in(written.text)
        return float(pattern.groups_in(answer.text) == expected), float(expected is not None)

    made = [Score(name, f"matches {name}", True, 1, matches)]
    if pattern.groups:
        made.append(Score(f"{name}_equal", f"same {name} as written", True, 1, equal))
    return made


@functools.cache
def _chrf() -> Callable[..., float]:
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return lambda answer, written: metric.sentence_score(answer, [written]).score


@functools.cache
def _bleu(tokenize: str) -> Callable[..., float]:
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenize, effective_order=True)  # of a sentence: short ones have few n-grams
    return lambda answer, written: metric.sentence_score(answer, [written]).score


class _Words:
    """A tokenizer of rouge_score's form, for all scripts."""

    def tokenize(self, text: str) -> list[str]:
        """Returns the words in lower case."""
        return WORDS.findall(text.lower())


@functools.cache
def _rouge() -> Callable[..., float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, written: 100 * scorer.score(written, answer)["rougeL"].fmeasure


def _chrf_of(answer: Answer, written: Written) -> tuple[float, float]:
    return _chrf()(answer.text, written.text), 1.0


def _bleu_of(answer: Answer, written: Written) -> tuple[float, float]:
    return _bleu("zh" if HAN.search(written.text) else "13a")(answer.text, written.text), 1.0


def _rouge_of(answer: Answer, written: Written) -> tuple[float, float]:
    return _rouge()(answer.text, written.text), 1.0


def _exact(answer: Answer, written: Written) -> tuple[float, float]:
    return float(" ".join(answer.text.split()) == " ".join(written.text.split())), 1.0


def _length(answer: Answer, written: Written) -> tuple[float, float]:
    return len(answer.tokens) / max(len(written.tokens), 1), 1.0


def _ended(answer: Answer, written: Written) -> tuple[float, float]:
    return float(answer.ended), 1.0


def _distinct(answer: Answer, written: Written) -> tuple[float, float]:
    grams = [tuple(answer.tokens[i : i + REPEATED]) for i in range(len(answer.tokens) - REPEATED + 1)]
    return len(set(grams)) / max(len(grams), 1), float(bool(grams))


SCORES = [
    Score("chrf", "chrF", False, 1, _chrf_of),
    Score("bleu", "BLEU", False, 1, _bleu_of),
    Score("rouge_l", "ROUGE-L", False, 1, _rouge_of),
    Score("exact_match", "equal to the written answer", True, 1, _exact),
    Score("length_ratio", "length / written length", False, 0, _length),
    Score("ended", "ended by the model", True, 1, _ended),
    Score("distinct", f"distinct {REPEATED}-grams", True, 1, _distinct),
]
