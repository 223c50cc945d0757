"""What is odd about the rows, before any of them is trained on: doubles, contradictions, outliers, personal data.

One pass, with some hundred bytes a row kept. Near duplicates take about 0.1 ms a row (20 s for 200,000 rows) and are
looked for among the first `NEAR` rows; everything else in all of them. No line repeats what a row says.
"""

import hashlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jlora.common.errors import UserError
from jlora.data.checks import pii
from jlora.data.conversation import Conversation
from jlora.data.readers.text import prefix_of

NEAR = 200_000  # rows that are compared for near duplicates
ALIKE = 0.85  # share of equal hashes from which two rows are near duplicates
SHINGLE = 5  # characters
BANDS, ROWS = 16, 4  # MinHash: rows that are ALIKE share a band of hashes with probability 0.9999
BROKEN = re.compile("\ufffd|锟斤拷|烫烫烫")  # what a wrong decoding leaves behind
PLACEHOLDER = re.compile(rf"\[({'|'.join(pii.WORDS)})_\d+\]")
BEGINNING = 24  # characters of an answer in which a common form is looked for
COMMON = 0.9  # share of answers that makes a beginning the common form
SHOWN = 5  # rows named in one line

_RANDOM = np.random.RandomState(0)
_FACTORS = _RANDOM.randint(1, 2**31, BANDS * ROWS, dtype=np.int64).astype(np.uint64) * np.uint64(2) + np.uint64(1)
_POWERS = np.uint64(1_000_003) ** np.arange(SHINGLE, dtype=np.uint64)


class Survey:
    """Takes rows one by one with `watch`; then `lines` says what is odd about them."""

    def __init__(self, pii_regions: tuple[str, ...], pii_rule: str, amounts: bool) -> None:
        self._regions, self._rule, self._amounts = pii_regions, pii_rule, amounts
        self.count = 0
        self._plain = False  # plain text has no answers
        self._where: list[str] = []
        self._rows, self._questions, self._lengths = array("Q"), array("Q"), array("L")
        self._beginnings: list[str] = []
        self._signatures: list[np.ndarray] = []
        self._empty: list[int] = []
        self._broken: list[int] = []
        self._prefixes: Counter[str] = Counter()
        self._personal: dict[str, list[int]] = defaultdict(list)

    def watch(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        """The rows, each looked at as it passes."""
        for row in rows:
            self._look(row)
            yield row

    def _look(self, row: Conversation) -> None:
        index, answer = self.count, row.messages[-1].content
        said = [message for message in row.messages if message.role != "system"]
        text = "\n".join(message.content for message in said)
        self.count += 1
        self._plain = self._plain or row.plain
        self._where.append(Path(row.where).name)
        self._rows.append(_hash("\0".join(f"{m.role}\0{m.content}" for m in said)))
        self._questions.append(_hash("\0".join(" ".join(m.content.split()).casefold() for m in said[:-1])))
        self._lengths.append(len(answer))
        self._beginnings.append(answer[:BEGINNING])
        if index < NEAR:
            self._signatures.append(signature(text))
        if not re.search(r"\w", answer):
            self._empty.append(index)
        if BROKEN.search(text):
            self._broken.append(index)
        for kind in self._kinds(row):
            self._personal[kind].append(index)
        self._prefixes.update(name for line in text.split("\n") if (name := prefix_of(line)))

    def _kinds(self, row: Conversation) -> set[str]:
        """The kinds of personal data in a row; those that were masked, where they were."""
        if self._rule == "allow":
            return set()
        if self._rule == "mask":
            return {kind for message in row.messages for kind in PLACEHOLDER.findall(message.content)}
        found = (pii.find(message.content, self._regions, self._amounts) for message in row.messages)
        return {finding.kind for findings in found for finding in findings}

    def lines(self) -> list[str]:
        """What was found, a line each.

        Raises:
          UserError: personal data, with pii="error".
        """
        same = _groups(np.array(self._rows, np.uint64))
        found = [
            self._pairs(same, "row(s) stand more than once"),
            self._pairs(self._near({i for group in same for i in group[1:]}), "row(s) are nearly the same as another"),
            self._contradictions(),
            self._named(self._empty, "answer(s) say nothing"),
            self._named(self._short(), "answer(s) are far shorter than the others"),
            self._odd_beginnings(),
            self._unread_prefixes(),
            self._named(self._broken, "row(s) hold characters that a wrong encoding left behind"),
        ]
        return [line for line in [*found, self._privacy()] if line]

    def _privacy(self) -> str:
        rows = sorted({row for rows in self._personal.values() for row in rows})
        if not rows:
            return ""
        kinds = ", ".join(
            f"{pii.WORDS[kind]} in {len(self._personal[kind])}" for kind in pii.WORDS if kind in self._personal
        )
        said = f"{len(rows)} row(s) hold personal data ({kinds}): {self._some(rows)}"
        if self._rule == "mask":
            return f"{said}; placeholders stand in its place (pii=mask)"
        if self._rule == "error":
            raise UserError(f"{said}. Remove it, set pii=mask to train on placeholders, or pii=warn to train on it")
        return f"{said}; pii=mask puts placeholders in its place"

    def _contradictions(self) -> str:
        """Rows with the question of another row and another answer."""
        plain_text = _hash("")
        groups = [
            [group[0], *(row for row in group[1:] if self._rows[row] != self._rows[group[0]])]
            for group in _groups(np.array(self._questions, np.uint64))
            if self._questions[group[0]] != plain_text
        ]
        return self._pairs(groups, "row(s) answer a question differently from another row")

    def _unread_prefixes(self) -> str:
        """Line beginnings such as `Note:` that stand in the text at least twice."""
        odd = ", ".join(f"{name} ({count})" for name, count in self._prefixes.most_common(8) if count > 1)
        return f"lines that begin like a role but are read as text: {odd}" if odd else ""

    def _short(self) -> list[int]:
        """Answers of a tenth of the usual length."""
        if self._plain:
            return []
        lengths = np.array(self._lengths)
        few = np.flatnonzero(lengths < np.median(lengths) / 10) if len(lengths) else np.array([], int)
        return [row for row in few.tolist() if row not in set(self._empty)]

    def _odd_beginnings(self) -> str:
        """Answers that do not begin as nearly all do."""
        beginning, count = "", self.count
        while len(beginning) < BEGINNING:
            rest = (answer[len(beginning) :] for answer in self._beginnings if answer.startswith(beginning))
            ((character, often),) = Counter(part[:1] for part in rest).most_common(1) or [("", 0)]
            if not character or often < COMMON * self.count:
                break
            beginning, count = beginning + character, often
        if self._plain or len(beginning) < 2 or count == self.count or self.count < 10:
            return ""
        shown = re.split(r"[\d@]", beginning)[0].strip()  # no number is told, whosoever's it is
        odd = [row for row, answer in enumerate(self._beginnings) if not answer.startswith(beginning)]
        return f"{count} of {self.count} answers begin with {shown!r}; not so {self._some(odd)}"

    def _near(self, known: set[int]) -> list[list[int]]:
        """Rows whose MinHash signatures agree in ALIKE of their places: each with the first one of its band.

        Broder 1997, "On the resemblance and containment of documents". A row is compared at most once a band, so the
        cost is that of sorting, however many are alike.
        """
        if not self._signatures:
            return []
        signatures = np.stack(self._signatures)
        first: dict[int, int] = {}
        for band in range(BANDS):
            part = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
            _, start, inverse = np.unique(part, axis=0, return_index=True, return_inverse=True)
            others = start[inverse.reshape(-1)]
            rows = np.flatnonzero(others != np.arange(len(others)))
            alike = np.mean(signatures[rows] == signatures[others[rows]], axis=1) >= ALIKE
            for row in rows[alike].tolist():
                first.setdefault(row, int(others[row]))
        return [[other, row] for row, other in sorted(first.items()) if row not in known]

    def _pairs(self, groups: list[list[int]], what: str) -> str:
        pairs = [(row, group[0]) for group in groups for row in group[1:]]
        if not pairs:
            return ""
        named = ", ".join(f"{self._where[row]} and {self._where[other]}" for row, other in pairs[:SHOWN])
        return f"{len(pairs)} {what}: {named}{_more(len(pairs))}"

    def _named(self, rows: list[int], what: str) -> str:
        return f"{len(rows)} {what}: {self._some(rows)}" if rows else ""

    def _some(self, rows: list[int]) -> str:
        return ", ".join(self._where[row] for row in rows[:SHOWN]) + _more(len(rows))


def signature(text: str) -> np.ndarray:
    """MinHash of a text's shingles, [BANDS * ROWS] uint32; case, spaces and punctuation do not count."""
    letters = re.sub(r"[\W_]+", "", text.casefold()) or "\0"
    codes = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    codes = np.pad(codes, (0, max(0, SHINGLE - len(codes))))
    hashes = np.unique(np.lib.stride_tricks.sliding_window_view(codes, SHINGLE) @ _POWERS)
    return ((hashes[None] * _FACTORS[:, None]) >> np.uint64(32)).min(axis=1).astype(np.uint32)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def _groups(values: np.ndarray) -> list[list[int]]:
    """The places of each value that stands more than once."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order])) + 1
    return sorted((part.tolist() for part in np.split(order, ends) if len(part) > 1), key=lambda group: group[1])


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""
