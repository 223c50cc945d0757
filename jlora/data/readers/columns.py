"""Rows with named columns -> conversations, whatever file they came from.

A row is a question and an answer (with context, system message and earlier turns, where it has them), or a list of
turns, or one text. Which column is which follows from their names, or from the config's `columns`; every column that
holds something and is not used is noted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import (
    ASSISTANT_NAMES,
    ROLES,
    SYSTEM_NAMES,
    USER_NAMES,
    Conversation,
    Notes,
    Reading,
    listing,
    make_conversation,
)

NAMES = {
    "prompt": USER_NAMES | {"prompt", "instruction", "questions", "ask", "query", "request", "inputs", "提问", "指令"},
    "response": ASSISTANT_NAMES
    | {"response", "completion", "output", "answers", "reply", "target", "targets", "答案", "回复", "输出"},
    "context": {"input", "context", "输入", "上下文"},
    "system": SYSTEM_NAMES | {"system_prompt", "系统提示"},
    "history": {"history"},
    "messages": {"messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat"},
    "text": {"text", "文本", "正文"},
}
SPEAKERS = {
    **dict.fromkeys(SYSTEM_NAMES | {"developer"}, "system"),
    **dict.fromkeys(USER_NAMES, "user"),
    **dict.fromkeys(ASSISTANT_NAMES | {"gpt", "chatgpt", "bard", "bing", "model", "ai", "chatbot"}, "assistant"),
}
WHO, WHAT = ("role", "from", "speaker"), ("content", "value", "text")
Parts = dict[str, str]  # what a column is -> its name


class Records:
    """Makes conversations of the rows of one file."""

    def __init__(self, reading: Reading, notes: Notes) -> None:
        self._reading, self._notes = reading, notes
        self._parts: dict[tuple[str, ...], Parts] = {}
        roles = [(role, prefix) for role, named in reading.role_prefixes.items() for prefix in named.split("|")]
        self._speakers = {**SPEAKERS, **{prefix.strip().lower(): role for role, prefix in roles}}

    def parts(self, columns: tuple[str, ...]) -> Parts:
        """Which of the columns are read, and as what.

        Raises:
          UserError: that is not obvious; the message lists the columns and the key to set, not the place.
        """
        if columns not in self._parts:
            self._parts[columns] = find_parts(columns, self._reading)
        return self._parts[columns]

    def conversation(self, row: Any, where: str) -> Conversation:
        """One row.

        Raises:
          UserError: it cannot be used.
        """
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, got {type(row).__name__}")
        try:
            parts = self.parts(tuple(row))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        turns = [(role, said, where) for role, said in self._turns(row, parts, where)]
        conversation = make_conversation(turns, where)
        read = parts.values()
        for column, value in row.items():
            if column not in read and value not in (None, "", [], {}):
                self._notes.add("columns not used", column)
        return conversation

    def _turns(self, row: dict[str, Any], parts: Parts, where: str) -> Iterator[tuple[str, str]]:
        def text(part: str) -> str:
            value = row.get(parts[part]) if part in parts else None
            if not isinstance(value, str | None):
                raise UserError(f"{where}: {parts[part]} is {_short(value)}; expected text")
            return (value or "").strip()

        if "text" in parts:
            if not (self._reading.plain or self._reading.columns):
                self._notes.add("no column asks and answers, so the text itself is trained on", parts["text"])
            yield "text", text("text")
            return
        yield "system", text("system")
        turns = [parts[part] for part in ("messages", "prompt", "response") if part in parts]
        if "messages" in parts or all(isinstance(row.get(column), list) for column in turns):
            for column in turns:  # a prompt and its response may be lists of turns too
                yield from self._messages(row[column], column, where)
            return
        if "history" in parts and row.get(parts["history"]):
            yield from self._history(row[parts["history"]], parts["history"], where)
        yield "user", "\n".join(part for part in (text("prompt"), text("context")) if part)
        yield "assistant", text("response")

    def _messages(self, turns: Any, column: str, where: str) -> Iterator[tuple[str, str]]:
        for number, turn in enumerate(_list(turns, column, where)):
            if isinstance(turn, str):
                yield ("user", "assistant")[number % 2], turn
                continue
            if pair := _pair(turn):
                yield from pair
                continue
            who = next((key for key in WHO if isinstance(turn, dict) and key in turn), None)
            what = next((key for key in WHAT if isinstance(turn, dict) and key in turn), None)
            if not (who and what):
                raise UserError(f"{where}: a turn of {column} needs a role and its content; got {_short(turn)}")
            role = self._speakers.get(str(turn[who]).strip().lower())
            if role is None:
                raise UserError(
                    f"{where}: the {who} {turn[who]!r} is unknown; expected one of {', '.join(ROLES)}, or name it with "
                    f'role_prefixes={{"assistant": {str(turn[who])!r}}}'
                )
            for key in ("tool_calls", "function_call"):
                if turn.get(key):
                    raise UserError(f"{where}: a turn of {column} has {key}, which is not read")
            if turn.get("weight", 1) not in (1, None):
                raise UserError(f"{where}: a turn of {column} has weight={_short(turn['weight'])}; expected 1 or none")
            for key, value in turn.items():
                if key not in (who, what, "weight") and value not in (None, "", [], {}):
                    self._notes.add("columns not used", f"{column}.{key}")
            yield role, _content(turn[what], role, where)

    @staticmethod
    def _history(earlier: Any, column: str, where: str) -> Iterator[tuple[str, str]]:
        for pair in _list(earlier, column, where):
            if not isinstance(pair, list | tuple) or [type(said) for said in pair] != [str, str]:
                raise UserError(f"{where}: {column} holds {_short(pair)}; expected pairs of a question and an answer")
            yield from zip(("user", "assistant"), pair, strict=True)


def find_parts(columns: Sequence[str], reading: Reading) -> Parts:
    """What each column is; see `Records.parts`."""
    named = {part: column for part, column in reading.columns.items() if part != "rows"}
    has = listing(columns, 20)
    if named:
        absent = [
            c for part, c in named.items() if c not in columns and part in ("prompt", "response", "messages", "text")
        ]
        if absent:
            raise UserError(f"columns names {absent[0]!r}, which is not there; got {has}")
        return {part: column for part, column in named.items() if column in columns}
    plain = [column for column in columns if column.strip().lower() in (*WHAT, *NAMES["text"])]
    if reading.plain:
        if len(plain) == 1:
            return {"text": plain[0]}
        raise UserError(f'which column is the text? Set columns={{"text": "..."}}; got {has}')
    found = {
        part: [c for c in columns if c.strip().lower().replace(" ", "_") in names] for part, names in NAMES.items()
    }
    if not found["prompt"] and "input" in columns:
        found["prompt"], found["context"] = ["input"], [c for c in found["context"] if c != "input"]
    sure = {part: names[0] for part, names in found.items() if len(names) == 1}
    pair, turns = {"prompt", "response"} <= sure.keys(), "messages" in sure and not found["response"]
    many = [names for part, names in found.items() if len(names) > 1 and part != "text"]
    if pair and not found["messages"] and not many:
        return {part: column for part, column in sure.items() if part != "text"}
    if turns and not many:
        return {part: column for part, column in sure.items() if part in ("messages", "system")}
    if "text" in sure and not (found["prompt"] or found["response"] or found["messages"]):
        return {"text": sure["text"]}
    raise UserError(
        f'which column asks and which answers? Set columns={{"prompt": "...", "response": "..."}} (or "messages" for a '
        f'list of turns, "text" for plain text); got {has}'
    )


def _list(value: Any, column: str, where: str) -> list[Any]:
    """A list, also where a table holds it as JSON, or a data set as an object of lists."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: {column} is not JSON: {_short(value)}") from None
    if isinstance(value, Mapping) and {type(v) for v in value.values()} == {list}:
        if len({len(v) for v in value.values()}) != 1:
            raise UserError(f"{where}: {column} has lists of different lengths")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UserError(f"{where}: {column} is {_short(value)}; expected a list of turns")
    return value


def _pair(turn: Any) -> list[tuple[str, str]]:
    """A question and its answer, where one turn holds both under two keys: {"human": ..., "assistant": ...}."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return []
    (asks, question), (answers, answer) = turn.items()
    if asks not in NAMES["prompt"] | {"input"} or answers not in NAMES["response"]:
        return []
    return [("user", question), ("assistant", answer)] if isinstance(question, str) and isinstance(answer, str) else []


def _content(value: Any, role: str, where: str) -> str:
    """The words of a turn: text, or OpenAI's list of text parts."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise UserError(f"{where}: the {role}'s message is {_short(value)}; expected text")
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
