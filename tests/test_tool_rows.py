"""Rows with tool calls, tools' results, tools and reasoning, as OpenAI, ShareGPT, Hermes and Qwen write them."""

import json

import pytest
from test_layouts import jsonl, read

from jlora.common.errors import UserError
from jlora.data.checks import pii
from jlora.data.conversation import Conversation, Message, ToolCall

ASKED, ANSWERED = "How many A7?", "Twelve."
TOOL = {"name": "stock", "description": "Counts.", "parameters": {"type": "object", "properties": {"sku": {}}}}
ARGUMENTS = {"sku": "A7", "n": [1, 2.50], "city": "Köln"}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
CALL = {"name": "stock", "arguments": ARGUMENTS}
TAGGED = f"<tool_call>\n{json.dumps(CALL, ensure_ascii=False)}\n</tool_call>"
QUESTION = {"role": "user", "content": ASKED}
LAST = {"role": "assistant", "content": ANSWERED}
SHAREGPT = [
    {"from": "human", "value": ASKED},
    {"from": "function_call", "value": json.dumps(CALL, ensure_ascii=False)},
    {"from": "observation", "value": "12"},
    {"from": "gpt", "value": ANSWERED},
]


def openai(arguments, **call):
    made = {"id": "call_9", "type": "function", "function": {"name": "stock", "arguments": arguments}, **call}
    called = {"role": "assistant", "content": None, "tool_calls": [made]}
    return [QUESTION, called, {"role": "tool", "tool_call_id": "call_9", "content": "12"}, LAST]


FORMS = {
    "openai": {"messages": openai(TEXT), "tools": [{"type": "function", "function": TOOL}]},
    "openai, arguments as an object": {"messages": openai(ARGUMENTS), "tools": [TOOL]},
    "openai, without content": {"messages": [QUESTION, {"role": "assistant", "tool_calls": [CALL]}, *openai("")[2:]]},
    "openai, the old way": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "", "function_call": {"name": "stock", "arguments": TEXT}},
            {"role": "function", "name": "stock", "content": "12"},
            LAST,
        ],
        "functions": [TOOL],
    },
    "sharegpt": {"conversations": SHAREGPT, "tools": json.dumps([TOOL])},
    "hermes": {
        "conversations": [
            {"from": "human", "value": ASKED},
            {"from": "gpt", "value": TAGGED},
            {"from": "tool", "value": "<tool_response>\n12\n</tool_response>"},
            {"from": "gpt", "value": ANSWERED},
        ]
    },
    "qwen": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": TAGGED},
            {"role": "user", "content": "<tool_response>\n12\n</tool_response>"},
            LAST,
        ],
        "tools": [TOOL],
    },
    "tags and a role": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": f'<tool_call>{{"name": "stock", "parameters": {TEXT}}}</tool_call>'},
            {"role": "ipython", "content": "12"},
            LAST,
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_calls_and_results_are_read(file, form):
    (row,), said = read(file(jsonl(FORMS[form]), "rows.jsonl"))
    assert [message.role for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    called, result = row.messages[1:3]
    assert [(call.name, json.loads(call.arguments)) for call in called.tool_calls] == [("stock", ARGUMENTS)]
    assert "Köln" in called.tool_calls[0].arguments and not called.content and result.content == "12"
    assert bool(row.tools) == ("tools" in FORMS[form] or "functions" in FORMS[form]) and not said
    if row.tools:
        assert json.loads(row.tools) == [{"type": "function", "function": TOOL}]


def test_text_beside_calls_and_several_calls_stay(file):
    turns = [
        QUESTION,
        {"role": "assistant", "content": f"I look.\n{TAGGED}\n{TAGGED}"},
        {"role": "tool", "content": "<tool_response>12</tool_response>\n<tool_response>13</tool_response>"},
        LAST,
    ]
    (row,), _ = read(file(jsonl({"messages": turns}), "rows.jsonl"))
    assert row.messages[1].content == "I look." and len(row.messages[1].tool_calls) == 2
    assert [message.content for message in row.messages[2:4]] == ["12", "13"]


def test_results_keep_their_json_and_their_calls(file):
    turns = openai(TEXT)
    turns[2]["content"] = {"stock": 12, "where": ["Köln"]}
    (row,), _ = read(file(jsonl({"messages": turns}), "rows.jsonl"))
    assert row.messages[2].content == '{"stock": 12, "where": ["Köln"]}'
    assert row.messages[2].call_id == row.messages[1].tool_calls[0].id == "call_9"


def test_tags_are_text_in_rows_without_tools(file):
    turns = [QUESTION, {"role": "assistant", "content": f"Write {TAGGED}, for example."}]
    (row,), _ = read(file(jsonl({"messages": turns}), "rows.jsonl"))
    assert not row.messages[1].tool_calls and TAGGED in row.messages[1].content


def test_a_column_that_defines_no_tools_is_unused(file):
    (row,), said = read(file(jsonl({"question": ASKED, "answer": ANSWERED, "tools": ["hammer"]}), "rows.jsonl"))
    assert not row.tools and said == ["train_data_dir: unused columns: tools"]


BAD = {
    "no name": (openai(TEXT, function={"arguments": "{}"}), "Expected a call with a name and arguments"),
    "no object": (openai("[1]"), r"Expected a JSON object as the arguments of the call stock, got '\[1\]'"),
    "no JSON": (openai("sku=A7"), "Expected a JSON object as the arguments of the call stock, got 'sku=A7'"),
    "no list": ([QUESTION, {"role": "assistant", "tool_calls": "stock()"}], "Expected a list of calls in 'tool_calls'"),
    "no answer": (openai(TEXT)[:3], "This tool's result has no answer: '12'"),
    "no call": ([QUESTION, openai(TEXT)[2], LAST], "This tool's result has no call before it: '12'"),
    "a question after a result": ([*openai(TEXT)[:3], QUESTION, LAST], "Expected an answer after the tool's result"),
    "broken tag": (
        [QUESTION, {"role": "assistant", "content": "<tool_call>stock</tool_call>"}, *openai(TEXT)[2:]],
        "Expected a call in JSON, with its name and arguments, got 'stock'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_calls_are_named(file, case):
    turns, message = BAD[case]
    with pytest.raises(UserError, match=f"rows.jsonl:1: {message}"):
        read(file(jsonl({"messages": turns}), "rows.jsonl"))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_from_turns(file, key):
    (row,), said = read(file(jsonl({"messages": [QUESTION, {**LAST, key: "One box."}]}), "rows.jsonl"))
    assert row.messages[1].thoughts == ("One box.", ANSWERED) and row.reasons and not said


def test_reasoning_is_read_from_a_column(file):
    rows = [{"question": ASKED, "answer": ANSWERED, "thinking": "One box."}]
    (row,), _ = read(file(jsonl(*rows), "rows.jsonl"))
    assert row.messages[1].thoughts == ("One box.", ANSWERED)
    rows = [{"question": ASKED, "answer": ANSWERED, "cot": "One box."}]
    columns = {"prompt": "question", "response": "answer", "reasoning": "cot"}
    (row,), _ = read(file(jsonl(*rows), "rows.jsonl"), columns=columns)
    assert row.messages[1].thoughts == ("One box.", ANSWERED)


def test_think_tags_are_reasoning_only_at_the_start():
    inside = Message("assistant", "Write <think>so</think>.")
    assert inside.thoughts == ("", inside.content) and Message("user", "<think>a</think>b").thoughts[0] == ""
    assert Message("assistant", "<think>\n\n</think>\n\nYes.").thoughts == ("", "Yes.")


def test_masking_reaches_calls_and_reasoning():
    arguments = json.dumps({"to": "ann@example.com", "phone": 13812345678, "n": 2, "deep": [{"x": "ann@example.com"}]})
    row = Conversation(
        (
            Message("user", "Call 13812345678."),
            Message("assistant", "", reasoning="ann@example.com?", tool_calls=(ToolCall("mail", arguments),)),
        ),
        "rows:1",
    )
    masked = pii.mask(row, ("CN",)).messages[1]
    assert masked.reasoning == "[EMAIL_1]?"
    assert json.loads(masked.tool_calls[0].arguments) == {
        "to": "[EMAIL_1]",
        "phone": "[PHONE_1]",
        "n": 2,
        "deep": [{"x": "[EMAIL_1]"}],
    }
