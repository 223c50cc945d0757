"""config.json -> the model's own config, field by field as transformers reads it, or refused by name and value."""

import json
from pathlib import Path
from typing import Any, get_type_hints

from jlora.common.errors import UserError
from jlora.models.llama import LlamaConfig
from jlora.models.rope import KINDS, DefaultRope, yarn_attention_factor

# model_type -> what its family fixes: a value, or the name of the field of config.json that decides.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias", "qk_norm": False},
    "mistral": {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "o_bias": False, "mlp_bias": False, "qk_norm": False},
    "qwen3": {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": False, "qk_norm": True},
}
# transformers' defaults for fields that a config.json may leave out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": None},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 32},
    "qwen3": {"use_sliding_window": False, "sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
}
COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
# Fields that change the numbers, with the one value that jlora computes.
REQUIRED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "quantization_config": None, "pretraining_tp": 1}
# Fields of rope_parameters that may be left out.
ROPE_DEFAULTS: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def read_config(directory: Path) -> LlamaConfig:
    """config.json (of a directory, or the file itself) as the model's own config, read as transformers reads it.

    Raises:
      UserError: the file is missing or broken, or asks for something that jlora does not compute, by name and value.
    """
    path = directory if directory.suffix == ".json" else directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"base_model {directory}: no config.json, so this is not a model directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type={family!r}; jlora computes {', '.join(FAMILIES)}")
    given = {**COMMON, **DEFAULTS[family], **raw}
    problems = [
        f"{field}={given[field]!r} (jlora computes {expected!r})"
        for field, expected in REQUIRED.items()
        if given.get(field, expected) != expected
    ]
    try:
        window = _sliding_window(given, problems)
        rope = _rope(given, problems)
        heads = given["num_attention_heads"]
        config = LlamaConfig(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or given["hidden_size"] // heads,
            rms_norm_eps=float(given["rms_norm_eps"]),
            rope=rope,
            sliding_window=window,
            tie_word_embeddings=given["tie_word_embeddings"],
            **{name: given[fixed] if isinstance(fixed, str) else fixed for name, fixed in FAMILIES[family].items()},
        )
    except KeyError as error:
        raise UserError(f"{path}: the field {error.args[0]!r} is missing") from None
    if problems:
        raise UserError(f"{path} asks for what jlora does not compute: {'; '.join(problems)}")
    return config


def _sliding_window(given: dict[str, Any], problems: list[str]) -> int | None:
    """The window of all layers; one that only some layers have is a problem."""
    window = given["sliding_window"] if given.get("use_sliding_window", True) else None
    layers = given["num_hidden_layers"]
    types = given.get("layer_types")
    if types is None and window is not None and given.get("max_window_layers") is not None:
        full = min(given["max_window_layers"], layers)
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if types is None:
        return window
    if len(set(types)) > 1 or not set(types) <= {"full_attention", "sliding_attention"}:
        problems.append(f"layer_types={sorted(set(types))} (jlora computes one kind for all layers)")
    return window if types[0] == "sliding_attention" else None


def _rope(given: dict[str, Any], problems: list[str]) -> DefaultRope:
    """The rotary embedding that rope_parameters (of old, rope_scaling and rope_theta) ask for."""
    asked = given.get("rope_parameters") or given.get("rope_scaling") or {}
    kind = asked.get("rope_type", asked.get("type", "default"))
    if kind not in KINDS:
        problems.append(f"rope_type={kind!r} (jlora computes {', '.join(KINDS)})")
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
        problems.append(f"partial_rotary_factor={values['partial_rotary_factor']!r} (jlora computes 1.0)")
    return KINDS[kind](**{name: cast(values[name]) for name, cast in get_type_hints(KINDS[kind]).items()})
