"""Text -> conversations: lines that begin with a role (`User: ...`); or, without roles, the text itself by paragraphs.

Two passes over the file, neither of which holds it: one finds the roles and what divides rows, one makes the rows.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jlora.common.errors import UserError
from jlora.data.conversation import (
    ASSISTANT_NAMES,
    MAX_ROW,
    SYSTEM_NAMES,
    USER_NAMES,
    Conversation,
    Notes,
    Reading,
    make_conversation,
)
from jlora.data.readers.encoding import lines

PREFIX = re.compile(r"^\s*(?P<name>[^\W\d_][\w -]{0,19}?)\s*[:：](?!//)\s*(?P<rest>.*)$", re.DOTALL)
RULE = re.compile(r"^\s*([-=*_])\1{2,}\s*$")  # a line of --- divides rows
KNOWN = USER_NAMES | ASSISTANT_NAMES | SYSTEM_NAMES
Row = Conversation | UserError  # a row, or why it cannot be used


def prefix_of(line: str, pattern: re.Pattern[str] = PREFIX) -> str:
    """The name before a line's first colon, without case and number (`问1：` is 问); "" where there is none."""
    match = pattern.match(line)
    return _bare(match["name"]) if match else ""


def begins_with_role(line: str, reading: Reading) -> bool:
    """Does this line begin with a prefix that is known to be a role's?"""
    pattern, given = _prefixes(reading)
    return prefix_of(line, pattern) in (given or KNOWN)


def read_text(file: Path, encoding: str, reading: Reading, notes: Notes) -> Iterator[Row]:
    """The rows of a text file.

    Raises:
      UserError: it cannot be told for sure which prefixes are the roles.
    """
    pattern, given = _prefixes(reading)
    survey = _Survey()
    if not reading.plain:
        for number, line in lines(file, encoding):
            survey.add(number, line, prefix_of(line, pattern))
        if not given and survey.has_no_roles():
            notes.add("no line begins with a role, so the text itself is trained on", file.name)
    if reading.plain or (not given and survey.has_no_roles()):
        yield from _paragraphs(file, encoding)
    else:
        roles = survey.roles(file, given)
        yield from _conversations(file, encoding, pattern, roles, survey.division(roles), notes)


def _prefixes(reading: Reading) -> tuple[re.Pattern[str], dict[str, str]]:
    """What a prefix looks like, and the role of each that the config names."""
    given = {p.strip(): role for role, named in reading.role_prefixes.items() for p in named.split("|") if p.strip()}
    if not given:
        return PREFIX, {}
    longest_first = sorted(given, key=len, reverse=True)
    words = [re.escape(p) + (r"\s*\d*\s*[:：]" if p[-1].isalnum() else r"\s*[:：]?") for p in longest_first]
    pattern = re.compile(rf"^\s*(?P<name>{'|'.join(words)})\s*(?P<rest>.*)$", re.DOTALL | re.IGNORECASE)
    return pattern, {_bare(prefix): role for prefix, role in given.items()}


def _bare(name: str) -> str:
    word = name.lower().rstrip(":： ")
    return word.rstrip("0123456789 ") or word


class _Survey:
    """What a file's lines begin with."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # of each prefix
        self._first = (1, "", "")  # the first line with words: number, line, prefix
        self._asks = ""  # the first prefix that is not the system's
        self._answers: Counter[str] = Counter()  # prefixes after a question, once for each question
        self._since: set[str] = set()  # those after the question at hand
        self._gap = {"rule": False, "blank": False}  # what lies before the line at hand
        self._after: dict[str, set[str]] = {"rule": set(), "blank": set()}  # prefixes that came after one

    def add(self, number: int, line: str, name: str) -> None:
        """The next line."""
        if not line.strip() or RULE.match(line):
            self._gap["rule" if line.strip() else "blank"] = True
            return
        if not self._first[1]:
            self._first = (number, line, name)
        elif name:
            for kind, there in self._gap.items():
                if there:
                    self._after[kind].add(name)
        self._gap = {"rule": False, "blank": False}
        if not name:
            return
        self.counts[name] += 1
        if name in SYSTEM_NAMES:
            return
        self._asks = self._asks or name
        if name == self._asks:
            self._since = set()
        elif name not in self._since:
            self._since.add(name)
            self._answers[name] += 1

    def has_no_roles(self) -> bool:
        """Is this plain text for sure: it does not begin with a prefix, and none is a role's or comes again?"""
        return not self._first[2] and not self.counts.keys() & KNOWN and all(n == 1 for n in self.counts.values())

    def roles(self, file: Path, given: dict[str, str]) -> dict[str, str]:
        """Which prefix is whose. The first line's asks; the one that every question is followed by answers.

        Raises:
          UserError: that cannot be told for sure.
        """
        number, line, name = self._first
        if not name:
            raise UserError(
                f"{file}:{number}: expected a line that begins with a role, as in `User: ...`; got "
                f"{line.strip()[:60]!r}. For text without roles, set task_type=plain-text"
            )
        if given:
            return given
        if self._asks in ASSISTANT_NAMES:
            raise UserError(f"{file}:{number}: this answer has no question before it: {line.strip()[:60]!r}")
        often = [n for n, count in self._answers.items() if count == max(self._answers.values())]
        likely = [n for n in often if n in ASSISTANT_NAMES and len(n) > 1] or often
        askers = [n for n in self.counts if n in USER_NAMES - {self._asks} and len(n) > 1]
        if len(likely) != 1 or sum(self.counts[n] for n in askers) > 1:
            found = Counter({n: count for n, count in self.counts.items() if n not in SYSTEM_NAMES})
            named = ", ".join(f"{n} ({count})" for n, count in found.most_common(6))
            raise UserError(
                f"{file}: which two prefixes are the roles? Lines begin with {named or 'none'}; expected one that "
                'asks, in the first line, and one that answers. Set role_prefixes={"user": "...", "assistant": "..."}, '
                "or task_type=plain-text for text without roles"
            )
        return {**dict.fromkeys(SYSTEM_NAMES, "system"), self._asks: "user", likely[0]: "assistant"}

    def division(self, roles: dict[str, str]) -> str:
        """What divides rows: lines of --- ("rule") if there are any before a question, or else blank lines ("blank"),
        or else each question begins one ("each")."""
        opening = {name for name, role in roles.items() if role != "assistant"}
        return next((kind for kind, names in self._after.items() if names & opening), "each")


def _conversations(
    file: Path, encoding: str, pattern: re.Pattern[str], roles: dict[str, str], division: str, notes: Notes
) -> Iterator[Row]:
    """An answer goes on until the next role or division, blank lines included."""
    turns: list[tuple[str, int, list[str]]] = []  # role, line number, lines
    gap: list[str] = []  # blank lines and lines of --- since the last line with words
    size = rows = 0

    def row() -> Row:
        where = f"{file}:{turns[0][1]}"
        if sum(role == "user" for role, *_ in turns) > 1 and division == "blank":
            notes.add("rows of several questions, as no blank line divides them", file.name)
        try:
            return make_conversation([(role, "".join(said), f"{file}:{line}") for role, line, said in turns], where)
        except UserError as error:
            return error

    for number, line in lines(file, encoding):
        role = roles.get(prefix_of(line, pattern))
        if role:
            last = turns[-1][0] if turns else ""
            divided = division == "each" or (bool(gap) if division == "blank" else any(map(RULE.match, gap)))
            if role == "system" or (role == "user" and (last == "user" or (last == "assistant" and divided))):
                if turns:
                    yield row()
                    rows += 1
                turns, size = [], 0
            elif turns:
                turns[-1][2].extend(gap)
            match = pattern.match(line)
            assert match is not None
            turns.append((role, number, [match["rest"]]))
            gap = []
        elif not line.strip() or RULE.match(line):
            gap.append(line)
        elif turns:
            turns[-1][2].extend([*gap, line])
            gap = []
        size += len(line)
        if size > MAX_ROW:
            raise UserError(f"{file}:{number}: a row of more than {MAX_ROW:,} characters: is the file broken?")
    if turns:
        yield row()
    if rows and division == "each":
        notes.add("no blank line divides rows, so each question begins one", file.name)


def _paragraphs(file: Path, encoding: str) -> Iterator[Row]:
    """Plain text: blank lines divide rows."""
    block: list[str] = []
    start = size = 0

    def row() -> Row:
        where = f"{file}:{start}"
        try:
            return make_conversation([("text", "".join(block), where)], where)
        except UserError as error:
            return error

    for number, line in lines(file, encoding):
        if line.strip():
            start = start if block else number
            block.append(line)
            size += len(line)
            if size > MAX_ROW:
                raise UserError(
                    f"{file}:{start}: a paragraph of more than {MAX_ROW:,} characters: divide it by blank lines"
                )
        elif block:
            yield row()
            block, size = [], 0
    if block:
        yield row()
