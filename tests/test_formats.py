"""Files to conversations: every layout and encoding, what is said about them, and every mistake by file and line."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from jlora.data import formats
from jlora.data.conversation import Message, Reading
from jlora.errors import UserError

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
    return formats.read_conversations(str(path), "train_data_dir", Reading(**reading), said.append), said


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
        assert formats.hash_files(str(tmp_path / "data"), "k", Reading(metadata_path=str(path)))
        path.unlink()
    for content, message in {
        lines + "four.csv,a,b\n": r"meta.csv:4: there is no file 'four.csv' in",
        "file,prompt\none.csv\n": r"meta.csv:2: expected 2 cells, got 1",
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

    class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
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
    with pytest.raises(UserError, match="train_data_dir=tfds:no_such_pairs/train: TFDS has no such data set here"):
        read("tfds:no_such_pairs/train")
    with pytest.raises(UserError, match=r"array_record.*: TFDS stores rows in it: name the directory"):
        read(next(tmp_path.rglob("*.array_record*")))
    train, test = (formats.hash_files(f"tfds:{prepared}/{split}", "k") for split in ("train", "test"))
    assert train != test
