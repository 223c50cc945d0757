"""Rows that are very long: for the base model's context, and for the time of a step."""

import json
import shutil

import pytest
from conftest import run_program

from jlora.models.families import read_config, read_context

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "context"),
    [
        ({}, 2048),
        ({"max_position_embeddings": 8192}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 5120),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, 2048),
        (  # Qwen's models state the length before YaRN, DeepSeek's the one after it
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}},
            8192,
        ),
        (
            {
                "max_position_embeddings": 8192,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
            },
            8192,
        ),
        ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 16384),
        (  # Llama 3.2: the factor is not the ratio of the two lengths
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
    ],
)
def test_the_context_includes_rope_scaling(tiny, tmp_path, changes, context):
    given = json.loads((tiny / "config.json").read_text())
    for key in ("rope_parameters", "rope_scaling", "max_position_embeddings"):
        given.pop(key, None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**given, **changes}))
    assert read_context(file) == context
    read_config(file)


@pytest.fixture
def short_context(tiny, tmp_path):
    """The tiny model with a context of 64 tokens."""
    directory = shutil.copytree(tiny, tmp_path / "short")
    given = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**given, "max_position_embeddings": 64}))
    return directory


@pytest.mark.slow
def test_an_example_beyond_the_context_is_reported(config_file, short_context, tiny, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [f"User: Is {number} long?\nAssistant: {'No. ' * 5}" for number in range(8)]
    (rows / "a.txt").write_text("\n\n".join([*lines, f"User: And this?\nAssistant: {'yes ' * 100}"]))
    config = config_file(base_model=str(short_context), train_data_dir=str(rows), max_steps=1)
    words = "a.txt:25), more than the base model's context of 64 tokens"
    for program in ("jlora.data", "jlora.train"):
        done = run_program(program, "--config", config)
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
        assert "Set max_seq_length=64 with overlong=truncate, split or drop" in done.stdout
    (tmp_path / "held.txt").write_text(f"User: And held out?\nAssistant: {'yes ' * 200}")
    held = f"--config.eval_data_dir={tmp_path / 'held.txt'}"
    assert "held.txt:1), more than" in run_program("jlora.data", "--config", config, held).stdout
    for other in (
        ["--config.max_seq_length=64", "--config.overlong=truncate"],
        ["--config.max_seq_length=64", "--config.overlong=split"],
        [f"--config.base_model={tiny}"],
    ):
        done = run_program("jlora.data", "--config", config, *other)
        assert done.returncode == 0 and "Warning" not in done.stdout, done.stdout
