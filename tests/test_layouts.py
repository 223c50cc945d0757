"""Files in every layout and encoding become conversations, and are read as streams."""

import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from jlora.common.errors import UserError
from jlora.data.conversation import ReadOptions
from jlora.data.readers import files

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"]


def read(path, **reading):
    """Returns the conversations, and the logged lines."""
    said = []
    return files.read_conversations(str(path), "train_data_dir", ReadOptions(**reading), said.append), said


def contents(rows):
    return [[message.content for message in row.messages] for row in rows]


def roles(rows):
    return ["".join(message.role[0] for message in row.messages) for row in rows]


# The same conversations in the layouts of offices and public data sets.
ONE = ("试用期最长多久？", "依据《劳动合同法》第19条，不得超过六个月。\n另见“附则”。")
TWO = ("合同, 必须书面吗？", "是的，第10条。")
SYSTEM = "你是律师。"


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def turns(who, what, names, system=()):
    return [{who: names[i % 2 + 1], what: said} for i, said in enumerate((*ONE, *TWO))]


def openai(*pairs):
    said = [[("system", SYSTEM), ("user", q), ("assistant", a)] for q, a in pairs]
    return [{"messages": [{"role": role, "content": c} for role, c in turn]} for turn in said]


def quoted(delimiter, *rows):
    return "".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in rows)


PAIRS, MULTI, WITH_SYSTEM = [[*ONE], [*TWO]], [[*ONE, *TWO]], [[SYSTEM, *ONE], [SYSTEM, *TWO]]
ALPACA = [{"instruction": q, "input": "", "output": a} for q, a in (ONE, TWO)]
LAYOUTS = {
    "text in Chinese": ("a.txt", f"用户：{ONE[0]}\n律师：{ONE[1]}\n\n用户：{TWO[0]}\n律师：{TWO[1]}\n", PAIRS),
    "text in English": ("a.txt", f"Q: {ONE[0]}\r\nA: {ONE[1]}\r\nQ: {TWO[0]}\r\nA: {TWO[1]}\r\n", PAIRS),
    "numbered text": ("a", f"问1：{ONE[0]}\n答1：{ONE[1]}\n\n\n问2：{TWO[0]}\n答2：{TWO[1]}", PAIRS),
    "text of several turns": (
        "a.txt",
        f"用户：{ONE[0]}\n律师：{ONE[1]}\n用户：{TWO[0]}\n律师：{TWO[1]}\n\n用户：三？\n律师：四",
        [*MULTI, ["三？", "四"]],
    ),
    "text with rules": (
        "a.txt",
        f"User: {ONE[0]}\n\nBot: {ONE[1]}\n\nUser: {TWO[0]}\n\nBot: {TWO[1]}\n---\nUser: 三？\nBot: 四\n---\n",
        [*MULTI, ["三？", "四"]],
    ),
    "text with system lines": (
        "a.txt",
        f"系统：{SYSTEM}\n用户：{ONE[0]}\n律师：{ONE[1]}\n\n系统：{SYSTEM}\n用户：{TWO[0]}\n律师：{TWO[1]}\n",
        WITH_SYSTEM,
    ),
    "alpaca jsonl": ("a.jsonl", jsonl(*ALPACA), PAIRS),
    "alpaca list": ("a.json", json.dumps(ALPACA, ensure_ascii=False, indent=2), PAIRS),
    "alpaca list, one line, no ending": ("a", json.dumps(ALPACA, ensure_ascii=False), PAIRS),
    "jsonl named txt": ("a.txt", jsonl(*ALPACA), PAIRS),
    "nested under one key": (
        "a.json",
        json.dumps({"version": "1.0", "data": ALPACA, "licence": {"name": "x"}}, ensure_ascii=False, indent=1),
        PAIRS,
    ),
    "nested twice, one line": ("a.json", json.dumps({"x": {"rows": ALPACA}}, ensure_ascii=False), PAIRS),
    "objects over several lines": (
        "a.json",
        "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in ALPACA),
        PAIRS,
    ),
    "prompt and completion": ("a.jsonl", jsonl(*({"prompt": q, "completion": a} for q, a in (ONE, TWO))), PAIRS),
    "q and a": ("a.jsonl", jsonl(*({"q": q, "a": a, "id": 7} for q, a in (ONE, TWO))), PAIRS),
    "query and response": ("a.jsonl", jsonl(*({"query": q, "response": a} for q, a in (ONE, TWO))), PAIRS),
    "dolly": (
        "a.jsonl",
        jsonl(
            *({"instruction": q, "context": "", "response": a, "category": "open_qa"} for q, a in (ONE, TWO)),
        ),
        PAIRS,
    ),
    "alpaca with system and history": (
        "a.json",
        json.dumps(
            [{"system": SYSTEM, "history": [list(ONE)], "instruction": TWO[0], "input": "", "output": TWO[1]}],
            ensure_ascii=False,
        ),
        [[SYSTEM, *ONE, *TWO]],
    ),
    "OpenAI fine-tuning": ("a.jsonl", jsonl(*openai(ONE, TWO)), WITH_SYSTEM),
    "OpenAI content parts": (
        "a.jsonl",
        jsonl(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": ONE[0]}]},
                    openai(ONE)[0]["messages"][2],
                ]
            }
        ),
        [[*ONE]],
    ),
    "ShareGPT": (
        "a.jsonl",
        jsonl({"id": "x_0", "conversations": turns("from", "value", ("system", "human", "gpt"))}),
        MULTI,
    ),
    "ShareGPT list with system": (
        "a.json",
        json.dumps([{"system": SYSTEM, "conversations": turns("from", "value", ("", "human", "gpt"))}], indent=2),
        [[SYSTEM, *ONE, *TWO]],
    ),
    "TRL": (
        "a.jsonl",
        jsonl(*({"prompt": m["messages"][:2], "completion": m["messages"][2:]} for m in openai(ONE, TWO))),
        WITH_SYSTEM,
    ),
    "LIMA": ("a.jsonl", jsonl({"conversations": [*ONE, *TWO], "source": "x"}), MULTI),
    "Capybara": ("a.jsonl", jsonl({"conversation": [{"input": q, "output": a} for q, a in (ONE, TWO)]}), MULTI),
    "OpenOrca": (
        "a.jsonl",
        jsonl(*({"id": 1, "system_prompt": SYSTEM, "question": q, "response": a} for q, a in (ONE, TWO))),
        WITH_SYSTEM,
    ),
    "CSV with a header and more columns": (
        "a.csv",
        "﻿id,Question,Answer,source\n" + quoted(",", ("1", *ONE, "x"), ("2", *TWO, "y")),
        PAIRS,
    ),
    "CSV with semicolons and sep=": ("a.csv", "sep=;\nprompt;response\n" + quoted(";", ONE, TWO), PAIRS),
    "CSV without a header": ("a.csv", quoted(",", ONE, TWO), PAIRS),
    "CSV in Chinese": ("a.csv", "问题,答案\n" + quoted(",", ONE, TWO) + ",\n,\n", PAIRS),
    "TSV": ("a.tsv", "instruction\toutput\n" + quoted("\t", ONE, TWO), PAIRS),
    "TSV without a header, named txt": ("a.txt", f"{ONE[0]}\t不超过六个月。\n{TWO[0]}\t{TWO[1]}\n", None),
    "plain text": ("a.txt", f"{ONE[0]}\n{ONE[1]}\n\n{TWO[1]}\n", [[f"{ONE[0]}\n{ONE[1]}"], [TWO[1]]]),
    "plain text in jsonl": ("a.jsonl", jsonl({"text": ONE[1]}, {"text": TWO[1]}), [[ONE[1]], [TWO[1]]]),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_every_encoding(file, layout, encoding):
    name, content, expected = LAYOUTS[layout]
    content = content.removeprefix("\ufeff")
    path = file(content.encode(encoding), name)
    rows, said = read(path)
    assert contents(rows) == (expected or [[ONE[0], "不超过六个月。"], [*TWO]])
    assert any("read as GB18030, because it is not UTF-8: a" in line for line in said) == (
        encoding == "gb18030" and not content.isascii()
    )
    assert all(row.where.startswith(f"{path}:") for row in rows)


def test_long_json_list_on_one_line_is_streamed(file):
    rows = [{"q": f"{i}?", "a": f"{i}" * 100_000} for i in range(10, 110)]  # 20 MB: more than one row may have
    assert contents(read(file(json.dumps({"data": rows}), "a.json"))[0]) == [[row["q"], row["a"]] for row in rows]


PEAKS = """
import sys, tracemalloc
from jlora.data.readers.files import iter_conversations
for path in sys.argv[1:]:
    for count in (lambda rows: sum(1 for _ in rows), lambda rows: len(list(rows))):
        tracemalloc.start()
        rows = count(iter_conversations(path, "train_data_dir"))
        print(rows, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
"""


def test_files_are_streamed(file):
    pairs = [(f"{i}?", f"{i} " + "b" * 20_000) for i in range(1000)]
    rows = [{"q": q, "a": a} for q, a in pairs]
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=50)
    files = {
        "a.jsonl": jsonl(*rows),
        "a.json": json.dumps({"data": rows}),
        "a.csv": quoted(",", ("q", "a"), *pairs),
        "a.txt": "".join(f"Q: {q}\nA: {a}\n\n" for q, a in pairs),
        "a.parquet": table.getvalue().to_pybytes(),
        "a.jsonl.gz": gzip.compress(jsonl(*rows).encode()),
    }
    paths = [file(content, name) for name, content in files.items()]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )  # a process of its own: checking types, as the tests do, takes memory
    peaks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [count for count, _ in peaks] == [1000] * 12
    for name, (_, one_by_one), (_, all_at_once) in zip(files, peaks[::2], peaks[1::2], strict=True):
        assert one_by_one < 8e6 < 20e6 < all_at_once, name  # the files have 20 MB


# Lists inside of rows


PAIRED = [["How long?", "Two weeks."], ["When?", "In May."]]
LISTS = {"questions": [q for q, _ in PAIRED], "answers": [a for _, a in PAIRED]}


@pytest.mark.parametrize(
    "text",
    [
        jsonl(LISTS, LISTS),
        json.dumps([LISTS, LISTS]),
        json.dumps(LISTS),
        json.dumps({"question": LISTS["questions"], "answer": LISTS["answers"]}, indent=1),
        jsonl({"prompt": LISTS["questions"], "completion": LISTS["answers"]}),
    ],
)
def test_lists_of_texts_are_paired_not_read_as_turns(file, text):
    rows, said = read(file(text, "rows.json"))
    assert contents(rows) in (PAIRED, PAIRED * 2)
    assert "lists of questions and answers, read as a row for each pair" in said[0]


@pytest.mark.parametrize(
    "row",
    [
        {"questions": ["How long?"], "answers": ["Two weeks.", "14 days."]},
        {"question": ["a?", "b?", "c?"], "answer": ["d", "e"]},
        {"instruction": ["a?", "b?"], "input": "both", "output": ["c", "d"]},
        {"question": ["a?", "b?"], "answer": ["c", "d"], "history": [["e?", "f"]]},
    ],
    ids=str,
)
def test_lists_of_texts_that_cannot_be_paired_are_refused(file, row):
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* cannot pair them. Write a row for each pair"):
        read(file(jsonl(row), "rows.jsonl"))


def test_texts_without_roles_in_a_list_of_turns_are_reported(file):
    rows, said = read(file(jsonl({"conversation": [*PAIRED[0], *PAIRED[1]]}), "rows.jsonl"))
    assert roles(rows) == ["uaua"] and "texts without roles are read as question and answer in turn" in said[0]


SOURCES = [{"title": "Atlas", "text": "page 1"}]
TOOLS = [{"type": "function", "function": {"name": "stock_level"}}]
TURNS = [{"role": "user", "content": "How long?"}, {"role": "assistant", "content": "Two weeks."}]
OWN_ROWS = [
    {"question": "How long?", "answer": "Two weeks.", "sources": SOURCES},
    {"sources": SOURCES, "question": "How long?", "answer": "Two weeks."},
    {"messages": TURNS, "tools": TOOLS, "parallel_tool_calls": False},
    {"tools": TOOLS, "messages": TURNS},
    {"instruction": "How long?", "output": "Two weeks.", "meta": {"editors": [{"name": "Ann"}]}},
]


@pytest.mark.parametrize("row", OWN_ROWS, ids=lambda row: ",".join(row))
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_whose_keys_make_a_row_is_the_row(file, row, count, indent):
    rows, said = read(file("\n".join([json.dumps(row, indent=indent)] * count), "rows.json"))
    assert contents(rows) == [["How long?", "Two weeks."]] * count
    assert any("unused columns" in line for line in said) == (row.keys() != {"tools", "messages"})


def test_an_object_that_holds_rows_is_no_row(file):
    data = {"title": "FAQ", "data": [{"question": q, "answer": a} for q, a in PAIRED]}
    assert contents(read(file(json.dumps(data), "rows.json"))[0]) == PAIRED
    long = {"data": [{"question": "How?", "answer": "So. " * 500}] * 600}  # longer than what is parsed at once
    assert len(read(file(json.dumps(long), "rows.json"))[0]) == 600
