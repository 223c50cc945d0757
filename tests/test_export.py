"""The adapter on disk: what PEFT reads is what was trained, and a broken one is caught."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import run_module, short_run
from safetensors.numpy import load_file, save_file

from jlora import export, generate, peft_format, verify
from jlora.checkpoint import read_record
from jlora.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, pairs):
    """A finished run on the tiny model that has learned something."""
    directory = tmp_path_factory.mktemp("export")
    values = short_run(
        tiny,
        pairs,
        directory / "run",
        lora_alpha=12.0,
        learning_rate=2e-2,
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    )
    (directory / "config.json.yaml").write_text(json.dumps(values))
    done = run_module("jlora.train", "--config", directory / "config.json.yaml")
    assert done.returncode == 0, done.stderr
    return directory / "run"


def test_the_command_exports_and_verifies_with_peft(run, tmp_path):
    done = run_module("jlora.export", "--run", run, "--step", "6", "--output", tmp_path / "six", "--verify")
    assert done.returncode == 0, done.stderr
    assert "adapter of step 6" in done.stdout
    assert "verified: PEFT" in done.stdout and "20 prompts" in done.stdout
    assert "20 of 20 greedy answers of 40 tokens equal" in done.stdout
    six, twelve = (load_file(d / peft_format.WEIGHTS) for d in (tmp_path / "six", run / "adapter"))
    assert any(not np.array_equal(six[name], twelve[name]) for name in six)
    again = run_module("jlora.export", "--run", run, "--output", tmp_path / "six")
    assert again.returncode == 2 and "exists, and jlora never overwrites" in again.stderr


@pytest.mark.parametrize(
    "break_it",
    [
        lambda tensors, config: ({k.removeprefix("base_model."): v for k, v in tensors.items()}, config),
        lambda tensors, config: (tensors, {**config, "lora_alpha": 24.0}),
        lambda tensors, config: (tensors, {**config, "use_rslora": True}),
        lambda tensors, config: ({k: v for k, v in tensors.items() if ".layers.1." not in k}, config),
        lambda tensors, config: (tensors, {**config, "target_modules": ["q_proj"]}),
        lambda tensors, config: (
            {k: v * 1.1 if "q_proj.lora_B" in k else v for k, v in tensors.items()},
            config,
        ),
    ],
    ids=["prefix", "alpha", "rslora", "missing-layer", "narrow-targets", "scaled"],
)
def test_verification_catches_a_broken_export(run, tmp_path, break_it, monkeypatch):
    monkeypatch.setattr(verify, "PROMPTS", 4)
    monkeypatch.setattr(verify, "NEW_TOKENS", 2)
    broken = tmp_path / "broken"
    shutil.copytree(run / "adapter", broken)
    config = json.loads((broken / peft_format.CONFIG).read_text())
    tensors, config = break_it(load_file(broken / peft_format.WEIGHTS), config)
    save_file(tensors, broken / peft_format.WEIGHTS, metadata={"format": "pt"})
    (broken / peft_format.CONFIG).write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"not the trained one|PEFT warns"):
        verify.verify(read_record(run, "--run"), *export.load_adapter(run, 12), broken)


def test_what_is_written_is_read_back_equal(run):
    adapter, spec = export.load_adapter(run, 12)
    got, got_spec, config = peft_format.read_adapter(run / "adapter")
    assert (got_spec.rank, got_spec.alpha) == (spec.rank, spec.alpha) == (4, 12.0)
    assert set(got_spec.target_modules) == set(spec.target_modules) == set(config["target_modules"])
    assert jax.tree.structure(got) == jax.tree.structure(adapter)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(adapter), strict=True):
        assert np.array_equal(a, b)
    assert config["base_model_name_or_path"] and config["inference_mode"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"target_modules": "all-linear"}, "target_modules='all-linear'"),
        ({"target_modules": ["q_proj"]}, r"\d+ tensor\(s\) would be dropped"),
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]},
            "are missing",
        ),
    ],
)
def test_adapters_that_jlora_does_not_compute_are_refused(run, tmp_path, change, message):
    shutil.copytree(run / "adapter", tmp_path / "other")
    path = tmp_path / "other" / peft_format.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        peft_format.read_adapter(tmp_path / "other")


def test_wrong_places_are_named(run, tmp_path, smollm):
    for arguments, message in [
        (["--run", tmp_path], "no checkpoints there"),
        (["--run", run, "--step", "7", "--output", tmp_path / "x"], "--step 7: there are 6, 12"),
        (["--run", run, "--step", "last", "--output", tmp_path / "x"], "--step last: there are 6, 12"),
    ]:
        done = run_module("jlora.export", *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError, match=r"expected a directory with adapter_config.json and adapter_model.safetensors"):
        peft_format.read_adapter(tmp_path)
    with pytest.raises(UserError, match=r"did you mean .*run/adapter\?"):
        peft_format.read_adapter(run)
    shutil.copytree(run / "adapter", tmp_path / "cut")
    with (tmp_path / "cut" / peft_format.WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="is damaged or unreadable"):
        peft_format.read_adapter(tmp_path / "cut")
    with pytest.raises(UserError, match="belongs to another base"):
        generate.load(str(smollm), run / "adapter")
