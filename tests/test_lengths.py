"""Rows that are very long: for the base model's context, and for the time of a step."""

import dataclasses
import json
import re
import shutil

import jax
import pytest
from programs import run_program, short_run

from jlora.adapters.spec import NO_ADAPTER
from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE, UNKNOWN
from jlora.models.families import read_config, read_context
from jlora.planning import hardware, step_time
from jlora.planning.forecast import count_work, make_job
from jlora.steps.programs import placed_shapes

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


@pytest.fixture
def long_rows(tiny, tmp_path):
    """The config of a run with one row of 150,000 tokens, hours of work for any CPU, and short ones."""
    file, config = tmp_path / "rows.txt", tmp_path / "config.yaml"
    file.write_text("\n\n".join(["law " * 20] * 3 + ["law " * 150_000]))
    changes = {"task_type": "plain-text", "max_seq_length": 200_000, "batch_size": 2}
    config.write_text(json.dumps(short_run(tiny, file, tmp_path / "run", **changes)))
    return config


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_refused(long_rows, tmp_path):
    done = run_program("jlora.train", "--config", long_rows)
    assert done.returncode == 2 and not (tmp_path / "run").exists() and "Compil" not in done.stdout
    for words in (
        r"step takes about \d+ (minutes|hours) \(1 x 15\d{4} tokens, without compiling",
        r"More than 10 minutes is refused",
        r"The longest example has 15\d{4} tokens \(.*rows.txt:7\)",
        r"Set a smaller max_seq_length with overlong=truncate, split or drop, or a smaller batch_size, or use",
        r"set --config.yes=true",
    ):
        assert re.search(words, done.stderr), done.stderr
    shorter = ["--config.max_seq_length=200", "--config.overlong=drop", "--config.max_steps=1"]
    done = run_program("jlora.train", "--config", long_rows, *shorter)
    assert done.returncode == 0 and "step takes about" not in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_yes_trains_nevertheless(config_file, tmp_path, monkeypatch):
    """Every step counts as long here. A normal step is not even timed."""
    timed = []
    monkeypatch.setattr(step_time, "_best_seconds", lambda *of: timed.append(of) or 1e-3)
    config = config_file(max_steps=2, save_steps=1)
    assert run_program("jlora.train", "--config", config, "--config.max_steps=1").returncode == 0 and not timed
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(step_time, "LONG", 0.0)
    monkeypatch.setattr(step_time, "BOUND", 0.0)
    refused = run_program("jlora.train", "--config", config)
    assert refused.returncode == 2 and "The first step takes about" in refused.stderr and timed
    done = run_program("jlora.train", "--config", config, "--config.yes=true")
    assert done.returncode == 0 and "The first step takes about" in done.stdout, done.stderr
    for left in ("adapter", "checkpoints/2"):
        shutil.rmtree(tmp_path / "run" / left)
    monkeypatch.setattr(step_time, "BOUND", 600.0)
    again = run_program("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    assert again.returncode == 0 and "from step 1, exactly" in again.stdout, again.stderr


def test_the_estimate_is_linear_in_the_work(tiny, monkeypatch):
    """Four devices of a CPU share its cores; what even a slow CPU does at once is not timed."""
    monkeypatch.setattr(step_time, "_best_seconds", lambda *_: 1e-3)
    model = read_config(tiny)

    def estimate(devices, length):
        target = hardware.Target("here", jax.devices()[:devices], None, None)
        config, layout = dataclasses.replace(Config(), batch_size=4, mesh={}), (1, 4, Shape(length, 8), UNKNOWN)
        job = make_job(config, model, FLOAT32_COMPUTE, target, lambda *_: layout)
        _, _, base = hf_loader.abstract_model(model, NO_ADAPTER, job.compute)
        work = count_work(job, placed_shapes(base, job.mesh, "base"), [])
        assert 0 < work.attention < work.flops
        return step_time.estimate_seconds(job, work)

    assert estimate(1, 512) == 0
    one = 4 * 3 * 4 * 4 * 64 * 3.5 * 40_000**2 * 1e-3 / (4 * 512 * 1024 * 4 * 64)  # rows, layers, FLOPs, N, H, passes
    assert one < estimate(1, 40_000) < 1.1 * one and 3.8 < estimate(1, 80_000) / estimate(1, 40_000) < 4
    assert estimate(4, 40_000) == pytest.approx(estimate(1, 40_000))
