"""Complete runs as a user starts them: real processes, real signals, real files."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import (
    adapter_of,
    command,
    logged,
    losses_of,
    process_options,
    run_module,
    run_program,
    short_run,
    start_module,
    wait_for,
)

from jlora.adapters import provenance


def assert_same(one, other):
    """Asserts that two runs have bit for bit the same adapter and the same logged losses."""
    a, b = adapter_of(one), adapter_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name
    shared = losses_of(one).keys() & losses_of(other).keys()
    assert shared and all(losses_of(one)[s] == losses_of(other)[s] for s in shared)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, pairs):
    """An uninterrupted run of 12 steps with dropout, its config, and a function that changes the config."""
    directory = tmp_path_factory.mktemp("whole")

    def write(name, **changes):
        own = {"lora_dropout": 0.1, "learning_rate": 5e-3, "eval_share": 0.1, "eval_steps": 6}
        values = short_run(tiny, pairs, **{"output": directory / name, **own, **changes})
        file = directory / f"{name}.yaml"
        file.write_text(json.dumps(values))
        return file

    options = process_options(1)
    options["env"] |= {"JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
    train = command("jlora.train", "--config", write("run", sample_questions=1))
    done = subprocess.run(train, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return directory / "run", write, done.stdout


@pytest.mark.slow
def test_a_run_prints_its_progress_and_writes_its_files(whole):
    run, _, said = whole
    for words in (
        "training: 36 examples",
        "held out: 4 examples",
        "Starting a new run",
        "Training for 12 steps on 1 CPU device; ",
        "Compiling the training step for",
        "Held-out loss of the base model before training: ",
        "Step 12 of 12: loss",
        "Held-out loss: ",
        "Question: ",
        f"Exported the adapter from step 12 to {run / 'adapter'}",
        f"ask it:    {sys.executable} -m jlora.generate --adapter {run / 'adapter'} --prompt 'YOUR QUESTION'",
        f"verify it: {sys.executable} -m jlora.export --run {run} --verify",
        f"serve it:  {sys.executable} -m jlora.export --run {run} --for vllm",
    ):
        assert words in said, words
    assert said.rindex("Compiling the") < said.index("Held-out loss of the base model before training: ")
    before, _, rest = said.partition("Step 1 of 12: ")
    assert "Compiling jit" in before and "Compiling" not in rest  # JAX reports each, also for the sample answers
    assert {p.name for p in run.iterdir()} - {".lock"} == {
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
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12]
    assert sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())[-1] == 12


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(whole):
    run, write, _ = whole
    half = run.parent / "second-half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "adapter")
    for path in (half / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 6:
            shutil.rmtree(path)
    done = run_module("jlora.train", "--config", write("second-half"), "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert f"Continuing {half} from step 6, exactly" in done.stdout
    assert_same(run, half)
    assert sorted(losses_of(half)) == list(range(1, 13))
    more = run_program(
        "jlora.train", "--config", write("second-half"), "--config.resume_from_checkpoint=auto", devices=2
    )
    assert more.returncode == 0 and "but not bit for bit, because devices changed from 1 to 2" in more.stdout


@pytest.mark.slow
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
    command = shlex.split(line)
    assert command[3:] == ["--config", str(config), "--config.max_steps=12", "--config.resume_from_checkpoint=auto"]
    if number is signal.SIGINT:
        return
    latest = run_program("jlora.export", "--run", stopped, "--step", "latest")
    assert latest.returncode == 0, latest.stderr
    done = subprocess.run(command, **process_options(1), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert_same(run, stopped)


@pytest.mark.slow
def test_a_warm_start_on_new_rows_needs_a_new_directory(whole, tmp_path, pairs):
    run, write, _ = whole
    more = tmp_path / "more"
    more.mkdir()
    text = (pairs / "train.txt").read_text()
    (more / "train.txt").write_text(text + "\n\nUser: And a new one?\nLawyer: Under Article 1 of the new law, yes.\n")
    config = write("warm", train_data_dir=str(more))
    done = run_program("jlora.train", "--config", config, f"--config.resume_from_checkpoint={run}")
    assert done.returncode == 0, done.stderr
    assert f"Warm start from the adapter of {run}, step " in done.stdout
    assert "with a fresh learning rate schedule (the training data changed)" in done.stdout
    assert "Held-out loss of the starting adapter: " in done.stdout
    assert losses_of(run.parent / "warm")[1] < losses_of(run)[1]
    for changes, words in [
        ([f"--config.output_dir={run}", "--config.resume_from_checkpoint=auto"], "set another output_dir"),
        ([f"--config.resume_from_checkpoint={run}"], "a warm start is a new run and needs its own directory"),
        (
            [f"--config.resume_from_checkpoint={run}", f"--config.output_dir={tmp_path / 'x'}", "--config.lora_rank=8"],
            "lora_rank changed from 4 to 8",
        ),
        (
            [f"--config.resume_from_checkpoint={run}/checkpoints/5", f"--config.output_dir={tmp_path / 'x'}"],
            "checkpoints/5 does not exist. Available steps: ",
        ),
    ]:
        refused = run_program("jlora.train", "--config", config, *changes)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_killed_warm_start_continues_warm(whole):
    run, write, _ = whole
    config, warm = write("warm-killed", save_steps=100, seed=1), run.parent / "warm-killed"
    process = start_module("jlora.train", "--config", config, f"--config.resume_from_checkpoint={run}")
    wait_for(lambda: (warm / "config.json").exists(), process)
    assert (warm / "checkpoints/0").exists()  # a run with a config.json always has its first checkpoint
    process.kill()
    process.communicate()
    done = run_program("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert f"Continuing {warm} from step 0, exactly" in done.stdout
    assert losses_of(warm)[1] < losses_of(run)[1]


@pytest.mark.slow
def test_auto_resume_changes_no_other_directory(whole, tmp_path):
    run, write, _ = whole
    foreign, gutted = tmp_path / "foreign", tmp_path / "gutted"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"precious": 1}')
    shutil.copytree(run, gutted)
    shutil.rmtree(gutted / "checkpoints")
    for place, words in [(foreign, "is not the output_dir of a run"), (gutted, "has no checkpoint to continue from")]:
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        config = write("elsewhere", output_dir=str(place), resume_from_checkpoint="auto")
        done = run_program("jlora.train", "--config", config)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_two_runs_in_one_directory_are_refused(whole):
    run, write, said = whole
    config, shared = write("shared", max_steps=5000), run.parent / "shared"
    process = start_module("jlora.train", "--config", config)
    wait_for(logged(shared, 1), process)
    second = run_program("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    process.terminate()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    before = next(line for line in said.splitlines() if "Held-out loss of the base model before" in line)
    assert f"{before} (cached from an earlier run)" in out
    assert second.returncode == 2 and "Another process is training in output_dir=" in second.stderr, second.stderr


@pytest.mark.slow
def test_a_finished_run_is_not_changed(whole):
    run, _, _ = whole
    before = {p: p.read_bytes() for p in (run / "adapter").iterdir()}
    done = run_program("jlora.train", "--config", run.parent / "run.yaml")
    assert (
        done.returncode == 2
        and "already contains a run" in done.stderr
        and "resume_from_checkpoint=auto" in done.stderr
    )
    done = run_program("jlora.train", "--config", run.parent / "run.yaml", "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert {p: p.read_bytes() for p in (run / "adapter").iterdir()} == before


@pytest.mark.slow
def test_early_stopping_exports_the_best_step_and_reports_overfitting(whole, tmp_path):
    run, write, _ = whole
    for name, answer in (("trained", "yes " * 9), ("held_out", "no " * 9)):  # training on one makes the other worse
        (tmp_path / name).mkdir()
        rows = (f"User: Is {number} {name}?\nAssistant: {answer}" for number in range(8))
        (tmp_path / name / "rows.txt").write_text("\n\n".join(rows))
    config = write(
        "early",
        train_data_dir=str(tmp_path / "trained"),
        eval_data_dir=str(tmp_path / "held_out"),
        eval_share=0,
        max_steps=20,
        eval_steps=2,
        early_stopping_patience=3,
        save_steps=100,
        lora_dropout=0,
    )
    done = run_program("jlora.train", "--config", config)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run.parent / "early/metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]}
    best = min(held_out, key=held_out.get)
    assert max(held_out) == best + 6 < 20
    assert "Stopped early: 3 evaluations without improvement" in done.stderr + done.stdout
    risen = f"Held-out loss has risen since step {best} (likely overfitting)"
    assert f"{risen}\n" in done.stdout and f"{risen}. Exporting the checkpoint from step {best}\n" in done.stdout
    assert f"Exported the adapter from step {best} to " in done.stdout
    again = run_program("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    assert again.returncode == 0 and f"Exported the adapter from step {best} to " in again.stdout
    assert len((run.parent / "early/metrics.jsonl").read_text().splitlines()) == len(lines)  # no further step
    saved = sorted(int(p.name) for p in (run.parent / "early/checkpoints").iterdir() if p.name.isdigit())
    assert best in saved and len(saved) <= 3
    on = run_program(
        "jlora.train", "--config", config, "--config.resume_from_checkpoint=auto", "--config.early_stopping_patience=0"
    )
    assert on.returncode == 0, on.stderr
    step, place = re.search(r"Exported the adapter from step (\d+) to (\S+)", on.stdout).groups()
    assert provenance.exported_step(Path(place)) == int(step)
    assert provenance.exported_step(run.parent / "early/adapter") == best  # the earlier export is kept


@pytest.mark.slow
def test_divergence_stops_the_run_and_names_the_rows(whole):
    run, write, _ = whole
    free = {"save_steps": 1, "warmup_ratio": 0.0, "max_grad_norm": 0.0, "eval_steps": 100}
    # past the largest float32: at once, or in the second step (the adapter norm is about rate x 68, then rate x 113)
    for name, rate, kept in [
        ("inf", 3e38, "no checkpoint was saved before"),
        ("late", 2e17, "the latest checkpoint is from step 1"),
    ]:
        done = run_program("jlora.train", "--config", write(name, learning_rate=rate, **free))
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "Training diverged at step" in done.stderr and "train.txt:" in done.stderr
        assert f"learning_rate={rate:g}" in done.stderr and kept in done.stderr
        assert not (run.parent / name / "adapter").exists()


@pytest.fixture
def filling_disk(tmp_path):
    """A directory, and a function that fills it: a small tmpfs if it can be mounted, else a file-size limit."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", directory]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield directory, lambda process: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        return
    free = lambda: shutil.disk_usage(directory).free  # noqa: E731
    yield directory, lambda process: (directory / "other").write_bytes(b"0" * max(0, free() - 8192))
    subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.slow
def test_a_full_disk_is_reported_and_loses_nothing(whole, filling_disk):
    _, write, _ = whole
    directory, fill = filling_disk
    run = directory / "full"
    config = write("full", output_dir=str(run), save_steps=3, logging_steps=15, eval_share=0.0, max_steps=15)
    process = start_module("jlora.train", "--config", config)
    wait_for(lambda: (run / "checkpoints/3/_CHECKPOINT_METADATA").exists(), process)
    fill(process)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, out + err
    assert "Traceback" not in err and "asyncio" not in err
    assert ("could not be saved" in err or "could not be written" in err) and "is safe" in err
    assert "resume_from_checkpoint=auto" in err
    (directory / "other").unlink(missing_ok=True)
    done = run_program("jlora.train", "--config", config, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert ", exactly" in done.stdout
