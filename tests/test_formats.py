"""Files to conversations: every layout and encoding, what is said about them, and every mistake by file and line."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.checks.report import Survey
from jlora.data.conversation import Message, Reading
from jlora.data.readers import files

PAIR = (Message("user", "What is due?"), Message("assistant", "Under Article 47, pay."))
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"]


@pytest.fixture
def file(tmp_path):
    def write(content, name="rows.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    return write


def read(path, **reading):
    """The conversations, and the lines said."""
    said = []
    return files.read_conversations(str(path), "train_data_dir", Reading(**reading), said.append), said


def contents(rows):
    return [[message.content for message in row.messages] for row in rows]


def roles(rows):
    return ["".join(message.role[0] for message in row.messages) for row in rows]


# Layouts of the same conversations, as offices and public data sets write them.
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
    assert any("read as GB18030: a" in line for line in said) == (encoding == "gb18030" and not content.isascii())
    assert all(row.where.startswith(f"{path}:") for row in rows)


def test_a_long_json_list_on_one_line_is_read_piece_by_piece(file):
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


def test_files_are_streams(file):
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
    }
    paths = [file(content, name) for name, content in files.items()]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )  # a process of its own: checking types, as the tests do, takes memory
    peaks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [count for count, _ in peaks] == [1000] * 10
    for name, (_, one_by_one), (_, all_at_once) in zip(files, peaks[::2], peaks[1::2], strict=True):
        assert one_by_one < 8e6 < 20e6 < all_at_once, name  # the files have 20 MB


def test_columns_that_are_not_used_are_said_once(file):
    _, said = read(file("id,question,answer,source\n1,a?,b,\n2,c?,d,x\n", "a.csv"))
    assert said == ["train_data_dir: columns not used: id (2), source"]
    turns = [{"role": "user", "content": "a?", "name": "Ann"}, {"role": "assistant", "content": "b", "weight": 1}]
    _, said = read(file(jsonl({"messages": turns, "score": 1}), "a.jsonl"))
    assert said == ["train_data_dir: columns not used: messages.name, score"]
    _, said = read(file(json.dumps({"licence": "x", "data": [{"q": "a?", "a": "b"}]}), "a.json"))
    assert said == ["train_data_dir: keys not used: licence"]


def test_columns_named_by_the_config(file):
    path = file("Frage,Antwort,Quelle\na?,b,x\nc?,d,y\n", "a.csv")
    rows, said = read(path, columns={"prompt": "Frage", "response": "Antwort"})
    assert contents(rows) == [["a?", "b"], ["c?", "d"]]
    assert said == ["train_data_dir: columns not used: Quelle (2)"]
    rows, _ = read(path, columns={"prompt": "Frage", "context": "Quelle", "response": "Antwort"})
    assert contents(rows)[0] == ["a?\nx", "b"]
    rows, _ = read(file("x,a?,b\ny,c?,d\n", "a.csv"), columns={"prompt": "2", "response": "3"})
    assert contents(rows) == [["a?", "b"], ["c?", "d"]]
    both = jsonl({"prompt": "a?", "messages": openai(ONE)[0]["messages"], "chosen": "c"})
    rows, _ = read(file(both, "a.jsonl"), columns={"prompt": "prompt", "response": "chosen"})
    assert contents(rows) == [["a?", "c"]]
    two = json.dumps({"train": [{"q": "a?", "a": "b"}], "test": [{"q": "c?", "a": "d"}]})
    rows, said = read(file(two, "a.json"), columns={"rows": "test"})
    assert contents(rows) == [["c?", "d"]] and said == ["train_data_dir: keys not used: train"]


def test_what_is_said_about_reading_is_part_of_the_config():
    settings = dataclasses.asdict(Config())
    assert Reading.of(settings) == Reading() and set(dataclasses.asdict(Reading())) <= settings.keys()
    assert Reading.of({**settings, "columns": {"text": "x"}, "bad_rows": "drop"}) == Reading(
        {"text": "x"}, bad_rows="drop"
    )


def test_prefixes_named_by_the_config(file):
    text = "Hinweis: kurz\nMandant: a?\nNote: stays\n[Kanzlei] b\nAnrufer 2: c?\nKanzlei: d\n"
    given = {"system": "Hinweis", "user": "Mandant|Anrufer", "assistant": "[Kanzlei]|Kanzlei"}
    rows, _ = read(file(text + "\nMandant: e?\nKanzlei: f"), role_prefixes=given)
    assert contents(rows) == [["kurz", "a?\nNote: stays", "b", "c?", "d"], ["e?", "f"]]
    turn = {"conversations": [{"from": "Mandant", "value": "a?"}, {"from": "Kanzlei", "value": "b"}]}
    assert roles(read(file(jsonl(turn), "a.jsonl"), role_prefixes=given)[0]) == ["ua"]


def test_plain_text_is_said_or_asked_for(file):
    rows, said = read(file("On leave.\nOf days.\n\n\nOn pay.\n"))
    assert roles(rows) == ["t", "t"] and [row.where[-2:] for row in rows] == [":1", ":5"]
    assert said == ["train_data_dir: no line begins with a role, so the text itself is trained on: rows.txt"]
    path = file("Chapter: one\nsays this.\n\nChapter: two\nUser: not a role here")
    rows, said = read(path, task_type="plain-text")
    assert contents(rows) == [["Chapter: one\nsays this."], ["Chapter: two\nUser: not a role here"]] and not said
    table = file("q,a,content\n1,2,A text.\n", "a.csv")
    assert contents(read(table, task_type="plain-text")[0]) == [["A text."]]
    rows, _ = read(file("q,a,body\n1,2,A text.\n", "a.csv"), columns={"text": "body"})
    assert contents(rows) == [["A text."]]


def test_metadata_path_says_what_each_file_holds(file, tmp_path):
    file("x,a?,b\n", "data/one.csv")
    file("Mandant: c?\nKanzlei: d\nMandant: e?\nKanzlei: f\n", "data/two.txt")
    file(jsonl({"q": "g?", "a": "h"}), "data/three.jsonl")
    lines = "file,prompt,response\none.csv,2,3\ntwo.txt,Mandant,Kanzlei\n"
    for place in ("data/metadata.csv", "meta.csv"):
        path = file(lines, place)
        rows, _ = read(tmp_path / "data", metadata_path=str(path), train_data_dir=str(tmp_path / "data"))
        assert contents(rows) == [["a?", "b"], ["g?", "h"], ["c?", "d"], ["e?", "f"]]
        assert files.hash_files(str(tmp_path / "data"), "k", Reading(metadata_path=str(path)))
        path.unlink()
    for content, message in {
        lines + "four.csv,a,b\n": r"meta.csv:4: there is no file 'four.csv' in",
        "file,prompt\none.csv\n": r"meta.csv:2: expected 2 cells, got 1",
        "file,prompt\none.csv,2\n": r"meta.csv:2: expected prompt and response, or messages, or text",
        "name,prompt\none.csv,x\n": r"meta.csv:1: expected columns file, prompt and .*got \['name', 'prompt'\]",
    }.items():
        path = file(content, "meta.csv")
        with pytest.raises(UserError, match=message):
            read(tmp_path / "data", metadata_path=str(path), train_data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"metadata_path=none.csv: no such file"):
        read(tmp_path / "data", metadata_path="none.csv")


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_parquet(tmp_path, compression):
    columns = {
        "prompt_id": [1, 2],
        "messages": [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in (ONE, TWO)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train", compression=compression)  # no ending
    rows, said = read(tmp_path / "train")
    assert contents(rows) == PAIRS and rows[1].where == f"{tmp_path / 'train'}:2"
    assert said == ["train_data_dir: columns not used: prompt_id (2)"]


@pytest.fixture
def prepared(tmp_path):
    """A data set as TFDS prepares it, of two splits, in a data_dir of its own."""

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            turns = tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})
            features = {"conversations": turns, "image": tfds.features.Tensor(shape=(2,), dtype=np.uint8)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples([ONE, TWO]), "test": self._generate_examples([TWO])}

        def _generate_examples(self, pairs):
            for i, pair in enumerate(pairs):
                said = [{"from": who, "value": what} for who, what in zip(("human", "gpt"), pair, strict=True)]
                yield i, {"conversations": said, "image": np.zeros(2, np.uint8)}

    builder = Pairs(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_tfds_by_directory_and_by_name(prepared, tmp_path, monkeypatch):
    rows, said = read(f"tfds:{prepared}/train")
    assert sorted(contents(rows)) == sorted(PAIRS) and rows[0].where == "pairs/train:1"
    assert said == ["train_data_dir: columns not used: image (2)"]
    with pytest.raises(UserError, match=rf"expected tfds:{prepared}/SPLIT with a split of test, train"):
        read(prepared)
    with pytest.raises(UserError, match="with a split of test, train"):
        read(f"tfds:{prepared}/dev")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    assert contents(read("tfds:pairs/test")[0]) == [[*TWO]]
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "elsewhere"))
    assert contents(read("tfds:pairs/test")[0]) == [[*TWO]]  # prepared now
    assert list((tmp_path / "elsewhere").rglob("*.array_record*"))
    with pytest.raises(UserError, match="train_data_dir=tfds:no_such_pairs/train: TFDS cannot give it"):
        read("tfds:no_such_pairs/train")
    with pytest.raises(UserError, match=r"array_record.*: TFDS stores rows in it: name the directory"):
        read(next(tmp_path.rglob("*.array_record*")))
    train, test = (files.hash_files(f"tfds:{prepared}/{split}", "k") for split in ("train", "test"))
    assert train != test


TURN = {"role": "user", "content": "a?"}
ANSWER = {"role": "assistant", "content": "b"}
Q = "question,answer\n"
BAD = [
    # text
    ("rows.txt", "", "rows.txt: the file is empty"),
    ("rows.txt", " \n\n", "rows.txt: the file is empty"),
    ("rows.txt", "\ufeff\n", "rows.txt: the file is empty"),
    (
        "rows.txt",
        "User: a?\nLawyer: b\n\nUser: c?\n\nUser: d?\nLawyer: e",
        r"rows.txt:4: this question has no answer: 'c\?'",
    ),
    ("rows.txt", "User: a?\nLawyer: b\n\nUser: c?", "rows.txt:4: this question has no answer"),
    ("rows.txt", "User: a?\nLawyer:\n", "rows.txt:2: the answer is empty"),
    ("rows.txt", "User:\nLawyer: b\n", "rows.txt:1: the question is empty"),
    ("rows.txt", "User: a?\nLawyer: b\0\n", "rows.txt:2: the answer holds a NUL character"),
    (
        "rows.txt",
        "hello\nUser: a?\nLawyer: b\n",
        "rows.txt:1: expected a line that begins with a role.*'hello'.*plain-text",
    ),
    ("rows.txt", "https://x.y/z\nUser: a?\nLawyer: b", "rows.txt:1: expected a line that begins with a role"),
    (
        "rows.txt",
        "Staff FAQ\n\nWorker: a?\nCounsel: b\n\nWorker: c?\nCounsel: d",
        "rows.txt:1: expected a line that begins",
    ),
    (
        "rows.txt",
        "Title: FAQ\nEmployee: a?\nCounsel: b",
        r"which two prefixes are the roles\? .*title \(1\).*role_prefixes=",
    ),
    ("rows.txt", "Title: FAQ\nUser: a?\nLawyer: b\nUser: c?\nLawyer: d", "which two prefixes are the roles"),
    ("rows.txt", "Topic: x\nEmployee: a?\nCounsel: b\n" * 3, "which two prefixes are the roles"),
    ("rows.txt", "Employee: a?\nNote: here.\nExpert: b", "which two prefixes are the roles"),
    ("rows.txt", "User: a?\nLawyer: b\n\n用户：c？\n律师：d\n\n用户：e？\n律师：f", "which two prefixes are the roles"),
    ("rows.txt", "User: a?\nLawyer: b\nLawyer: c\n", "rows.txt:1: expected user and .*got user, assistant, assistant"),
    ("rows.txt", "Lawyer: b\nUser: a?\nLawyer: c", "rows.txt:1: this answer has no question before it: 'Lawyer: b'"),
    (
        "rows.txt",
        "User: a?\nLawyer: " + ("b" * 4095 + "\n") * 4097,
        r"rows.txt:\d+: a row of more than 16,777,216 characters",
    ),
    # encodings
    (
        "rows.txt",
        "User: a?\nLawyer: caf\xe9 b".encode("latin-1"),
        "rows.txt:2: not UTF-8, UTF-16 or GB18030: save .* set encoding",
    ),
    ("rows.txt", "用户：长？\n律师：短".encode()[:-1], "rows.txt:2: not UTF-8, UTF-16 or GB18030"),
    ("rows.txt", "用户：长？\n律师：短".encode("utf-16")[:-1], "rows.txt:2: not utf-16"),
    ("rows.txt", "勞動契約應以書面為之\n僱主應給付工資".encode("big5"), "rows.txt:1: not UTF-8, UTF-16 or GB18030"),
    ("rows.txt", b"User: a?\nLawyer: \xed\xa0\x80", "rows.txt:2: not UTF-8"),  # half a character, as UTF-8 forbids
    ("rows.txt", bytes(range(256)) * 9, r"rows.txt:\d: not UTF-8"),
    ("rows.xlsx", b"PK\x03\x04....", r"rows.xlsx is a zip archive \(.xlsx and .docx are\): save the table as CSV"),
    ("rows.pdf", b"%PDF-1.7", "rows.pdf is a PDF: save its text"),
    ("rows.jsonl.gz", b"\x1f\x8b\x08", r"rows.jsonl.gz is compressed \(gzip\): unpack it"),
    # JSON
    ("rows.jsonl", '{"instruction": "a", "output": "b"}\n{broken', "rows.jsonl:2: not JSON: Expecting property name"),
    ("rows.jsonl", '{"q": "a", "a": "b"\n{"q": "c", "a": "d"}\n', "rows.jsonl:1: not JSON: Expecting ',' delimiter"),
    ("rows.jsonl", '{"q": "a", "a": }', "rows.jsonl:1: not JSON: Expecting value"),
    ("rows.jsonl", '{"q": "a", "a": "b\0"}\n', "rows.jsonl:1: not JSON: Invalid control character"),
    ("rows.jsonl", '{"q": "a", "a": "b\\u0000"}\n', "rows.jsonl:1: the answer holds a NUL character"),
    (
        "rows.jsonl",
        '{"q": "a", "a": "\\ud83d"}\n',
        r"rows.jsonl:1: the answer holds half a character \(a lone surrogate\)",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b", "a": "c"}\n' * 2,
        r"rows.jsonl:1: not JSON: the key .a. stands twice \(also .*rows.jsonl:2\)",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b"}\n{"q": "a", "a": "' + "b" * 50_000_000 + '"}\n',
        "rows.jsonl:2: a row of more than 16,777,216 characters",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "' + "b" * 50_000_000 + '"}\n',
        "rows.jsonl:1: a row of more than 16,777,216 characters",
    ),
    ("rows.json", "[" * 100_000, "rows.json:1: not JSON: too deeply nested"),
    ("rows.jsonl", "[1]", "rows.jsonl:1: expected an object, got int"),
    ("rows.jsonl", "42\n43", "rows.jsonl:1: expected an object, got int"),
    ("rows.json", '[{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}]', "rows.json:2: not JSON: expected ',', got '{"),
    ("rows.json", '[{"q": "a", "a": "b"},\n', "rows.json:2: not JSON: Expecting value"),
    ("rows.json", '[{"q": "a", "a": "b"}', "rows.json:1: not JSON: expected ',', the file ends"),
    (
        "rows.json",
        '{"train": [{"q": "a", "a": "b"}], "test": [{"q": "c", "a": "d"}]}',
        "rows lie under train and under test.*rows",
    ),
    ("rows.json", "[]", "rows.json: no rows in it"),
    ("rows.json", '{"data": []}', r"rows.json:1: which column asks and which answers\?.*got data"),
    ("rows.jsonl", '{"instruction": "a"}', r"rows.jsonl:1: which column asks .*columns=.*got instruction"),
    (
        "rows.jsonl",
        jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "which column.*got prompt, chosen, rejected",
    ),
    (
        "rows.jsonl",
        jsonl({"question": "a", "prompt": "b", "answer": "c"}),
        "which column asks.*got question, prompt, answer",
    ),
    ("rows.jsonl", '{"q": "a", "a": "b", "messages": []}', "which column asks and which answers"),
    ("rows.jsonl", '{"instruction": ["a"], "output": "b"}', r"rows.jsonl:1: instruction is \['a'\]; expected text"),
    ("rows.jsonl", '{"instruction": "a", "output": null}', "rows.jsonl:1: the answer is empty"),
    ("rows.jsonl", '{"instruction": "a", "output": 4}', "rows.jsonl:1: output is 4; expected text"),
    ("rows.jsonl", '{"instruction": "a", "output": " "}', "rows.jsonl:1: the answer is empty"),
    ("rows.jsonl", jsonl({"q": "a", "a": "b", "history": [["c"]]}), r"history holds \['c'\]; expected pairs"),
    ("rows.jsonl", jsonl({"messages": [TURN]}), "this question has no answer: 'a"),
    (
        "rows.jsonl",
        jsonl({"messages": [ANSWER, TURN, ANSWER]}),
        "rows.jsonl:1: this answer has no question before it: 'b'",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN, TURN, ANSWER]}), "the assistant last; got user, user, assistant"),
    (
        "rows.jsonl",
        jsonl({"messages": [{"role": "robot", "content": "a"}]}),
        "the role 'robot' is unknown; expected one of",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN, {"role": "tool", "content": "x"}]}), "the role 'tool' is unknown"),
    ("rows.jsonl", jsonl({"messages": [TURN, {**ANSWER, "tool_calls": [1]}]}), "has tool_calls, which is not read"),
    ("rows.jsonl", jsonl({"messages": [TURN, {**ANSWER, "weight": 0}]}), "has weight=0; expected 1"),
    (
        "rows.jsonl",
        jsonl({"messages": [TURN, {"role": "assistant", "content": None}]}),
        "assistant's message is None; expected text",
    ),
    ("rows.jsonl", jsonl({"messages": [{"role": "user"}]}), "a turn of messages needs a role and its content"),
    ("rows.jsonl", '{"messages": []}', "the assistant last; got no message"),
    ("rows.jsonl", '{"messages": "hi"}', "messages is 'hi'; expected a list of turns"),
    # tables
    ("rows.csv", Q + "a?\n", r"rows.csv:2: expected 2 cells, got 1"),
    ("rows.csv", Q + "a?,b,c\n", r"rows.csv:2: expected 2 cells, got 3: put quotes around a cell that holds ','"),
    ("rows.csv", Q + 'a?,"b\nc?,d\n', "rows.csv:2: not CSV: a quote that is opened here is never closed"),
    ("rows.csv", Q + 'a?,"b"c\n', "rows.csv:2: not CSV: ',' expected after"),
    ("rows.csv", Q + "a?," + "b" * 200_000, "rows.csv:2: not CSV: a cell of more than 131,072 characters"),
    ("rows.csv", Q, "rows.csv: no rows in it"),
    ("rows.csv", Q + "a?,\n", "rows.csv:2: the answer is empty"),
    ("rows.csv", "question,answer,answer\na?,b,c\n", "rows.csv: two columns are called 'answer': rename one"),
    (
        "rows.csv",
        "Frage,Antwort\nWas ist wann fällig?,Nach Artikel 47 sofort.\n",
        "which column asks.*got Frage, Antwort; without",
    ),
    ("rows.csv", "1,a?,b\n2,c?,d\n", "which column asks .*got 1, a., b; without a header, name columns by number"),
    ("rows.csv", "a? b\n", "which column asks .*got a. b; without"),
    ("rows.parquet", b"PAR1....PAR1", "rows.parquet: not Parquet after row 0"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{n}-{m[:40]}" for n, _, m in BAD])
def test_bad_rows_are_named(file, name, content, message):
    with pytest.raises(UserError, match=message):
        read(file(content, name))


def test_settings_that_do_not_fit_the_files(file):
    path = file(jsonl({"q": "a?", "a": "b"}), "a.jsonl")
    for settings, message in [
        (
            {"columns": {"prompt": "ask", "response": "a"}},
            "a.jsonl:1: columns names 'ask', which is not there; got q, a",
        ),
        ({"columns": {"rows": "data"}}, "a.jsonl: columns names the rows 'data', and no list of them is there"),
        ({"task_type": "plain-text"}, r"a.jsonl:1: which column is the text\? Set columns=.*got q, a"),
        ({"encoding": "utf-16"}, "a.jsonl:1: not utf-16"),
    ]:
        with pytest.raises(UserError, match=message):
            read(path, **settings)
    assert contents(read(file("User: caf\xe9?\nBot: b".encode("latin-1")), encoding="latin-1")[0]) == [
        ["caf\xe9?", "b"]
    ]
    given = {"user": "Mandant", "assistant": "Kanzlei"}
    with pytest.raises(UserError, match=r"rows.txt:1: expected a line that begins with a role"):
        read(file("User: a?\nLawyer: b"), role_prefixes=given)


def test_every_bad_row_is_named_or_dropped_and_counted(file):
    good = {"q": "a?", "a": "b"}
    path = file(jsonl(good, {"q": "", "a": "b"}, good, {"q": "", "a": "c"}, {"x": 1}) + "{", "a.jsonl")
    with pytest.raises(UserError) as caught:
        read(path)
    heading, *named = str(caught.value).split("\n  ")
    assert heading == f"train_data_dir={path}: 4 of 6 rows cannot be used (mend them, or set bad_rows=drop):"
    assert named[0] == f"{path}:2: the question is empty (also {path}:4)"
    assert named[1].startswith(f"{path}:5: which column asks") and named[2].startswith(f"{path}:6: not JSON")
    rows, said = read(path, bad_rows="drop")
    assert contents(rows) == [["a?", "b"]] * 2
    assert said == ["\n  ".join(["train_data_dir: 4 of 6 rows cannot be used and are dropped:", *named])]
    with pytest.raises(UserError, match=r"no rows in it that can be used"):
        read(file("{}\n{}", "a.jsonl"), bad_rows="drop")


def test_bad_places_are_named(file, tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            read(path)

    refused(tmp_path / "none", r"train_data_dir=.*none: no such file or directory")
    refused(tmp_path, r"train_data_dir=.*: no file in this directory")
    file("User: a?\nLawyer: b", "good/rows.txt")
    for name, make, message in [
        ("loop", lambda p: p.symlink_to(p), r"loop leads nowhere \(Too many levels of symbolic links\)"),
        (
            "dangling.txt",
            lambda p: p.symlink_to("nothing"),
            r"dangling.txt leads nowhere \(No such file or directory\)",
        ),
        ("sub", lambda p: p.symlink_to(p.parent), r"sub is a link to a directory above it"),
        ("pipe.txt", os.mkfifo, r"pipe.txt is not a file \(a pipe or a device\?\)"),
        (
            "unreadable.txt",
            lambda p: p.symlink_to("/proc/self/mem"),
            r"unreadable.txt cannot be read: Input/output error",
        ),
        (
            "notes.txt",
            lambda p: p.write_text("Read me."),
            r"rows.txt:1 is a conversation, and .*notes.txt:1 is plain text",
        ),
    ]:
        path = tmp_path / "good" / name
        make(path)
        refused(tmp_path / "good", message)
        path.unlink()
    (tmp_path / "linked").symlink_to(tmp_path / "good")  # a link that leads somewhere is followed
    assert contents(read(tmp_path / "linked")[0]) == [["a?", "b"]]


def test_a_folder_of_several_formats_in_the_order_of_names(file, tmp_path):
    file("User: a?\nLawyer: b", "all/b.TXT")
    file(Q + "c?,d\n".encode("utf-16").decode("utf-16"), "all/a.csv")
    file(jsonl({"q": "e?", "a": "f"}), "all/sub.jsonl")
    for name in (".DS_Store", ".hidden.txt", "Thumbs.db", "README.md", "LICENSE"):
        file("User: not read\nLawyer: b", f"all/{name}")
    file("User: not read\nLawyer: b", ".ipynb_checkpoints/b.txt").parent.rename(tmp_path / "all/.ipynb_checkpoints")
    rows, said = read(tmp_path / "all")
    assert contents(rows) == [["c?", "d"], ["a?", "b"], ["e?", "f"]] and not said


@pytest.mark.parametrize(
    "text",
    [
        "User: What is due?\nLawyer: Under Article 47, pay.\n",
        "user： What is due?\nlawyer：Under Article 47, pay.",
        "Q: What is due?\r\nA: Under Article 47, pay.\r\n",
        "\ufeffQuestion: What is due?\n\n\nAnswer: Under Article 47, pay.\n\n\n",
        "用户：What is due?\n律师：Under Article 47, pay.",
        "Worker: What is due?\nCounsel: Under Article 47, pay.",  # unknown names: the first asks, the next answers
    ],
)
def test_text_prefixes(file, text):
    (row,) = read(file(text))[0]
    assert row.messages == PAIR


def test_what_divides_rows_of_text_is_said_where_it_might_be_meant_otherwise(file):
    text = "User: one?\nmore of it\nLawyer: first\n\nNote: second, with a colon\nUser: two?\nLawyer: b\n"
    rows, said = read(file(text))  # nothing divides them
    assert contents(rows) == [["one?\nmore of it", "first\n\nNote: second, with a colon"], ["two?", "b"]]
    assert said == ["train_data_dir: no blank line divides rows, so each question begins one: rows.txt"]
    rows, said = read(file(text + "\nUser: three?\nLawyer: c"))  # a blank line does
    assert [len(row.messages) for row in rows] == [4, 2] and [row.where[-2:] for row in rows] == [":1", ":9"]
    assert said == ["train_data_dir: rows of several questions, as no blank line divides them: rows.txt"]
    rows, said = read(file("User: one?\nLawyer: a\n---\nb\n\nUser: two?\nLawyer: c\n---\n\nUser: three?\nLawyer: d"))
    assert contents(rows) == [["one?", "a\n---\nb", "two?", "c"], ["three?", "d"]] and not said  # a line of --- does


def test_text_that_looks_like_roles_stays_text_and_is_said(file):
    pair = (
        "Employee: Which?\nNote: two\nlines\nCounsel: One of:\nA: fixed term\nB: open term\nA: again\nsee https://x.y\n"
    )
    rows, _ = read(file(pair + "Employee: And?\nCounsel: No.\n"))
    assert [row.messages[0].content for row in rows] == ["Which?\nNote: two\nlines", "And?"]
    assert rows[0].messages[1].content.startswith("One of:\nA: fixed term\nB: open")
    survey = Survey((), "allow", False)
    assert list(survey.watch(rows)) == rows
    assert "lines that begin like a role but are read as text: a (2)" in survey.lines()


def test_hash_follows_the_bytes(file):
    path = file("User: a?\nLawyer: b")
    before = files.hash_files(str(path), "train_data_dir")
    assert before == files.hash_files(str(path), "train_data_dir")
    file("User: a?\nLawyer: c")
    assert before != files.hash_files(str(path), "train_data_dir")
