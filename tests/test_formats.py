"""Files to conversations: layouts, encodings, remarks, and errors with file and line."""

import dataclasses
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from test_bad_rows import Q
from test_layouts import ONE, PAIRS, TWO, contents, jsonl, openai, read, roles

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.checks.report import DataReport
from jlora.data.conversation import Message, ReadOptions
from jlora.data.readers import files

PAIR = (Message("user", "What is due?"), Message("assistant", "Under Article 47, pay."))


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
    assert ReadOptions.from_config(settings) == ReadOptions()
    assert set(dataclasses.asdict(ReadOptions())) - {"group_column"} <= settings.keys()  # which a sweep sets itself
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
    ],
)
def test_text_prefixes(file, text):
    (row,) = read(file(text))[0]
    assert row.messages == PAIR


def test_unknown_prefixes_that_repeat_are_read_as_roles_and_reported(file):
    pair = "Worker: What is due?\nCounsel: Under Article 47, pay.\n\n"
    rows, said = read(file(pair * 2))
    assert [row.messages for row in rows] == [PAIR] * 2
    assert said[0].startswith("train_data_dir: 'worker' asks and 'counsel' answers, by the order of the lines")
    assert "asks and" not in " ".join(read(file(pair.replace("Worker", "User").replace("Counsel", "Lawyer") * 2))[1])


@pytest.mark.parametrize(
    "text",
    [
        "Worker: What is due?\nCounsel: Under Article 47, pay.",
        "Title: Sea Songs\nAuthor: Nobody\n\nThe harbour sleeps.\n\nThe boats go out.\n",
        "---\ntitle: My notes\ndate: 2024-01-01\n---\n\nBread is baked from flour.\n",
        "categories:\n- shop\nconversations:\n- - Are you open?\n  - Yes until six.\n",
        "From: ann\nTo: bob\nSubject: lunch\n\nAt noon?\n",
    ],
)
def test_names_that_do_not_repeat_are_no_dialogue(file, text):
    with pytest.raises(UserError, match=r"Cannot tell which prefixes are the roles.*role_prefixes=.*=plain-text"):
        read(file(text))
    assert read(file(text), task_type="plain-text")[0]


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
