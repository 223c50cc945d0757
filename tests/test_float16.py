"""Training in float16: its loss is scaled, steps that overflow are skipped, and only such runs pay for it."""

import dataclasses
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from programs import Trains, run_program, short_run
from safetensors.numpy import load_file, save_file

from jlora.adapters.methods import AXES
from jlora.adapters.spec import AdapterSpec
from jlora.config.schema import Config
from jlora.data.batches import plan_batches
from jlora.data.examples import Example
from jlora.distributed import processes, sharding
from jlora.models import hf_loader
from jlora.models.compute_settings import ComputeSettings, default_dtype
from jlora.models.families import read_config
from jlora.steps import loss_scale, optim
from jlora.steps.programs import Programs, fresh_state
from jlora.steps.train_step import Metrics
from jlora.training import setup
from jlora.training.checkpoint import Checkpoints, Progress
from jlora.training.metrics import Logger

SPEC = AdapterSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "down_proj"))


def test_loss_scale_follows_torch_grad_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, ours, skipped = torch.optim.SGD([parameter], lr=1.0), loss_scale.init_loss_scale(), 0
    for finite in [1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]:
        parameter.grad = theirs.scale(torch.ones(1)) * (1 if finite else torch.inf)
        theirs.step(optimizer)
        theirs.update()
        ours, skipped = loss_scale.update_loss_scale(ours, jnp.array(bool(finite))), skipped + 1 - finite
        assert float(ours.scale) == theirs.get_scale() and int(ours.skipped) == skipped


class Run(Trains):
    """A small base with random weights on random tokens, ready for its first step."""

    def __init__(self, tiny, dtype=jnp.float16, devices=1, micro_batches=1, **changes):
        model = dataclasses.replace(read_config(tiny), vocab_size=300, num_hidden_layers=2)
        config = dataclasses.replace(Config(), warmup_ratio=0.0, learning_rate=5e-3, **changes)
        mesh = sharding.make_mesh(jax.devices()[:devices])
        graphdef, shapes, base = hf_loader.abstract_model(model, SPEC, ComputeSettings(dtype, dtype, mesh=mesh))
        keys = iter(jax.random.split(jax.random.key(0), 99))
        base = jax.tree_util.tree_map_with_path(
            lambda path, x: (0.08 * jax.random.normal(next(keys), x.shape) + ("norm" in str(path))).astype(dtype), base
        )
        adapter = jax.tree.map(lambda x: 0.05 * jax.random.normal(next(keys), x.shape), shapes)
        optimizer, random = optim.make_optimizer(config, SPEC, 20), np.random.RandomState(0)
        examples = [Example(random.randint(300, size=n), np.arange(n) > 8, "") for n in range(33, 65)]
        sizes = {"batch_size": 8, "micro_batches": micro_batches, "devices": devices, "steps": 20}
        self.batches = plan_batches(examples, **sizes, seed=0, linear_cost=1e4, max_shapes=1)
        self.fresh = jax.device_get(fresh_state(adapter, optimizer, mesh, dtype))
        self.mesh = mesh
        self.programs = Programs(graphdef, base, optimizer, mesh, dropout=False, seed=1)

    def start(self):
        """At step 0 again, with what was compiled."""
        self.state = jax.device_put(self.fresh, sharding.shardings(self.fresh, self.mesh, "state", AXES))
        return self


def taken(run, step=0, scale=None):
    """The state before a step, the state after it and its metrics, on the host; from another loss scale if given."""
    if scale is not None:
        moved = jax.device_put(jnp.float32(scale), run.state.scaling.scale.sharding)
        run.state = run.state._replace(scaling=run.state.scaling._replace(scale=moved))
    before = jax.device_get(run.state)
    run.state, metrics = run.programs.train_step(run.state, run.batches[step], print)
    return before, jax.device_get(run.state), jax.device_get(metrics)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(scope="module")
def half(tiny):
    return Run(tiny)


@pytest.mark.slow
def test_losses_are_close_to_float32_and_only_float16_has_a_scale(tiny, half):
    half, single = half.start(), Run(tiny, jnp.float32).start()
    assert single.state.scaling is None
    want = single.losses(12)
    assert np.abs(half.losses(12) / want - 1).max() < 5e-3
    assert want[-1] < want[0] - 0.1  # the bound means something: it learns
    assert jax.device_get(half.state.scaling) == (2.0**16, 12, 0)


@pytest.mark.slow
def test_overflowing_step_changes_only_the_scale(half):
    taken(half.start())
    before, after, metrics = taken(half, 1, scale=2.0**40)
    assert same((before.lora, before.optimizer), (after.lora, after.optimizer))
    assert after.step == 2 and after.scaling == (2.0**39, 0, 1)
    assert not np.isfinite(metrics.grad_norm) and np.isfinite(metrics.loss) and not metrics.broken()
    before, after, metrics = taken(half, 2, scale=2.0**10)  # the negative control
    assert not same(before.lora, after.lora) and not same(before.optimizer, after.optimizer)
    assert after.scaling == (2.0**10, 1, 1)


@pytest.mark.slow
def test_small_gradients_vanish_without_a_scale(half, monkeypatch):
    def smaller(path, x):
        return x * jnp.asarray(2.0**-12, x.dtype) if "embed_tokens" in str(path) else x

    base = jax.tree_util.tree_map_with_path(smaller, half.programs.base)  # a small head, and so small gradients
    monkeypatch.setattr(half.programs, "base", base)

    def zeros(scale):
        _, after, _ = taken(half.start(), scale=scale)
        return np.mean([np.mean(x == 0) for x in jax.tree.leaves(after.optimizer) if x.ndim > 1])

    assert zeros(1.0) > 0.1 and zeros(2.0**16) == 0


@pytest.mark.slow
def test_eight_devices_with_accumulation_skip_the_same_steps(tiny):
    one, eight = Run(tiny, micro_batches=2).start(), Run(tiny, devices=8, micro_batches=2).start()
    for step, scale in enumerate([None, 2.0**40, 2.0**12]):
        (_, a, x), (_, b, y) = (taken(run, step, scale) for run in (one, eight))
        assert a.scaling == b.scaling and abs(float(x.loss) - float(y.loss)) < 2e-3
    assert a.scaling == (2.0**12, 1, 1)
    pairs = list(zip(jax.tree.leaves(a.lora), jax.tree.leaves(b.lora), strict=True))
    assert all(np.abs(p - q).mean() < 5e-5 for p, q in pairs)  # of two steps of 5e-3, in which Adam takes signs


def test_training_stops_on_scale_below_one_or_nan_loss():
    def metrics(loss, grad_norm, scale):
        return Metrics(*map(np.float32, (loss, grad_norm, 1.0, 10.0)), loss_scale.LossScale(np.float32(scale), 0, 1))

    assert not metrics(2.0, 1.0, 1.0).broken() and not metrics(2.0, np.inf, 1.0).broken()
    assert metrics(2.0, np.nan, 0.5).broken() and metrics(np.inf, np.nan, 2.0**16).broken()
    assert Metrics(*map(np.float32, (2.0, np.nan, 1.0, 10.0))).broken()


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.0", "float16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx942", "bfloat16"),
    ],
)
def test_float16_is_the_default_on_cards_without_bfloat16(capsys, platform, capability, dtype):
    device = types.SimpleNamespace(platform=platform, device_kind="this", compute_capability=capability)
    if capability is None:
        del device.compute_capability
    assert default_dtype(device) == jnp.dtype(dtype)
    compute = setup.choose_compute(Config(), device)
    assert compute == ComputeSettings(jnp.dtype(dtype).type, jnp.dtype(dtype).type)
    said = capsys.readouterr().out
    assert ("Computing in float16, because this does not support bfloat16" in said) == (dtype == "float16")
    compute = setup.choose_compute(dataclasses.replace(Config(), fp16=True), device)
    assert compute.compute_dtype == (jnp.float16 if dtype == "float16" else jnp.bfloat16)
    assert ("fp16=true: computing in bfloat16" in capsys.readouterr().out) == (dtype != "float16")


@pytest.mark.slow
def test_resume_with_a_loss_scale_is_bit_identical(half, tmp_path):
    """Two steps, one of them skipped, saved; two more, and the same two from what was saved."""
    taken(half.start(), scale=2.0**40)
    taken(half, 1, scale=2.0**12)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(processes.gather_to_host(half.state), Progress(), None)
    want = [taken(half, step) for step in (2, 3)]
    checkpoints.wait()
    fresh = half.start().state
    half.state = sharding.place(checkpoints.restore(2, fresh), sharding.places_of(fresh))
    got = [taken(half, step) for step in (2, 3)]
    checkpoints.close()
    assert same(got, want)
    assert got[1][1].scaling == (2.0**12, 3, 1)
    assert not same(got[1][1], got[0][1])  # the negative control


def test_log_line_counts_skipped_steps(tmp_path, capsys):
    with Logger(tmp_path, 0, 9, {}) as logger:
        logger.log(4, loss=2.0, loss_scale=1024.0, skipped_steps=3)
    assert re.search(r"Step 4 of 9: loss 2.0000, tokens/s \d+, skipped 3 steps", capsys.readouterr().out)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss_scale"] == 1024.0


@pytest.mark.slow
def test_float16_run_reports_skipped_steps_and_errors(tiny, pairs, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny, base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(short_run(base, pairs, run, max_steps=1)))
    done = run_program("jlora.train", "--config", file, "--config.compute_dtype=float16")
    assert done.returncode == 2 and "Training diverged at step 1: loss" in done.stderr
    assert "; or set compute_dtype='float32', because float16 has no values above 65504" in done.stderr
    assert "Computing in float16: the loss is scaled" in done.stdout
    assert re.search(r"\nAttention: xla; shared \d+-token prefix computed once per row\n", done.stdout)

    record = json.loads((run / "config.json").read_text())
    record["config"]["compute_dtype"] = "auto"  # as if it had begun on a card without bfloat16
    (run / "config.json").write_text(json.dumps(record))
    done = run_program("jlora.train", "--config", file, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 2 and "the compute dtype changed from float16 to float32" in done.stderr
