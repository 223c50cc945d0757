"""Reads text files: lines that start with a role (`User: ...`), or plain text without roles, split at blank lines.

The file is read twice, and never held in memory: the first pass finds the roles and the row separator, the second
builds the rows.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from jlora.common.errors import UserError
from jlora.data.conversation import (
    ASSISTANT_NAMES,
    MAX_ROW,
    SYSTEM_NAMES,
    USER_NAMES,
    Conversation,
    Message,
    ReaderNotes,
    ReadOptions,
    Turn,
    make_conversation,
)
from jlora.data.readers.source import Source

PREFIX = re.compile(r"^\s*(?P<name>[^\W\d_][\w -]{0,19}?)\s*[:：](?!//)\s*(?P<rest>.*)$", re.DOTALL)
RULE = re.compile(r"^\s*([-=*_])\1{2,}\s*$")  # a line such as ---, which separates rows
KNOWN = USER_NAMES | ASSISTANT_NAMES | SYSTEM_NAMES
Row = Conversation | UserError  # a row, or the reason why it cannot be used
Lines = Callable[[], Iterator[tuple[int, str]]]  # reads a file's lines from the start, with their numbers


def make_row(turns: Iterable[Turn], where: str) -> Row:
    """Returns a conversation, or the reason why the turns cannot be used."""
    try:
        return make_conversation(turns, where)
    except UserError as error:
        return error


def line_prefix(line: str, pattern: re.Pattern[str] = PREFIX) -> str:
    """Returns the name before a line's first colon, in lower case without its number (`问1：` gives 问); "" if none."""
    match = pattern.match(line)
    return _without_number(match["name"]) if match else ""


def begins_with_role(line: str, options: ReadOptions) -> bool:
    """Returns whether the line starts with a known role prefix."""
    pattern, given = _prefixes(options)
    return line_prefix(line, pattern) in (given or KNOWN)


def read_text(file: Source, lines: Lines, options: ReadOptions, notes: ReaderNotes) -> Iterator[Row]:
    """Yields the rows of a text file.

    Raises:
      UserError: it is unclear which prefixes are the roles.
    """
    pattern, given = _prefixes(options)
    prefixes = _PrefixScan()
    if not options.plain:
        for number, line in lines():
            prefixes.add(number, line, line_prefix(line, pattern))
        if not given and prefixes.has_no_roles():
            notes.add("training on plain text, because no line starts with a role", file.name)
    if options.plain or (not given and prefixes.has_no_roles()):
        yield from _paragraphs(file, lines)
    else:
        roles = prefixes.roles(file, given)
        if not roles.keys() <= {*given, *KNOWN}:
            spoken = {role: name for name, role in roles.items() if role != "system"}
            words = f"{spoken['user']!r} asks and {spoken['assistant']!r} answers, by the order of the lines"
            notes.add(f"{words} (otherwise set role_prefixes)", file.name)
        yield from _conversations(file, lines, pattern, roles, prefixes.row_separator(roles), notes)


def _prefixes(options: ReadOptions) -> tuple[re.Pattern[str], dict[str, str]]:
    """Returns the pattern of a prefix, and the role of each prefix that the config sets."""
    given = {p.strip(): role for role, joined in options.role_prefixes.items() for p in joined.split("|") if p.strip()}
    if not given:
        return PREFIX, {}
    longest_first = sorted(given, key=len, reverse=True)
    words = [re.escape(p) + (r"\s*\d*\s*[:：]" if p[-1].isalnum() else r"\s*[:：]?") for p in longest_first]
    pattern = re.compile(rf"^\s*(?P<name>{'|'.join(words)})\s*(?P<rest>.*)$", re.DOTALL | re.IGNORECASE)
    return pattern, {_without_number(prefix): role for prefix, role in given.items()}


def _without_number(name: str) -> str:
    word = name.lower().rstrip(":： ")
    return word.rstrip("0123456789 ") or word


class _PrefixScan:
    """Counts the prefixes with which a file's lines start."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # of each prefix
        self._first = (1, "", "")  # the first non-blank line: number, line, prefix
        self._question = ""  # the first prefix that is not the system's
        self._answers: Counter[str] = Counter()  # prefixes that follow a question, counted once per question
        self._since: set[str] = set()  # prefixes since the current question
        self._gap = {"rule": False, "blank": False}  # the separators before the current line
        self._after: dict[str, set[str]] = {"rule": set(), "blank": set()}  # prefixes right after a separator

    def add(self, number: int, line: str, name: str) -> None:
        """Counts the prefix of the next line."""
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
        self._question = self._question or name
        if name == self._question:
            self._since = set()
        elif name not in self._since:
            self._since.add(name)
            self._answers[name] += 1

    def has_no_roles(self) -> bool:
        """Returns whether this is plain text: no prefix in the first line, and none that is a role's or repeats."""
        return not self._first[2] and not self.counts.keys() & KNOWN and all(n == 1 for n in self.counts.values())

    def roles(self, file: Source, given: dict[str, str]) -> dict[str, str]:
        """Returns the role of each prefix: the first line's asks, and the one that follows every question answers.

        Raises:
          UserError: the roles are unclear.
        """
        number, line, name = self._first
        if not name:
            raise UserError(
                f"{file}:{number}: Expected a line that starts with a role, such as `User: ...`, got "
                f"{line.strip()[:60]!r}. For text without roles, set task_type=plain-text."
            )
        if given:
            return given
        if self._question in ASSISTANT_NAMES:
            answer = line.strip()[:60]
            raise UserError(
                f"{file}:{number}: This answer has no question before it: {answer!r}. Write the question there."
            )
        often = [n for n, count in self._answers.items() if count == max(self._answers.values())]
        likely = [n for n in often if n in ASSISTANT_NAMES and len(n) > 1] or often
        askers = [n for n in self.counts if n in USER_NAMES - {self._question} and len(n) > 1]
        guessed = [n for n in (self._question, *likely) if n not in KNOWN]
        once = any(self.counts[n] < 2 for n in guessed)  # as in a title, a header or YAML
        if len(likely) != 1 or once or sum(self.counts[n] for n in askers) > 1:
            found = Counter({n: count for n, count in self.counts.items() if n not in SYSTEM_NAMES})
            listed = ", ".join(f"{n} ({count})" for n, count in found.most_common(6))
            raise UserError(
                f"{file}: Cannot tell which prefixes are the roles. Lines start with {listed or 'no prefix'}. Expected "
                "one prefix that asks, in the first line, and one that answers. Set "
                'role_prefixes={"user": "...", "assistant": "..."}, or task_type=plain-text for text without roles.'
            )
        return {**dict.fromkeys(SYSTEM_NAMES, "system"), self._question: "user", likely[0]: "assistant"}

    def row_separator(self, roles: dict[str, str]) -> str:
        """Returns what separates rows: "rule" (lines of ---) if any precede a question, else "blank" (blank lines) if
        any do, else "each" (every question starts a row)."""
        opening = {name for name, role in roles.items() if role != "assistant"}
        return next((kind for kind, names in self._after.items() if names & opening), "each")


def _conversations(
    file: Source, lines: Lines, pattern: re.Pattern[str], roles: dict[str, str], separator: str, notes: ReaderNotes
) -> Iterator[Row]:
    """Yields conversations; an answer continues to the next role or separator, blank lines included."""
    turns: list[tuple[str, int, list[str]]] = []  # role, line number, lines
    gap: list[str] = []  # blank lines and rules since the last line with text
    size = rows = 0

    def row() -> Row:
        where = f"{file}:{turns[0][1]}"
        if sum(role == "user" for role, *_ in turns) > 1 and separator == "blank":
            notes.add("rows with several questions, because no blank line separates them", file.name)
        return make_row((Turn(Message(role, "".join(text)), f"{file}:{line}") for role, line, text in turns), where)

    for number, line in lines():
        role = roles.get(line_prefix(line, pattern))
        if role:
            last = turns[-1][0] if turns else ""
            separated = separator == "each" or (bool(gap) if separator == "blank" else any(map(RULE.match, gap)))
            if role == "system" or (role == "user" and (last == "user" or (last == "assistant" and separated))):
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
            raise UserError(f"{file}:{number}: The row is longer than {MAX_ROW:,} characters. Split it into several.")
    if turns:
        yield row()
    if rows and separator == "each":
        notes.add("every question starts a row, because no blank line separates rows", file.name)


def _paragraphs(file: Source, lines: Lines) -> Iterator[Row]:
    """Yields plain text, one row per block of lines between blank lines."""
    block: list[str] = []
    start = size = 0

    def row() -> Row:
        where = f"{file}:{start}"
        return make_row([Turn(Message("text", "".join(block)), where)], where)

    for number, line in lines():
        if line.strip():
            start = start if block else number
            block.append(line)
            size += len(line)
            if size > MAX_ROW:
                raise UserError(
                    f"{file}:{start}: The paragraph is longer than {MAX_ROW:,} characters. Split it with blank lines."
                )
        elif block:
            yield row()
            block, size = [], 0
    if block:
        yield row()
