"""A GGUF file of the llama architecture, written once as an ordinary Hugging Face directory.

Source of the layout: the GGUF specification and the `gguf` package of llama.cpp. Quantised tensors become float32.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jlora.errors import UserError

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # gguf's token type of tokens that are markup, not text


def convert(file: Path, directory: Path) -> None:
    """Writes config, weights, tokenizer, chat template and generation config into `directory`, which must exist.

    Raises:
      UserError: the architecture or the tokenizer is one that jlora does not read.
    """
    reader = gguf.GGUFReader(file)
    field = {name: value.contents() for name, value in reader.fields.items()}
    for name, expected in {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }.items():
        if field.get(name) != expected:
            raise UserError(f"{file}: {name} is {field.get(name)!r}; jlora reads {expected!r}")
    heads = {
        "attn_q": field["llama.attention.head_count"],
        "attn_k": field["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name, _, rest = tensor.name.removeprefix("blk.").partition(".")
        if tensor.name in TOP:
            tensors[TOP[tensor.name]] = values
            continue
        part = rest.removesuffix(".weight")
        if part not in IN_LAYER:
            raise UserError(f"{file}: the tensor {tensor.name} is not one of a llama's")
        if part in heads:
            values = _half_rotation(values, heads[part])
        tensors[f"model.layers.{name}.{IN_LAYER[part]}.weight"] = values
    save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    tied = "lm_head.weight" not in tensors
    _write_json(directory / "config.json", _config(field, tied, len(field["tokenizer.ggml.tokens"])))
    special = {key: field[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id")}
    _write_json(
        directory / "generation_config.json",
        {**special, "pad_token_id": field["tokenizer.ggml.padding_token_id"]},
    )
    _write_tokenizer(field, directory)


def _half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from GGUF's order (rotary pairs side by side) to Hugging Face's (pairs half a head apart)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _config(field: dict[str, Any], tied: bool, vocabulary: int) -> dict[str, Any]:
    eps = np.float32(field["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "head_dim": field["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": float(str(eps)),  # the shortest decimal of the float32 in the file
        "rope_theta": field["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _write_tokenizer(field: dict[str, Any], directory: Path) -> None:
    """Byte-level BPE, digits one by one: SmolLM's own splitting."""
    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        f"{role}_token": tokens[field[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    _write_json(
        directory / "tokenizer_config.json",
        {
            **named,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": field["llama.context_length"],
        },
    )
    (directory / "chat_template.jinja").write_text(field["tokenizer.chat_template"], encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
