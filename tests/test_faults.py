"""Faults of storage, processes and losses: only the steps since the last checkpoint are lost."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from programs import adapter_of, process_options, run_program, short_run, start_module, wait_for

from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.steps.train_step import TrainState
from jlora.training import resume
from jlora.training.checkpoint import CHECKSUMS, Checkpoints, Progress, write_record


def state_of(step):
    """A state as the training loop saves it, with a different value at every step."""
    lora = {"layers": {"q_proj": {"lora_A": np.full((2, 4, 8), step, np.float32)}}}
    return TrainState(lora, {"mu": np.full(3, step, np.float32)}, np.array(step, np.int32))


@pytest.fixture
def saved(tmp_path):
    """A run's directory with checkpoints of steps 1 and 2."""
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step), Progress(base_loss=float(step)), None)
    return tmp_path


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def test_a_checkpoint_is_what_was_saved(saved):
    with contextlib.closing(Checkpoints(saved)) as checkpoints:
        assert checkpoints.steps() == [1, 2] and not any(map(checkpoints.find_damage, (1, 2)))
        found = checkpoints.restore(2, state_of(0))
        assert found.step == 2 and (found.optimizer["mu"] == 2).all()
        assert (found.lora["layers"]["q_proj"]["lora_A"] == 2).all() and checkpoints.progress(1).base_loss == 1


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_every_damaged_file_is_detected_and_its_checkpoint_skipped(saved, harm):
    kept, place = saved / "kept", saved / "checkpoints/2"
    shutil.copytree(place, kept)
    files = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
    assert len(files) > 8 and Path(CHECKSUMS) in files
    for file in files:
        if not (place / file).stat().st_size and harm is not Path.unlink:
            continue
        harm(place / file)
        with contextlib.closing(Checkpoints(saved)) as checkpoints:
            assert file.name == CHECKSUMS or str(file) in checkpoints.find_damage(2)
            assert checkpoints.find_damage(2) and not checkpoints.find_damage(1)
            for read in (checkpoints.progress, lambda step: checkpoints.restore(step, state_of(0))):
                with pytest.raises(
                    UserError, match=r"The checkpoint of step 2 .* is damaged .* Other available steps: 1\."
                ):
                    read(2)
            assert checkpoints.best() == 1
            assert checkpoints.intact_steps()[0] == [1]
        shutil.rmtree(place)
        shutil.copytree(kept, place)
    with contextlib.closing(Checkpoints(saved)) as checkpoints:
        assert checkpoints.intact_steps() == ([1, 2], [])


def test_damaged_checkpoints_are_renamed_and_unfinished_ones_removed(saved):
    flip(saved / "checkpoints/2/sha256.json")
    (saved / "checkpoints/.unfinished-abc/new").mkdir(parents=True)
    with contextlib.closing(Checkpoints(saved)) as checkpoints:
        checkpoints.clean_up(keep_intact=True)
        checkpoints.save(state_of(2), Progress(), None)  # the step is repeated
        checkpoints.wait()
        assert not checkpoints.find_damage(2)
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["1", "2", "2.damaged-0"]


def test_a_save_waits_only_for_the_previous_one(saved, monkeypatch):
    with contextlib.closing(Checkpoints(saved)) as checkpoints:
        goes_on, write = threading.Event(), checkpoints._orbax.save
        monkeypatch.setattr(checkpoints._orbax, "save", lambda *a, **k: (goes_on.wait(60), write(*a, **k)))
        checkpoints.save(state_of(3), Progress(), None)
        assert checkpoints.steps() == [1, 2]  # training continues while it is written
        threading.Timer(0.5, goes_on.set).start()
        checkpoints.save(state_of(4), Progress(), None)
        assert goes_on.is_set() and checkpoints.steps()[-1] >= 3
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._orbax, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("the disk left")))
        checkpoints.save(state_of(5), Progress(), None)
        with pytest.raises(UserError, match=r"the disk left.* The checkpoint of step 4 is safe"):
            checkpoints.wait()


@pytest.fixture
def read_only(saved):
    """Makes the checkpoint directory read-only; root can write anywhere except on a read-only mount."""
    place = saved / "checkpoints"
    if os.geteuid():
        place.chmod(0o555)
        yield
        place.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", place, place], capture_output=True).returncode:
        pytest.skip("root can write to every directory, and here root may not mount a read-only one")
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    yield
    subprocess.run(["umount", place], check=True)


def test_a_read_only_directory_is_reported(saved, read_only):
    with contextlib.closing(Checkpoints(saved)) as checkpoints:
        checkpoints.save(state_of(3), Progress(), None)
        with pytest.raises(UserError, match=r"(Read-only|denied).* The checkpoint of step 2 is safe"):
            checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny, pairs):
    """A run of 12 steps, saved at 6 and 12, and a function that writes its config for another directory."""
    directory = tmp_path_factory.mktemp("faults")

    def write(place, **changes):
        file = directory / f"{len(list(directory.iterdir()))}.yaml"
        file.write_text(json.dumps(short_run(tiny, pairs, place, lora_dropout=0.1, **changes)))
        return file

    done = run_program("jlora.train", "--config", write(directory / "run"))
    assert done.returncode == 0, done.stderr
    return directory / "run", write


@pytest.mark.slow
def test_a_run_skips_a_damaged_checkpoint_with_the_same_result(finished, tmp_path):
    run, write = finished
    place = tmp_path / "run"
    shutil.copytree(run, place)
    shutil.rmtree(place / "adapter")
    flip(max((place / "checkpoints/12/lora").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    done = run_program("jlora.train", "--config", write(place), "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert (
        "the checkpoint of step 12 is damaged (lora/" in done.stdout and "differs from what was written" in done.stdout
    )
    assert f"Skipping it\nContinuing {place} from step 6, exactly" in done.stdout
    ours, theirs = adapter_of(place), adapter_of(run)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    for step in ("6", "12", "12.damaged-0"):
        flip(place / "checkpoints" / step / "_CHECKPOINT_METADATA")
    done = run_program("jlora.train", "--config", write(place), "--config.resume_from_checkpoint=auto")
    assert done.returncode == 2 and "the checkpoint of step 6 is damaged" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_moved_run_directory_is_not_recreated(finished, tmp_path):
    _, write = finished
    place = tmp_path / "run"
    process = start_module("jlora.train", "--config", write(place, max_steps=5000, save_steps=5))
    wait_for(lambda: (place / "checkpoints/5").exists(), process)
    place.rename(tmp_path / "elsewhere")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "could not be saved in" in err and "No such file" in err, err
    assert "Traceback" not in err and not place.exists()


@pytest.mark.slow
def test_a_loss_spike_stops_the_run_and_names_the_rows(finished, tmp_path):
    """The loss of random weights hardly changes, so a factor of 0.9 makes every step a spike."""
    _, write = finished
    done = run_program("jlora.train", "--config", write(tmp_path / "run", max_loss_spike=0.9, save_steps=3))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    for words in (
        "The loss jumped at step 11 (",
        "at most in the 10 steps before): loss ",
        "train.txt:",
        "the latest checkpoint is from step",
        "Set max_loss_spike=0 to continue despite such jumps.",
    ):
        assert words in done.stderr, done.stderr
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.slow
def test_random_kills_do_not_change_the_result(monkeypatch, capsys, tiny, pairs):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name, value in process_options(1)["env"].items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("faults", ROOT / "scripts/faults.py")
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    counts = ["--kills", "2", "--terms", "0", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["faults.py", *counts, "--base", str(tiny), "--data", str(pairs)])
    assert faults.main() == 0, capsys.readouterr().out


def test_a_damaged_best_checkpoint_is_no_longer_the_best(saved):
    best = Progress(base_loss=3.0, best_loss=1.0, best_step=2, worse_since=3, worse=1)
    with contextlib.closing(Checkpoints(saved)) as checkpoints:
        checkpoints.save(state_of(3), best, None)
        checkpoints.wait()
        assert checkpoints.progress(3) == best and checkpoints.best() == 2
        flip(saved / "checkpoints/2/sha256.json")
        assert checkpoints.progress(3) == Progress(base_loss=3.0) and checkpoints.best() == 3
        (line,) = checkpoints.clean_up(keep_intact=True)
        assert line.startswith("Moved the checkpoint of step 2 (") and line.endswith("2.damaged-0")


def test_a_start_killed_before_its_record_can_start_again(saved, monkeypatch):
    record = {"config": {"init_adapter": ""}}
    again = Config(output_dir=str(saved), resume_from_checkpoint="auto")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):  # killed before the record was renamed
        patched.setattr(Path, "replace", lambda *_: sys.exit())
        write_record(saved, record)
    assert {path.name for path in saved.iterdir()} == {"checkpoints", ".unfinished-config.json"}
    with pytest.raises(
        UserError, match=r"killed before it was recorded\. Start it again with the resume_from_checkpoint that"
    ):
        resume.decide_start(again, record)
    record["config"]["init_adapter"] = "adapter"
    assert resume.decide_start(again, record).source == ""
    with contextlib.closing(Checkpoints(saved)) as checkpoints:
        assert len(checkpoints.clean_up(keep_intact=False)) == 2 and checkpoints.steps() == []
