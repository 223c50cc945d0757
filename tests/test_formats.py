"""Files to conversations: layouts, encodings, remarks, and errors with file and line."""

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
from jlora.data.checks.report import DataReport
from jlora.data.conversation import Message, ReadOptions
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
    }
    paths = [file(content, name) for name, content in files.items()]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )  # a process of its own: checking types, as the tests do, takes memory
    peaks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [count for count, _ in peaks] == [1000] * 10
    for name, (_, one_by_one), (_, all_at_once) in zip(files, peaks[::2], peaks[1::2], strict=True):
        assert one_by_one < 8e6 < 20e6 < all_at_once, name  # the files have 20 MB


def test_unused_columns_are_reported_once(file):
    _, said = read(file("id,question,answer,source\n1,a?,b,\n2,c?,d,x\n", "a.csv"))
    assert said == ["train_data_dir: unused columns: id (2), source"]
    turns = [{"role": "user", "content": "a?", "name": "Ann"}, {"role": "assistant", "content": "b", "weight": 1}]
    _, said = read(file(jsonl({"messages": turns, "score": 1}), "a.jsonl"))
    assert said == ["train_data_dir: unused columns: messages.name, score"]
    _, said = read(file(json.dumps({"licence": "x", "data": [{"q": "a?", "a": "b"}]}), "a.json"))
    assert said == ["train_data_dir: unused keys: licence"]


def test_columns_set_in_the_config(file):
    path = file("Frage,Antwort,Quelle\na?,b,x\nc?,d,y\n", "a.csv")
    rows, said = read(path, columns={"prompt": "Frage", "response": "Antwort"})
    assert contents(rows) == [["a?", "b"], ["c?", "d"]]
    assert said == ["train_data_dir: unused columns: Quelle (2)"]
    rows, _ = read(path, columns={"prompt": "Frage", "context": "Quelle", "response": "Antwort"})
    assert contents(rows)[0] == ["a?\nx", "b"]
    rows, _ = read(file("x,a?,b\ny,c?,d\n", "a.csv"), columns={"prompt": "2", "response": "3"})
    assert contents(rows) == [["a?", "b"], ["c?", "d"]]
    both = jsonl({"prompt": "a?", "messages": openai(ONE)[0]["messages"], "chosen": "c"})
    rows, _ = read(file(both, "a.jsonl"), columns={"prompt": "prompt", "response": "chosen"})
    assert contents(rows) == [["a?", "c"]]
    two = json.dumps({"train": [{"q": "a?", "a": "b"}], "test": [{"q": "c?", "a": "d"}]})
    rows, said = read(file(two, "a.json"), columns={"rows": "test"})
    assert contents(rows) == [["c?", "d"]] and said == ["train_data_dir: unused keys: train"]


def test_read_options_are_config_keys():
    settings = dataclasses.asdict(Config())
    assert (
        ReadOptions.from_config(settings) == ReadOptions() and set(dataclasses.asdict(ReadOptions())) <= settings.keys()
    )
    assert ReadOptions.from_config({**settings, "columns": {"text": "x"}, "bad_rows": "drop"}) == ReadOptions(
        {"text": "x"}, bad_rows="drop"
    )


def test_role_prefixes_set_in_the_config(file):
    text = "Hinweis: kurz\nMandant: a?\nNote: stays\n[Kanzlei] b\nAnrufer 2: c?\nKanzlei: d\n"
    given = {"system": "Hinweis", "user": "Mandant|Anrufer", "assistant": "[Kanzlei]|Kanzlei"}
    rows, _ = read(file(text + "\nMandant: e?\nKanzlei: f"), role_prefixes=given)
    assert contents(rows) == [["kurz", "a?\nNote: stays", "b", "c?", "d"], ["e?", "f"]]
    turn = {"conversations": [{"from": "Mandant", "value": "a?"}, {"from": "Kanzlei", "value": "b"}]}
    assert roles(read(file(jsonl(turn), "a.jsonl"), role_prefixes=given)[0]) == ["ua"]


def test_plain_text_is_detected_and_reported_or_set(file):
    rows, said = read(file("On leave.\nOf days.\n\n\nOn pay.\n"))
    assert roles(rows) == ["t", "t"] and [row.where[-2:] for row in rows] == [":1", ":5"]
    assert said == ["train_data_dir: training on plain text, because no line starts with a role: rows.txt"]
    path = file("Chapter: one\nsays this.\n\nChapter: two\nUser: not a role here")
    rows, said = read(path, task_type="plain-text")
    assert contents(rows) == [["Chapter: one\nsays this."], ["Chapter: two\nUser: not a role here"]] and not said
    table = file("q,a,content\n1,2,A text.\n", "a.csv")
    assert contents(read(table, task_type="plain-text")[0]) == [["A text."]]
    rows, _ = read(file("q,a,body\n1,2,A text.\n", "a.csv"), columns={"text": "body"})
    assert contents(rows) == [["A text."]]


def test_metadata_path_sets_options_per_file(file, tmp_path):
    file("x,a?,b\n", "data/one.csv")
    file("Mandant: c?\nKanzlei: d\nMandant: e?\nKanzlei: f\n", "data/two.txt")
    file(jsonl({"q": "g?", "a": "h"}), "data/three.jsonl")
    lines = "file,prompt,response\none.csv,2,3\ntwo.txt,Mandant,Kanzlei\n"
    for place in ("data/metadata.csv", "meta.csv"):
        path = file(lines, place)
        rows, _ = read(tmp_path / "data", metadata_path=str(path), train_data_dir=str(tmp_path / "data"))
        assert contents(rows) == [["a?", "b"], ["g?", "h"], ["c?", "d"], ["e?", "f"]]
        assert files.hash_files(str(tmp_path / "data"), "k", ReadOptions(metadata_path=str(path)))
        path.unlink()
    for content, message in {
        lines + "four.csv,a,b\n": r"meta.csv:4: File 'four.csv' does not exist in",
        "file,prompt\none.csv\n": r"meta.csv:2: Expected 2 cells, got 1",
        "file,prompt\none.csv,2\n": r"meta.csv:2: Expected columns for prompt and response, or messages, or text",
        "name,prompt\none.csv,x\n": r"meta.csv:1: Expected the columns file, prompt and .*got \['name', 'prompt'\]",
    }.items():
        path = file(content, "meta.csv")
        with pytest.raises(UserError, match=message):
            read(tmp_path / "data", metadata_path=str(path), train_data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"metadata_path=none.csv: No such file"):
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
    assert said == ["train_data_dir: unused columns: prompt_id (2)"]


@pytest.fixture
def prepared(tmp_path):
    """A data set prepared by TFDS, with two splits, in its own data_dir."""

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
    assert said == ["train_data_dir: unused columns: image (2)"]
    with pytest.raises(UserError, match=rf"Expected tfds:{prepared}/SPLIT, where SPLIT is one of test, train"):
        read(prepared)
    with pytest.raises(UserError, match="where SPLIT is one of test, train"):
        read(f"tfds:{prepared}/dev")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    assert contents(read("tfds:pairs/test")[0]) == [[*TWO]]
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "elsewhere"))
    assert contents(read("tfds:pairs/test")[0]) == [[*TWO]]  # prepared now
    assert list((tmp_path / "elsewhere").rglob("*.array_record*"))
    with pytest.raises(UserError, match="train_data_dir=tfds:no_such_pairs/train: TFDS cannot load this data set"):
        read("tfds:no_such_pairs/train")
    with pytest.raises(UserError, match=r"array_record.* is part of a TFDS data set. Pass its directory"):
        read(next(tmp_path.rglob("*.array_record*")))
    train, test = (files.hash_files(f"tfds:{prepared}/{split}", "k") for split in ("train", "test"))
    assert train != test


TURN = {"role": "user", "content": "a?"}
ANSWER = {"role": "assistant", "content": "b"}
Q = "question,answer\n"
BAD = [
    # text
    ("rows.txt", "", "rows.txt: The file is empty"),
    ("rows.txt", " \n\n", "rows.txt: The file is empty"),
    ("rows.txt", "\ufeff\n", "rows.txt: The file is empty"),
    (
        "rows.txt",
        "User: a?\nLawyer: b\n\nUser: c?\n\nUser: d?\nLawyer: e",
        r"rows.txt:4: This question has no answer: 'c\?'",
    ),
    ("rows.txt", "User: a?\nLawyer: b\n\nUser: c?", "rows.txt:4: This question has no answer"),
    ("rows.txt", "User: a?\nLawyer:\n", "rows.txt:2: The answer is empty"),
    ("rows.txt", "User:\nLawyer: b\n", "rows.txt:1: The question is empty"),
    ("rows.txt", "User: a?\nLawyer: b\0\n", "rows.txt:2: The answer contains a NUL character"),
    (
        "rows.txt",
        "hello\nUser: a?\nLawyer: b\n",
        "rows.txt:1: Expected a line that starts with a role.*'hello'.*plain-text",
    ),
    ("rows.txt", "https://x.y/z\nUser: a?\nLawyer: b", "rows.txt:1: Expected a line that starts with a role"),
    (
        "rows.txt",
        "Staff FAQ\n\nWorker: a?\nCounsel: b\n\nWorker: c?\nCounsel: d",
        "rows.txt:1: Expected a line that starts with a role",
    ),
    (
        "rows.txt",
        "Title: FAQ\nEmployee: a?\nCounsel: b",
        r"Cannot tell which prefixes are the roles\. .*title \(1\).*role_prefixes=",
    ),
    ("rows.txt", "Title: FAQ\nUser: a?\nLawyer: b\nUser: c?\nLawyer: d", "Cannot tell which prefixes are the roles"),
    ("rows.txt", "Topic: x\nEmployee: a?\nCounsel: b\n" * 3, "Cannot tell which prefixes are the roles"),
    ("rows.txt", "Employee: a?\nNote: here.\nExpert: b", "Cannot tell which prefixes are the roles"),
    (
        "rows.txt",
        "User: a?\nLawyer: b\n\n用户：c？\n律师：d\n\n用户：e？\n律师：f",
        "Cannot tell which prefixes are the roles",
    ),
    (
        "rows.txt",
        "User: a?\nLawyer: b\nLawyer: c\n",
        "rows.txt:1: Expected user and assistant turns to alternate, .*Got user, assistant, assistant",
    ),
    ("rows.txt", "Lawyer: b\nUser: a?\nLawyer: c", "rows.txt:1: This answer has no question before it: 'Lawyer: b'"),
    (
        "rows.txt",
        "User: a?\nLawyer: " + ("b" * 4095 + "\n") * 4097,
        r"rows.txt:\d+: The row is longer than 16,777,216 characters",
    ),
    # encodings
    (
        "rows.txt",
        "User: a?\nLawyer: caf\xe9 b".encode("latin-1"),
        "rows.txt:2: Not valid UTF-8, UTF-16 or GB18030. Save .* set encoding",
    ),
    ("rows.txt", "用户：长？\n律师：短".encode()[:-1], "rows.txt:2: Not valid UTF-8, UTF-16 or GB18030"),
    ("rows.txt", "用户：长？\n律师：短".encode("utf-16")[:-1], "rows.txt:2: Not valid utf-16"),
    (
        "rows.txt",
        "勞動契約應以書面為之\n僱主應給付工資".encode("big5"),
        "rows.txt:1: Not valid UTF-8, UTF-16 or GB18030",
    ),
    (
        "rows.txt",
        b"User: a?\nLawyer: \xed\xa0\x80",
        "rows.txt:2: Not valid UTF-8",
    ),  # half a character, as UTF-8 forbids
    ("rows.txt", bytes(range(256)) * 9, r"rows.txt:\d: Not valid UTF-8"),
    (
        "rows.xlsx",
        b"PK\x03\x04....",
        r"rows.xlsx is a zip archive \(.xlsx and .docx files are, too\). Save the table as CSV",
    ),
    ("rows.pdf", b"%PDF-1.7", "rows.pdf is a PDF. Save its text"),
    ("rows.jsonl.gz", b"\x1f\x8b\x08", r"rows.jsonl.gz is compressed with gzip. Decompress it"),
    # JSON
    (
        "rows.jsonl",
        '{"instruction": "a", "output": "b"}\n{broken',
        "rows.jsonl:2: Not valid JSON: Expecting property name",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b"\n{"q": "c", "a": "d"}\n',
        "rows.jsonl:1: Not valid JSON: Expecting ',' delimiter",
    ),
    ("rows.jsonl", '{"q": "a", "a": }', "rows.jsonl:1: Not valid JSON: Expecting value"),
    ("rows.jsonl", '{"q": "a", "a": "b\0"}\n', "rows.jsonl:1: Not valid JSON: Invalid control character"),
    ("rows.jsonl", '{"q": "a", "a": "b\\u0000"}\n', "rows.jsonl:1: The answer contains a NUL character"),
    (
        "rows.jsonl",
        '{"q": "a", "a": "\\ud83d"}\n',
        r"rows.jsonl:1: The answer contains half a character \(a lone surrogate\)",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b", "a": "c"}\n' * 2,
        r"rows.jsonl:1: Not valid JSON: duplicate key 'a'. Also at .*rows.jsonl:2",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "b"}\n{"q": "a", "a": "' + "b" * 50_000_000 + '"}\n',
        "rows.jsonl:2: The row is longer than 16,777,216 characters",
    ),
    (
        "rows.jsonl",
        '{"q": "a", "a": "' + "b" * 50_000_000 + '"}\n',
        "rows.jsonl:1: The row is longer than 16,777,216 characters",
    ),
    ("rows.json", "[" * 100_000, "rows.json:1: Not valid JSON: too deeply nested"),
    ("rows.jsonl", "[1]", "rows.jsonl:1: Expected a JSON object, got int"),
    ("rows.jsonl", "42\n43", "rows.jsonl:1: Expected a JSON object, got int"),
    ("rows.json", '[{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}]', "rows.json:2: Not valid JSON: Expected ',', got '{"),
    ("rows.json", '[{"q": "a", "a": "b"},\n', "rows.json:2: Not valid JSON: Expecting value"),
    ("rows.json", '[{"q": "a", "a": "b"}', "rows.json:1: Not valid JSON: Expected ',', but the file ends"),
    (
        "rows.json",
        '{"train": [{"q": "a", "a": "b"}], "test": [{"q": "c", "a": "d"}]}',
        "Both train and test hold rows. Set columns=.*rows",
    ),
    ("rows.json", "[]", "rows.json contains no usable rows"),
    ("rows.json", '{"data": []}', "rows.json:1: Cannot tell which columns hold question and answer.*Columns: data"),
    (
        "rows.jsonl",
        '{"instruction": "a"}',
        "rows.jsonl:1: Cannot tell which columns .*Set columns=.*Columns: instruction",
    ),
    (
        "rows.jsonl",
        jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "Cannot tell which columns.*Columns: prompt, chosen, rejected",
    ),
    (
        "rows.jsonl",
        jsonl({"question": "a", "prompt": "b", "answer": "c"}),
        "Cannot tell which columns.*Columns: question, prompt, answer",
    ),
    ("rows.jsonl", '{"q": "a", "a": "b", "messages": []}', "Cannot tell which columns hold question and answer"),
    (
        "rows.jsonl",
        '{"instruction": ["a"], "output": "b"}',
        r"rows.jsonl:1: Expected text in 'instruction', got \['a'\]",
    ),
    ("rows.jsonl", '{"instruction": "a", "output": null}', "rows.jsonl:1: The answer is empty"),
    ("rows.jsonl", '{"instruction": "a", "output": 4}', "rows.jsonl:1: Expected text in 'output', got 4"),
    ("rows.jsonl", '{"instruction": "a", "output": " "}', "rows.jsonl:1: The answer is empty"),
    (
        "rows.jsonl",
        jsonl({"q": "a", "a": "b", "history": [["c"]]}),
        r"Expected pairs of question and answer in 'history', got \['c'\]",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN]}), "This question has no answer: 'a"),
    (
        "rows.jsonl",
        jsonl({"messages": [ANSWER, TURN, ANSWER]}),
        "rows.jsonl:1: This answer has no question before it: 'b'",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN, TURN, ANSWER]}), "ending with the assistant. Got user, user, assistant"),
    (
        "rows.jsonl",
        jsonl({"messages": [{"role": "robot", "content": "a"}]}),
        "Unknown role 'robot'. Expected one of",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN, {"role": "tool", "content": "x"}]}), "Unknown role 'tool'"),
    (
        "rows.jsonl",
        jsonl({"messages": [TURN, {**ANSWER, "tool_calls": [1]}]}),
        "has 'tool_calls', which jlora does not support",
    ),
    ("rows.jsonl", jsonl({"messages": [TURN, {**ANSWER, "weight": 0}]}), "has weight 0. Only weight 1 is supported"),
    (
        "rows.jsonl",
        jsonl({"messages": [TURN, {"role": "assistant", "content": None}]}),
        "Expected text in the assistant's message, got None",
    ),
    (
        "rows.jsonl",
        jsonl({"messages": [{"role": "user"}]}),
        "Expected a role and content in each turn of 'messages', got",
    ),
    ("rows.jsonl", '{"messages": []}', "ending with the assistant. Got no turns"),
    ("rows.jsonl", '{"messages": "hi"}', "Expected a list of turns in 'messages', got 'hi'"),
    # tables
    ("rows.csv", Q + "a?\n", r"rows.csv:2: Expected 2 cells, got 1"),
    ("rows.csv", Q + "a?,b,c\n", r"rows.csv:2: Expected 2 cells, got 3. Put quotes around cells that contain ','"),
    ("rows.csv", Q + 'a?,"b\nc?,d\n', "rows.csv:2: Not valid CSV: the quote opened here is never closed"),
    ("rows.csv", Q + 'a?,"b"c\n', "rows.csv:2: Not valid CSV: ',' expected after"),
    ("rows.csv", Q + "a?," + "b" * 200_000, "rows.csv:2: Not valid CSV: a cell is longer than 131,072 characters"),
    ("rows.csv", Q, "rows.csv contains no usable rows"),
    ("rows.csv", Q + "a?,\n", "rows.csv:2: The answer is empty"),
    ("rows.csv", "question,answer,answer\na?,b,c\n", "rows.csv: Two columns are named 'answer'. Rename one"),
    (
        "rows.csv",
        "Frage,Antwort\nWas ist wann fällig?,Nach Artikel 47 sofort.\n",
        "Cannot tell which columns.*Columns: Frage, Antwort. If the file has no header",
    ),
    (
        "rows.csv",
        "1,a?,b\n2,c?,d\n",
        "Cannot tell which columns .*Columns: 1, a., b. If the file has no header, use numbers",
    ),
    ("rows.csv", "a? b\n", "Cannot tell which columns .*Columns: a. b. If"),
    ("rows.parquet", b"PAR1....PAR1", "rows.parquet cannot be read as Parquet after row 0"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[f"{n}-{m[:40]}" for n, _, m in BAD])
def test_bad_rows_are_reported(file, name, content, message):
    with pytest.raises(UserError, match=message):
        read(file(content, name))


def test_settings_that_do_not_match_the_files(file):
    path = file(jsonl({"q": "a?", "a": "b"}), "a.jsonl")
    for settings, message in [
        (
            {"columns": {"prompt": "ask", "response": "a"}},
            "a.jsonl:1: Key columns names the column 'ask', which does not exist. Columns: q, a",
        ),
        ({"columns": {"rows": "data"}}, "a.jsonl: Key columns sets rows to 'data', but no list of rows exists"),
        (
            {"task_type": "plain-text"},
            r"a.jsonl:1: Cannot tell which column holds the text. Set columns=.*Columns: q, a",
        ),
        ({"encoding": "utf-16"}, "a.jsonl:1: Not valid utf-16"),
    ]:
        with pytest.raises(UserError, match=message):
            read(path, **settings)
    assert contents(read(file("User: caf\xe9?\nBot: b".encode("latin-1")), encoding="latin-1")[0]) == [
        ["caf\xe9?", "b"]
    ]
    given = {"user": "Mandant", "assistant": "Kanzlei"}
    with pytest.raises(UserError, match=r"rows.txt:1: Expected a line that starts with a role"):
        read(file("User: a?\nLawyer: b"), role_prefixes=given)


def test_every_bad_row_is_listed_or_dropped_and_counted(file):
    good = {"q": "a?", "a": "b"}
    path = file(jsonl(good, {"q": "", "a": "b"}, good, {"q": "", "a": "c"}, {"x": 1}) + "{", "a.jsonl")
    with pytest.raises(UserError) as caught:
        read(path)
    heading, *named = str(caught.value).split("\n  ")
    assert heading == f"train_data_dir={path}: 4 of 6 rows cannot be used. Fix them, or set bad_rows=drop:"
    assert named[0] == f"{path}:2: The question is empty. Also at {path}:4."
    assert named[1].startswith(f"{path}:5: Cannot tell which columns") and named[2].startswith(
        f"{path}:6: Not valid JSON"
    )
    rows, said = read(path, bad_rows="drop")
    assert contents(rows) == [["a?", "b"]] * 2
    assert said == ["\n  ".join(["train_data_dir: dropped 4 of 6 rows that cannot be used:", *named])]
    with pytest.raises(UserError, match=r"a.jsonl contains no usable rows"):
        read(file("{}\n{}", "a.jsonl"), bad_rows="drop")


def test_bad_paths_are_reported(file, tmp_path):
    def refused(path, message):
        with pytest.raises(UserError, match=message):
            read(path)

    refused(tmp_path / "none", r"train_data_dir=.*none: No such file or directory")
    refused(tmp_path, r"train_data_dir=.*: The directory contains no data files")
    file("User: a?\nLawyer: b", "good/rows.txt")
    for name, make, message in [
        ("loop", lambda p: p.symlink_to(p), r"loop is a broken symbolic link \(Too many levels of symbolic links\)"),
        (
            "dangling.txt",
            lambda p: p.symlink_to("nothing"),
            r"dangling.txt is a broken symbolic link \(No such file or directory\)",
        ),
        ("sub", lambda p: p.symlink_to(p.parent), r"sub is a link to one of its own parent directories"),
        ("pipe.txt", os.mkfifo, r"pipe.txt is not a regular file"),
        (
            "unreadable.txt",
            lambda p: p.symlink_to("/proc/self/mem"),
            r"unreadable.txt cannot be read: Input/output error",
        ),
        (
            "notes.txt",
            lambda p: p.write_text("Read me."),
            r"rows.txt:1 is a conversation, but .*notes.txt:1 is plain text",
        ),
    ]:
        path = tmp_path / "good" / name
        make(path)
        refused(tmp_path / "good", message)
        path.unlink()
    (tmp_path / "linked").symlink_to(tmp_path / "good")  # a valid link is followed
    assert contents(read(tmp_path / "linked")[0]) == [["a?", "b"]]


def test_directory_of_several_formats_is_read_in_order_of_names(file, tmp_path):
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


def test_row_separators_of_text_are_reported_if_ambiguous(file):
    text = "User: one?\nmore of it\nLawyer: first\n\nNote: second, with a colon\nUser: two?\nLawyer: b\n"
    rows, said = read(file(text))  # nothing separates them
    assert contents(rows) == [["one?\nmore of it", "first\n\nNote: second, with a colon"], ["two?", "b"]]
    assert said == ["train_data_dir: every question starts a row, because no blank line separates rows: rows.txt"]
    rows, said = read(file(text + "\nUser: three?\nLawyer: c"))  # a blank line does
    assert [len(row.messages) for row in rows] == [4, 2] and [row.where[-2:] for row in rows] == [":1", ":9"]
    assert said == ["train_data_dir: rows with several questions, because no blank line separates them: rows.txt"]
    rows, said = read(file("User: one?\nLawyer: a\n---\nb\n\nUser: two?\nLawyer: c\n---\n\nUser: three?\nLawyer: d"))
    assert contents(rows) == [["one?", "a\n---\nb", "two?", "c"], ["three?", "d"]] and not said  # a line of --- does


def test_text_that_looks_like_roles_stays_text_and_is_reported(file):
    pair = (
        "Employee: Which?\nNote: two\nlines\nCounsel: One of:\nA: fixed term\nB: open term\nA: again\nsee https://x.y\n"
    )
    rows, _ = read(file(pair + "Employee: And?\nCounsel: No.\n"))
    assert [row.messages[0].content for row in rows] == ["Which?\nNote: two\nlines", "And?"]
    assert rows[0].messages[1].content.startswith("One of:\nA: fixed term\nB: open")
    report = DataReport((), "allow", False)
    assert list(report.inspect(rows)) == rows
    assert "lines that start like a role but are read as text: a (2)" in report.lines()


def test_hash_depends_on_the_bytes(file):
    path = file("User: a?\nLawyer: b")
    before = files.hash_files(str(path), "train_data_dir")
    assert before == files.hash_files(str(path), "train_data_dir")
    file("User: a?\nLawyer: c")
    assert before != files.hash_files(str(path), "train_data_dir")
