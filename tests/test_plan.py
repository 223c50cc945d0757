"""The forecast of a run: memory by part, communication, and settings that fit; also with the TPU's own compiler."""

import dataclasses
import importlib.util
import json
import os
import re
import types

import jax
import pytest
from conftest import ROOT
from programs import process_options

from jlora.api import finetune
from jlora.cli import plan
from jlora.common.errors import UserError
from jlora.config import files
from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.models.compute_settings import FLOAT32_COMPUTE, UNKNOWN
from jlora.models.families import read_config
from jlora.planning import collectives, hardware, search
from jlora.planning.forecast import forecast, make_job
from jlora.planning.hlo import Program
from jlora.training import run

SMALL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def small(tmp_path):
    """The config.json of a small base model, without weights."""
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    return file


@pytest.fixture
def written(tmp_path, small):
    """Returns a function that writes a YAML config for the small base model."""

    def write(**changes):
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps({"base_model": str(small), "train_data_dir": "none", **changes}))
        return file

    return write


LOOPS = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %sum = (f32[8]{0}, bf16[4,2]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
}
%end (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
}
%inner (p: f32[]) -> f32[] {
  %all = ((f32[2]{0}), (f32[16]{0})) all-gather-start(%c), replica_groups=mesh['x'=1,'y'=8] {'y'}, dimensions={0}
  %alone = f32[100]{0} all-reduce(%d), replica_groups={{0},{1}}, to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %one = (s32[], f32[8]) while(%t), condition=%end, body=%body
  %two = f32[] while(%t), condition=%end, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %last = f32[] all-reduce(%e), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


def test_collectives_are_read_from_a_program():
    found = sorted(collectives.find_collectives(Program(LOOPS), 8))
    assert found == [("all-gather", 64, 8, 3), ("all-reduce", 4, 2, 1), ("all-reduce", 32 + 16, 4, 5)]
    assert found[0].sent == 3 * 64 * 7 / 8 and found[2].sent == 5 * 48 * 2 * 3 / 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:2x4", "Unknown --target 'v5x:2x4'. Examples: here, v5e:1, v5e:2x4"),
        ("v5e:3x5", "v5e:3x5 cannot be simulated: .*a slice that exists, such as here, v5e:1"),
        ("gpu:24", "Unknown --target 'gpu:24'. .*gpu:24GiB"),
    ],
)
def test_unknown_targets_are_rejected(name, message):
    with pytest.raises(UserError, match=message):
        hardware.find_target(name, jax.devices()[:1])


def job_of(file, target, length=128, **changes):
    def layout(config, ways):
        return config.gradient_accumulation_steps, config.batch_size, Shape(length, length), UNKNOWN

    config = dataclasses.replace(Config(), **{"batch_size": 8, "mesh": {}, **changes})
    return make_job(config, read_config(file), FLOAT32_COMPUTE, target, layout), layout


@pytest.mark.slow
def test_memory_is_reported_by_part(small):
    target = hardware.Target("here", jax.devices()[:2], None, None)
    seen = forecast(job_of(small, target)[0])
    heads, keys, D, F, L = 256, 128, 256, 512, 2
    matrices = 2 * heads * D + 2 * keys * D + 3 * F * D
    adapter = 4 * L * 16 * (D + heads + D + keys)
    assert seen.memory.base == 4 * (512 * D + D + L * (matrices + 2 * D))
    assert seen.memory.adapter == adapter and adapter * 2 <= seen.memory.optimizer < adapter * 2 + 100
    assert seen.memory.batch == 4 * 8 // 2 * 128 * 6
    assert adapter < sum(c.size * c.times for c in seen.collectives) <= adapter + 16  # and a few scalars
    longer = forecast(job_of(small, target, length=256)[0])
    assert longer.memory.rest > 1.5 * seen.memory.rest and longer.memory.base == seen.memory.base


@pytest.mark.slow
def test_search_finds_settings_that_fit(small):
    roomy = hardware.Target("here", jax.devices()[:1], None, None)
    job, layout = job_of(small, roomy)
    seen, said = forecast(job), []
    tight = roomy._replace(limit=int(seen.needed * 0.7))
    assert not seen.fits(tight.limit)
    other = search.find_fastest(seen, tight, layout, said.append)
    assert other.needed <= tight.limit and said
    config = other.job.config
    assert config.batch_size * config.gradient_accumulation_steps == 8  # the same optimizer steps
    assert f"set {search.format_changes(job.config, config)}" in search.suggest_fix(job.config, other)
    hopeless = roomy._replace(limit=seen.memory.adapter)
    assert search.find_fastest(seen, hopeless, layout, said.append) is None
    assert "Use a smaller base model" in search.suggest_fix(job.config, None)


@pytest.mark.slow
def test_training_stops_before_it_runs_out_of_memory(config_file, monkeypatch, tmp_path):

    monkeypatch.setattr(
        "jlora.planning.hardware.memory_limit", lambda devices: 1 << 20
    )  # less than an eighth of the base
    config = files.load_config(str(config_file(batch_size=8, target_modules="all-linear", num_processes=1)), [])
    with pytest.raises(
        UserError, match=r"needs 0\.\d+ GiB on each device, but only 0.00 GiB is available\. None of the batch_size"
    ):
        finetune(config)
    assert not (tmp_path / "run").exists()


def test_held_out_rows_that_do_not_fit_are_reported_before_training():
    target = hardware.Target("here", jax.devices()[:1], 1 << 30, None)
    programs = types.SimpleNamespace(needed_bytes=lambda name: {"evaluation": 3 << 30}[name])
    with pytest.raises(UserError, match=r"Evaluating on eval_data_dir needs 3\.00 GiB .* only 1\.00 GiB is available"):
        run.ensure_evaluation_fits(programs, target)
    run.ensure_evaluation_fits(programs, target._replace(limit=3 << 30))


def test_plan_needs_only_config_json(written, capsys):
    plan.main(["--config", str(written(batch_size=8)), "--tokens", "64"])
    said = capsys.readouterr().out
    for words in (
        "8 x cpu, data=8; remat=dots, float32 base, attention by xla",
        "1 forward and backward pass of 8 x 64 tokens; assuming 64 tokens per example, all trained on (--tokens)",
        "Fits: 0.0",
        "activations, temporaries, padding",
        "MB sent (all-reduce of 0.",
        "No faster settings that fit were found",
    ):
        assert words in said, said
    with pytest.raises(UserError, match=r"batch_size=6 does not divide over 8 devices\. Set batch_size=8"):
        plan.main(["--config", str(written(batch_size=6))])


def test_lengths_come_from_the_data_if_it_exists(config_file, varied_pairs, capsys):
    file = config_file(train_data_dir=str(varied_pairs), batch_size=8)
    plan.main(["--config", str(file), "--only"])
    said = capsys.readouterr().out
    assert "of 8 x 152 tokens; row lengths from " in said, said


@pytest.fixture
def quick_compiler(monkeypatch):
    """Lets the TPU's compiler optimize less, as conftest.py does for CPUs: it takes a third of the time."""
    if "JLORA_TESTS_OPTIMIZE" not in os.environ:
        monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1.0")
    monkeypatch.setenv("PYTHONPATH", process_options(1)["env"]["PYTHONPATH"])


def plan_of(row):
    """Returns the plan for a row of scripts/plan_table.py."""
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "scripts/plan_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.plan(*module.ROWS[row])


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
def test_seven_billion_parameters_on_a_tpu_slice():
    """By the TPU's compiler: at most 14 GiB a chip, and only the adapter's gradients and scalars are sent."""
    said = plan_of("7b-v5e-8")
    assert float(re.search(r"Fits: (\S+) of 16.00 GiB on each device", said)[1]) < 14, said
    travels = re.search(r"MB sent \(all-reduce of (\S+) MB\)", said)  # no other collective is named
    gradients = 32 * 2 * 16 * (4096 + 4096)  # A and B of q and v
    assert travels and float(travels[1]) * 1e6 <= 4 * gradients + 100, said


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_communication_does_not_grow_with_the_slice(small):
    """On 8 and on 256 chips, by the TPU's compiler: each sends the adapter's gradients once, with the same memory."""
    heads, keys, D, L = 256, 128, 256, 2
    gradients, needed = 4 * L * 16 * (D + heads + D + keys), []
    for name, chips in (("v5e:2x4", 8), ("v5e:16x16", 256)):
        target = hardware.find_target(name, jax.devices())
        assert len(target.devices) == chips
        seen = forecast(job_of(small, target, batch_size=chips, remat="full")[0])
        assert {c.kind for c in seen.collectives} == {"all-reduce"}
        assert gradients < sum(c.size * c.times for c in seen.collectives) <= gradients + 100
        needed.append(seen.needed - seen.memory.code)
    assert abs(needed[1] / needed[0] - 1) < 0.01


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
def test_seven_billion_parameters_in_four_bits_on_one_chip():
    said = plan_of("7b-v5e-1-nf4")
    assert "Fits: " in said and "nothing sent between devices" in said, said
