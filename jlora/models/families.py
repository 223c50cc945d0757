"""Model families, and the conversion of config.json to the model's config; each key is read as in transformers.

A new family is one `Family` below, plus whatever llama.py does not compute yet. A family reads the keys that
transformers' class of that family reads, and ignores all others, as transformers does. A setting that jlora does not
support is an error that names the key and its value.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from jlora.common import typed_json
from jlora.common.errors import UserError
from jlora.common.typed_json import Layers, Size, Whole
from jlora.models.model_config import ModelConfig
from jlora.models.rope import KINDS, DefaultRope, yarn_attention_factor
from jlora.models.safetensors_files import equal_tensors


class Keys(typed_json.Strict):
    """The keys of config.json that all families read, with transformers' defaults."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size
    rms_norm_eps: Annotated[float, pydantic.Field(ge=0, le=1)] = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: Size | None = None
    # Keys that change the numbers, with the values that jlora supports.
    hidden_act: Literal["silu", "swish"] = "silu"
    partial_rotary_factor: Literal[1] | None = None
    is_causal: Literal[True] = True
    quantization_config: None = None
    per_layer_config: None = None

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, including itself; None means no limit."""
        return None

    @property
    def heads(self) -> tuple[int, int, int]:
        """Number of query heads, number of key and value heads, and head dim."""
        size = self.head_dim or self.hidden_size // self.num_attention_heads
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads, size

    @pydantic.model_validator(mode="after")
    def _check_heads(self) -> "Keys":
        queries, groups, size = self.heads
        if queries % groups:
            raise ValueError(f"num_key_value_heads={groups} does not divide num_attention_heads={queries}")
        if size % 2 or not size:
            raise ValueError(f"head_dim={size} (expected an even number, for rotary pairs)")
        return self


class LlamaKeys(Keys):
    """The keys of LlamaConfig."""

    max_position_embeddings: Size = 2048
    attention_bias: bool = False
    mlp_bias: bool = False


class MistralKeys(Keys):
    """The keys of MistralConfig."""

    num_key_value_heads: Size | None = 8
    max_position_embeddings: Size = 4096 * 32
    sliding_window: Size | None = 4096

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, including itself; None means no limit."""
        return self.sliding_window


class Qwen2Keys(Keys):
    """The keys of Qwen2Config."""

    num_key_value_heads: Size | None = 32
    max_position_embeddings: Size = 32768
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: Whole = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, including itself; None means no limit."""
        return self.sliding_window if self._types()[0] == "sliding_attention" else None

    def _types(self) -> list[str]:
        """Returns the attention of each layer, as Qwen2Config derives it."""
        window = self.sliding_window if self.use_sliding_window else None
        full = self.num_hidden_layers if window is None else min(self.max_window_layers, self.num_hidden_layers)
        derived = ["full_attention"] * full + ["sliding_attention"] * (self.num_hidden_layers - full)
        return list(self.layer_types or derived)

    @pydantic.model_validator(mode="after")
    def _check_layer_types(self) -> "Qwen2Keys":
        types = self._types()
        if len(types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers={self.num_hidden_layers}")
        if len(set(types)) > 1:
            raise ValueError(f"layer_types={sorted(set(types))} (expected one type in all layers)")
        if types[0] == "sliding_attention" and not (self.use_sliding_window and self.sliding_window):
            raise ValueError(
                f"layer_types={types[:1]} with use_sliding_window={self.use_sliding_window} "
                f"and sliding_window={self.sliding_window}"
            )
        return self


class Qwen3Keys(Qwen2Keys):
    """The keys of Qwen3Config."""

    head_dim: Size | None = 128
    attention_bias: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """The differences between families that share one network. A string names the config.json key that decides."""

    model_type: str  # in config.json
    architecture: str  # the class in transformers
    keys: type[Keys]  # what transformers' config class of the family reads
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    gguf_architecture: str  # the name in llama.cpp
    gguf_pairs_adjacent: bool  # llama.cpp reorders the rows of q and k, so that rotary pairs are neighbors


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=LlamaKeys,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    qk_norm=False,
    gguf_architecture="llama",
    gguf_pairs_adjacent=True,
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=MistralKeys,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    gguf_architecture="llama",
    gguf_pairs_adjacent=True,
)
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=Qwen2Keys,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    gguf_architecture="qwen2",
    gguf_pairs_adjacent=False,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=Qwen3Keys,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias=False,
    qk_norm=True,
    gguf_architecture="qwen3",
    gguf_pairs_adjacent=False,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# Keys of rope_parameters that may be left out.
ROPE_DEFAULTS: dict[str, Any] = {"rope_theta": 10000.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def read_config(directory: Path) -> ModelConfig:
    """Reads config.json (in a directory, or the file itself) as transformers does.

    Raises:
      UserError: the file is missing or broken, or has settings that jlora does not support; all of them at once.
    """
    path, family, keys, rope = _read_keys(directory)
    config = _model_config(family, keys, rope)
    if config.tie_word_embeddings and not equal_tensors(directory, "model.embed_tokens.weight", "lm_head.weight"):
        _note(f"{path} sets tie_word_embeddings=true, but the model has a different lm_head.weight: not tied.")
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def read_context(directory: Path) -> int:
    """Returns the base model's context in tokens: max_position_embeddings, or what its RoPE scaling extends that to."""
    _, _, keys, rope = _read_keys(directory)
    return rope.context(keys.max_position_embeddings)


def _read_keys(directory: Path) -> tuple[Path, Family, Keys, DefaultRope]:
    """Reads config.json; returns its path, family, keys and rotary embedding. Raises as `read_config` does."""
    path = directory if directory.suffix == ".json" else directory / "config.json"
    try:
        raw = typed_json.read_object(path)
    except FileNotFoundError:
        raise UserError(f"base_model={directory} is not a model directory: it has no config.json.") from None
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{path} has model_type={model_type!r}. Supported model types: {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    keys, problems = typed_json.parse(family.keys, raw)
    rope = None
    if keys is not None:
        rope, problems = _rope(keys, path)
    if problems:
        raise UserError(f"{path} has settings that jlora cannot use: {'; '.join(problems)}.")
    assert keys is not None and rope is not None
    return path, family, keys, rope


@functools.cache
def _note(line: str) -> None:
    """Prints a line once, because the config is read many times."""
    print(line, file=sys.stderr)


def _model_config(family: Family, keys: Keys, rope: DefaultRope) -> ModelConfig:
    """Returns the config of the network."""

    def decided(value: bool | str) -> bool:
        return getattr(keys, value) if isinstance(value, str) else value

    queries, groups, size = keys.heads
    return ModelConfig(
        vocab_size=keys.vocab_size,
        hidden_size=keys.hidden_size,
        intermediate_size=keys.intermediate_size,
        num_hidden_layers=keys.num_hidden_layers,
        num_attention_heads=queries,
        num_key_value_heads=groups,
        head_dim=size,
        rms_norm_eps=float(keys.rms_norm_eps),
        rope=rope,
        qkv_bias=decided(family.qkv_bias),
        o_bias=decided(family.o_bias),
        mlp_bias=decided(family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_window=keys.window,
        tie_word_embeddings=keys.tie_word_embeddings,
    )


def _rope(keys: Keys, path: Path) -> tuple[Any, list[str]]:
    """Returns the rotary embedding, or None and its problems.

    As in transformers, the older key rope_scaling replaces rope_parameters, and original_max_position_embeddings beside
    them takes precedence over the one in them.
    """
    asked: Mapping[str, Any] = keys.rope_scaling or keys.rope_parameters or {}
    if keys.rope_scaling and keys.rope_parameters and keys.rope_scaling != keys.rope_parameters:
        _note(f"{path} has rope_scaling and rope_parameters, which differ: rope_scaling is used, as in transformers.")
    kind = asked.get("rope_type", asked.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        return None, [f"rope_type={kind!r} (expected {', '.join(KINDS)})"]
    if nested := sorted(name for name, value in asked.items() if isinstance(value, dict)):
        return None, [f"rope_parameters by layer type: {', '.join(nested)} (expected the same in all layers)"]
    values = {
        **ROPE_DEFAULTS,
        **({} if keys.rope_theta is None else {"rope_theta": keys.rope_theta}),
        "original_max_position_embeddings": keys.max_position_embeddings,
        **{name: value for name, value in asked.items() if value is not None},
        "max_position_embeddings": keys.max_position_embeddings,
    }
    if keys.original_max_position_embeddings:
        values["original_max_position_embeddings"] = keys.original_max_position_embeddings
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        return None, [f"partial_rotary_factor={values['partial_rotary_factor']!r} (expected 1.0)"]
    if kind == "yarn":
        try:
            values.setdefault("factor", keys.max_position_embeddings / values["original_max_position_embeddings"])
            factor = yarn_attention_factor(values["factor"], values.get("mscale"), values.get("mscale_all_dim"))
            values.setdefault("attention_factor", factor)
        except (TypeError, ValueError, ArithmeticError):
            pass  # reported below, by the schema
    return typed_json.parse(KINDS[kind], values)
