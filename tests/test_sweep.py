"""Sweeps: each training equals a run of its own, the best wins, and a sweep that was killed ends the same."""

import dataclasses
import json
import random
import time

import numpy as np
import pytest
from programs import losses_of, run_module, run_program, short_run, start_module, terminated

from jlora import UserError
from jlora.config.schema import Config
from jlora.sweep.grid import read_grid
from jlora.sweep.trials import fold_indices

BASE = {"eval_share": 0.2, "max_steps": 6, "save_steps": 50, "eval_steps": 3, "learning_rate": 1e-3}


def settings(**values):
    """Words of the command line."""
    return [f"--sweep.{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny, pairs):
    """A sweep of two ranks, two rates, and two sets of targets; and its config."""
    root = tmp_path_factory.mktemp("sweep")
    file = root / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, root / "out", **BASE)))
    words = settings(lora_rank="2,4", learning_rate="1e-3,1e-2", target_modules="q_proj+v_proj,down_proj")
    done = run_program("sweep", "--config", file, *words)
    assert done.returncode == 0, done.stderr
    return done, root, file


def test_every_training_equals_a_run_of_its_own(swept, tmp_path):
    _, root, file = swept
    found = json.loads((root / "out/sweep.json").read_text())
    assert len(found["settings"]) == 8
    for rank, rate, targets in ((2, 0.01, "q_proj,v_proj"), (4, 0.001, "down_proj")):
        words = [f"--config.lora_rank={rank}", f"--config.learning_rate={rate}", f"--config.target_modules={targets}"]
        alone = run_program("train", "--config", file, *words, f"--config.output_dir={tmp_path}/{rank}")
        assert alone.returncode == 0, alone.stderr
        name = f"lora_rank={rank},learning_rate={rate:g},target_modules={targets.replace(',', '+')}"
        own, theirs = losses_of(root / "out/trials" / name), losses_of(tmp_path / str(rank))
        assert own.keys() == theirs.keys()
        np.testing.assert_allclose(list(own.values()), list(theirs.values()), rtol=1e-5)


def test_trainings_in_turn_have_the_bits_of_runs(tiny, pairs, tmp_path, monkeypatch):
    """With the compiler's own optimization; the tests' rounds in other places where a rate is an array."""
    monkeypatch.setenv("XLA_FLAGS", "")
    file = tmp_path / "config.yaml"
    changes = {**BASE, "max_steps": 12, "eval_steps": 6, "learning_rate": 1e-2, "weight_decay": 0.1}
    file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / "out", **changes)))
    done = run_module("jlora.sweep", "--config", file, *settings(lora_rank="2,4", learning_rate="3e-2"))
    assert done.returncode == 0, done.stderr
    for rank in (2, 4):
        words = [f"--config.lora_rank={rank}", "--config.learning_rate=3e-2", f"--config.output_dir={tmp_path}/{rank}"]
        alone = run_module("jlora.train", "--config", file, *words)
        assert alone.returncode == 0, alone.stderr
        trial = tmp_path / f"out/trials/lora_rank={rank},learning_rate=0.03"
        for name in ("loss", "eval_loss"):
            assert losses_of(trial, name) == losses_of(tmp_path / str(rank), name)


def test_adapters_that_train_in_one_step_compute_what_they_compute_alone(swept, tmp_path):
    """Eight settings in teams of three, the last of which is filled up; stopped once, it ends with the same bytes."""
    _, root, file = swept
    words = settings(lora_rank="2,4", learning_rate="1e-3,1e-2", target_modules="q_proj+v_proj,down_proj", together=3)
    done = run_program("sweep", "--config", file, *words, f"--config.output_dir={tmp_path}/whole")
    assert done.returncode == 0, done.stderr
    trials = sorted((root / "out/trials").iterdir())
    assert len(trials) == 8
    for trial in trials:
        own, theirs = losses_of(trial), losses_of(tmp_path / "whole/trials" / trial.name)
        assert own.keys() == theirs.keys()
        np.testing.assert_allclose(list(own.values()), list(theirs.values()), rtol=1e-5)
    words += [f"--config.output_dir={tmp_path}/out", "--config.resume_from_checkpoint=auto"]
    with terminated(lambda: any((tmp_path / "out/trials").glob("*/checkpoints/3"))):
        stopped = run_program("sweep", "--config", file, *words)
    assert "Stopped and saved" in stopped.stdout
    assert run_program("sweep", "--config", file, *words).returncode == 0
    for name in ("sweep.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_adapters_that_train_in_one_step_share_devices(swept, tmp_path):
    """Two adapters on four devices, which split the rows of a batch."""
    _, root, file = swept
    words = settings(lora_rank="2,4", learning_rate="1e-3", target_modules="q_proj+v_proj", together=2)
    done = run_program("sweep", "--config", file, *words, f"--config.output_dir={tmp_path}/out", devices=4)
    assert done.returncode == 0, done.stderr
    for trial in (tmp_path / "out/trials").iterdir():
        own, theirs = losses_of(trial), losses_of(root / "out/trials" / trial.name)
        np.testing.assert_allclose(list(own.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "alone"),
    [
        ({"lora_dropout": "0,0.2", "weight_decay": "0,0.1"}, {"lora_dropout": 0.2, "weight_decay": 0.1}),
        ({"lora_dropout": "0,0.2", "weight_decay": "0,0.1"}, {"lora_dropout": 0.0, "weight_decay": 0.1}),
        ({"use_rslora": "true,false", "lora_alpha": "8,32"}, {"use_rslora": True, "lora_alpha": 8.0}),
    ],
)
def test_settings_that_are_arrays_have_the_effect_that_they_have_in_a_run(tiny, pairs, tmp_path, values, alone):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / "out", **BASE)))
    done = run_program("sweep", "--config", file, *settings(**values))
    assert done.returncode == 0, done.stderr
    words = [f"--config.{key}={value}" for key, value in alone.items()]
    assert run_program("train", "--config", file, *words, f"--config.output_dir={tmp_path}/alone").returncode == 0
    shown = ",".join(f"{key}={value if isinstance(value, bool) else f'{value:g}'}" for key, value in alone.items())
    own, theirs = losses_of(tmp_path / "out/trials" / shown), losses_of(tmp_path / "alone")
    np.testing.assert_allclose(list(own.values()), list(theirs.values()), rtol=1e-5)


def test_the_winner_is_exported_as_a_run_exports_it(swept, tmp_path):
    """PEFT loads its directory: it has the winner's own rank and targets, not the padded ones."""
    done, root, _ = swept
    found = json.loads((root / "out/sweep.json").read_text())
    best = min(found["settings"], key=lambda own: own["held_out_loss"])
    assert found["winner"]["settings"] == best["settings"]
    assert f"The winner is {found['winner']['reason']}." in done.stdout
    form = json.loads((root / "out/adapter/adapter_config.json").read_text())
    assert form["r"] == best["settings"]["lora_rank"]
    assert sorted(form["target_modules"]) == sorted(best["settings"]["target_modules"])
    name = "lora_rank={lora_rank},learning_rate={learning_rate:g},target_modules=".format(**best["settings"])
    run = root / "out/trials" / (name + "+".join(best["settings"]["target_modules"]))
    verified = run_program("export", "--run", run, "--output", root / "out/adapter", "--verify")
    assert verified.returncode == 0, verified.stderr
    assert "Verified with PEFT" in verified.stdout
    page = (root / "out/sweep.html").read_text()
    assert "the winner" in page
    assert "lora_rank \\ learning_rate" in page


def test_a_stopped_sweep_continues_to_the_same_bytes(swept, tmp_path):
    """SIGTERM in the middle of a training, and a second one later."""
    _, root, file = swept
    words = settings(lora_rank="2,4", learning_rate="1e-3,1e-2", target_modules="q_proj+v_proj,down_proj")
    words += [f"--config.output_dir={tmp_path}/out"]
    trials = tmp_path / "out/trials"
    for count in (1, 4):
        with terminated(lambda count=count: len([*trials.glob("*/metrics.jsonl")]) >= count):
            stopped = run_program("sweep", "--config", file, *words, "--config.resume_from_checkpoint=auto")
        assert stopped.returncode == 0, stopped.stderr
        assert "Stopped and saved" in stopped.stdout
    done = run_program("sweep", "--config", file, *words, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    for name in ("sweep.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "out" / name).read_bytes()
    again = run_program("sweep", "--config", file, *words)
    assert again.returncode == 2
    assert "already contains a run" in again.stderr
    other = run_program("sweep", "--config", file, *words, "--sweep.seed=1", "--config.resume_from_checkpoint=auto")
    assert other.returncode == 2
    assert "cannot continue: sweep changed" in other.stderr


def test_losers_stop_early(tiny, pairs, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / "out", **{**BASE, "max_steps": 8, "eval_steps": 4})))
    words = settings(lora_rank="2,4", learning_rate="1e-4,1e-2", halving="2")
    for name, together, compiled in (("out", 0, 2), ("teams", 4, 3)):  # each rank; teams of four, two and one
        own = (*words, *settings(together=together), f"--config.output_dir={tmp_path / name}")
        done = run_program("sweep", "--config", file, *own)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / name / "sweep.json").read_text())
        assert sorted(own["steps"] for own in found["settings"]) == [2, 2, 4, 8]
        assert "left out after step 2" in done.stdout
        assert done.stdout.count("Compiling the training step") == compiled
    (best,) = (own["settings"] for own in found["settings"] if own["steps"] == 8)
    trial = f"trials/lora_rank={best['lora_rank']},learning_rate={best['learning_rate']:g}"
    losses = [losses_of(tmp_path / name / trial) for name in ("out", "teams")]
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=1e-5)


def test_a_setting_that_diverges_is_left_out(tiny, pairs, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / "out", **BASE)))
    done = run_program("sweep", "--config", file, *settings(learning_rate="1e-3,1e30", halving="2"))
    assert done.returncode == 0, done.stderr
    best, worst = json.loads((tmp_path / "out/sweep.json").read_text())["settings"]
    assert (best["settings"]["learning_rate"], worst["held_out_loss"]) == (1e-3, None)
    assert "diverged before step" in done.stdout
    every = run_program(
        "sweep", "--config", file, *settings(learning_rate="1e30,1e31"), f"--config.output_dir={tmp_path}/all"
    )
    assert every.returncode == 2
    assert "All settings diverged. Lower learning_rate." in every.stderr


def test_folds_hold_every_row_out_once_and_give_a_standard_error(tiny, pairs, tmp_path):
    every = [fold_indices(11, 3, seed) for seed in (0, 1)]
    for folds in every:
        assert sorted(np.concatenate([left for _, left in folds])) == list(range(11))
        assert all(not set(kept) & set(left) for kept, left in folds)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / "out", **{**BASE, "eval_share": 0.0})))
    done = run_program("sweep", "--config", file, *settings(learning_rate="1e-3,1e-2", folds="3"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/sweep.json").read_text())
    for own in found["settings"]:
        losses = [fold[str(own["step"])] for fold in own["held_out_losses"]]
        assert len(losses) == 3
        assert own["held_out_loss"] == pytest.approx(np.mean(losses))
        assert own["standard_error"] == pytest.approx(np.std(losses, ddof=1) / 3**0.5)
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()
    assert "±" in done.stdout


def test_a_fold_equals_a_run_on_its_rows(tiny, pairs, tmp_path):
    """The other folds' rows as training files, in their order, and the fold as the held-out file."""
    changes = {**BASE, "eval_share": 0.0, "max_steps": 0, "epochs": 1, "batch_size": 8}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / "out", **changes)))
    assert run_program("sweep", "--config", file, *settings(learning_rate="1e-3,1e-2", folds="2")).returncode == 0
    texts = (pairs / "train.txt").read_text().strip().split("\n\n")
    (kept, left), _ = fold_indices(len(texts), 2, 0)
    for name, indices in (("rows", kept), ("held_out", left)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("\n\n".join(texts[i] for i in indices) + "\n")
    rows = {"eval_data_dir": str(tmp_path / "held_out"), **changes}
    file.write_text(json.dumps(short_run(tiny, tmp_path / "rows", tmp_path / "alone", **rows)))
    assert run_program("train", "--config", file).returncode == 0
    own, theirs = losses_of(tmp_path / "out/trials/learning_rate=0.001/fold-1"), losses_of(tmp_path / "alone")
    assert own.keys() == theirs.keys()
    np.testing.assert_allclose(list(own.values()), list(theirs.values()), rtol=1e-5)


def test_a_long_row_may_be_held_out_in_any_fold(tiny, tmp_path):
    """Bounds on the held-out rows hold for all folds: a row beyond them would be NaN."""
    (tmp_path / "rows").mkdir()
    rows = [{"prompt": f"Is rule {i} binding?", "response": "Yes." * (40 if i == 7 else 1)} for i in range(12)]
    (tmp_path / "rows/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 7 not in fold_indices(12, 3, 0)[0][1]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, tmp_path / "rows", tmp_path / "out", **{**BASE, "eval_share": 0.0})))
    done = run_program("sweep", "--config", file, *settings(learning_rate="1e-3,1e-2", folds="3"))
    assert done.returncode == 0, done.stderr
    assert "diverged" not in done.stdout


@pytest.mark.slow
def test_a_sweep_that_is_killed_ten_times_ends_with_the_same_bytes(swept, tmp_path):
    """SIGKILL at random moments: after some more lines of metrics, and up to half a second later, in the saves too."""
    _, root, file = swept
    words = settings(lora_rank="2,4", learning_rate="1e-3,1e-2", target_modules="q_proj+v_proj,down_proj")
    words += [f"--config.output_dir={tmp_path}/out", "--config.resume_from_checkpoint=auto"]
    chance, trials = random.Random(0), tmp_path / "out/trials"

    def lines():
        return sum(path.read_text().count("\n") for path in trials.glob("*/metrics.jsonl"))

    kills = 0
    for _ in range(10):
        enough = lines() + chance.randint(1, 9)
        process = start_module("jlora.sweep", "--config", file, *words)
        while process.poll() is None and lines() < enough:
            time.sleep(0.01)
        time.sleep(chance.random() / 2)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 5
    done = run_program("sweep", "--config", file, *words)
    assert done.returncode == 0, done.stderr
    for name in ("sweep.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Nothing varies"),
        ({"lora_rnk": "4,8"}, "--sweep.lora_rnk: Unknown key. Did you mean lora_rank?"),
        ({"base_model": "a,b"}, "base_model cannot vary, because all trainings share the base model"),
        ({"lora_rank": "4,x"}, "--sweep.lora_rank has 'x': Expected int."),
        ({"lora_rank": "0,4"}, "lora_rank=0: Expected a number above 0"),
        ({"lora_rank": "4,100000"}, "lora_rank=100000 is above the width of a projection"),
        ({"lora_rank": str(list(range(1, 101))), "learning_rate": str([i / 1e4 for i in range(1, 101)])}, "10,000 tr"),
        ({"seed": "0,1"}, "each seed would hold out other rows"),
        ({"lora_rank": "4,8", "halving": "1"}, "Expected 0, or a number of at least 2"),
        ({"lora_rank": "4,8", "folds": "25"}, "needs at least 50 training rows"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(tiny, pairs, tmp_path, values, message):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / "out", **BASE)))
    done = run_program("sweep", "--config", file, *settings(**values))
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Compiling" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_dora_and_patterns_are_refused():
    for changes in ({"use_dora": True}, {"rank_pattern": (("v_proj", 4),)}, {"init_lora_weights": "pissa"}):
        config = dataclasses.replace(Config(), train_data_dir="x", sweep={"lora_rank": "4,8"}, **changes)
        with pytest.raises(UserError, match="A sweep trains plain LoRA"):
            read_grid(config)
