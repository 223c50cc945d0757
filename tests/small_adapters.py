"""A random model of three layers, quick to compile, and adapters that all change its answers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny_models import make_model

from jlora.adapters import params
from jlora.adapters.peft_config import peft_config, read_spec
from jlora.adapters.peft_io import read_adapter, write_adapter
from jlora.adapters.spec import NO_ADAPTER, AdapterSpec
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config

SPECS = {
    "law": AdapterSpec(4, 12.0, 0.0, ("q_proj", "v_proj")),
    "style": AdapterSpec(
        6,
        9.0,
        0.0,
        ("v_proj", "down_proj"),
        use_rslora=True,
        rank_pattern=(("layers.1.self_attn.v_proj", 2),),
        alpha_pattern=(("down_proj", 5.0),),
        layers_to_transform=(0, 1),
    ),
    "short": AdapterSpec(2, 4.0, 0.0, ("gate_proj",), init_lora_weights="pissa"),
}
DORA = AdapterSpec(2, 4.0, 0.0, ("q_proj",), use_dora=True)


def make_small(directory: Path, smollm: Path, **changes) -> Path:
    """Writes the model, with SmolLM2's tokenizer; `changes` go into its config."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(directory, smollm, **sizes, **changes)


def write_adapters(root: Path, base: Path) -> dict[str, Path]:
    """Writes PEFT directories; returns them by name. "dora" cannot be loaded with others."""
    specs = {**SPECS, "dora": DORA}
    for number, (name, spec) in enumerate(specs.items()):
        _, shapes, _ = hf_loader.abstract_model(read_config(base), spec, FLOAT32_COMPUTE)
        adapter = params.start(spec, shapes, hf_loader.load_base_alone(base, FLOAT32_COMPUTE), jax.random.key(number))
        for path, leaves in params.modules(adapter):
            ranks = np.array(spec.ranks(params.projection(path), 3))
            noise = np.random.RandomState(number).randn(*leaves["lora_B"].shape).astype(np.float32)
            within = np.arange(noise.shape[2])[None, None] < ranks[:, None, None]
            leaves["lora_B"] = leaves["lora_B"] + np.where(within, 0.3 * noise, 0.0)
        write_adapter(adapter, spec, peft_config(spec, str(base), None, tied=True), "", root / name)
    return {name: root / name for name in specs}


class Alone:
    """A model with one adapter in its own form, or none, that computes whole sequences: no rows, blocks or cache."""

    def __init__(self, base: Path, place: Path | None, width: int) -> None:
        config, self.width = read_config(base), width
        spec = read_spec(place, 3) if place else NO_ADAPTER
        self._graphdef, shapes, _ = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
        self._base = hf_loader.load_base_alone(base, FLOAT32_COMPUTE)
        self._adapter = read_adapter(place, spec, shapes, tied=True) if place else {}
        self._run = jax.jit(self._forward)

    def _forward(self, adapter, base, ids):
        model = nnx.merge(self._graphdef, adapter, base)
        return model.logits(model(ids, jnp.ones_like(ids), jnp.arange(self.width)[None])[0])[0]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Returns the logits after each token; no token sees what comes after it, so zeros fill the row."""
        ids = jnp.array([tokens + [0] * (self.width - len(tokens))])
        return np.asarray(self._run(self._adapter, self._base, ids))[: len(tokens)]

    def answer(self, prompt: list[int], count: int, ends: frozenset[int]) -> list[int]:
        """Returns the greedy answer."""
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            token = int(self.logits(tokens)[-1].argmax())
            if token in ends:
                break
            tokens.append(token)
        return tokens[len(prompt) :]
