"""Every mesh gives the same numbers, arrays are sharded by the rules, and sizes that do not divide are reported."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from programs import Trains, adapter_of, logged, losses_of, run_program, short_run, terminated
from tiny_models import make_model

from jlora.adapters.settings import spec_of
from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.data.batches import plan_batches
from jlora.data.examples import Example
from jlora.distributed import sharding
from jlora.models import hf_loader, splash_attention
from jlora.models.compute_settings import Packing
from jlora.models.families import read_config
from jlora.planning import collectives
from jlora.planning.hlo import Program
from jlora.steps import optim
from jlora.steps.programs import Programs, fresh_state
from jlora.training import run, setup

MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"tensor": 2}, {"fsdp": 2, "tensor": 4}]
TABLES = {"target_modules": ("v_proj", "lm_head"), "trainable_token_indices": (("embed_tokens", (300, 2, 7)),)}
MORE = {"use_dora": True, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def heads(tmp_path_factory, smollm):
    """A random untied Llama whose heads divide over 4 devices, with a small vocabulary."""
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False, "vocab_size": 512}
    return make_model(tmp_path_factory.mktemp("heads"), smollm, num_hidden_layers=2, **changes)


class Run(Trains):
    """A run on random tokens."""

    def __init__(self, directory, devices=1, mesh=None, **changes):
        config = dataclasses.replace(
            Config(), batch_size=8, learning_rate=5e-3, lora_rank=4, target_modules=("q_proj", "down_proj")
        )
        config = dataclasses.replace(config, mesh=mesh or {}, **changes)
        self.mesh = sharding.make_mesh(jax.devices()[:devices], config.mesh)
        random = np.random.RandomState(0)
        drawn = (np.r_[np.arange(5), random.randint(512, size=n - 5)] for n in range(17, 49))
        examples = [Example(tokens, np.arange(len(tokens)) > 8, "") for tokens in drawn]
        self.batches = plan_batches(
            examples,
            batch_size=config.batch_size,
            micro_batches=config.gradient_accumulation_steps,
            devices=sharding.data_parallel_size(self.mesh),
            steps=10,
            seed=0,
            linear_cost=1e4,
            max_shapes=1,
            share=True,
        )
        assert self.batches.prefix == 5
        model, spec = read_config(directory), spec_of(dataclasses.asdict(config))
        kernel = config.attn_implementation.replace("auto", "xla")
        compute = setup.choose_compute(config, jax.devices()[0])
        compute = dataclasses.replace(compute, mesh=self.mesh, attention=kernel)
        graphdef, _, base_shapes = hf_loader.abstract_model(model, spec, compute)
        self.base = hf_loader.load_base(directory, base_shapes, self.mesh)
        optimizer = optim.make_optimizer(config, spec, 10)
        adapter = run.first_adapter(config, model, compute, self.base)
        self.state = fresh_state(adapter, optimizer, self.mesh, compute.compute_dtype)
        packing = Packing(*self.batches.packing)
        self.programs = Programs(graphdef, self.base, optimizer, self.mesh, packing=packing, dropout=spec.draws, seed=1)
        self.curve = self.losses(10)


@pytest.fixture(scope="module")
def alone(heads):
    """A function that returns the run on one device for some changes, cached."""
    runs = {}

    def get(**changes):
        if str(changes) not in runs:
            runs[str(changes)] = Run(heads, **changes)
        return runs[str(changes)]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        *((mesh, {}) for mesh in MESHES),
        (MESHES[4], MORE),
        (MESHES[4], TABLES),
        ({"data": 4, "fsdp": 2}, {"quantize_base": "nf4"}),
        (MESHES[0], {"attn_implementation": "splash"}),
    ],
    ids=str,
)
def test_every_mesh_equals_one_device(heads, alone, monkeypatch, mesh, changes):
    monkeypatch.setattr(splash_attention, "INTERPRET", True)
    one, many = alone(**changes), Run(heads, 8, mesh, **changes)
    assert np.abs(np.subtract(one.curve, many.curve)).max() < 1e-5
    assert one.curve[-1] < one.curve[0] - 0.1  # it learns, so the bound is meaningful
    for a, b in zip(jax.tree.leaves(one.state.lora), jax.tree.leaves(many.state.lora), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5
    for leaf in jax.tree.leaves(many.base["layers"]):
        if leaf.ndim == 3:  # each device holds its share of every matrix, and no more
            assert leaf.addressable_data(0).nbytes == leaf.nbytes * many.mesh.shape["data"] // 8
    (program,) = many.programs.compiled.values()
    sent = collectives.find_collectives(Program(program.as_text()), 8)
    gathered = [c.size for c in sent if c.kind == "all-gather"]
    if many.mesh.shape["fsdp"] > 1:  # the stack never comes together, only a layer's matrices, and the head once
        matrices = [leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(many.base["layers"])]
        tables = [many.base["lm_head"]["weight"], *many.state.lora.get("lm_head", {}).values()]
        head = sum(leaf.nbytes for leaf in tables if leaf.shape[0] == 512)  # B of a head with LoRA lies beside it
        assert max(gathered) == max(*matrices, head) // many.mesh.shape["tensor"]
    if many.mesh.shape["data"] == 8:  # nothing but the adapter's gradient, and a few scalars
        adapter = sum(leaf.nbytes for leaf in jax.tree.leaves(many.state.lora))
        assert {c.kind for c in sent} == {"all-reduce"}
        assert adapter < sum(c.size * c.times for c in sent) <= adapter + 16


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 3}, r"data=-1 x fsdp=3 x tensor=1 does not match 8 .*use sizes from 1, 2, 4, 8"),
        ({"data": 2, "tensor": 2}, r"data=2 x fsdp=1 x tensor=2 does not match 8"),
        (
            {"tensor": 8},
            r"tensor=8 does not divide all of .*num_key_value_heads=4.*Set tensor to one of 1, 2, 4.$",
        ),
    ],
)
def test_a_mesh_that_does_not_match_is_refused(heads, mesh, message):
    with pytest.raises(UserError, match=message):
        Run(heads, 8, mesh)


def test_a_batch_size_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh(jax.devices(), {"data": 2, "fsdp": 2, "tensor": 2})
    sharding.check_batch(mesh, 8)
    words = (
        r"batch_size=6 does not divide over 4 devices \(mesh: data=2 x fsdp=2 x tensor=2\)\. Set batch_size=4 or 8\."
    )
    with pytest.raises(UserError, match=words):
        sharding.check_batch(mesh, 6)


def test_an_array_without_a_sharding_rule_is_refused():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="No sharding rule matches base/layers/self_attn/q_proj/bits"):
        sharding.shardings({"layers": {"self_attn": {"q_proj": {"bits": np.zeros(8)}}}}, mesh, "base")


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_one_to_four(tiny, pairs, tmp_path):
    """Stopped twice, on three different meshes; the loss curve equals that of a single device."""

    def config(name):
        values = {"save_steps": 100, "max_steps": 20, "batch_size": 8}
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(short_run(tiny, pairs, tmp_path / name, learning_rate=2e-3, **values)))
        return file

    def losses(name):
        return list(losses_of(tmp_path / name).values())

    done = run_program("jlora.train", "--config", config("still"))
    assert done.returncode == 0, done.stderr
    file, at = config("moving"), 0
    for devices, mesh, until in [(8, "{fsdp: 2, tensor: 2}", 2), (1, "{}", 8), (4, "{fsdp: 4}", 100)]:
        told = ["--config", file, f"--config.mesh={mesh}", "--config.resume_from_checkpoint=auto"]
        with terminated(logged(tmp_path / "moving", until)):
            done = run_program("jlora.train", *told, devices=devices)
        assert done.returncode == 0, done.stderr
        assert f"Training for 20 steps on {devices} CPU device" in done.stdout and (
            at == 0 or f"from step {at}, but not bit for bit" in done.stdout
        )
        if until < 20:
            at = int(re.search(r"Stopped after step (\d+) of 20", done.stdout)[1])
    assert len(losses("moving")) == len(losses("still"))
    assert np.abs(np.subtract(losses("moving"), losses("still"))).max() < 1e-5
    assert losses("still")[-1] < losses("still")[0] - 0.1
    ours, theirs = adapter_of(tmp_path / "moving"), adapter_of(tmp_path / "still")
    assert max(np.abs(ours[name] - theirs[name]).max() for name in theirs) < 1e-5
