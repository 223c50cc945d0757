"""Every family and RoPE type against transformers and PEFT: logits, losses, gradients of A and B."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from test_model import full, load, logits

from jlora.adapters.peft_config import peft_config
from jlora.adapters.peft_io import tensors, write_adapter
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import UserError
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import FAMILIES, read_config

SPEC = AdapterSpec(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))
SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama-1": ("llama", {"head_dim": 128, "num_key_value_heads": 4}),
    "llama-2-gqa": ("llama", {"head_dim": 128}),
    "llama-biases": ("llama", {"head_dim": 64, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"head_dim": 64, "tie_word_embeddings": True}),
    "llama-3.1": (
        "llama",
        {"head_dim": 128, "rope": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32}},
    ),
    "llama-linear": ("llama", {"head_dim": 128, "rope": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}),
    "llama-dynamic": ("llama", {"head_dim": 128, "rope": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("llama", {"head_dim": 128, "rope": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-yarn-odd": (
        "llama",
        {
            "head_dim": 64,
            "rope": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 1.5,
                "mscale_all_dim": 0.8,
                "truncate": False,
            },
        },
    ),
    "mistral": ("mistral", {"head_dim": 128, "sliding_window": 20}),
    "mistral-0.3": (
        "mistral",
        {"head_dim": 64, "sliding_window": None, "rope": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 256}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0, "hidden_size": 256},
    ),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3-bias-yarn": (
        "qwen3",
        {"head_dim": 64, "attention_bias": True, "rope": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
    ),
}
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
}
T = 150  # beyond max_position_embeddings, every original length and every window


def make(directory, family, changes):
    """A random model of a family on disk; its norms and biases are not the initial ones and zeros."""
    torch.manual_seed(0)
    changes = dict(changes)
    rope = changes.pop("rope", {"rope_type": "default", "rope_theta": 10000.0})
    cls = CLASSES[family]
    model = cls(cls.config_class(**{**SIZES, "rope_parameters": rope, **changes}))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models by case, made once."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = make(tmp_path_factory.mktemp(case), *CASES[case])
        return made[case]

    return get


TOKENS = np.random.RandomState(1).randint(0, 300, (2, T)).astype(np.int32)
SHORT = 61  # length of the second example


@functools.partial(jax.jit, static_argnums=0)
def jax_outputs(graphdef, adapter, base, tokens, segments, positions, targets):
    """Logits, the loss of each target (0 where the target is -1), and the gradient of their sum."""

    def loss(adapter):
        model = nnx.merge(graphdef, adapter, base)
        hidden, _ = model(tokens, segments, positions)
        logits = model.logits(hidden)
        scores = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        losses = jnp.where(targets >= 0, -picked, 0.0)
        return jnp.sum(losses), (logits, losses)

    grads, (logits, losses) = jax.grad(loss, has_aux=True)(adapter)
    return logits, losses, grads


def shifted(tokens, segments):
    """The next token of the same example, -1 where there is none."""
    targets = np.full_like(tokens, -1)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets[:, :-1] = np.where(same, tokens[:, 1:], -1)
    return targets


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_gradients_equal_transformers_and_peft(models, tmp_path, case):
    directory = models(case)
    graphdef, adapter, base = load(directory, SPEC)
    adapter = full(adapter)
    write_adapter(adapter, SPEC, peft_config(SPEC, str(directory), None, tied=False), "", tmp_path / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)

    lengths = [T, SHORT]
    mask = np.arange(T)[None] < np.array(lengths)[:, None]
    sides = {"right": mask, "left": mask[:, ::-1]}
    if CASES[case][1].get("rope", {}).get("rope_type") == "dynamic":
        sides.pop("left")  # transformers counts padding into the length there
    for real in sides.values():
        segments = real.astype(np.int32)
        positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
        tokens = np.where(real, TOKENS, 0).astype(np.int32)
        targets = shifted(tokens, segments)
        got, losses, grads = jax_outputs(graphdef, adapter, base, tokens, segments, positions, targets)

        model.zero_grad()
        scores = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(segments, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
        ).logits
        want_losses = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), torch.tensor(targets, dtype=torch.long).flatten(), ignore_index=-1, reduction="none"
        ).reshape(targets.shape)
        want_losses.sum().backward()
        want = scores.detach().numpy()
        assert np.abs(got - want)[real].max() < 2e-4
        assert np.abs(losses - want_losses.detach().numpy()).max() < 1e-5
        assert abs(losses.sum() / want_losses.sum().item() - 1) < 1e-5
        theirs = {
            name.replace(".default", ""): p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad
        }
        ours = tensors(grads, SPEC, tied=False)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert np.linalg.norm(value - theirs[name]) <= 1e-4 * np.linalg.norm(theirs[name]), name

    # the same two examples in one packed row
    row = np.concatenate([TOKENS[:1], TOKENS[1:, :SHORT]], axis=1)
    segments = np.array([[1] * T + [2] * SHORT], np.int32)
    positions = np.array([[*range(T), *range(SHORT)]], np.int32)
    packed, _, _ = jax_outputs(graphdef, adapter, base, row, segments, positions, shifted(row, segments))
    right = np.where(mask, TOKENS, 0)
    with torch.no_grad():
        want = model(
            torch.tensor(right, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long)
        ).logits.numpy()
    assert np.abs(packed[0, :T] - want[0]).max() < 2e-4
    assert np.abs(packed[0, T:] - want[1, :SHORT]).max() < 2e-4


FIELDS = "llama-biases llama-tied llama-3.1 llama-dynamic llama-yarn-odd mistral qwen2-sliding qwen3-bias-yarn".split()


@pytest.mark.slow
@pytest.mark.parametrize("case", FIELDS)
def test_every_config_field_changes_the_output_or_the_shapes(models, case):
    """The perturbation test, and the negative control of each family: a field read wrongly would be seen above."""
    directory = models(case)
    config = read_config(directory)
    graphdef, adapter, base = load(directory, SPEC)
    adapter = full(adapter)
    want = eager_logits(graphdef, adapter, base, TOKENS)
    changed = {"rms_norm_eps": 1e-2, "sliding_window": 10 if config.sliding_window else 30}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "rope":
            ropes = [
                dataclasses.replace(value, **{f.name: perturbed(f.name, getattr(value, f.name))})
                for f in dataclasses.fields(value)
            ]
            others = [(f"rope {rope}", dataclasses.replace(config, rope=rope)) for rope in ropes]
        else:
            doubled = changed.get(field.name) or value * 2
            new = (not value) if isinstance(value, bool) else doubled
            others = [(field.name, dataclasses.replace(config, **{field.name: new}))]
        for name, other in others:
            graphdef, _, shapes = hf_loader.abstract_model(other, SPEC, FLOAT32_COMPUTE)
            if jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, base):
                assert np.abs(eager_logits(graphdef, adapter, base, TOKENS) - want).max() > 1e-3, name


def eager_logits(*arguments):
    """Logits without jit: to compile a model that runs once takes most of the time."""
    with jax.disable_jit():
        return logits(*arguments)


def perturbed(name, value):
    """Another value of a RoPE field, large enough to show at T tokens."""
    if isinstance(value, bool):
        return not value
    if name == "beta_fast":  # more turns than the original length holds would change nothing
        return value / 8
    return type(value)(value * 2 if value > 1 else value * 2 + 0.5)


def test_every_config_key_that_transformers_reads_is_handled():
    """A field that a later transformers adds to one of these families fails this test until it is reviewed."""
    harmless = {"initializer_range", "use_cache", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"}
    harmless |= {"pretraining_tp"}  # the same products in slices, in older versions
    assert set(CLASSES) == set(FAMILIES)
    for family, cls in CLASSES.items():
        own = set(cls.config_class.__annotations__) - {"model_type", "keys_to_ignore_at_inference"}
        own = {name for name in own if not name.startswith("base_model_")}
        read = set(FAMILIES[family].keys.model_fields)
        assert own <= read | harmless, (family, own - read - harmless)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            "llama",
            {"model_type": "gemma2"},
            "has model_type='gemma2'. Supported model types: llama, mistral, qwen2, qwen3.",
        ),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type='longrope'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor is missing"),
        ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}'),
        ("llama", {"is_causal": False}, "is_causal=False"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "layer_types="),
    ],
)
def test_unsupported_settings_are_errors_that_name_them(tmp_path, family, changes, message):
    fields = {**SIZES, "model_type": family, **changes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace("{", r"\{")):
        read_config(tmp_path)


def test_old_and_new_rope_keys_give_the_same_config(tmp_path):
    new = {**SIZES, "model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    old = {**SIZES, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    read = []
    for fields in (new, old):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        read.append(read_config(tmp_path))
    assert read[0] == read[1] and read[0].rope.original_max_position_embeddings == 64
