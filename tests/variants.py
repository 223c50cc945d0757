"""Kinds of adapters, and how jlora and PEFT train them on tiny random models."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from flax import nnx
from peft.optimizers import create_loraplus_optimizer
from tiny_models import make_model

from jlora.adapters import params
from jlora.adapters.peft_config import peft_config
from jlora.adapters.peft_io import read_adapter, write_adapter
from jlora.config.schema import Config
from jlora.data.batches import Batch
from jlora.distributed import sharding
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.steps import optim
from jlora.steps.loss import CROSS_ENTROPY
from jlora.steps.train_step import TrainState, make_train_step

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
    "lora-bias-rslora": (
        False,
        peft.LoraConfig,
        {"lora_bias": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {},
    ),
    "tokens-tied": (
        True,
        peft.LoraConfig,
        {"target_modules": ["q_proj"], "trainable_token_indices": [250, 3, 17]},
        {},
    ),
    "tokens-untied": (
        False,
        peft.LoraConfig,
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [200, 3, 9]}},
        {},
    ),
    "rslora-on-tables": (
        False,
        peft.LoraConfig,
        {"use_rslora": True, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 2}},
        {},
    ),
    "lora-on-tied-tables": (
        True,
        peft.LoraConfig,
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "alpha_pattern": {"embed_tokens": 3}},
        {},
    ),
    "ia3": (
        False,
        peft.IA3Config,
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {},
    ),
}


def write_models(tmp_path_factory, smollm):
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
