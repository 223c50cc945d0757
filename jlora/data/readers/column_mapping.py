"""Rows with named columns to conversations, for every format that has columns or keys.

A row is a question and an answer (with context, system message and earlier turns if it has them), a list of turns, or a
single text. The part that a column holds is inferred from its name, or set by the config's `columns`. Unused columns
that have content are reported.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.data.conversation import (
    ASSISTANT_NAMES,
    ROLES,
    SYSTEM_NAMES,
    USER_NAMES,
    Conversation,
    Message,
    ReaderNotes,
    ReadOptions,
    Turn,
    join_limited,
    make_conversation,
)
from jlora.data.readers.chat_markup import turns_of_text
from jlora.data.readers.tool_calls import calls_of, read_tagged, result_text, text_calls, tools_json
from jlora.data.readers.training_marks import TURN_MARKS, bad_mark, loss_weight

NAMES = {
    "prompt": USER_NAMES | {"prompt", "instruction", "questions", "ask", "query", "request", "inputs", "提问", "指令"},
    "response": ASSISTANT_NAMES
    | {"response", "completion", "output", "answers", "reply", "target", "targets", "答案", "回复", "输出"},
    "context": {"input", "context", "输入", "上下文"},
    "system": SYSTEM_NAMES | {"system_prompt", "系统提示"},
    "history": {"history"},
    "messages": {"messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat"},
    "reasoning": {"reasoning_content", "thinking"},
    "tools": {"tools", "functions"},
    "text": {"text", "文本", "正文"},
}
CALL = "call"  # the role of ShareGPT's turns that hold only an assistant's call
SPEAKERS = {
    **dict.fromkeys(SYSTEM_NAMES | {"developer"}, "system"),
    **dict.fromkeys(USER_NAMES, "user"),
    **dict.fromkeys(ASSISTANT_NAMES | {"gpt", "chatgpt", "bard", "bing", "model", "ai", "chatbot"}, "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_result", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
# What programs write into a table's cell that has no value. JSON has its own null, so there these are words.
NO_VALUE = frozenset("nan NaN NAN NA N/A n/a #N/A <NA> NaT None NONE null Null NULL".split())
WHO, WHAT = ("role", "from", "speaker"), ("content", "value", "text")
CALLS = ("tool_calls", "function_call")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
NEEDED = {"prompt": "question", "response": "answer", "text": "text"}
Parts = dict[str, str]  # one of conversation.PARTS -> the name of its column


class RowConverter:
    """Converts the rows of one file to conversations.

    Args:
      table: whether the rows are a table's, in which a cell such as `nan` or `None` has no value.
    """

    def __init__(self, options: ReadOptions, notes: ReaderNotes, *, table: bool = False) -> None:
        self._reading, self._notes, self._table = options, notes, table
        self._parts: dict[tuple[str, ...], Parts] = {}
        prefixes = [(role, prefix) for role, joined in options.role_prefixes.items() for prefix in joined.split("|")]
        self._speakers = {**SPEAKERS, **{prefix.strip().lower(): role for role, prefix in prefixes}}

    def parts(self, columns: tuple[str, ...]) -> Parts:
        """Returns the column of each part of a row.

        Raises:
          UserError: the columns are ambiguous. The message lists them and the key to set, but not the place.
        """
        if columns not in self._parts:
            self._parts[columns] = map_columns(columns, self._reading)
        return self._parts[columns]

    def conversations(self, row: Any, where: str) -> list[Conversation]:
        """Converts one row: to one conversation, to several if it holds lists of questions and answers, or to none.

        Raises:
          UserError: the row cannot be used.
        """
        if not isinstance(row, dict):
            raise UserError(f"{where}: Expected a JSON object, got {type(row).__name__}.")
        try:
            parts = self.parts(tuple(row))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        row = self._without_missing(row, parts, where)
        tools = tools_json(row.get(parts.get("tools", "")))
        used = [column for part, column in parts.items() if part != "tools" or tools]
        made = [
            make_conversation(read_tagged(list(self._turns(one, parts, where)), tools), where, tools)
            for one in self._pairs(row, parts, where)
        ]
        if (group := row.get(self._reading.group_column)) is not None:
            made = [replace(conversation, group=str(group).strip()) for conversation in made]
        others = {column: value for column, value in row.items() if column not in used}
        mark = "" if "text" in parts else bad_mark(others)
        for column, value in others.items():
            if column != mark and value not in (None, "", [], {}):
                self._notes.add("unused columns", column)
        learned = [] if mark else [conversation for conversation in made if conversation.trained]
        if len(learned) < len(made):
            remark = "rows left out, because a mark says not to learn them (preference training can use them)"
            self._notes.add(remark, mark or "every answer")
        return learned

    def _without_missing(self, row: dict[str, Any], parts: Parts, where: str) -> dict[str, Any]:
        """Returns the row with None in place of NaN, infinity and, in a table, the words for no value."""
        found = dict(row)
        for part, column in parts.items():
            value = row[column]
            word = value.strip() if isinstance(value, str) and value.strip() in NO_VALUE else ""
            if word and not self._table:
                self._notes.add("texts such as nan or None, kept as words, because the format has its own null", column)
            elif word and part in NEEDED and not (part == "prompt" and row.get(parts.get("context", ""))):
                advice = f"In a table, {word} means no value. If it is a word, write it with a full stop."
                raise UserError(f"{where}: The {NEEDED[part]} is empty. {advice}")
            elif word or (isinstance(value, float) and not math.isfinite(value)):
                self._notes.add("values such as nan or None, read as empty", column)
                found[column] = None
        return found

    def _pairs(self, row: dict[str, Any], parts: Parts, where: str) -> Iterator[dict[str, Any]]:
        """Yields the row; or, if its question and answer are lists of texts, a row for each pair."""
        asked, answered = parts.get("prompt", ""), parts.get("response", "")
        questions, answers = row.get(asked), row.get(answered)
        if not (_is_text_list(questions) and _is_text_list(answers)):
            yield row
            return
        shared = any(row.get(parts[part]) for part in ("history", "context") if part in parts)
        if len(questions) != len(answers) or shared:
            raise UserError(
                f"{where}: {asked!r} holds {plural(len(questions), 'text')} and {answered!r} holds {len(answers)}"
                f"{', beside other parts' if shared else ''}, so jlora cannot pair them. Write a row for each pair, or "
                "one list of turns with roles."
            )
        self._notes.add("lists of questions and answers, read as a row for each pair", asked)
        yield from ({**row, asked: q, answered: a} for q, a in zip(questions, answers, strict=True))

    def _turns(self, row: dict[str, Any], parts: Parts, where: str) -> Iterator[Turn]:
        def text(part: str) -> str:
            value = row.get(parts[part]) if part in parts else None
            if not isinstance(value, str | None):
                raise UserError(f"{where}: Expected text in {parts[part]!r}, got {_shorten(value)}.")
            return (value or "").strip()

        if "text" in parts:
            if not self._reading.plain and (found := turns_of_text(text("text"), where, self._notes, parts["text"])):
                yield from found
                return
            if not (self._reading.plain or self._reading.columns):
                self._notes.add("training on plain text, because no columns hold question and answer", parts["text"])
            yield Turn(Message("text", text("text")), where)
            return
        yield Turn(Message("system", text("system")), where)
        turns = [parts[part] for part in ("messages", "prompt", "response") if part in parts]
        if "messages" in parts or all(isinstance(row.get(column), list) for column in turns):
            for column in turns:  # a prompt and its response may be lists of turns as well
                yield from self._messages(row[column], column, where)
            return
        if "history" in parts and row.get(parts["history"]):
            yield from self._history(row[parts["history"]], parts["history"], where)
        yield Turn(Message("user", "\n".join(part for part in (text("prompt"), text("context")) if part)), where)
        yield Turn(Message("assistant", text("response"), reasoning=text("reasoning")), where)

    def _messages(self, turns: Any, column: str, where: str) -> Iterator[Turn]:
        for number, turn in enumerate(_turn_list(turns, column, where)):
            if isinstance(turn, str):
                self._notes.add("texts without roles are read as question and answer in turn", column)
                yield Turn(Message(("user", "assistant")[number % 2], turn), where)
            elif pair := _question_answer_pair(turn):
                yield from (Turn(Message(role, content), where) for role, content in pair)
            else:
                yield Turn(self._message(turn, column, where), where)

    def _message(self, turn: Any, column: str, where: str) -> Message:
        """Reads a turn with a role and content, calls or reasoning."""
        who = next((key for key in WHO if isinstance(turn, dict) and key in turn), None)
        what = next((key for key in WHAT if isinstance(turn, dict) and key in turn), None)
        if not who or not (what or any(turn.get(key) for key in CALLS)):
            raise UserError(f"{where}: Expected a role and content in each turn of {column!r}, got {_shorten(turn)}.")
        role = self._speakers.get(str(turn[who]).strip().lower())
        if role is None:
            raise UserError(
                f"{where}: Unknown {who} {turn[who]!r}. Expected one of {', '.join(ROLES)}, tool. Map it to a role "
                f'with role_prefixes, for example {{"assistant": {str(turn[who])!r}}}.'
            )
        content, calls = turn[what] if what else None, calls_of(turn, where)
        if role == CALL:
            role, content, calls = "assistant", None, text_calls(_content(content, role, where), where)
        elif role == "tool":
            content = result_text(content)
        thought = next((key for key in REASONING_KEYS if isinstance(turn.get(key), str)), "")
        known = {who, what, thought, *CALLS, *TURN_MARKS, *(("name", "tool_call_id") if role == "tool" else ())}
        for key in turn.keys() - known:
            if turn[key] not in (None, "", [], {}):
                self._notes.add("unused columns", f"{column}.{key}")
        return Message(
            role,
            "" if content is None and calls else _content(content, role, where),
            loss_weight(turn, where) if role == "assistant" else 1.0,
            turn[thought] if thought else "",
            calls,
            str(turn.get("name") or "") if role == "tool" else "",
            str(turn.get("tool_call_id") or "") if role == "tool" else "",
        )

    @staticmethod
    def _history(earlier: Any, column: str, where: str) -> Iterator[Turn]:
        for pair in _turn_list(earlier, column, where):
            if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
                raise UserError(f"{where}: Expected pairs of question and answer in {column!r}, got {_shorten(pair)}.")
            yield from (
                Turn(Message(role, text), where) for role, text in zip(("user", "assistant"), pair, strict=True)
            )


def map_columns(columns: Sequence[str], options: ReadOptions) -> Parts:
    """Returns the column of each part; see `RowConverter.parts`."""
    named = {part: column for part, column in options.columns.items() if part != "rows"}
    available = f"Columns: {join_limited(columns, 20)}."
    if named:
        missing = [
            c for part, c in named.items() if c not in columns and part in ("prompt", "response", "messages", "text")
        ]
        if missing:
            raise UserError(
                f"The key columns names the column {missing[0]!r}, which does not exist. {available} Name one of them."
            )
        return {part: column for part, column in named.items() if column in columns}
    plain = [column for column in columns if column.strip().lower() in (*WHAT, *NAMES["text"])]
    if options.plain:
        if len(plain) == 1:
            return {"text": plain[0]}
        raise UserError(f'Cannot tell which column holds the text. Set columns={{"text": "NAME"}}. {available}')
    found = {
        part: [c for c in columns if c.strip().lower().replace(" ", "_") in names] for part, names in NAMES.items()
    }
    if not found["prompt"] and "input" in columns:
        found["prompt"], found["context"] = ["input"], [c for c in found["context"] if c != "input"]
    sure = {part: names[0] for part, names in found.items() if len(names) == 1}
    pair, turns = {"prompt", "response"} <= sure.keys(), "messages" in sure and not found["response"]
    many = [names for part, names in found.items() if len(names) > 1 and part not in ("text", "tools")]
    if pair and not found["messages"] and not many:
        return {part: column for part, column in sure.items() if part != "text"}
    if turns and not many:
        return {part: column for part, column in sure.items() if part in ("messages", "system", "tools")}
    if "text" in sure and not (found["prompt"] or found["response"] or found["messages"]):
        return {"text": sure["text"]}
    raise UserError(
        'Cannot tell which columns hold question and answer. Set columns={"prompt": "NAME", "response": "NAME"}, or '
        f'{{"messages": "NAME"}} for a list of turns, or {{"text": "NAME"}} for plain text. {available}'
    )


def makes_row(keys: Sequence[str], options: ReadOptions) -> bool:
    """Returns whether an object with these keys is a row, so that a list of objects in it does not hold the rows."""
    try:
        parts = map_columns(keys, options)
    except UserError:
        return False
    return "messages" in parts or {"prompt", "response"} <= parts.keys()


def _is_text_list(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _turn_list(value: Any, column: str, where: str) -> list[Any]:
    """Returns a list of turns, which a table may hold as JSON text, and a data set as an object of lists."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: Expected a JSON list in {column!r}, got {_shorten(value)}.") from None
    if isinstance(value, Mapping) and {type(v) for v in value.values()} == {list}:
        if len({len(v) for v in value.values()}) != 1:
            raise UserError(f"{where}: The lists in {column!r} differ in length. Write one item for each turn in each.")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UserError(f"{where}: Expected a list of turns in {column!r}, got {_shorten(value)}.")
    return value


def _question_answer_pair(turn: Any) -> list[tuple[str, str]]:
    """Returns question and answer if one turn holds both under two keys, as {"human": ..., "assistant": ...}."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return []
    (question_key, question), (answer_key, answer) = turn.items()
    if question_key not in NAMES["prompt"] | {"input"} or answer_key not in NAMES["response"]:
        return []
    return [("user", question), ("assistant", answer)] if isinstance(question, str) and isinstance(answer, str) else []


def _content(value: Any, role: str, where: str) -> str:
    """Returns the content of a turn, which is text or OpenAI's list of text parts."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise UserError(f"{where}: Expected text in the {role}'s message, got {_shorten(value)}.")
    return value


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
