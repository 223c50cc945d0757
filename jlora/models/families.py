"""Model families, and the conversion of config.json to the model's config; each key is read as in transformers.

A new family is one `Family` below, plus whatever llama.py does not compute yet. A setting that jlora does not support
is an error that names the key and its value.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from jlora.common.errors import UserError
from jlora.models.model_config import ModelConfig
from jlora.models.rope import KINDS, DefaultRope, yarn_attention_factor


@dataclasses.dataclass(frozen=True)
class Family:
    """The differences between families that share one network. A string names the config.json key that decides."""

    model_type: str  # in config.json
    architecture: str  # the class in transformers
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    defaults: Mapping[str, Any]  # of keys that a config.json may leave out, if the family has its own
    gguf_architecture: str  # the name in llama.cpp
    gguf_pairs_adjacent: bool  # llama.cpp reorders the rows of q and k, so that rotary pairs are neighbors


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    qk_norm=False,
    defaults={"sliding_window": None},
    gguf_architecture="llama",
    gguf_pairs_adjacent=True,
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    gguf_architecture="llama",
    gguf_pairs_adjacent=True,
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    defaults={"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 32},
    gguf_architecture="qwen2",
    gguf_pairs_adjacent=False,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias=False,
    qk_norm=True,
    defaults={"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
    gguf_architecture="qwen3",
    gguf_pairs_adjacent=False,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# transformers' defaults that all families share.
COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
# Keys that change the numbers, with the only supported value.
REQUIRED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None, "pretraining_tp": 1}
# Keys of rope_parameters that may be left out.
ROPE_DEFAULTS: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def read_config(directory: Path) -> ModelConfig:
    """Reads config.json (in a directory, or the file itself) as transformers does.

    Raises:
      UserError: the file is missing or broken, or has settings that jlora does not support; all of them at once.
    """
    path = directory if directory.suffix == ".json" else directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"base_model={directory} is not a model directory: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{path} has model_type={model_type!r}. Supported model types: {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    given = {**COMMON, **family.defaults, **raw}
    problems = [
        f"{key}={given[key]!r} (supported: {expected!r})"
        for key, expected in REQUIRED.items()
        if given.get(key, expected) != expected
    ]
    try:
        config = _model_config(family, given, problems)
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error.args[0]!r}.") from None
    if problems:
        raise UserError(f"{path} has settings that jlora does not support: {'; '.join(problems)}.")
    return config


def _model_config(family: Family, given: dict[str, Any], problems: list[str]) -> ModelConfig:
    """Returns the config of the network; appends unsupported settings to `problems`."""

    def decided(value: bool | str) -> bool:
        return given[value] if isinstance(value, str) else value

    heads = given["num_attention_heads"]
    return ModelConfig(
        vocab_size=given["vocab_size"],
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_hidden_layers=given["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=given.get("num_key_value_heads") or heads,
        head_dim=given.get("head_dim") or given["hidden_size"] // heads,
        rms_norm_eps=float(given["rms_norm_eps"]),
        rope=_rope(given, problems),
        qkv_bias=decided(family.qkv_bias),
        o_bias=decided(family.o_bias),
        mlp_bias=decided(family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(given, problems),
        tie_word_embeddings=given["tie_word_embeddings"],
    )


def _sliding_window(given: dict[str, Any], problems: list[str]) -> int | None:
    """Returns the window that all layers share; a window in only some layers is not supported."""
    window = given["sliding_window"] if given.get("use_sliding_window", True) else None
    layers = given["num_hidden_layers"]
    types = given.get("layer_types")
    if types is None and window is not None and given.get("max_window_layers") is not None:
        full = min(given["max_window_layers"], layers)
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if types is None:
        return window
    if len(set(types)) > 1 or not set(types) <= {"full_attention", "sliding_attention"}:
        problems.append(f"layer_types={sorted(set(types))} (supported: one type in all layers)")
    return window if types[0] == "sliding_attention" else None


def _rope(given: dict[str, Any], problems: list[str]) -> DefaultRope:
    """Returns the rotary embedding from rope_parameters, or from the older keys rope_scaling and rope_theta."""
    asked = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = asked.get("rope_type", asked.get("type", "default"))
    if kind not in KINDS:
        problems.append(f"rope_type={kind!r} (supported: {', '.join(KINDS)})")
        kind = "default"
    original = given.get("original_max_position_embeddings") or given.get("max_position_embeddings")
    values = {
        **ROPE_DEFAULTS,
        "rope_theta": float(given.get("rope_theta") or 10000.0),
        "max_position_embeddings": given.get("max_position_embeddings"),
        "original_max_position_embeddings": original,
        **{name: value for name, value in asked.items() if value is not None},
    }
    if kind == "dynamic":
        values["max_position_embeddings"] = given["max_position_embeddings"]
    if kind == "yarn" and "factor" not in values:
        values["factor"] = given["max_position_embeddings"] / values["original_max_position_embeddings"]
    if kind == "yarn" and "attention_factor" not in values:
        values["attention_factor"] = yarn_attention_factor(
            values["factor"], values.get("mscale"), values.get("mscale_all_dim")
        )
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={values['partial_rotary_factor']!r} (supported: 1.0)")
    return KINDS[kind](**{name: cast(values[name]) for name, cast in get_type_hints(KINDS[kind]).items()})
