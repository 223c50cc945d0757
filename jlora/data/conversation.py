"""Conversations, which every reader produces, and the options and checks that all readers share."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from jlora.common.errors import UserError

ROLES = ("system", "user", "assistant")
USER_NAMES = {"用户", "问", "问题", "客户", "患者", "user", "question", "q", "human", "client", "patient"}
ASSISTANT_NAMES = {
    *("律师", "答", "回答", "助手", "医生", "顾问"),
    *("lawyer", "answer", "a", "assistant", "doctor", "advisor", "adviser", "bot"),
}
SYSTEM_NAMES = {"系统", "system"}
ROLE_NOUNS = {
    "system": "system message",
    "user": "question",
    "assistant": "answer",
    "tool": "tool's result",
    "text": "text",
}
# What a column can hold. `rows` is not a column but the key under which a JSON object keeps its list of rows.
PARTS = ("prompt", "context", "response", "reasoning", "system", "history", "messages", "tools", "text", "rows")
ROW_FORMS = (  # the parts that a kind of row requires, and all parts that it may have
    ({"prompt", "response"}, {"prompt", "response", "reasoning", "context", "system", "history", "tools"}),
    ({"messages"}, {"messages", "system", "tools"}),
    ({"text"}, {"text"}),
)
MAX_ROW = 1 << 24  # characters of a line or row; anything longer is a broken file and would fill the memory
REASONING = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>(?P<answer>.*)", re.DOTALL)  # at the start of an answer


class ToolCall(NamedTuple):
    """A call that an answer makes."""

    name: str
    arguments: str  # a JSON object
    id: str = ""  # which call a result belongs to


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: its role ("system", "user", "assistant" or "tool") and content; or "text" for text without roles."""

    role: str
    content: str
    weight: float = 1.0  # of the loss on an answer; 0: it stays in the context, but is not learned
    reasoning: str = ""  # what the assistant thought before the answer, if the row keeps it apart from the content
    tool_calls: tuple[ToolCall, ...] = ()
    tool: str = ""  # of a tool's result: the name of the tool
    call_id: str = ""  # of a tool's result: the `id` of the call

    @property
    def thoughts(self) -> tuple[str, str]:
        """The reasoning ("" if there is none) and the answer without it."""
        if not self.reasoning and self.role == "assistant" and (found := REASONING.fullmatch(self.content)):
            return found["reasoning"].strip(), found["answer"].strip()
        return self.reasoning, self.content

    @property
    def full_text(self) -> str:
        """The reasoning, the content and the calls, as a person reads them."""
        calls = (f"{call.name}({call.arguments})" for call in self.tool_calls)
        return "\n".join(filter(None, (self.reasoning, self.content, *calls)))


class Turn(NamedTuple):
    """A turn as a reader found it."""

    message: Message
    where: str  # file:line


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one row, ending with the assistant's, or a single "text"; and its place (`file:line`)."""

    messages: tuple[Message, ...]
    where: str
    tools: str = ""  # the tools that the assistant may call: a JSON list of OpenAI's function definitions
    source: str = ""  # the path of its set, if a run has several
    group: str = ""  # its value in `ReadOptions.group_column`

    @property
    def plain(self) -> bool:
        """Whether this is text without roles."""
        return self.messages[0].role == "text"

    @property
    def trained(self) -> bool:
        """Whether anything in it is learned: every answer may be marked not to be."""
        return self.plain or any(message.weight for message in self.messages if message.role == "assistant")

    @property
    def reasons(self) -> bool:
        """Whether any answer that is learned has reasoning."""
        return any(message.weight and message.thoughts[0] for message in self.messages)


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
    group_column: str = ""  # a column whose values are names of groups of rows

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


def make_conversation(turns: Iterable[Turn], where: str, tools: str = "") -> Conversation:
    """Checks turns and builds a conversation from them; an empty system message is dropped.

    Args:
      turns: the turns, in order.
      where: the place of the row.
      tools: as in `Conversation`.

    Raises:
      UserError: a turn is empty, contains invalid characters, or is out of order.
    """
    messages = []
    for turn, place in turns:
        content, reasoning = turn.content.strip(), turn.reasoning.strip()
        clean = content == turn.content and reasoning == turn.reasoning
        message = turn if clean else replace(turn, content=content, reasoning=reasoning)  # a copy takes time
        if not message.content and message.role == "system":
            continue
        if not message.content and not message.tool_calls and message.role != "tool":
            raise UserError(f"{place}: The {ROLE_NOUNS[message.role]} is empty. Write it, or remove the row.")
        _check_characters(message, place)
        messages.append(message)
    _check_order(messages, where)
    return Conversation(tuple(messages), where, tools)


def _check_characters(message: Message, place: str) -> None:
    for text in (message.content, message.reasoning, *(call.arguments for call in message.tool_calls)):
        if "\0" in text:
            raise UserError(f"{place}: The {ROLE_NOUNS[message.role]} contains a NUL character. Remove it.")
        if not (text.isascii() or _is_unicode(text)):
            raise UserError(
                f"{place}: The {ROLE_NOUNS[message.role]} contains a lone surrogate (half a character). Remove or "
                "replace it."
            )


def _check_order(messages: list[Message], where: str) -> None:
    """Raises a UserError unless questions and answers alternate; tools' results come between a call and an answer."""
    roles = [message.role for message in messages]
    start = int(roles[:1] == ["system"])
    if roles[start:] == ["text"]:
        return
    if roles[start : start + 1] == ["assistant"]:
        answer = messages[start].content[:60]
        raise UserError(
            f"{where}: This answer has no question before it: {answer!r}. Write the question, or remove the row."
        )
    spoken = []  # without tools' results and the answers that call them
    calling = False
    for number, message in enumerate(messages[start:], start):
        if message.role == "tool":
            if not calling:
                result = message.content[:60]
                raise UserError(f"{where}: This tool's result has no call before it: {result!r}. Write the call.")
            continue
        answered = number > 0 and roles[number - 1] == "tool"
        if answered and message.role != "assistant":
            raise UserError(f"{where}: Expected an answer after the tool's result, got {ROLE_NOUNS[message.role]}.")
        if not answered:
            spoken.append(message.role)
        calling = bool(message.tool_calls)
    if roles[-1:] == ["tool"]:
        result = messages[-1].content[:60]
        raise UserError(f"{where}: This tool's result has no answer: {result!r}. Write the answer, or remove the row.")
    if spoken[-1:] == ["user"] and spoken[:-1] == ["user", "assistant"] * (len(spoken) // 2):
        question = messages[-1].content[:60]
        raise UserError(
            f"{where}: This question has no answer: {question!r}. Write the answer, or remove the question."
        )
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        got = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise UserError(
            f"{where}: Expected user and assistant turns to alternate, ending with the assistant. Got "
            f"{got or 'no turns'}."
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
