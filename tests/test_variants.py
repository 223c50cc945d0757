"""Every kind of adapter against PEFT: its loss curve, its files and its logits, both ways; on tiny random models."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from variants import (
    STEPS,
    TOKENS,
    VARIANTS,
    Ours,
    batch,
    torch_base,
    torch_logits,
    torch_loss,
    torch_train,
    write_models,
)

from jlora.adapters import neftune, params
from jlora.adapters.methods import make_method
from jlora.adapters.methods.lora import dropout
from jlora.adapters.peft_config import read_spec
from jlora.adapters.peft_io import COPIES
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.settings import settings_of, spec_of
from jlora.adapters.spec import TARGETS, AdapterSpec
from jlora.common import hf_names
from jlora.common.errors import UserError
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.llama import Projection
from jlora.steps.loss import CROSS_ENTROPY
from jlora.steps.train_step import make_train_step


@pytest.fixture(scope="module")
def models(tmp_path_factory, smollm):
    return write_models(tmp_path_factory, smollm)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains_exports_and_infers_like_peft(models, tmp_path, name):
    tied, kind, theirs, settings = VARIANTS[name]
    directory = models[tied]
    shared = {"r": 4, "lora_alpha": 12} if kind is peft.LoraConfig else {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):  # PEFT's ways of saying that something does not fit
            warnings.simplefilter("error", category)
        warnings.filterwarnings(
            "ignore", "Using Rank-Stabilized LoRA with rank_pattern"
        )  # no difference by PEFT itself
        for text in PEFTS_OWN_WARNINGS:
            warnings.filterwarnings("ignore", text)
        model = peft.get_peft_model(torch_base(directory), kind(task_type="CAUSAL_LM", **shared, **theirs))
        model.save_pretrained(tmp_path / "initial")
        spec = read_spec(tmp_path / "initial", 3)
        assert spec_of(settings_of(spec)) == dataclasses.replace(spec, rank=spec.rank)
        ours = Ours(directory, spec, **settings)
        initial = ours.read(tmp_path / "initial")
        assert sum(a.size for a in jax.tree.leaves(initial)) >= sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )

        state, losses = ours.state(initial), []
        for tokens in TOKENS[:STEPS]:
            state, metrics = ours.train(state, tokens)
            losses.append(float(metrics.loss))
        want = torch_train(model, ours.settings)
        assert np.abs(np.array(losses) / want - 1).max() < 1e-4
        assert want[-1] != pytest.approx(want[0], rel=1e-2)

        before = np.array(ours.base["layers"]["mlp"]["up_proj"]["weight"])
        ours.write(state.lora, tmp_path / "written")
        loaded = peft.PeftModel.from_pretrained(torch_base(directory), tmp_path / "written")
        mine = ours.logits(state.lora, TOKENS[0])
        assert np.abs(mine - torch_logits(loaded, TOKENS[0])).max() < 1e-4
        assert np.abs(mine - ours.logits(params.neutral(spec, state.lora, ours.base), TOKENS[0])).max() > 0.05
        assert np.array_equal(before, ours.base["layers"]["mlp"]["up_proj"]["weight"])

        model.save_pretrained(tmp_path / "theirs")
        taken = ours.read(tmp_path / "theirs")
        with torch.no_grad():
            next_loss = float(torch_loss(model, TOKENS[STEPS]))
        assert float(ours.train(ours.state(taken), TOKENS[STEPS])[1].loss) == pytest.approx(next_loss, rel=1e-4)
    if spec.init_lora_weights != "pissa":  # which is written as a difference
        ours.write(taken, tmp_path / "again")
        one, other = (load_file(tmp_path / place / WEIGHTS) for place in ("theirs", "again"))
        one = {key: values for key, values in one.items() if key not in COPIES}
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


# PEFT warns of its own advice, or of its own files, not of jlora's.
PEFTS_OWN_WARNINGS = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "Setting `save_embedding_layers` to `True`",
    ".*LoRA tensor.s. have invalid shape.*lora_B.bias",
)
EVERYWHERE = {  # is the model tied, AdapterSpec's fields; LoRA+, dropout and noise leave no trace in the file
    "lora": (False, {}),
    "rslora-layers": (True, {"use_rslora": True, "layers_to_transform": (0, 2)}),
    "patterns": (True, {"rank_pattern": (("q_proj", 2),), "alpha_pattern": (("layers.1.mlp.down_proj", 5.0),)}),
    "dora": (False, {"use_dora": True}),
    "pissa": (True, {"init_lora_weights": "pissa"}),
    "tables": (False, {"modules_to_save": ("embed_tokens", "lm_head")}),
    "tied-tables": (True, {"modules_to_save": ("embed_tokens", "lm_head")}),
    "ia3": (False, {"peft_type": "IA3", "feedforward_modules": ("up_proj", "down_proj")}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYWHERE)
def test_peft_loads_variants_on_all_targets_without_warnings(models, tmp_path, name):
    tied, fields = EVERYWHERE[name]
    spec = AdapterSpec(4, 8.0, 0.0, TARGETS, **fields)
    ours = Ours(models[tied], spec)
    adapter = params.start(spec, ours.shapes, ours.base, jax.random.key(0))
    for i, (_, leaves) in enumerate(params.modules(adapter)):
        for part in leaves.keys() - {"lora_A", "pissa_A", "pissa_B"}:
            there = jnp.any(leaves["lora_A"] != 0, axis=2)[:, None] if part == "lora_B" else True
            moved = leaves[part] + 0.05 * jax.random.normal(jax.random.key(i), leaves[part].shape)
            leaves[part] = jnp.where(there, moved, leaves[part])
    ours.write(adapter, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(torch_base(models[tied]), tmp_path / "adapter")
    adapted = {key.split(".")[-2] for key, _ in loaded.named_modules() if key.endswith((".lora_B", ".ia3_l"))}
    assert adapted == set(TARGETS)
    mine = ours.logits(adapter, TOKENS[0])
    assert np.abs(mine - torch_logits(loaded, TOKENS[0])).max() < 1e-4
    assert np.abs(mine - ours.logits(params.neutral(spec, adapter, ours.base), TOKENS[0])).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "layers_to_transform": (1,)},
        {
            "init_lora_weights": "pissa",
            "rank_pattern": (("layers.0.mlp.up_proj", 2),),
            "modules_to_save": ("embed_tokens",),
        },
        {"peft_type": "IA3"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_new_adapters_have_no_effect_and_padding_stays_zero(models, changes):
    spec = AdapterSpec(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ("q_proj", "up_proj"), **changes})
    ours = Ours(models[True], spec)
    adapter = params.start(spec, ours.shapes, ours.base, jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), adapter) == jax.tree.map(
        lambda a: (a.shape, a.dtype), ours.shapes
    )
    want = torch_logits(torch_base(models[True]), TOKENS[0])
    assert np.abs(ours.logits(adapter, TOKENS[0]) - want).max() < 1e-4
    state = ours.state(adapter)
    for tokens in TOKENS[:3]:
        state, _ = ours.train(state, tokens)
    assert np.abs(ours.logits(state.lora, TOKENS[0]) - want).max() > 1e-2
    for path, leaves in params.modules(state.lora):
        if "lora_A" not in leaves:
            continue
        for layer, rank in enumerate(spec.ranks(params.projection(path), 3)):
            assert not np.any(leaves["lora_A"][layer, rank:]) and not np.any(leaves["lora_B"][layer, :, rank:])
        if spec.init_lora_weights == "pissa":
            (frozen,) = [old for other, old in params.modules(adapter) if other == path]
            assert np.array_equal(frozen["pissa_A"], leaves["pissa_A"])
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert moments == 2 * sum(
        leaf.size
        for _, leaves in params.modules(adapter)
        for part, leaf in leaves.items()
        if not part.startswith("pissa")
    )


def test_pissa_rank_above_the_number_of_components_is_refused(models):
    spec = AdapterSpec(65, 8.0, 0.0, ("k_proj",), init_lora_weights="pissa")
    ours = Ours(models[True], spec)
    with pytest.raises(UserError, match="rank 65 for k_proj, which has 64 singular components"):
        params.start(spec, ours.shapes, ours.base, jax.random.key(0))


def test_dora_dropout_matches_peft():
    spec = AdapterSpec(4, 8.0, 0.5, ("q_proj",), use_dora=True)
    ours = Projection("self_attn.q_proj", 16, 24, spec, FLOAT32_COMPUTE, bias=True, layers=1)
    theirs = torch.nn.Linear(16, 24)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, use_dora=True, init_lora_weights=False)
    layer = peft.tuners.lora.layer.Linear(theirs, "default", config, r=4, lora_alpha=8)
    rng, key = np.random.RandomState(0), jax.random.key(3)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data = magnitude.data * torch.tensor(rng.uniform(0.5, 2.0, 24).astype(np.float32))
    sources = {
        "weight": theirs.weight,
        "bias": theirs.bias,
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
        "lora_magnitude_vector": magnitude,
    }
    for name, tensor in sources.items():
        getattr(ours, name)[...] = jnp.asarray(tensor.detach().numpy())
    x = rng.standard_normal((2, 5, 16)).astype(np.float32)
    kept = np.asarray(dropout(jnp.ones_like(x), 0.5, key))

    class Fixed(torch.nn.Module):
        def forward(self, inputs):
            return inputs * torch.tensor(kept)

    layer.lora_dropout["default"] = Fixed()
    want = layer.train()(torch.tensor(x)).detach().numpy()
    zero = jnp.zeros((), jnp.int32)
    assert np.abs(np.asarray(ours(jnp.asarray(x), zero, key)) - want).max() < 1e-5
    assert np.abs(np.asarray(ours(jnp.asarray(x), zero)) - want).max() > 0.1


@pytest.mark.slow
def test_neftune_noise_is_bounded_per_example_and_only_in_training(models):
    segments = jnp.array([[1] * 4 + [2] * 16 + [0] * 4])
    noise = np.asarray(neftune.noise(jnp.zeros((1, 24, 64)), segments, 5.0, jax.random.key(0)))
    for part, length in ((noise[0, :4], 4), (noise[0, 4:20], 16)):
        bound = 5.0 / np.sqrt(length * 64)
        assert 0.95 * bound < np.abs(part).max() <= bound
        assert abs(part.mean()) < 0.1 * bound
    spec = AdapterSpec(4, 8.0, 0.0, ("q_proj",), neftune_noise_alpha=5.0)
    ours = Ours(models[True], spec)
    adapter = params.start(spec, ours.shapes, ours.base, jax.random.key(0))
    noisy = jax.jit(make_train_step(ours.graphdef, CROSS_ENTROPY, ours.optimizer, dropout=True, devices=1))
    losses = [float(ours.train(ours.state(adapter), TOKENS[0])[1].loss)]
    losses += [
        float(noisy(ours.state(adapter), ours.base, batch(TOKENS[0]), jax.random.key(k))[1].loss) for k in (0, 1)
    ]
    assert len(set(losses)) == 3


def test_rank_patterns_follow_peft():
    assert {module.split(".")[-1] for module in hf_names.projections()} == set(TARGETS)
    spec = AdapterSpec(
        8, 16.0, 0.0, TARGETS, rank_pattern=(("proj", 1), ("layers.1.self_attn.q_proj", 2), ("q_proj", 3))
    )
    assert spec.ranks("self_attn.q_proj", 3) == (3, 2, 3)
    assert make_method(spec, "self_attn.q_proj").site(3).scales == (16 / 3, 8.0, 16 / 3)
    assert spec.ranks("mlp.up_proj", 3) == (8, 8, 8)
    wrong = dataclasses.replace(spec, layers_to_transform=(3,))
    assert wrong.problems(hf_names.projections(), 3) == ["layers_to_transform has 3: Expected layers from 0 to 2."]
    assert spec.problems(hf_names.projections(), 3) == ["rank_pattern has 'proj', which matches no trained module."]
