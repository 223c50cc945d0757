"""Directories with training, held-out and test files: each file is used as its name says, and each is reported."""

import dataclasses
import json

import jax
import pyarrow
import pytest
from test_layouts import contents, jsonl, read

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.config.validation import validate
from jlora.data.readers import files, splits
from jlora.data.tokenizer import load_tokenizer
from jlora.distributed.sharding import make_mesh
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.planning import data_pipeline
from jlora.training import setup


def write(file, *names):
    """Writes each file with one row, whose question is the file's name; returns their directory."""
    paths = [file(jsonl({"question": f"{name}?", "answer": "Yes."}), f"rows/{name}") for name in names]
    return next(folder for folder in paths[0].parents if folder.name == "rows")


def used(directory, **changes):
    """Returns the training and the held-out files, and the lines about them."""
    said = []
    config = dataclasses.replace(Config(train_data_dir=str(directory)), **changes)
    rows, held_out = data_pipeline.read_rows(config, said.append)
    names = [[row.messages[0].content[:-1] for row in some] for some in (rows, held_out)]
    return *names, [line for line in said if "files" in line]


NAMED = [  # training, held-out and test files
    ("train.jsonl", "valid.jsonl", "test.jsonl"),
    ("TRAIN.jsonl", "validation.jsonl", "testing.jsonl"),
    ("train-00000-of-00002.jsonl", "dev-00000-of-00001-9f2ac3d41b7e5a60.jsonl", "test-00000-of-00001.jsonl"),
    ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
    ("train/a.jsonl", "valid/a.jsonl", "test/a.jsonl"),
    ("training_set/law.jsonl", "eval_set/law.jsonl", "testset/law.jsonl"),
    ("law_train.jsonl", "law_heldout.jsonl", "law_test.jsonl"),
    ("train.v2.jsonl", "held-out.v2.jsonl", "test.v2.jsonl"),
    ("train_sft.jsonl", "val_sft.jsonl", "test_sft.jsonl"),
    ("法律训练集.jsonl", "法律验证集.jsonl", "法律测试集.jsonl"),
    ("law1.jsonl", "valid.jsonl", "test.jsonl"),  # a name that says nothing is a training file
    ("train/test_law.jsonl", "eval/train_law.jsonl", "test/law.jsonl"),  # a word alone says more
]


@pytest.mark.parametrize("names", NAMED, ids=lambda names: names[0])
def test_files_are_used_as_their_names_say(file, names):
    train, held_out, test = names
    directory = write(file, *names)
    assert used(directory) == (
        [train],
        [held_out],
        [
            f"train_data_dir: training files: {train}",
            f"train_data_dir: held-out files: {held_out}",
            f"train_data_dir: test files, which are neither trained on nor used to choose a checkpoint: {test}",
        ],
    )
    only_training, _ = read(directory)
    assert contents(only_training) == [[f"{train}?", "Yes."]]


UNNAMED = [
    ("law1.jsonl", "law2.jsonl"),
    ("test.jsonl",),
    ("test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"),
    ("test/a.jsonl", "test/b.jsonl"),
    ("train.jsonl", "more.jsonl"),
    ("covid_test.jsonl", "vaccine.jsonl"),  # a subject, since no file says train
    ("latest.jsonl", "devices.jsonl", "trains.jsonl", "evaluate.jsonl"),
    ("train_test.jsonl", "law.jsonl"),  # says two things
    ("valid.jsonl",),
]


@pytest.mark.parametrize("names", UNNAMED, ids=lambda names: ",".join(names))
def test_names_that_say_nothing_leave_all_files_as_rows(file, names):
    directory = write(file, *names)
    assert used(directory) == (sorted(names), [], [])
    assert used(directory / names[0])[0] == [names[0]]  # a single file is read whatever its name is


def test_without_training_files_all_are_read_and_that_is_reported(file):
    train, held_out, said = used(write(file, "valid.jsonl", "test.jsonl"))
    assert train == ["test.jsonl", "valid.jsonl"] and held_out == []
    assert said == ["train_data_dir: all files are training files, because no name says train: test.jsonl, valid.jsonl"]


@pytest.mark.parametrize("key", ["eval_data_dir", "eval_share"])
def test_a_config_with_other_held_out_rows_leaves_the_held_out_files_out(file, key):
    directory = write(file, "valid.jsonl")
    (directory / "train.jsonl").write_text(jsonl(*({"question": f"{i}??", "answer": "Yes."} for i in range(30))))
    other = file(jsonl({"question": "else??", "answer": "Yes."}), "else.jsonl")
    train, held_out, said = used(directory, **{key: {"eval_data_dir": str(other), "eval_share": 0.3}[key]})
    assert "valid.jsonl" not in [*train, *held_out] and len(held_out) and len(train) > 15
    assert said[1:] == [f"train_data_dir: held-out files, left out because {key} is set: valid.jsonl"]


@pytest.mark.parametrize(
    ("names", "held_out", "said"),
    [
        (
            ("train.jsonl", "valid.jsonl", "test.jsonl"),
            ["valid.jsonl"],
            ["held-out files: valid.jsonl", "files left out: train.jsonl, test.jsonl"],
        ),
        (
            ("train.jsonl", "test.jsonl"),
            ["test.jsonl"],
            ["held-out files, because no name says that a file is held out: test.jsonl", "files left out: train.jsonl"],
        ),
        (("law1.jsonl", "law2.jsonl"), ["law1.jsonl", "law2.jsonl"], []),
        (("train.jsonl",), ["train.jsonl"], []),
    ],
)
def test_eval_data_dir_reads_the_held_out_files(file, names, held_out, said):
    directory = write(file, *names)
    other = file(jsonl({"question": "else?", "answer": "Yes."}), "else.jsonl")
    assert used(other, eval_data_dir=str(directory)) == (
        ["else"],
        held_out,
        [f"eval_data_dir: {line}" for line in said],
    )


def test_many_files_are_counted(file):
    directory = write(file, *(f"train-{i:05}-of-00012.jsonl" for i in range(12)), "test.jsonl")
    assert used(directory)[2][0].endswith("train-00007-of-00012.jsonl and 4 more")


def test_metadata_is_no_row(file, tmp_path):
    directory = write(file, "train.jsonl", "test.jsonl")
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json", ".gitattributes"):
        file(json.dumps({"splits": ["train"]}), f"rows/{name}")
    assert used(directory)[0] == ["train.jsonl"]
    state = write(file, "state.json").parent / "states"
    state.mkdir()
    (state / "state.json").write_text(jsonl({"question": "Capital of Ohio?", "answer": "Columbus."}))
    assert len(read(state)[0]) == 1


def test_the_hash_covers_the_files_that_are_read(file):
    directory = write(file, "train.jsonl", "valid.jsonl", "test.jsonl")

    def hashes():
        return [files.hash_files(str(directory), "k", use=use) for use in (splits.TRAIN, splits.HELD_OUT, splits.EVAL)]

    before = hashes()
    assert before[0] == files.hash_files(str(directory / "train.jsonl"), "k") and before[1] == before[2]
    for name, changed in (
        ("test", (False, False, False)),
        ("valid", (False, True, True)),
        ("train", (True, True, True)),
    ):
        (directory / f"{name}.jsonl").write_text(jsonl({"question": "Changed?", "answer": "Yes."}))
        assert [a != b for a, b in zip(before, hashes(), strict=True)] == [*changed], name


def test_a_run_records_the_files_that_it_reads(file, tiny):
    directory = write(file, "train.jsonl", "valid.jsonl", "test.jsonl")
    config, tokenizer = Config(train_data_dir=str(directory)), load_tokenizer(tiny, "")
    mesh = make_mesh(jax.devices()[:1], {})
    data = setup.make_record(config, tiny, tokenizer, mesh, FLOAT32_COMPUTE)["data"]
    assert data["train"] == files.hash_files(str(directory / "train.jsonl"), "k")
    assert data["held_out"] == files.hash_files(str(directory / "valid.jsonl"), "k")
    asked = files.read_conversations(data["questions"], "k", use=data["question_files"])
    assert contents(asked) == [["valid.jsonl?", "Yes."]]
    shared = setup.make_record(dataclasses.replace(config, eval_share=0.1), tiny, tokenizer, mesh, FLOAT32_COMPUTE)[
        "data"
    ]
    assert (shared["train"], shared["held_out"], shared["question_files"]) == (data["train"], "", "train")


def test_early_stopping_may_use_the_held_out_files(file):
    directory = write(file, "train.jsonl", "valid.jsonl")
    assert used(directory, early_stopping_patience=2)[1] == ["valid.jsonl"]
    assert validate(Config(train_data_dir=str(directory), early_stopping_patience=2)) == []
    (directory / "valid.jsonl").unlink()
    with pytest.raises(UserError, match=r"early_stopping_patience needs held-out rows"):
        used(directory, early_stopping_patience=2)


def test_a_held_out_file_without_rows_is_reported(file):
    directory = write(file, "train.jsonl")
    (directory / "valid.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match=r"train_data_dir=.*rows \(its held-out files\) contains no usable rows"):
        used(directory)


# What `save_to_disk` of the package `datasets` writes


def save_to_disk(directory, pairs):
    directory.mkdir(parents=True)
    batches = pyarrow.Table.from_pylist([{"question": q, "answer": a} for q, a in pairs]).to_batches(max_chunksize=1)
    with pyarrow.ipc.new_stream(directory / "data-00000-of-00001.arrow", batches[0].schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {"question": {"_type": "Value"}}}))


PAIRS = [["How long?", "Two weeks."], ["When?", "In May."]]


def test_a_saved_data_set(tmp_path):
    save_to_disk(tmp_path / "saved", PAIRS)
    rows, said = read(tmp_path / "saved")
    assert contents(rows) == PAIRS and not said and rows[1].where.endswith("data-00000-of-00001.arrow:2")
    assert contents(read(tmp_path / "saved/data-00000-of-00001.arrow")[0]) == PAIRS
    (tmp_path / "saved/cache-0123456789abcdef.arrow").write_bytes(b"a copy that map made")
    assert contents(read(tmp_path / "saved")[0]) == PAIRS


def test_saved_splits(tmp_path):
    save_to_disk(tmp_path / "saved/train", PAIRS[:1])
    save_to_disk(tmp_path / "saved/test", PAIRS[1:])
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    rows, held_out = data_pipeline.read_rows(Config(train_data_dir=str(tmp_path / "saved")), lambda line: None)
    assert contents(rows) == PAIRS[:1] and not held_out


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
def test_an_arrow_file(tmp_path, codec):
    table = pyarrow.Table.from_pylist([{"question": q, "answer": a} for q, a in PAIRS * 200])
    options = pyarrow.ipc.IpcWriteOptions(compression=codec)
    with pyarrow.ipc.new_file(tmp_path / "rows.feather", table.schema, options=options) as writer:
        writer.write_table(table)
    rows, _ = read(tmp_path / "rows.feather")
    assert contents(rows) == PAIRS * 200 and rows[-1].where.endswith("rows.feather:400")


def test_a_broken_arrow_file_is_refused(tmp_path):
    save_to_disk(tmp_path / "saved", PAIRS)
    file = tmp_path / "saved/data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:60], b"ARROW1\0\0" + whole):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"data-00000-of-00001.arrow cannot be read as Arrow after row \d"):
            read(tmp_path / "saved")
    file.write_bytes(b"FEA1" + whole)
    with pytest.raises(UserError, match=r"is a Feather file of the first version. Save it as Parquet"):
        read(tmp_path / "saved")
