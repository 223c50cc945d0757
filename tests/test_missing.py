"""Cells without a value, such as nan and None, are no answers; the words in a sentence are."""

import json

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from test_layouts import contents, jsonl, read

from jlora.common.errors import UserError

ROW = {"question": "How long?", "answer": "Two weeks."}
WORDS = ["nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "n/a", "NA", "#N/A"]


def write(tmp_path, kind, rows):
    """Writes rows as a table of this kind and returns its path."""
    path = tmp_path / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        delimiter = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("".join(delimiter.join(cells) + "\n" for cells in [rows[0], *(row.values() for row in rows)]))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("part", ["question", "answer"])
def test_a_cell_without_a_value_is_empty(tmp_path, kind, part):
    path = write(tmp_path, kind, [ROW, *({**ROW, part: word} for word in [*WORDS, " nan "])])
    with pytest.raises(UserError, match=rf"The {part} is empty. In a table, nan means no value"):
        read(path)
    rows, (said,) = read(path, bad_rows="drop")
    assert contents(rows) == [["How long?", "Two weeks."]] and f"dropped {len(WORDS) + 1} of" in said


def test_the_words_in_a_sentence_and_other_words_stay(tmp_path):
    pairs = [("who is nan?", "nan is a grandmother."), ("Any?", "None."), ("Sodium?", "Na"), ("How many?", "none")]
    path = write(tmp_path, "csv", [{"question": q, "answer": a} for q, a in pairs])
    rows, said = read(path)
    assert contents(rows) == [list(pair) for pair in pairs] and not said


def test_optional_columns_without_a_value_are_counted(tmp_path):
    rows = [{"system": "nan", "instruction": "How long?", "input": "", "output": "Two weeks."}]
    rows += [{**rows[0], "system": "Be brief.", "input": word} for word in ("None", "nan", "the break")]
    rows += [{**rows[0], "system": "", "instruction": "NaN", "input": "In May?"}]
    read_rows, said = read(write(tmp_path, "csv", rows))
    asked = ["Be brief.", "How long?", "Two weeks."]
    expected = [asked[1:], asked, asked, ["Be brief.", "How long?\nthe break", "Two weeks."], ["In May?", "Two weeks."]]
    assert contents(read_rows) == expected
    assert said == ["train_data_dir: values such as nan or None, read as empty: system, input (2), instruction"]


def test_text_in_json_stays_and_is_reported(file):
    """JSON has its own null, so whoever writes a text means the word."""
    rows, said = read(file(jsonl({**ROW, "answer": "None"}, ROW), "rows.jsonl"))
    assert contents(rows)[0] == ["How long?", "None"]
    assert said == [
        "train_data_dir: texts such as nan or None, kept as words, because the format has its own null: answer"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_bare_numbers_of_json_without_a_value_are_empty(file, value):
    with pytest.raises(UserError, match=r"rows.jsonl:1: The answer is empty"):
        read(file(json.dumps({**ROW, "answer": value}), "rows.jsonl"))
    rows, said = read(file(json.dumps({**ROW, "context": value, "id": value}), "rows.jsonl"))
    assert contents(rows) == [["How long?", "Two weeks."]]
    assert any("read as empty: context" in line for line in said) == (value is not None)


def test_a_column_of_numbers_without_a_value_is_empty(tmp_path):
    table = pyarrow.table({"question": ["How long?"], "answer": ["Two weeks."], "context": np.array([np.nan])})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows, _ = read(tmp_path / "rows.parquet")
    assert contents(rows) == [["How long?", "Two weeks."]]


def test_plain_text_in_a_table(tmp_path):
    path = write(tmp_path, "csv", [{"id": "1", "text": "It rains."}, {"id": "2", "text": "nan"}])
    with pytest.raises(UserError, match=r"rows.csv:3: The text is empty"):
        read(path)
