"""Every family and every key of config.json against transformers: the same logits, or an error that names the key."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from test_families import CLASSES, LLAMA3, eager_logits, make
from test_model import load

from jlora.adapters.spec import NO_ADAPTER
from jlora.common.errors import UserError
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config

# Families whose keys people copy into other families' files.
OTHERS = (
    "gemma2 phi3 cohere2 olmo2 granite mixtral deepseek_v3 gpt_neox falcon stablelm starcoder2 exaone4 smollm3 gpt2"
)
TOKENS = np.random.RandomState(1).randint(0, 300, (1, 72)).astype(np.int32)  # longer than all lengths and windows
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = [
    YARN,
    {**YARN, "rope_theta": 300.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {**LLAMA3, "original_max_position_embeddings": 16},
    {"rope_type": "default", "rope_theta": 200.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 200.0}},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    {"rope_type": None},
    {},
]
# Values that act, or would if the family read the key. Every other key gets values by the type of its default.
VALUES = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [500.0, 1000, None],
    "original_max_position_embeddings": [16, None],
    "partial_rotary_factor": [0.5, 1.0],
    "sliding_window": [8, None, 0, 4096],
    "layer_types": [["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"] * 2 + ["sliding_attention"]],
    "max_window_layers": [0, 1, 3],
    "hidden_act": ["gelu", "relu", "swish", "silu"],
    "head_dim": [None, 16, 32],
    "num_key_value_heads": [None, 1, 2, 3, 4],
    "rms_norm_eps": [1e-2, 0, 1],
    "is_causal": [False],
    "per_layer_config": [{"0": {"sliding_window": 8}}],
    "layers_block_type": [["attention"] * 3],
    "quantization_config": [{"bits": 4, "quant_method": "gptq"}],
}
# These choose the class, the dtype, or whether the head is a table of its own, which also depends on the weights.
SKIPPED = {"model_type", "dtype", "tie_word_embeddings"}


def values(key, default):
    """Values of a key that are not its default."""
    if key in VALUES:
        return VALUES[key]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int | float):
        return [default * 2 + 1, default + 1]
    return [8, True, "text"] if default is None else ["text", None]


def known_keys():
    """Key -> default, for all keys of the supported families and of the others."""
    classes = [transformers.CONFIG_MAPPING[name] for name in OTHERS.split()]
    classes = [*(cls.config_class for cls in CLASSES.values()), *classes]
    found = {}
    for cls in reversed(classes):
        found |= {field.name: field.default for field in dataclasses.fields(cls)}
    found |= dict.fromkeys(VALUES)
    return {key: value for key, value in found.items() if key not in SKIPPED and not key.startswith("_")}


class Bases:
    """A random model of a family, in both programs, and the logits of any config that keeps its shapes."""

    def __init__(self, directory, family, rope):
        self.directory, self.cls = make(directory, family, {"head_dim": 24, "rope": dict(rope)}), CLASSES[family]
        self.given = json.loads((directory / "config.json").read_text())
        self.weights = self.cls.from_pretrained(directory).state_dict()
        self.graphdef, self.adapter, self.base = load(directory, NO_ADAPTER)
        self.cached = {}

    def with_key(self, key, value, file):
        """Writes config.json with one key set."""
        file.write_text(json.dumps({**self.given, key: value}))
        return file

    def theirs(self, file):
        """transformers' logits, or its tensors' shapes if they are not the base's."""
        config = self.cls.config_class.from_pretrained(file)
        if getattr(config, "quantization_config", None):
            raise ValueError("from_pretrained reads quantization_config, and the class does not")
        model = self.cls(config).eval()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in self.weights.items()}:
            return shapes
        model.load_state_dict(self.weights)
        with torch.no_grad():
            return model(torch.tensor(TOKENS, dtype=torch.long), return_dict=True).logits.numpy()

    def ours(self, file):
        """jlora's logits, or its tensors' shapes."""
        config = read_config(file)
        if config not in self.cached:
            graphdef, _, shapes = hf_loader.abstract_model(config, NO_ADAPTER, FLOAT32_COMPUTE)
            if jax.tree.map(np.shape, shapes) != jax.tree.map(np.shape, self.base):
                self.cached[config] = shapes_on_disk(shapes)
            else:
                self.cached[config] = np.asarray(eager_logits(graphdef, self.adapter, self.base, TOKENS))
        return self.cached[config]


def shapes_on_disk(shapes):
    """Name on disk -> shape; a tied head is listed as transformers lists it."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = tuple(entry.key for entry in path)
        for name in hf_loader.tensor_names(keys, leaf.shape):
            found[name] = leaf.shape[1:] if keys[0] == "layers" else leaf.shape
    return {"lm_head.weight": found["model.embed_tokens.weight"], **found}


def compare(base, key, value, file):
    """How the two programs take a config with one key set: one word."""
    base.with_key(key, value, file)
    try:
        want = base.theirs(file)
    except Exception:
        want = None
    try:
        got = base.ours(file)
    except UserError as error:
        named = [key, *value] if isinstance(value, dict) else [key]
        assert value is None or any(name in str(error) for name in named), (key, value, str(error))
        return "refused"
    if want is None:
        return "refused by transformers alone"
    if isinstance(want, dict) or isinstance(got, dict):
        return "equal" if want == got else "different"
    return "equal" if np.abs(want - got).max() < 2e-4 else "different"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rope"),
    [*((family, {"rope_type": "default"}) for family in CLASSES), ("llama", YARN), ("qwen3", YARN)],
    ids=[*CLASSES, "llama-yarn", "qwen3-yarn"],
)
def test_every_key_is_read_as_transformers_reads_it(tmp_path, family, rope):
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    base, found, counts = Bases(tmp_path, family, {**rope, "rope_theta": 1e4}), {}, collections.Counter()
    keys = known_keys()
    if rope["rope_type"] != "default":
        keys = {key: keys[key] for key in VALUES}
    for key, default in keys.items():
        for value in values(key, base.given.get(key, default)):
            outcome = compare(base, key, value, tmp_path / "other.json")
            counts[outcome] += 1
            found.setdefault(outcome, []).append((key, value))
    print(len(keys), "keys", dict(counts))
    print(found.get("refused by transformers alone"))
    assert not found.get("different")
    assert counts["equal"] > 30 and counts["refused"] > 5
