"""What every reader makes, conversations; and what a config may say about how they are written."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jlora.common.errors import UserError

ROLES = ("system", "user", "assistant")
USER_NAMES = {"用户", "问", "问题", "客户", "患者", "user", "question", "q", "human", "client", "patient"}
ASSISTANT_NAMES = {
    *("律师", "答", "回答", "助手", "医生", "顾问"),
    *("lawyer", "answer", "a", "assistant", "doctor", "advisor", "adviser", "bot"),
}
SYSTEM_NAMES = {"系统", "system"}
NOUNS = {"system": "system message", "user": "question", "assistant": "answer", "text": "text"}
# What a column can be; `rows` is the key of a JSON object under which the list of rows lies.
PARTS = ("prompt", "context", "response", "system", "history", "messages", "text", "rows")
FORMS = (  # the parts that make a row, and those that it may have
    ({"prompt", "response"}, {"prompt", "response", "context", "system", "history"}),
    ({"messages"}, {"messages", "system"}),
    ({"text"}, {"text"}),
)
MAX_ROW = 1 << 24  # characters of a line or a row: what is longer is a broken file, and would fill the memory


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who says it ("system", "user" or "assistant") and what; or the role "text", for text without roles."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example, and where it stands (`file:line`): its turns, the last of them the assistant's; or one "text"."""

    messages: tuple[Message, ...]
    where: str

    @property
    def plain(self) -> bool:
        """Is this text without roles?"""
        return self.messages[0].role == "text"


@dataclass(frozen=True)
class Reading:
    """What the files do not tell by themselves. The names are the config's; an empty value means: told by content."""

    columns: Mapping[str, str] = field(default_factory=dict)  # of PARTS -> a column or key of the rows
    role_prefixes: Mapping[str, str] = field(default_factory=dict)  # of ROLES -> prefixes, divided by |
    metadata_path: str = ""  # a CSV that says both, file by file
    train_data_dir: str = ""  # where the files that it names may lie
    eval_data_dir: str = ""
    encoding: str = ""
    task_type: str = "text-generation"
    bad_rows: str = "error"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Reading":
        """The part of a config's settings that is about reading."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    @property
    def plain(self) -> bool:
        """Are the files to be read as text, whatever their lines begin with?"""
        return self.task_type == "plain-text"


def is_whole(columns: Mapping[str, str]) -> bool:
    """Do the named columns make a row, of one form and not of two? None named will do: they are told by content."""
    said = columns.keys() - {"rows"}
    return not said or any(needed <= said <= allowed for needed, allowed in FORMS)


class Notes:
    """What a reader decided or left out, to be said once: a remark, and the files or columns it is about."""

    def __init__(self) -> None:
        self._found: dict[str, Counter[str]] = {}

    def add(self, remark: str, thing: str) -> None:
        """Counts `thing` under `remark`."""
        self._found.setdefault(remark, Counter())[thing] += 1

    def lines(self) -> list[str]:
        """One line a remark."""
        return [f"{remark}: {listing(things)}" for remark, things in self._found.items()]


class BadRows:
    """Rows that cannot be used: how many, and the first places of the first complaints."""

    def __init__(self) -> None:
        self.count = 0
        self._places: dict[str, list[str]] = {}  # complaint -> places

    def add(self, message: str) -> None:
        """Takes `place: complaint`."""
        self.count += 1
        place, _, complaint = message.partition(": ")
        places = self._places.setdefault(complaint, []) if len(self._places) < 10 else self._places.get(complaint, [])
        if len(places) < 100:
            places.append(place)

    def lines(self) -> list[str]:
        """One line a complaint."""
        named = [
            f"{places[0]}: {complaint}" + (f" (also {listing(places[1:])})" if places[1:] else "")
            for complaint, places in self._places.items()
        ]
        more = self.count - sum(map(len, self._places.values()))
        return [*named, f"and {more} more"] if more else named


def listing(things: Iterable[str], most: int = 8) -> str:
    """The first of `things`, with commas, and how many there are besides; counts of a Counter in brackets."""
    count = things if isinstance(things, Counter) else Counter()
    named = [f"{thing} ({count[thing]})" if count[thing] > 1 else thing for thing in things]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")


def make_conversation(turns: Iterable[tuple[str, str, str]], where: str) -> Conversation:
    """Checked turns as a conversation; a system message without words is none.

    Args:
      turns: role, words and place (`file:line`) of each.
      where: the row's place.

    Raises:
      UserError: a turn without words, with characters that no text has, or out of order.
    """
    messages = []
    for role, said, place in turns:
        content = said.strip()
        if not content and role == "system":
            continue
        if not content:
            raise UserError(f"{place}: the {NOUNS[role]} is empty")
        if "\0" in content:
            raise UserError(f"{place}: the {NOUNS[role]} holds a NUL character: remove it")
        if not (content.isascii() or _is_unicode(content)):
            raise UserError(f"{place}: the {NOUNS[role]} holds half a character (a lone surrogate): write it anew")
        messages.append(Message(role, content))
    roles = [message.role for message in messages]
    spoken = roles[roles[:1] == ["system"] :]
    if spoken == ["text"]:
        return Conversation(tuple(messages), where)
    if spoken[:1] == ["assistant"]:
        raise UserError(
            f"{where}: this answer has no question before it: {messages[len(roles) - len(spoken)].content[:60]!r}"
        )
    if spoken[-1:] == ["user"] and spoken[:-1] == ["user", "assistant"] * (len(spoken) // 2):
        raise UserError(f"{where}: this question has no answer: {messages[-1].content[:60]!r}")
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        got = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise UserError(f"{where}: expected user and assistant in turn, the assistant last; got {got or 'no message'}")
    return Conversation(tuple(messages), where)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
