"""Conversations, which every reader produces, and the options and checks that all readers share."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from jlora.common.errors import UserError

ROLES = ("system", "user", "assistant")
USER_NAMES = {"用户", "问", "问题", "客户", "患者", "user", "question", "q", "human", "client", "patient"}
ASSISTANT_NAMES = {
    *("律师", "答", "回答", "助手", "医生", "顾问"),
    *("lawyer", "answer", "a", "assistant", "doctor", "advisor", "adviser", "bot"),
}
SYSTEM_NAMES = {"系统", "system"}
ROLE_NOUNS = {"system": "system message", "user": "question", "assistant": "answer", "text": "text"}
# What a column can hold. `rows` is not a column but the key under which a JSON object keeps its list of rows.
PARTS = ("prompt", "context", "response", "system", "history", "messages", "text", "rows")
ROW_FORMS = (  # the parts that a kind of row requires, and all parts that it may have
    ({"prompt", "response"}, {"prompt", "response", "context", "system", "history"}),
    ({"messages"}, {"messages", "system"}),
    ({"text"}, {"text"}),
)
MAX_ROW = 1 << 24  # characters of a line or row; anything longer is a broken file and would fill the memory


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: its role ("system", "user" or "assistant") and content; or the role "text" for text without roles."""

    role: str
    content: str
    trained: bool = True  # False: an answer that stays in the context, but is not learned


class Turn(NamedTuple):
    """A turn as a reader found it."""

    role: str
    content: str
    where: str  # file:line
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one row, ending with the assistant's, or a single "text"; and its place (`file:line`)."""

    messages: tuple[Message, ...]
    where: str

    @property
    def plain(self) -> bool:
        """Whether this is text without roles."""
        return self.messages[0].role == "text"

    @property
    def trained(self) -> bool:
        """Whether anything in it is learned: every answer may be marked not to be."""
        return self.plain or any(message.trained for message in self.messages if message.role == "assistant")


@dataclass(frozen=True)
class ReadOptions:
    """The config's settings for reading files, under the same names; an empty value is inferred from the content."""

    columns: Mapping[str, str] = field(default_factory=dict)  # one of PARTS -> the name of a column or key
    role_prefixes: Mapping[str, str] = field(default_factory=dict)  # one of ROLES -> its prefixes, separated by |
    metadata_path: str = ""  # a CSV file with the columns or prefixes of each file
    train_data_dir: str = ""  # files that `metadata_path` names are looked up here
    eval_data_dir: str = ""
    encoding: str = ""
    task_type: str = "text-generation"
    bad_rows: str = "error"

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> "ReadOptions":
        """Picks the reading options out of all settings of a config."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    @property
    def plain(self) -> bool:
        """Whether to read files as plain text, even if their lines start with roles."""
        return self.task_type == "plain-text"


def names_complete_row(columns: Mapping[str, str]) -> bool:
    """Returns whether the named columns make exactly one kind of row; True if none are named and all are inferred."""
    named = columns.keys() - {"rows"}
    return not named or any(required <= named <= allowed for required, allowed in ROW_FORMS)


class ReaderNotes:
    """Remarks on what a reader assumed or skipped, each reported once with the files or columns it is about."""

    def __init__(self) -> None:
        self._found: dict[str, Counter[str]] = {}

    def add(self, remark: str, thing: str) -> None:
        """Counts `thing` under `remark`."""
        self._found.setdefault(remark, Counter())[thing] += 1

    def lines(self) -> list[str]:
        """Returns one line per remark."""
        return [f"{remark}: {join_limited(things)}" for remark, things in self._found.items()]


class BadRows:
    """The number of unusable rows, and the first places of the first distinct errors."""

    def __init__(self) -> None:
        self.count = 0
        self._places: dict[str, list[str]] = {}  # error message without its place -> places

    def add(self, message: str) -> None:
        """Adds an error whose message is `place: text`."""
        self.count += 1
        place, _, text = message.partition(": ")
        places = self._places.setdefault(text, []) if len(self._places) < 10 else self._places.get(text, [])
        if len(places) < 100:
            places.append(place)

    def lines(self) -> list[str]:
        """Returns one line per distinct error."""
        listed = []
        for text, (first, *others) in self._places.items():
            also = f". Also at {join_limited(others)}." if others else ""
            listed.append(f"{first}: {text.removesuffix('.') + also if also else text}")
        more = self.count - sum(map(len, self._places.values()))
        return [*listed, f"and {more} more"] if more else listed


def join_limited(things: Iterable[str], most: int = 8) -> str:
    """Joins the first `most` things with commas and counts the rest; a Counter's counts above 1 follow in brackets."""
    count = things if isinstance(things, Counter) else Counter()
    named = [f"{thing} ({count[thing]})" if count[thing] > 1 else thing for thing in things]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")


def make_conversation(turns: Iterable[Turn], where: str) -> Conversation:
    """Checks turns and builds a conversation from them; an empty system message is dropped.

    Args:
      turns: the turns, in order.
      where: the place of the row.

    Raises:
      UserError: a turn is empty, contains invalid characters, or is out of order.
    """
    messages = []
    for role, text, place, trained in turns:
        content = text.strip()
        if not content and role == "system":
            continue
        if not content:
            raise UserError(f"{place}: The {ROLE_NOUNS[role]} is empty.")
        if "\0" in content:
            raise UserError(f"{place}: The {ROLE_NOUNS[role]} contains a NUL character. Remove it.")
        if not (content.isascii() or _is_unicode(content)):
            raise UserError(
                f"{place}: The {ROLE_NOUNS[role]} contains a lone surrogate (half a character). Remove or replace it."
            )
        messages.append(Message(role, content, trained))
    roles = [message.role for message in messages]
    spoken = roles[roles[:1] == ["system"] :]  # without the system message
    if spoken == ["text"]:
        return Conversation(tuple(messages), where)
    if spoken[:1] == ["assistant"]:
        raise UserError(
            f"{where}: This answer has no question before it: {messages[len(roles) - len(spoken)].content[:60]!r}."
        )
    if spoken[-1:] == ["user"] and spoken[:-1] == ["user", "assistant"] * (len(spoken) // 2):
        raise UserError(f"{where}: This question has no answer: {messages[-1].content[:60]!r}.")
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        got = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise UserError(
            f"{where}: Expected user and assistant turns to alternate, ending with the assistant. Got "
            f"{got or 'no turns'}."
        )
    return Conversation(tuple(messages), where)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
