"""A judge: another model, behind OpenAI's API, that says which of two answers is better.

Each pair is judged in both orders, because judges prefer the first answer or the second (Zheng et al. 2023); an answer
wins a row only if it wins in both.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.common.statistics import Difference, difference
from jlora.data.conversation import Conversation
from jlora.evaluation.journal import Journal
from jlora.evaluation.text_scores import Answer

KEY = "JLORA_JUDGE_KEY"
AT_A_TIME = 4  # requests
RETRIES = 5  # of a request that fails or is refused, after growing pauses or the one that the server asks for
ATTEMPTS = 3  # if a reply has no verdict
SECONDS = 120.0  # for a reply
LONGEST = 8000  # characters of a text that the judge is shown
PROMPT = """Two assistants answered the same question. An expert's answer is given for comparison. Decide which \
assistant's answer is more correct and more useful. Do not let the order or the length of the answers influence you.

[Question]
{question}

[Expert's answer]
{written}

[Answer 1]
{first}

[Answer 2]
{second}

Reply with one word: 1 if answer 1 is better, 2 if answer 2 is better, or tie."""
VERDICT = re.compile(r"\b(1|2|tie)\b", re.IGNORECASE)
UNCLEAR = "unclear"  # the judge gave no verdict


class Preference(NamedTuple):
    """How often a judge preferred one model's answers to another's."""

    model: str
    other: str
    rows: int  # that were judged in both orders
    won: int
    lost: int
    unclear: int  # replies without a verdict
    share: Difference  # rows won less rows lost, as a share of all

    @property
    def verdict(self) -> str:
        """Returns "better", "worse" or "no difference shown"."""
        if not self.share.shown:
            return "no difference shown"
        return "better" if self.share.value > 0 else "worse"


class Judge:
    """The judge at an address.

    Args:
      url: of OpenAI's API, such as "http://127.0.0.1:8000/v1".
      model: its name there.

    Raises:
      UserError: the package openai is not installed.
    """

    def __init__(self, url: str, model: str) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(
                "judge_url needs the package openai, which is not installed. Run: pip install 'jlora[judge]'"
            ) from None
        self.url, self.model, self._failures = url, model, (openai.OpenAIError,)
        key = os.environ.get(KEY) or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=SECONDS)

    def compare(self, question: str, written: str, first: str, second: str) -> str:
        """Returns "1", "2", "tie" or UNCLEAR; raises `openai.OpenAIError` if the judge cannot be reached."""
        texts = {"question": question, "written": written, "first": first, "second": second}
        prompt = PROMPT.format(**{name: text[:LONGEST] for name, text in texts.items()})
        for _ in range(ATTEMPTS):
            reply: Any = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=16
            )
            choices = getattr(reply, "choices", None)
            if choices and (found := VERDICT.search(choices[0].message.content or "")):
                return found[1].lower()
        return UNCLEAR

    def judge_all(self, rows: Sequence[Conversation], answers: Mapping[str, list[Answer]], journal: Journal) -> str:
        """Judges all pairs of models on all rows, and keeps each verdict in the journal.

        Returns:
          Why it stopped early, or "" if everything is judged.
        """
        keys = list(self._keys(answers, len(rows)))
        missing, stopped = iter([key for key in keys if key not in journal]), ""
        bar = tqdm(total=len(keys), initial=sum(key in journal for key in keys), desc="Judging", disable=None)
        with bar, ThreadPoolExecutor(AT_A_TIME) as pool:
            running = dict[Future[str], tuple[Any, ...]]()
            while True:
                for key in itertools.islice(missing, AT_A_TIME - len(running)):
                    *_, one, two, i = key
                    texts = rows[i].messages[-2].full_text, rows[i].messages[-1].full_text
                    running[pool.submit(self.compare, *texts, answers[one][i].text, answers[two][i].text)] = key
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    key = running.pop(done)
                    try:
                        journal.add(key, done.result())
                        bar.update()
                    except self._failures as error:  # what is running is still kept
                        missing, stopped = iter(()), str(error).splitlines()[0][:200]
        judged = sum(key in journal for key in keys)
        if not stopped:
            return ""
        return (
            f"The judge at {self.url} stopped after {judged:,} of {plural(len(keys), 'comparison')}: {stopped}. Run "
            "the same command again to continue."
        )

    def preferences(self, rows: int, answers: Sequence[str], journal: Journal) -> list[Preference]:
        """Sums up the verdicts of the journal on every pair of models."""
        return [
            _preference(
                model,
                other,
                [self._row(journal, model, other, i) for i in range(rows)],
            )
            for other, model in itertools.combinations(answers, 2)
        ]

    def _keys(self, answers: Iterable[str], rows: int) -> Iterator[tuple[Any, ...]]:
        for i in range(rows):
            for other, model in itertools.combinations(answers, 2):
                yield ("judge", self.url, self.model, model, other, i)
                yield ("judge", self.url, self.model, other, model, i)

    def _row(self, journal: Journal, model: str, other: str, i: int) -> tuple[str, str] | None:
        """Returns the verdicts on a row in both orders; None if one is missing."""
        keys = [("judge", self.url, self.model, *pair, i) for pair in ((model, other), (other, model))]
        return (journal[keys[0]], journal[keys[1]]) if all(key in journal for key in keys) else None


def _preference(model: str, other: str, verdicts: Sequence[tuple[str, str] | None]) -> Preference:
    found = [pair for pair in verdicts if pair is not None]
    points = np.array([float(pair == ("1", "2")) - float(pair == ("2", "1")) for pair in found])
    unclear = sum(verdict == UNCLEAR for pair in found for verdict in pair)
    share = difference(points, np.zeros(len(points)), np.ones(len(points)))
    return Preference(model, other, len(found), int(sum(points > 0)), int(sum(points < 0)), unclear, share)
