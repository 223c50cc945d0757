"""Every kind of adapter against PEFT's own: its curve, its files, its logits, both ways; on tiny random models."""

import dataclasses
import json
import shutil
import warnings

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import make_model, short_run
from flax import nnx
from peft.optimizers import create_loraplus_optimizer
from safetensors import safe_open
from safetensors.numpy import load_file

from jlora.adapters import neftune, params, plain_lora
from jlora.adapters.methods import make_method
from jlora.adapters.methods.lora import dropout
from jlora.adapters.peft_config import peft_config, read_spec
from jlora.adapters.peft_io import read_adapter, write_adapter
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.spec import TARGETS, AdapterSpec, settings_of, spec_of
from jlora.api import finetune
from jlora.bases.gguf import _unpermute_rotary as half_rotation
from jlora.common import hf_names
from jlora.common.errors import UserError, VerificationError
from jlora.config.files import load_config
from jlora.config.schema import Config
from jlora.data.batches import Batch
from jlora.distributed import sharding
from jlora.export.exporter import load_adapter
from jlora.export.gguf import FILE, check_gguf, side_by_side, write_gguf
from jlora.export.servers import convert_for_server
from jlora.models import hf_loader
from jlora.models.compute import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.models.llama import Projection
from jlora.serve import loading
from jlora.steps import optim
from jlora.steps.loss import CROSS_ENTROPY
from jlora.steps.step import TrainState, make_train_step
from jlora.training import setup

STEPS, ROWS, LENGTH, V = 20, 2, 24, 256
TOKENS = np.random.RandomState(1).randint(0, V, (4, ROWS, LENGTH)).astype(np.int32)[np.arange(STEPS + 1) % 4]
PATTERNED = {
    "use_rslora": True,
    "target_modules": "all-linear",
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6, "^model.layers.2.mlp.down_proj": 3},
    "alpha_pattern": {"v_proj": 5, r"layers\.[02]\.mlp\..*": 9},
}
# Name -> is the model tied, PEFT's class, PEFT's settings, jlora's further settings.
VARIANTS = {
    "rslora-patterns-all-linear": (True, peft.LoraConfig, PATTERNED, {}),
    "dora-layers-patterns": (
        False,
        peft.LoraConfig,
        {
            "use_dora": True,
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"layers.2.self_attn.q_proj": 7},
        },
        {},
    ),
    "pissa-rslora": (
        True,
        peft.LoraConfig,
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "target_modules": ["v_proj", "gate_proj"],
            "rank_pattern": {"layers.0.mlp.gate_proj": 2},
        },
        {},
    ),
    "pissa-dora": (
        False,
        peft.LoraConfig,
        {"init_lora_weights": "pissa", "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
        {},
    ),
    "loraplus-tied-tables": (
        True,
        peft.LoraConfig,
        {
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        {"loraplus_lr_ratio": 8.0, "learning_rate": 1e-3},
    ),
    "dora-loraplus-untied-tables": (
        False,
        peft.LoraConfig,
        {"use_dora": True, "target_modules": ["layers.1.mlp.up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"loraplus_lr_ratio": 4.0, "learning_rate": 1e-3},
    ),
    "ia3": (
        False,
        peft.IA3Config,
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, smollm):
    """Three layers, head_dim 64: tied without biases, and untied with them."""
    small = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1}
    root = tmp_path_factory.mktemp("models")
    biased = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    return {
        True: make_model(root / "tied", smollm, **small),
        False: make_model(root / "untied", smollm, **small, **biased),
    }


class Ours:
    """jlora on a model directory with one kind of adapter."""

    def __init__(self, directory, spec, **settings):
        self.directory, self.spec = directory, spec
        self.config = read_config(directory)
        self.graphdef, self.shapes, base = hf_loader.abstract_model(self.config, spec, FLOAT32_COMPUTE)
        self.base = hf_loader.load_base(directory, base, sharding.make_mesh(jax.devices()[:1]))
        fixed = {"weight_decay": 0.1, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
        self.settings = Config(**{"learning_rate": 1e-2, **fixed, **settings})
        self.optimizer = optim.make_optimizer(self.settings, spec, STEPS)
        self.step = jax.jit(make_train_step(self.graphdef, CROSS_ENTROPY, self.optimizer, dropout=False, devices=1))

        @jax.jit
        def run(adapter, base, tokens):
            model = nnx.merge(self.graphdef, adapter, base)
            positions = jnp.tile(jnp.arange(tokens.shape[1])[None], (len(tokens), 1))
            hidden, _ = model(tokens, jnp.ones_like(tokens), positions)
            return model.logits(hidden)

        self.logits = lambda adapter, tokens: np.asarray(run(adapter, self.base, tokens))

    def read(self, directory):
        adapter = read_adapter(directory, self.spec, self.shapes, tied=self.config.tie_word_embeddings)
        return params.complete(self.spec, adapter, self.base)

    def write(self, adapter, directory):
        config = peft_config(self.spec, str(self.directory), None, tied=self.config.tie_word_embeddings)
        write_adapter(adapter, self.spec, config, "", directory)

    def state(self, adapter):
        return TrainState(adapter, optim.init(self.optimizer, adapter), jnp.zeros((), jnp.int32))

    def train(self, state, tokens):
        return self.step(state, self.base, batch(tokens), jax.random.key(0))


def batch(tokens):
    """Rows of one example each, every next token a target."""
    ones = np.ones_like(tokens)
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (len(tokens), 1))
    targets, weights = tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32)
    return Batch(*(leaf[None] for leaf in (tokens, ones, places, places[:, :-1], targets, weights)))


def torch_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def torch_loss(model, tokens):
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def torch_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def torch_train(model, settings):
    """PEFT's and torch's own training: the loss of every step."""
    rate, decay, ratio = settings.learning_rate, settings.weight_decay, settings.loraplus_lr_ratio
    trained = [p for p in model.parameters() if p.requires_grad]
    if ratio == 1:
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    else:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
        )
    losses = []
    for tokens in TOKENS[:STEPS]:
        optimizer.zero_grad()
        loss = torch_loss(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_pefts_own_in_training_files_and_logits(models, tmp_path, name):
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
        assert np.abs(mine - ours.logits(params.neutral(state.lora, ours.base), TOKENS[0])).max() > 0.05
        assert np.array_equal(before, ours.base["layers"]["mlp"]["up_proj"]["weight"])

        model.save_pretrained(tmp_path / "theirs")
        taken = ours.read(tmp_path / "theirs")
        with torch.no_grad():
            next_loss = float(torch_loss(model, TOKENS[STEPS]))
        assert float(ours.train(ours.state(taken), TOKENS[STEPS])[1].loss) == pytest.approx(next_loss, rel=1e-4)
    if spec.init_lora_weights != "pissa":  # which is written as a difference
        ours.write(taken, tmp_path / "again")
        one, other = (load_file(tmp_path / place / WEIGHTS) for place in ("theirs", "again"))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


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
def test_a_variant_on_every_target_is_loaded_by_peft_without_a_warning(models, tmp_path, name):
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
    assert np.abs(mine - ours.logits(params.neutral(adapter, ours.base), TOKENS[0])).max() > 0.05


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
def test_a_new_adapter_does_nothing_yet_and_what_a_layer_lacks_stays_zero(models, changes):
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


@pytest.mark.slow
def test_the_portable_form_computes_the_same(models, tmp_path):
    spec = AdapterSpec(
        4,
        8.0,
        0.0,
        ("q_proj", "v_proj", "model.layers.1.mlp.down_proj"),
        use_rslora=True,
        rank_pattern=(("layers.0.self_attn.q_proj", 2), ("v_proj", 6)),
        alpha_pattern=(("layers.2.self_attn.v_proj", 3.0),),
        layers_to_transform=(0, 2),
    )
    ours = Ours(models[True], spec)
    adapter = params.start(spec, ours.shapes, ours.base, jax.random.key(0))
    for path, leaves in params.modules(adapter):
        within = jnp.any(leaves["lora_A"] != 0, axis=2)[:, None]
        leaves["lora_B"] = jnp.where(
            within, 0.05 * jax.random.normal(jax.random.key(len(path)), leaves["lora_B"].shape), 0
        )
    plain, form = plain_lora.to_plain_lora(adapter, spec)
    assert form == AdapterSpec(6, 6.0, 0.0, form.target_modules)
    assert set(form.target_modules) == {"q_proj", "v_proj", "down_proj"}
    assert plain_lora.is_uniform_lora(form) and not plain_lora.is_uniform_lora(spec)
    other = Ours(models[True], form)
    want = ours.logits(adapter, TOKENS[0])
    assert np.abs(other.logits(plain, TOKENS[0]) - want).max() < 1e-6 * np.abs(want).max()
    other.write(plain, tmp_path / "portable")
    loaded = peft.PeftModel.from_pretrained(torch_base(models[True]), tmp_path / "portable")
    assert np.abs(torch_logits(loaded, TOKENS[0]) - want).max() < 1e-4
    # float32's own noise is above 1e-6 here (the same ranks in another order move a logit by 1.4e-6): in float64, then
    ours.write(adapter, tmp_path / "original")
    original = peft.PeftModel.from_pretrained(torch_base(models[True]), tmp_path / "original")
    exact, other_form = (torch_logits(model.double(), TOKENS[0]) for model in (original, loaded))
    assert exact.dtype == np.float64 and np.abs(other_form - exact).max() < 1e-6
    nothing = ours.logits(params.neutral(adapter, ours.base), TOKENS[0])
    assert np.abs(nothing - want).max() > 0.05


def test_a_gguf_adapter_changes_every_weight_as_trained(models, tmp_path, smollm):
    spec = AdapterSpec(
        4,
        8.0,
        0.0,
        TARGETS,
        use_rslora=True,
        rank_pattern=(("q_proj", 2),),
        layers_to_transform=(0, 2),
        init_lora_weights="pissa",
    )
    ours = Ours(models[True], spec)
    adapter = params.start(spec, ours.shapes, ours.base, jax.random.key(0))
    for _, leaves in params.modules(adapter):
        leaves["lora_B"] = 1.5 * leaves["lora_B"]
    form = convert_for_server("llama.cpp", adapter, spec, 0)
    sentence = write_gguf((adapter, spec), form, models[True], tmp_path / "made")
    assert "each of 21 weights" in sentence
    reader = gguf.GGUFReader(tmp_path / "made" / FILE)
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type", "general.architecture")}
    assert list(fields.values()) == ["adapter", "lora", "llama"]
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert shapes["blk.2.ffn_down.weight.lora_a"] == (8, 96) and shapes["blk.2.attn_k.weight.lora_b"] == (64, 8)
    heads = {"q_proj": 2, "k_proj": 1}
    for wrong, file_heads in ((dataclasses.replace(spec, alpha=9.0), heads), (spec, {})):  # scale, order of rows
        with pytest.raises(VerificationError, match="does not compute what was trained: blk"):
            check_gguf(tmp_path / "made" / FILE, (adapter, wrong), file_heads)
    with pytest.raises(UserError, match="exists, and jlora never overwrites"):
        write_gguf((adapter, spec), form, models[True], tmp_path / "made")


def test_rows_are_in_the_order_of_a_real_gguf_file(smollm):
    with safe_open(smollm / "model.safetensors", framework="numpy") as file:
        weight = file.get_tensor("model.layers.3.self_attn.k_proj.weight")
    assert np.array_equal(half_rotation(side_by_side(weight, 3), 3), weight)  # half_rotation read the real file
    assert not np.array_equal(side_by_side(weight, 3), weight)


@pytest.mark.parametrize(
    ("changes", "max_rank", "message"),
    [
        ({"use_dora": True}, 0, r"vLLM does not support DoRA \(use_dora\)\. Merge it into the base model"),
        ({"modules_to_save": ("lm_head",)}, 0, "vLLM does not support modules_to_save=lm_head. Merge"),
        ({"peft_type": "IA3"}, 0, "vLLM does not support IA3. Merge"),
        ({"rank": 17}, 0, "rank 17, but vLLM would be started with a maximum rank of 16. Add --max_lora_rank 32"),
        ({"rank": 600}, 512, "rank 600 exceeds vLLM's limit of 512. Merge"),
    ],
)
def test_what_a_server_refuses_is_said_before_anything_is_written(changes, max_rank, message):
    spec = AdapterSpec(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ("q_proj",), **changes})
    with pytest.raises(UserError, match=message):
        convert_for_server("vllm", {}, spec, max_rank)
    assert convert_for_server("peft", {}, spec, 0) == ({}, spec)


@pytest.mark.slow
def test_a_run_of_many_variants_resumes_bit_for_bit_and_answers(tmp_path, tiny, pairs, capsys, monkeypatch):
    monkeypatch.setattr(setup, "find_devices", lambda config: jax.devices()[:1])
    (tmp_path / "few.txt").write_text("\n\n".join((pairs / "train.txt").read_text().split("\n\n")[:4]))
    settings = short_run(
        tiny,
        tmp_path / "few.txt",
        tmp_path / "whole",
        max_steps=4,
        save_steps=2,
        learning_rate=1e-3,
        lora_dropout=0.1,
        use_dora=True,
        use_rslora=True,
        init_lora_weights="pissa",
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[0, 2],
        rank_pattern={"layers.2.mlp.up_proj": 2},
        modules_to_save=["embed_tokens"],
        loraplus_lr_ratio=4,
        neftune_noise_alpha=5,
    )
    (tmp_path / "run.yaml").write_text(json.dumps(settings))

    def run(*overrides):
        finetune(load_config(str(tmp_path / "run.yaml"), list(overrides)))

    run()
    shutil.copytree(tmp_path / "whole", tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved/checkpoints/4")
    shutil.rmtree(tmp_path / "halved/adapter")
    run(f"--config.output_dir={tmp_path / 'halved'}", "--config.resume_from_checkpoint=auto")
    assert "from step 2, exactly" in capsys.readouterr().out
    one, other = (load_file(tmp_path / place / "adapter" / WEIGHTS) for place in ("whole", "halved"))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    generator, voices = loading.load_model(str(tiny), {"adapter": tmp_path / "whole/adapter"})
    adapter = voices.adapters["adapter"]
    trained, spec = load_adapter(tmp_path / "whole", 4)
    graphdef, _, _ = hf_loader.abstract_model(read_config(tiny), spec, FLOAT32_COMPUTE)
    same = type(generator)(tiny, generator.tokenizer, graphdef, generator.base, jnp.float32)
    assert list(generator.generate_tokens(adapter, [1, 2, 3], 8)) == list(same.generate_tokens(trained, [1, 2, 3], 8))
    bare = loading.load_model(str(tiny)).generator
    assert list(same.tokens(same.neutral(trained), [1, 2, 3], 8)) == list(bare.tokens({}, [1, 2, 3], 8))


def test_pissa_of_more_ranks_than_components_is_refused(models):
    spec = AdapterSpec(65, 8.0, 0.0, ("k_proj",), init_lora_weights="pissa")
    ours = Ours(models[True], spec)
    with pytest.raises(UserError, match="rank 65 for k_proj, which has only 64 singular components"):
        params.start(spec, ours.shapes, ours.base, jax.random.key(0))


def test_doras_dropout_is_pefts():
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


def test_noise_is_within_its_bound_by_example_and_only_in_training(models):
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


def test_sites_follow_pefts_rule_of_patterns():
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
