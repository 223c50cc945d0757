"""Answers of several models to many questions, in one batch, kept as they come."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from jlora.evaluation.journal import Journal
from jlora.evaluation.subjects import Subjects
from jlora.evaluation.text_scores import Answer
from jlora.serve.engine import Request


class Question(NamedTuple):
    """A prompt, by the key under which its answers are kept."""

    key: tuple[str | int, ...]
    prompt: list[int]
    max_new_tokens: int


def ask(subjects: Subjects, questions: Sequence[Question], journal: Journal, title: str) -> None:
    """Lets every model answer every question greedily, and keeps each answer in the journal, under (*key, name).

    Answers that are in the journal already are not generated again. Ctrl-C keeps those that are complete.
    """
    missing = [(q, name) for q in questions for name in subjects.mixtures if (*q.key, name) not in journal]
    if not missing:
        return
    asked: dict[int, tuple[str | int, ...]] = {}  # the id of a request -> its answer's key

    def requests() -> Iterator[Request]:
        for question, name in missing:
            request = Request(question.prompt, subjects.mixtures[name], question.max_new_tokens)
            asked[id(request)] = (*question.key, name)
            yield request

    longest = max(len(question.prompt) + question.max_new_tokens for question, _ in missing)
    done = len(questions) * len(subjects.mixtures) - len(missing)
    with tqdm(total=done + len(missing), initial=done, desc=title, unit="answer", disable=None) as bar:
        for request in subjects.generator.generate_each(requests(), longest, len(missing)):
            journal.add(asked.pop(id(request)), [[token.id for token in request.answer], request.finish == "stop"])
            bar.update()


def kept(subjects: Subjects, journal: Journal, question: Question, name: str) -> Answer:
    """Returns an answer from the journal."""
    tokens, ended = journal[(*question.key, name)]
    return Answer(subjects.generator.tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens, ended)
