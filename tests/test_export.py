"""Exported adapters: PEFT loads what was trained, and verification catches broken ones."""

import dataclasses
import itertools
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import run_program, short_run
from safetensors.numpy import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jlora.adapters import peft_config, peft_io, plain_lora, provenance
from jlora.cli.export import main
from jlora.common import hf_names
from jlora.common.errors import UserError, VerificationError
from jlora.export import exporter, verify
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.serve import loading
from jlora.training.checkpoint import read_record

MODULES = {module.split(".")[1]: module for module in hf_names.projections()}


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
    done = run_program("jlora.train", "--config", directory / "config.json.yaml")
    assert done.returncode == 0, done.stderr
    return directory / "run"


@pytest.mark.slow
def test_the_command_exports_and_verifies_with_peft(run, tmp_path):
    done = run_program("jlora.export", "--run", run, "--step", "6", "--output", tmp_path / "six", "--verify")
    assert done.returncode == 0, done.stderr
    assert "Exported the adapter from step 6 to" in done.stdout
    assert "Verified with PEFT" in done.stdout and "20 prompts" in done.stdout
    assert "20 of 20 greedy answers of 40 tokens are equal" in done.stdout
    six, twelve = (load_file(d / provenance.WEIGHTS) for d in (tmp_path / "six", run / "adapter"))
    assert any(not np.array_equal(six[name], twelve[name]) for name in six)
    again = run_program("jlora.export", "--run", run, "--output", tmp_path / "six")
    assert again.returncode == 2 and "exists, and jlora never overwrites" in again.stderr


@pytest.mark.slow
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
        lambda tensors, config: (
            {k: np.ascontiguousarray(v.T).reshape(v.shape) if "lora_A" in k else v for k, v in tensors.items()},
            config,
        ),
    ],
    ids=["prefix", "alpha", "rslora", "missing-layer", "narrow-targets", "scaled", "transposed"],
)
def test_verification_catches_a_broken_export(run, tmp_path, break_it, monkeypatch):
    monkeypatch.setattr(verify, "PROMPTS", 4)
    monkeypatch.setattr(verify, "NEW_TOKENS", 2)
    broken = tmp_path / "broken"
    shutil.copytree(run / "adapter", broken)
    config = json.loads((broken / peft_config.CONFIG).read_text())
    tensors, config = break_it(load_file(broken / provenance.WEIGHTS), config)
    save_file(tensors, broken / provenance.WEIGHTS, metadata={"format": "pt"})
    (broken / peft_config.CONFIG).write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"does not compute what was trained|PEFT warns"):
        verify.verify(read_record(run, "--run"), *exporter.load_adapter(run, 12), broken)


@pytest.mark.slow
@pytest.mark.parametrize("inexact", [0, 1], ids=["warm-up", "measured"])
def test_verification_does_not_measure_the_first_pass_of_pytorch(run, inexact, monkeypatch):
    monkeypatch.setattr(verify, "PROMPTS", 2)
    monkeypatch.setattr(verify, "NEW_TOKENS", 2)
    passes, exact = itertools.count(), LlamaRotaryEmbedding.forward

    def forward(self, x, position_ids):
        cos, sin = exact(self, x, position_ids)
        return (cos + 0.1, sin) if next(passes) == inexact else (cos, sin)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    broken = pytest.raises(VerificationError, match="The logits of 1 prompt differ") if inexact else nullcontext()
    with broken:
        verify.verify(read_record(run, "--run"), *exporter.load_adapter(run, 12), run / "adapter")
    assert next(passes) > 2


@pytest.mark.slow
def test_an_export_for_a_server_is_verified_or_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "PROMPTS", 4)
    monkeypatch.setattr(verify, "NEW_TOKENS", 2)
    other = shutil.copytree(run, tmp_path / "run")  # the same arrays with other scales
    record = json.loads((other / "config.json").read_text())
    record["config"] |= {"use_rslora": True, "alpha_pattern": ["v_proj=3", "layers.1.mlp.down_proj=20"]}
    (other / "config.json").write_text(json.dumps(record))
    main(["--run", str(other), "--for", "vllm"])
    config = peft_config.read_config_file(other / "adapter-vllm")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4.0, False)
    assert not config["alpha_pattern"] and not config["rank_pattern"]
    parity = json.loads((other / "adapter-vllm" / peft_io.PARITY).read_text())
    assert parity["largest_logit_difference"] < 1e-3 and parity["equal_greedy_answers"] == len(parity["prompts"]) == 4
    assert not parity["weaker"] and parity["checked_with"].startswith("PEFT") and "torch" in parity["versions"]
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    main(["--run", str(other), "--for", "peft", "--output", str(tmp_path / "alone")])
    parity = json.loads((tmp_path / "alone" / peft_io.PARITY).read_text())
    assert parity["weaker"] and "a weaker check" in parity["sentence"] and "peft" not in parity["versions"]
    assert peft_config.read_config_file(tmp_path / "alone")["use_rslora"]
    scaling = plain_lora.to_plain_lora
    monkeypatch.setattr(
        plain_lora, "to_plain_lora", lambda adapter, spec: scaling(adapter, dataclasses.replace(spec, alpha=9.0))
    )
    with pytest.raises(VerificationError, match=r"what was trained .* logits of \d prompts differ by more; "):
        main(["--run", str(other), "--for", "sglang"])
    assert not (other / "adapter-sglang").exists()
    assert not list(other.glob(".unfinished*"))


def test_an_exported_adapter_is_read_back_unchanged(run):
    adapter, spec = exporter.load_adapter(run, 12)
    got, config = read(run / "adapter", run), peft_config.read_config_file(run / "adapter")
    got_spec = peft_config.read_spec(run / "adapter", 3)
    assert (got_spec.rank, got_spec.alpha) == (spec.rank, spec.alpha) == (4, 12.0)
    assert set(got_spec.target_modules) == set(spec.target_modules) == set(config["target_modules"])
    assert jax.tree.structure(got) == jax.tree.structure(adapter)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(adapter), strict=True):
        assert np.array_equal(a, b)
    assert config["base_model_name_or_path"] and config["inference_mode"] is True


def read(directory, run):
    """Reads the adapter in a directory for the base model of a run."""
    base = read_config(Path(read_record(run, "--run")["base"]["directory"]))
    spec = peft_config.read_spec(directory, base.num_hidden_layers)
    _, shapes, _ = hf_loader.abstract_model(base, spec, FLOAT32_COMPUTE)
    return peft_io.read_adapter(directory, spec, shapes, tied=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"a_new_trick": {"strength": 2}}, "a_new_trick="),
        ({"peft_type": "VERA"}, "peft_type='VERA'"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora' \(it changes the base"),
        ({"layers_pattern": ["blocks"]}, "layers_pattern="),
        ({"modules_to_save": ["score"]}, "modules_to_save has 'score'"),
        ({"target_modules": None}, "target_modules=None"),
        ({"target_modules": ["q_proj", "c_attn"]}, "target_modules="),
        ({"use_dora": True}, "lacks the tensor .*lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_[AB].weight has shape .* expected"),
        ({"target_modules": "all-linear"}, "lacks the tensor"),
        ({"target_modules": ["q_proj"]}, r"contains \d+ unexpected tensors"),
        (
            {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]},
            "lacks the tensor",
        ),
    ],
)
def test_unsupported_adapters_are_refused(run, tmp_path, change, message):
    shutil.copytree(run / "adapter", tmp_path / "other")
    path = tmp_path / "other" / peft_config.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "other", run)


def test_wrong_paths_and_steps_are_reported(run, tmp_path, smollm):
    for arguments, message in [
        (["--run", tmp_path], "contains no checkpoints"),
        (
            ["--run", run, "--step", "7", "--output", tmp_path / "x"],
            "--step 7 has no checkpoint. Available steps: 6, 12",
        ),
        (
            ["--run", run, "--step", "last", "--output", tmp_path / "x"],
            "--step last has no checkpoint. Available steps: 6, 12",
        ),
    ]:
        done = run_program("jlora.export", *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError, match=r"Expected a directory with adapter_config.json and adapter_model.safetensors"):
        read(tmp_path, run)
    with pytest.raises(UserError, match=r"Did you mean .*run/adapter\?"):
        read(run, run)
    shutil.copytree(run / "adapter", tmp_path / "cut")
    with (tmp_path / "cut" / provenance.WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="is damaged or unreadable"):
        read(tmp_path / "cut", run)


def test_adapters_of_another_base_or_with_broken_values_are_refused(run, tmp_path, smollm):
    with pytest.raises(UserError, match="was trained on other weights than"):
        loading.load_model(str(smollm), {"adapter": run / "adapter"})

    def broken(name, change, **notes):
        directory = shutil.copytree(run / "adapter", tmp_path / name)
        tensors = load_file(directory / provenance.WEIGHTS)
        change(tensors, next(iter(tensors)))
        save_file(tensors, directory / provenance.WEIGHTS, metadata={"format": "pt", **notes})
        return directory

    unnoted = broken("unnoted", lambda tensors, first: None)
    with pytest.raises(UserError, match=r"belongs to another base.* has shape"):
        loading.load_model(str(smollm), {"adapter": unnoted})
    with pytest.raises(UserError, match=r"contains NaN or infinity"):
        read(broken("nan", lambda tensors, first: tensors[first].__setitem__((0, 0), np.nan)), run)
    with pytest.raises(UserError, match=r"contains 1 unexpected tensor .*, such as alien"):
        read(broken("alien", lambda tensors, first: tensors.update(alien=np.zeros(3, np.float32))), run)
    pickled = shutil.copytree(run / "adapter", tmp_path / "pickled")
    (pickled / provenance.WEIGHTS).rename(pickled / "adapter_model.bin")
    with pytest.raises(UserError, match=r"only adapter_model.bin, which can run code.*safe_serialization=True"):
        read(pickled, run)


def test_all_target_formats_and_dtypes_of_peft_are_read(run, tmp_path):
    want = read(run / "adapter", run)
    leaves = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    for name, change in {
        "regex": {"target_modules": r".*\.(q|v|o|gate|down)_proj"},
        "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "up_proj"]},
        "whole-names": {"target_modules": [f"{i}.{m}" for i in range(3) for m in map(MODULES.get, leaves)]},
    }.items():
        directory = shutil.copytree(run / "adapter", tmp_path / name)
        path = directory / peft_config.CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        got = read(directory, run)
        assert jax.tree.all(jax.tree.map(np.array_equal, got, want)), name
    half = {k: v.astype(jnp.bfloat16) for k, v in load_file(directory / provenance.WEIGHTS).items()}
    save_file(half, directory / provenance.WEIGHTS)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), want)
    assert jax.tree.all(jax.tree.map(np.array_equal, read(directory, run), rounded))


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_with_its_settings(run, tmp_path, tiny, pairs):
    values = short_run(tiny, pairs, tmp_path / "on", learning_rate=1e-2, lora_rank=16, max_steps=2, save_steps=1)
    (tmp_path / "on.yaml").write_text(json.dumps({**values, "init_adapter": str(run / "adapter")}))
    done = run_program("jlora.train", "--config", tmp_path / "on.yaml")
    assert done.returncode == 0, done.stderr
    assert "with its own settings: peft_type='LORA', lora_rank=4, lora_alpha=12.0" in done.stdout
    before, after = (
        [json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for place in (run, tmp_path / "on")
    )
    assert after[0] < 0.9 * before[0]
    assert exporter.load_adapter(tmp_path / "on", 2)[1] == exporter.load_adapter(run, 12)[1]
