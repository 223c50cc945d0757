"""The forms in which a chat template takes reasoning, tool calls and tools, found by rendering small conversations.

Templates agree on a turn's role and content, and on little else: reasoning has a key of its own, is in the content,
or is cut out; a call's arguments are an object or JSON text; the content beside a call is empty, None or absent.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jlora.common.errors import UserError
from jlora.data.conversation import Message, ToolCall

Turns = list[dict[str, Any]]
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
CONTENT, CUT = "content", ""  # the other values of `Forms.reasoning`
ABSENT = "absent"
CALL_ID = re.compile("[A-Za-z0-9]{9}")  # Mistral's form, which other templates take too

QUESTION, ANSWER = Message("user", "Probe question?"), Message("assistant", "Probe answer.", reasoning="Probe thought.")
CALL = Message("assistant", "", tool_calls=(ToolCall("probe_tool", '{"probe_key": "probe value"}'),))
RESULT = Message("tool", "Probe result.")
# Not with \" (JSON within JSON) or ' (Python's form) before the key.
RENDERED_CALL = re.compile(r"""probe_tool.*(?<!\\")(?<!')probe_key.*probe value.*Probe result\.""", re.DOTALL)
TOOLS = '[{"type": "function", "function": {"name": "probe_tool", "description": "Probes.", "parameters": {}}}]'


class Forms(NamedTuple):
    """How a chat template takes the parts of a turn."""

    reasoning: str = CONTENT  # the turn's key for it; CONTENT: in the content; CUT: the template leaves it out
    calls: bool = True  # whether it renders calls and results
    arguments_as_text: bool = False  # a call's arguments as JSON text, not as an object
    without_content: str | None = ""  # the content of a turn with calls alone; ABSENT: no such key
    tools: bool = True  # whether it renders the tools


def find_forms(render: Callable[[Turns, str], str]) -> Forms:
    """Returns the forms of a template.

    Args:
      render: renders turns and tools (JSON, or ""); raises a UserError if the template does not accept them.
    """

    def tried(messages: Sequence[Message], forms: Forms, tools: str = "") -> str:
        try:
            return render(turn_values(messages, forms), tools)
        except UserError:
            return ""

    ways = (*REASONING_KEYS, CONTENT)
    answered = ((way, tried([QUESTION, ANSWER], Forms(way))) for way in ways)
    reasoning = next((way for way, text in answered if ANSWER.reasoning in text and ANSWER.content in text), CUT)
    candidates = [
        Forms(reasoning, True, as_text, content) for as_text in (False, True) for content in ("", None, ABSENT)
    ]
    texts = [tried([QUESTION, CALL, RESULT], forms) for forms in candidates]
    lengths = [len(text) if RENDERED_CALL.search(text) else 0 for text in texts]
    working = [pair for pair in zip(lengths, candidates, strict=True) if pair[0]]
    # Some templates add an empty turn for content that is empty but not None, which is why the shortest text is taken.
    forms = min(working, key=lambda pair: pair[0])[1] if working else Forms(reasoning, calls=False)
    return forms._replace(tools="probe_tool" in tried([QUESTION], forms, TOOLS))


def turn_values(messages: Sequence[Message], forms: Forms) -> Turns:
    """Returns turns as a template takes them."""
    turns: Turns = []
    calls: list[tuple[str, str, str]] = []  # of each call: its id in the row, its id for the template, its name
    answered = 0  # calls that have a result
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        thought, answer = message.thoughts
        if thought and forms.reasoning != CONTENT:
            turn |= {"content": answer, **({forms.reasoning: thought} if forms.reasoning else {})}
        elif message.reasoning:
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{answer}"
        if message.tool_calls:
            turn["tool_calls"] = []
            answered = len(calls)
        for call in message.tool_calls:
            own = call.id if CALL_ID.fullmatch(call.id) else f"call{len(calls):05}"
            calls.append((call.id, own, call.name))
            arguments = call.arguments if forms.arguments_as_text else json.loads(call.arguments)
            function = {"name": call.name, "arguments": arguments}
            turn["tool_calls"].append({"id": own, "type": "function", "function": function})
        if message.tool_calls and not turn["content"]:
            turn["content"] = forms.without_content
            if forms.without_content == ABSENT:
                del turn["content"]
        if message.role == "tool":
            named = [i for i, (given, *_) in enumerate(calls) if given and given == message.call_id]
            index = named[-1] if named else min(answered, len(calls) - 1)
            answered += 1
            turn |= {"tool_call_id": calls[index][1], "name": message.tool or calls[index][2]}
        turns.append(turn)
    return turns
