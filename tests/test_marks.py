"""Marks that say what must not be learned are obeyed, in turns and in whole rows."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_layouts import contents, jsonl, read
from test_strangers import ROW

from jlora.common.errors import UserError
from jlora.data.conversation import Conversation, Message
from jlora.data.loss_mask import encode_conversation
from jlora.data.token_cache import load_or_tokenize
from jlora.data.tokenizer import end_tokens, load_tokenizer

ASKED, WRONG, RIGHT = "Capital of Peru?", "Quito, I think.", "No: it is Lima."


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny, "")


def turns(**mark):
    """A conversation whose first answer has a mark."""
    asked, again = ({"role": "user", "content": text} for text in (ASKED, "Sure?"))
    answers = ({"role": "assistant", "content": WRONG, **mark}, {"role": "assistant", "content": RIGHT})
    return {"messages": [asked, answers[0], again, answers[1]]}


def trained_text(tokenizer, tiny, row, train_on="assistant"):
    example = encode_conversation(tokenizer, end_tokens(tiny, tokenizer), row, train_on)
    return tokenizer.decode(example.tokens[example.loss_mask])


HIDDEN = [{"train": False}, {"trainable": False}, {"loss": False}, {"weight": 0}, {"weight": 0.0}, {"mask": True}]
HIDDEN += [{"masked": True}, {"train": "false"}, {"loss": 0}, {"train": True, "weight": 0}]
SHOWN = [{}, {"train": True}, {"weight": 1}, {"weight": 1.0}, {"mask": False}, {"loss": 0.35}, {"train": None}]


@pytest.mark.parametrize("mark", HIDDEN, ids=str)
def test_a_marked_answer_stays_in_the_context_but_is_not_trained(file, tokenizer, tiny, mark):
    (row,), said = read(file(jsonl(turns(**mark)), "rows.jsonl"))
    assert trained_text(tokenizer, tiny, row) == f"{RIGHT}<|im_end|>" and WRONG in row.messages[1].content
    assert trained_text(tokenizer, tiny, row, "last") == f"{RIGHT}<|im_end|>" and not said


@pytest.mark.parametrize("mark", SHOWN, ids=str)
def test_other_values_hide_nothing(file, tokenizer, tiny, mark):
    (row,), _ = read(file(jsonl(turns(**mark)), "rows.jsonl"))
    assert trained_text(tokenizer, tiny, row) == f"{WRONG}<|im_end|>{RIGHT}<|im_end|>"


@pytest.mark.parametrize(
    "mark", [{"weight": "1"}, {"weight": -1}, {"mask": [0, 1]}, {"mask": 1}, {"train": "later"}], ids=str
)
def test_a_mark_that_is_not_understood_is_refused(file, mark):
    ((key, value),) = mark.items()
    with pytest.raises(UserError) as error:
        read(file(jsonl(turns(**mark)), "rows.jsonl"))
    assert f"rows.jsonl:1: A turn has {key}={value!r}. Expected" in str(error.value)


def test_marks_contradict_training_on_everything(file, tokenizer, tiny):
    (row,), _ = read(file(jsonl(turns(train=False)), "rows.jsonl"))
    with pytest.raises(UserError, match="marked not to be learned, but train_on=all"):
        trained_text(tokenizer, tiny, row, "all")


BAD = [{"label": False}, {"train": False}, {"trainable": False}, {"loss": False}, {"Label": "false"}]


@pytest.mark.parametrize("mark", BAD, ids=str)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_row_marked_as_bad_is_left_out_and_counted(tmp_path, mark, kind):
    rows = [{**ROW, **dict.fromkeys(mark, True)}, {**ROW, **mark}, {**ROW, **dict.fromkeys(mark, True)}]
    path, texts = tmp_path / f"rows.{kind}", [{key: str(value) for key, value in row.items()} for row in rows]
    if kind == "jsonl":
        path.write_text(jsonl(*rows))
    elif kind == "csv":
        path.write_text("\n".join(",".join(row) for row in [texts[0].keys(), *(row.values() for row in texts)]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)
    kept, said = read(path)
    assert contents(kept) == [[ROW["instruction"], ROW["output"]]] * 2
    (line,) = (line for line in said if "left out" in line)
    assert "a mark says not to learn them" in line and line.endswith(f": {next(iter(mark))}")


def test_a_class_label_is_no_mark(file):
    rows, _ = read(file(jsonl({"text": "The moon is cheese.", "label": "false"}, {"text": "It is.", "label": False})))
    assert len(rows) == 2
    rows, said = read(file(jsonl({**ROW, "label": 0}, {**ROW, "label": 1}), "rows.jsonl"))
    assert len(rows) == 2 and said == ["train_data_dir: unused columns: label (2)"]


def test_a_conversation_with_every_answer_marked_is_left_out(file):
    row = turns(train=False)
    row["messages"][3]["train"] = False
    rows, said = read(file(jsonl(row, turns()), "rows.jsonl"))
    assert len(rows) == 1 and said[0].endswith("(preference training can use them): every answer")
    with pytest.raises(UserError, match=r"(?s)no usable rows.*a mark says not to learn them"):
        read(file(jsonl(row), "rows.jsonl"))


def test_a_changed_mark_is_tokenized_anew(tmp_path, tokenizer, tiny):
    ends, made = end_tokens(tiny, tokenizer), []
    for weight in (1.0, 0.0, 1.0):
        messages = (Message("user", ASKED), Message("assistant", WRONG, weight), Message("user", "?"))
        row = Conversation((*messages, Message("assistant", RIGHT)), "rows:1")
        (example,) = load_or_tokenize(tokenizer, ends, [row], tmp_path, "assistant")
        made.append(np.asarray(example.loss_mask).tolist())
    assert made[0] == made[2] != made[1]
