"""Data quality report: duplicates, contradictions, outliers and personal data, found before training.

It takes one pass and keeps a few hundred bytes per row. Near-duplicates take about 0.1 ms per row (20 s for 200,000
rows) and are searched among the first `NEAR_DUPLICATE_ROWS` rows; everything else is searched in all rows. Lines name
rows but never quote personal data.
"""

import hashlib
import itertools
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.checks import pii
from jlora.data.conversation import Conversation
from jlora.data.readers.text_files import line_prefix

NEAR_DUPLICATE_ROWS = 200_000  # rows compared for near-duplicates
NEAR_DUPLICATE = 0.85  # share of equal MinHash values above which two rows are near-duplicates
SHINGLE = 5  # characters
BANDS, VALUES = 16, 4  # MinHash bands and values per band: near-duplicates share a band with probability 0.9999
MISDECODED = re.compile("\ufffd|锟斤拷|烫烫烫")  # the traces of a wrong encoding
PLACEHOLDER = re.compile(rf"\[({'|'.join(pii.KINDS)})_\d+\]")
BEGINNING = 24  # characters at the start of an answer that are compared with other answers
COMMON = 0.9  # share of answers that must start alike to make the others conspicuous
SHOWN = 5  # rows listed per line

_RANDOM = np.random.RandomState(0)
_FACTORS = _RANDOM.randint(1, 2**31, BANDS * VALUES, dtype=np.int64).astype(np.uint64) * np.uint64(2) + np.uint64(1)
_POWERS = np.uint64(1_000_003) ** np.arange(SHINGLE, dtype=np.uint64)


class DataReport:
    """Inspects rows one by one in `inspect`, then reports its findings in `lines`."""

    def __init__(self, pii_regions: tuple[str, ...], pii_rule: str, amounts: bool) -> None:
        self._regions, self._rule, self._amounts = pii_regions, pii_rule, amounts
        self.count = 0
        self._plain = False  # plain text has no answers
        self._where: list[str] = []
        self._rows, self._questions, self._lengths = array("Q"), array("Q"), array("L")
        self._beginnings: list[str] = []
        self._signatures: list[np.ndarray] = []
        self._empty: list[int] = []
        self._unreasoned: list[int] = []
        self.tools = 0  # rows that define tools
        self._misdecoded: list[int] = []
        self._prefixes: Counter[str] = Counter()
        self._personal: dict[str, list[int]] = defaultdict(list)

    @property
    def reasoning(self) -> int:
        """The number of rows with reasoning that is learned."""
        return self.count - len(self._unreasoned)

    def inspect(self, rows: Iterable[Conversation]) -> Iterator[Conversation]:
        """Yields the rows unchanged, inspecting each."""
        for row in rows:
            self._inspect_row(row)
            yield row

    def _inspect_row(self, row: Conversation) -> None:
        index, answer = self.count, row.messages[-1].full_text
        turns = [message for message in row.messages if message.role != "system"]
        text = "\n".join(message.full_text for message in turns)
        self.count += 1
        self.tools += bool(row.tools)
        self._plain = self._plain or row.plain
        self._where.append(Path(row.where).name)
        self._rows.append(_hash("\0".join(f"{m.role}\0{m.full_text}" for m in turns)))
        self._questions.append(_hash("\0".join(" ".join(m.full_text.split()).casefold() for m in turns[:-1])))
        self._lengths.append(len(answer))
        self._beginnings.append(answer[:BEGINNING])
        if index < NEAR_DUPLICATE_ROWS:
            self._signatures.append(signature(text))
        if not re.search(r"\w", answer):
            self._empty.append(index)
        if not row.reasons:
            self._unreasoned.append(index)
        if MISDECODED.search(text):
            self._misdecoded.append(index)
        for kind in self._personal_kinds(row):
            self._personal[kind].append(index)
        self._prefixes.update(name for line in text.split("\n") if (name := line_prefix(line)))

    def _personal_kinds(self, row: Conversation) -> set[str]:
        """Returns the kinds of personal data in a row; with pii="mask", those of its placeholders."""
        if self._rule == "allow":
            return set()
        if self._rule == "mask":
            return {kind for message in row.messages for kind in PLACEHOLDER.findall(message.full_text)}
        found = (pii.find(message.full_text, self._regions, self._amounts) for message in row.messages)
        return {finding.kind for findings in found for finding in findings}

    def lines(self) -> list[str]:
        """Returns one line per finding.

        Raises:
          UserError: the rows contain personal data and pii is "error".
        """
        equal, near = self._duplicates()
        findings = [
            self._pairs(equal, ("duplicates", "duplicate"), "another row, so its content counts twice"),
            self._pairs(near, ("nearly duplicates", "nearly duplicate"), "another row"),
            self._contradictions(),
            self._listed("answer", self._empty, ("has", "have"), "no text"),
            self._listed("answer", self._short_answers(), ("is", "are"), "unusually short"),
            self._beginnings_line(),
            self._listed("row", self._unreasoned if self.reasoning else [], ("has", "have"), "no reasoning"),
            self._unread_prefixes(),
            self._listed("row", self._misdecoded, ("contains", "contain"), "characters damaged by a wrong encoding"),
        ]
        return [line for line in [*findings, self._privacy()] if line]

    def clusters(self) -> list[list[int]]:
        """Returns the rows of each cluster of duplicates and near-duplicates."""
        return _joined([*itertools.chain(*self._duplicates())])

    def conspicuous(self) -> dict[str, list[list[int]]]:
        """Returns the groups of rows that `lines` reports for their answers, by what is reported of them."""
        kinds = {
            "answers without text": self._empty,
            "unusually short answers": self._short_answers(),
            "answers that start differently": self._odd_beginnings()[1],
            "rows without reasoning": self._unreasoned if self.reasoning else [],
            "rows damaged by a wrong encoding": self._misdecoded,
        }
        groups = {kind: [rows] for kind, rows in kinds.items() if rows}
        return {"rows that contradict each other": self._contradicting(), **groups}

    def _privacy(self) -> str:
        rows = sorted({row for rows in self._personal.values() for row in rows})
        if not rows:
            return ""
        kinds = ", ".join(
            f"{pii.KINDS[kind]} in {len(self._personal[kind])}" for kind in pii.KINDS if kind in self._personal
        )
        report = f"{plural(len(rows), 'row', ('contains', 'contain'))} personal data ({kinds}): {self._places(rows)}"
        if self._rule == "mask":
            return f"{report}. Placeholders replace it (pii=mask)."
        if self._rule == "error":
            raise UserError(f"{report}. Remove it, set pii=mask to train on placeholders, or pii=warn to train on it.")
        return f"{report}. The model may learn and repeat it. Set pii=mask to train on placeholders instead."

    def _contradicting(self) -> list[list[int]]:
        """Returns groups of rows with the same question but different answers."""
        plain_text = _hash("")
        groups = [
            [group[0], *(row for row in group[1:] if self._rows[row] != self._rows[group[0]])]
            for group in _groups_of_equal(np.array(self._questions, np.uint64))
            if self._questions[group[0]] != plain_text
        ]
        return [group for group in groups if len(group) > 1]

    def _contradictions(self) -> str:
        verbs = ("contradicts", "contradict")
        return self._pairs(self._contradicting(), verbs, "another row's answer to the same question")

    def _unread_prefixes(self) -> str:
        """Reports line starts such as `Note:` that occur at least twice in the text."""
        odd = ", ".join(f"{name} ({count})" for name, count in self._prefixes.most_common(8) if count > 1)
        return f"lines that start like a role but are read as text: {odd}" if odd else ""

    def _short_answers(self) -> list[int]:
        """Returns the answers shorter than a tenth of the median length."""
        if self._plain:
            return []
        lengths = np.array(self._lengths)
        few = np.flatnonzero(lengths < np.median(lengths) / 10) if len(lengths) else np.array([], int)
        return [row for row in few.tolist() if row not in set(self._empty)]

    def _odd_beginnings(self) -> tuple[str, list[int]]:
        """Returns how nearly all answers start, and those that start differently; or no answers."""
        beginning, count = "", self.count
        while len(beginning) < BEGINNING:
            rest = (answer[len(beginning) :] for answer in self._beginnings if answer.startswith(beginning))
            ((character, often),) = Counter(part[:1] for part in rest).most_common(1) or [("", 0)]
            if not character or often < COMMON * self.count:
                break
            beginning, count = beginning + character, often
        if self._plain or len(beginning) < 2 or count == self.count or self.count < 10:
            return "", []
        shown = re.split(r"[\d@]", beginning)[0].strip()  # a number may be personal data, so it is not quoted
        return shown, [row for row, answer in enumerate(self._beginnings) if not answer.startswith(beginning)]

    def _beginnings_line(self) -> str:
        shown, odd = self._odd_beginnings()
        count = self.count - len(odd)
        every = f"{count} of {plural(self.count, 'answer')}"
        return f"{every} start with {shown!r}, except {self._places(odd)}" if odd else ""

    def _duplicates(self) -> tuple[list[list[int]], list[list[int]]]:
        equal = _groups_of_equal(np.array(self._rows, np.uint64))
        return equal, self._near_duplicates({i for group in equal for i in group[1:]})

    def _near_duplicates(self, known: set[int]) -> list[list[int]]:
        """Pairs each near-duplicate row with the first row in one of its MinHash bands.

        Broder 1997, "On the resemblance and containment of documents". A row is compared at most once per band, so the
        cost is that of sorting, regardless of how many rows are similar.
        """
        if not self._signatures:
            return []
        signatures = np.stack(self._signatures)
        first: dict[int, int] = {}
        for band in range(BANDS):
            part = np.ascontiguousarray(signatures[:, band * VALUES : (band + 1) * VALUES])
            _, start, inverse = np.unique(part, axis=0, return_index=True, return_inverse=True)
            others = start[inverse.reshape(-1)]
            rows = np.flatnonzero(others != np.arange(len(others)))
            similar = np.mean(signatures[rows] == signatures[others[rows]], axis=1) >= NEAR_DUPLICATE
            for row in rows[similar].tolist():
                first.setdefault(row, int(others[row]))
        return [[other, row] for row, other in sorted(first.items()) if row not in known]

    def _pairs(self, groups: list[list[int]], verbs: tuple[str, str], rest: str) -> str:
        pairs = [(row, group[0]) for group in groups for row in group[1:]]
        if not pairs:
            return ""
        listed = ", ".join(f"{self._where[row]} and {self._where[other]}" for row, other in pairs[:SHOWN])
        return f"{plural(len(pairs), 'row', verbs)} {rest}: {listed}{_more(len(pairs))}"

    def _listed(self, noun: str, rows: list[int], verbs: tuple[str, str], rest: str) -> str:
        return f"{plural(len(rows), noun, verbs)} {rest}: {self._places(rows)}" if rows else ""

    def _places(self, rows: list[int]) -> str:
        return ", ".join(self._where[row] for row in rows[:SHOWN]) + _more(len(rows))


def signature(text: str) -> np.ndarray:
    """Returns the MinHash of a text's shingles, [BANDS * VALUES] uint32; ignores case, spaces and punctuation."""
    letters = re.sub(r"[\W_]+", "", text.casefold()) or "\0"
    codes = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    codes = np.pad(codes, (0, max(0, SHINGLE - len(codes))))
    hashes = np.unique(np.lib.stride_tricks.sliding_window_view(codes, SHINGLE) @ _POWERS)
    return ((hashes[None] * _FACTORS[:, None]) >> np.uint64(32)).min(axis=1).astype(np.uint32)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def _groups_of_equal(values: np.ndarray) -> list[list[int]]:
    """Returns the indices of each value that occurs more than once."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order])) + 1
    return sorted((part.tolist() for part in np.split(order, ends) if len(part) > 1), key=lambda group: group[1])


def _joined(groups: list[list[int]]) -> list[list[int]]:
    """Returns groups that share a row as one, each in ascending order."""
    sets = DisjointSet(sorted({row for group in groups for row in group}))
    for first, *others in groups:
        for row in others:
            sets.merge(first, row)
    return sorted(sorted(group) for group in sets.subsets())


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""
