"""Reads tool calls, tools' results and tool definitions, as OpenAI, ShareGPT, Hermes and Qwen write them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jlora.common.errors import UserError
from jlora.data.conversation import Message, ToolCall, Turn

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


def tools_json(value: Any) -> str:
    """Returns a row's tools as OpenAI's JSON list of function definitions; "" if the value does not define tools."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ""
    if not isinstance(value, list) or not value:
        return ""
    tools = [tool if isinstance(tool, dict) and "function" in tool else {"function": tool} for tool in value]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in tools):
        return ""
    return _dump([{"type": "function", **tool} for tool in tools])


def calls_of(turn: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    """Returns the calls of a turn that keeps them under `tool_calls` or `function_call`.

    Raises:
      UserError: a call has no name, or its arguments are not a JSON object.
    """
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UserError(f"{where}: Expected a list of calls in 'tool_calls', got {calls!r:.60}.")
    return tuple(_call(call, where) for call in (*calls, *filter(None, [turn.get("function_call")])))


def text_calls(text: str, where: str) -> tuple[ToolCall, ...]:
    """Returns the calls of a turn whose text is one call, or a list of calls, in JSON."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: Expected a call in JSON, with its name and arguments, got {text[:60]!r}.") from None
    return tuple(_call(call, where) for call in (calls if isinstance(calls, list) else [calls]))


def read_tagged(turns: Sequence[Turn], tools: str) -> Iterator[Turn]:
    """Yields turns, with `<tool_call>` and `<tool_response>` in their text read as calls and results.

    Only rows with tools, or with tools' results, are read so; elsewhere, such tags are text.
    """
    if not tools and not any(turn.message.role == "tool" or _is_result(turn.message) for turn in turns):
        yield from turns
        return
    for message, where in turns:
        if message.role == "assistant" and CALL.search(message.content) and not message.tool_calls:
            found = [call for tagged in CALL.finditer(message.content) for call in text_calls(tagged[1], where)]
            yield Turn(replace(message, content=CALL.sub("", message.content), tool_calls=tuple(found)), where)
        elif _is_result(message):
            results = RESULT.findall(message.content)
            yield from (Turn(replace(message, role="tool", content=result), where) for result in results)
        else:
            yield Turn(message, where)


def _is_result(message: Message) -> bool:
    tagged = message.role in ("user", "tool") and RESULT.search(message.content)
    return bool(tagged) and not RESULT.sub("", message.content).strip()


def result_text(content: Any) -> Any:
    """Returns a tool's result as text: JSON other than text is written as JSON; parts of text are left alone."""
    parts = isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content)
    return content if isinstance(content, str) or parts else _dump(content)


def _call(value: Any, where: str) -> ToolCall:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(f"{where}: Expected a call with a name and arguments, got {value!r:.60}.")
    arguments = function.get("arguments", function.get("parameters")) or "{}"
    if not isinstance(arguments, str):
        arguments = _dump(arguments)
    try:
        valid = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise UserError(
            f"{where}: Expected a JSON object as the arguments of the call {function['name']}, got {arguments[:60]!r}."
        )
    return ToolCall(function["name"], arguments, str(value.get("id") or ""))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
