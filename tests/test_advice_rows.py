"""The advice of every error message about tables, columns and turns is followed; then the rows are read."""

import pytest
from advice import PAIR, case, follow, sites, unmet
from test_layouts import jsonl

TEXT, CSV, ROW = "User: a?\nLawyer: b\n", "question,answer\na?,b\n", jsonl({"q": "a?", "a": "b"})
ASK, SAY = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
PLAIN, TWICE, BOTH = {"task_type": "plain-text"}, PAIR * 2, [*PAIR, ["c?", "d"]]
NAMED = {"columns": {"prompt": "ask", "response": "say"}}
LONG, QUOTED = "b" * 200_000, "In a cell in quotes, write each quote twice"


def turns(*said, **others):
    return jsonl({"messages": list(said), **others})


TABLES = [
    case("a.csv", f"{CSV}a?\n", "a.csv:3: .*got 1", "Expected 2 cells", f"{CSV}a?,b\n", gives=TWICE),
    case("a.csv", f"{CSV}a?,b,c\n", "got 3", "Put quotes around cells that contain ','", f'{CSV}a?,"b"\n', gives=TWICE),
    case("a.csv", f'{CSV}a?,"b\n', "a.csv:3: Not valid CSV: the quote", "Close it", f'{CSV}a?,"b"\n', gives=TWICE),
    case("a.csv", 'q,a\na?,"b "c""\n', "Not valid CSV", QUOTED, 'q,a\na?,"b ""c"""\n', gives=[["a?", 'b "c"']]),
    case("a.csv", f'{CSV}a?,"{LONG}\n', "a cell is longer", "Close its quote", f'{CSV}a?,"b"\n', gives=TWICE),
    case("a.csv", f"q,a\na?,{LONG}\n", "a cell is longer", "save the rows as JSON lines", {"a.jsonl": ROW}),
    case("a.csv", ",,\n", "contains no rows", "Write rows into it", CSV),
    case("a.csv", "q,a,a\na?,b,c\n", "Two columns are named 'a'", "Rename one of them", "q,a,note\na?,b,c\n"),
    case(
        "a.csv",
        "x,a?,b\n",
        "Cannot tell which",
        "use numbers, as in columns=",
        {"columns": {"prompt": "2", "response": "3"}},
    ),
    case(
        "a.csv",
        "q,a\na?,nan\n",
        "The answer is empty",
        "If it is a word, write it with a full stop",
        "q,a\na?,nan.\n",
        gives=[["a?", "nan."]],
    ),
]
COLUMNS = [
    case("a.jsonl", jsonl({"ask": "a?", "say": "b"}), "Cannot tell", 'columns={"prompt": "NAME", "response": ', NAMED),
    case("a.jsonl", jsonl({"x": [ASK, SAY]}), "Cannot tell", '{"messages": "NAME"}', {"columns": {"messages": "x"}}),
    case("a.jsonl", jsonl({"x": "b"}), "Cannot tell", '{"text": "NAME"}', {"columns": {"text": "x"}}, gives=[["b"]]),
    case(
        "a.jsonl",
        jsonl({"x": "b"}),
        "Cannot tell which column holds the text",
        'columns={"text": "NAME"}',
        {"columns": {"text": "x"}},
        gives=[["b"]],
        **PLAIN,
    ),
    case(
        "a.jsonl",
        jsonl({"ask": "a?", "say": "b"}),
        "'Ask', which does not exist. Columns: ask, say",
        "Name one of them",
        NAMED,
        columns={"prompt": "Ask", "response": "say"},
    ),
    case("a.jsonl", "[1]\n", "got int", "Expected a JSON object", f"[{ROW}]"),
    case("a.jsonl", jsonl({"q": ["a?", "c?"], "a": ["b"]}), "cannot pair them", "Write a row for each pair", ROW),
    case(
        "a.jsonl",
        jsonl({"q": ["a?", "c?"], "a": ["b"]}),
        "cannot pair",
        "one list of turns with roles",
        turns(ASK, SAY),
    ),
    case("a.jsonl", jsonl({"q": ["a?"], "a": "b"}), r"got \['a\?'\]", "Expected text in 'q'", ROW),
    case(
        "a.jsonl",
        turns({"role": "user"}, SAY),
        "got {'role'",
        "Expected a role and content in each turn",
        turns(ASK, SAY),
    ),
    case(
        "a.jsonl",
        turns(ASK, {**SAY, "role": "robot"}),
        "Unknown role 'robot'",
        "Expected one of system, user, assistant",
        turns(ASK, SAY),
    ),
    case(
        "a.jsonl",
        turns(ASK, {**SAY, "role": "robot"}),
        "Unknown role",
        """role_prefixes, for example {"assistant": 'robot'}""",
        {"role_prefixes": {"assistant": "robot"}},
    ),
    case(
        "a.jsonl",
        turns(ASK, {**SAY, "content": 4}),
        "got 4",
        "Expected text in the assistant's message",
        turns(ASK, SAY),
    ),
    case(
        "a.jsonl",
        jsonl({"q": "a?", "a": "b", "history": ["c?"]}),
        r"got 'c\?'",
        "Expected pairs of question and answer",
        jsonl({"q": "a?", "a": "b", "history": [["c?", "d"]]}),
        gives=[["c?", "d", "a?", "b"]],
    ),
    case("a.csv", "messages\n[{]\n", r"got '\[{\]'", "Expected a JSON list", {"a.jsonl": turns(ASK, SAY)}),
    case(
        "a.jsonl",
        jsonl({"messages": {"role": ["user", "assistant"], "content": ["a?"]}}),
        "differ in length",
        "Write one item for each turn in each",
        jsonl({"messages": {"role": ["user", "assistant"], "content": ["a?", "b"]}}),
    ),
    case("a.jsonl", jsonl({"messages": "a?"}), r"got 'a\?'", "Expected a list of turns", turns(ASK, SAY)),
]
CALL, RESULT = {"name": "count", "arguments": {}}, {"role": "tool", "content": "12"}


def called(**parts):
    return turns(ASK, {"role": "assistant", "content": "", **parts}, RESULT, SAY)


TOOLS, SPOKEN = [["a?", "", "12", "b"]], {"role": "function_call", "content": "count()"}
TURNS = [
    case(
        "a.jsonl",
        called(tool_calls="count"),
        "got 'count'",
        "Expected a list of calls",
        called(tool_calls=[CALL]),
        gives=TOOLS,
    ),
    case(
        "a.jsonl",
        called(tool_calls=["count"]),
        "got 'count'",
        "Expected a call with a name and arguments",
        called(tool_calls=[CALL]),
        gives=TOOLS,
    ),
    case(
        "a.jsonl",
        called(tool_calls=[{**CALL, "arguments": [1]}]),
        r"got '\[1\]'",
        "Expected a JSON object as the arguments",
        called(tool_calls=[CALL]),
        gives=TOOLS,
    ),
    case(
        "a.jsonl",
        turns(ASK, SPOKEN, RESULT, SAY),
        r"got 'count\(\)'",
        "Expected a call in JSON, with its name and arguments",
        called(tool_calls=[CALL]),
        gives=TOOLS,
    ),
    case(
        "a.jsonl",
        turns(ASK, {**SAY, "weight": -1}),
        "has weight=-1",
        "Expected a number that is 0 or more",
        turns(ASK, {**SAY, "weight": 0.5}),
    ),
    case(
        "a.jsonl",
        turns(ASK, {**SAY, "train": "no"}),
        "has train='no'",
        "Expected true or false",
        turns(ASK, {**SAY, "train": True}),
    ),
    case(
        "a.jsonl",
        turns(SAY, ASK, SAY),
        "no question before it: 'b'",
        "Write the question",
        turns(ASK, SAY, ASK, SAY),
        gives=[["a?", "b"] * 2],
    ),
    case("a.jsonl", turns(SAY, ASK, SAY) + ROW, "no question before it: 'b'", "remove the row", ROW),
    case(
        "a.jsonl",
        turns(ASK, RESULT, SAY),
        "no call before it: '12'",
        "Write the call",
        called(tool_calls=[CALL]),
        gives=TOOLS,
    ),
    case(
        "a.jsonl",
        turns(ASK, {**SAY, "tool_calls": [CALL]}, RESULT, ASK, SAY),
        "got question",
        "Expected an answer after the tool's result",
        called(tool_calls=[CALL]),
        gives=TOOLS,
    ),
    case(
        "a.jsonl",
        turns(ASK, {**SAY, "tool_calls": [CALL]}, RESULT),
        "result has no answer: '12'",
        "Write the answer",
        called(tool_calls=[CALL]),
        gives=TOOLS,
    ),
    case(
        "a.txt",
        f"{TEXT}\nUser: c?\n",
        r"no answer: 'c\?'",
        "Write the answer",
        f"{TEXT}\nUser: c?\nLawyer: d\n",
        gives=BOTH,
    ),
    case("a.txt", f"{TEXT}\nUser: c?\n", r"no answer: 'c\?'", "remove the question", TEXT),
    case(
        "a.jsonl",
        turns(ASK, SAY, SAY),
        "Got user, assistant, assistant",
        "Expected user and assistant turns to alternate",
        turns(ASK, SAY),
    ),
    case("a.csv", f"{CSV}c?,\n", "The answer is empty", "Write it", f"{CSV}c?,d\n", gives=BOTH),
    case("a.csv", f"{CSV}c?,\n", "The answer is empty", "remove the row", CSV),
    case("a.txt", f"{TEXT}\0", "contains a NUL character", "Remove it", TEXT),
    case("a.jsonl", '{"q": "a?", "a": "b\\ud83d"}', "a lone surrogate", "Remove or replace it", ROW),
]
CASES = [*TABLES, *COLUMNS, *TURNS]
FILES = "column_mapping csv_files tables tool_calls training_marks".split()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.found[:40]}-{case.advice[:30]}")
def test_advice_is_followed(case, tmp_path, monkeypatch):
    follow(case, tmp_path, monkeypatch)


def test_every_message_about_rows_has_a_case(tmp_path):
    found = sites(["data/conversation.py", *(f"data/readers/{name}.py" for name in FILES)])
    assert not unmet(CASES, found, {}, tmp_path)
