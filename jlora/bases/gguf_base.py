"""Converts a GGUF file to an ordinary Hugging Face directory.

Sources: the GGUF specification, and llama.cpp's `gguf` package, which names and dequantizes the tensors. Quantized
tensors are written as float32, which represents their values exactly; others keep their dtype.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pydantic
from gguf import GGMLQuantizationType as Stored

from jlora.bases.gguf_tokenizer import write_tokenizer
from jlora.common.errors import UserError
from jlora.common.hf_names import NAMES, tensor_names
from jlora.common.plural import plural
from jlora.common.typed_json import Count, Layers, Size, mismatches
from jlora.models.families import FAMILIES
from jlora.models.rope import Llama3Rope, plain_frequencies
from jlora.models.safetensors_files import write_weights

# Architectures in GGUF, which are model types too. Mistral is stored as llama, with a sliding window.
ARCHITECTURES = list(dict.fromkeys(family.gguf_architecture for family in FAMILIES.values()))
Positive = Annotated[float, pydantic.Field(gt=0)]
# Types of the architecture's fields that jlora reads. It rejects a file that sets any other, except to zero or false.
ARCHITECTURE: dict[str, Any] = {
    **dict.fromkeys(("context_length", "embedding_length", "feed_forward_length", "vocab_size"), Size),
    "block_count": Layers,
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "rope.dimension_count"), Size),
    **dict.fromkeys(("attention.key_length", "attention.value_length"), Size),
    **dict.fromkeys(("attention.sliding_window", "rope.scaling.original_context_length"), Count),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"), Positive),
    "rope.scaling.type": str,
    "rope.scaling.finetuned": bool,
}
# Types of the other fields that jlora reads.
GENERAL: dict[str, Any] = {
    "general.architecture": str,
    "split.count": Count,
    "tokenizer.chat_template": str,
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre"), str),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), list[str]),
    "tokenizer.ggml.token_type": list[int],
    "tokenizer.ggml.scores": list[float],
    **dict.fromkeys(("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"), bool),
    **{f"tokenizer.ggml.{name}_token_id": Count for name in ("bos", "eos", "eot", "unknown", "padding")},
}
ROPE_TABLE = "rope_freqs.weight"  # the RoPE scaling of Llama 3.1, as a divisor for each frequency


class _Reader(gguf.GGUFReader):
    """A reader that stops at the end of the file; gguf's own reads a list of any length there, in no bounded time."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early")
        return super()._get(offset, dtype, count, override_order)


def convert_gguf(file: Path, directory: Path) -> None:
    """Writes config, weights, tokenizer, chat template and generation config into `directory`, which must exist.

    Raises:
      UserError: the file is broken, or uses a feature that jlora does not support, named by field and value.
    """
    try:
        reader = _Reader(file)
        field = {name: value.contents() for name, value in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{file} cannot be read as GGUF: {reason}. Check that it was downloaded completely.") from None
    try:
        config = config_from_gguf(field, stored)
        names = _tensor_names(field["general.architecture"], config["num_hidden_layers"], stored)
        _write_json(directory / "config.json", config)
        _write_json(directory / "generation_config.json", _generation(field))
        write_tokenizer(field, directory)
    except KeyError as error:
        raise UserError(f"{file}: Field {error.args[0]!r} is missing.") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # fields of any type and value, which the libraries reject in many ways
        raise UserError(f"{file} has fields that do not fit together: {str(error) or type(error).__name__}.") from None
    rotated = {}
    if FAMILIES[config["model_type"]].gguf_pairs_adjacent:
        rotated = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read(name: str) -> np.ndarray:
        tensor = stored[names[name]]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = rotated.get(name.split(".")[-2])
        values = _gguf_to_hf_rows(values, heads) if heads else values
        return values.astype(_dtype(tensor))

    sizes = {name: int(stored[its].n_elements) * _dtype(stored[its]).itemsize for name, its in names.items()}
    try:
        write_weights(directory, sizes, read)
    except NotImplementedError as error:
        raise UserError(f"{file} uses an unsupported quantization: {error}.") from None
    except ValueError as error:
        raise UserError(f"{file}: A tensor does not have the shape that the fields imply: {error}.") from None


def config_from_gguf(field: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
      KeyError: a field is missing.
      ValueError: a field has a value that jlora does not support.
    """
    if mistyped := mismatches(GENERAL, field):
        raise ValueError(f"{'; '.join(mistyped)}.")
    kind = field["general.architecture"]
    if kind not in ARCHITECTURES:
        raise ValueError(f"Unsupported general.architecture {kind!r}. Supported: {', '.join(ARCHITECTURES)}.")
    if field.get("split.count", 1) > 1:
        raise ValueError(
            f"This is one of {field['split.count']} parts. Join them with `llama-gguf-split --merge FIRST_PART OUTPUT`."
        )
    own = {name.removeprefix(f"{kind}."): value for name, value in field.items() if name.startswith(f"{kind}.")}
    if odd := [f"{kind}.{name}={value!r}" for name, value in own.items() if name not in ARCHITECTURE and value]:
        raise ValueError(f"Unsupported: {', '.join(odd)}.")
    if mistyped := mismatches(ARCHITECTURE, own):
        raise ValueError(f"{'; '.join(f'{kind}.{problem}' for problem in mistyped)}.")
    heads, width = own["attention.head_count"], own["embedding_length"]
    size = own.get("attention.key_length") or own.get("rope.dimension_count") or width // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, size) != size:
            raise ValueError(f"Unsupported {kind}.{name}={own[name]}. Expected the head size, {size}.")
    theta = own.get("rope.freq_base", 10000.0)
    window = own.get("attention.sliding_window")
    if window and kind != "llama":
        raise ValueError(f"Unsupported {kind}.attention.sliding_window={window}. It is only supported for llama.")
    special = {role: field.get(f"tokenizer.ggml.{role}") for role in ("bos_token_id", "eos_token_id")}
    family = FAMILIES["mistral" if window else kind]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": int(stored["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": size,
        "hidden_act": "silu",
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _decimal(own["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_theta": _decimal(theta), **_scaling(own, stored, theta, size)},
        **({"sliding_window": window} if window else {}),
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": isinstance(family.qkv_bias, str) and "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_gate.bias" in stored,
        **special,
        "pad_token_id": field.get("tokenizer.ggml.padding_token_id"),
        "dtype": _dtype(stored["token_embd.weight"]).name,
    }


def _scaling(own: dict[str, Any], stored: dict[str, Any], theta: float, size: int) -> dict[str, Any]:
    """Returns config.json's rope_parameters, except rope_theta."""
    kind = own.get("rope.scaling.type", "none")
    if ROPE_TABLE in stored:
        table = np.asarray(stored[ROPE_TABLE].data, np.float32)
        return {"rope_type": "llama3", **_llama3(table, theta, size)}
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"Unsupported rope.scaling.type {kind!r}. Supported: none, linear, yarn.")
    original = own.get("rope.scaling.original_context_length")
    known = {"original_max_position_embeddings": original} if kind == "yarn" and original else {}
    return {"rope_type": kind, "factor": _decimal(own["rope.scaling.factor"]), **known}


def _llama3(table: np.ndarray, theta: float, size: int) -> dict[str, Any]:
    """Returns the scaling that a table of divisors encodes. Published Llama 3.1 to 3.3 models differ only in factor."""
    rope = Llama3Rope(theta, _decimal(table.max()), 1.0, 4.0, 8192)
    frequencies = np.asarray(rope.frequencies(size, jnp.ones((), jnp.int32)))
    if not np.allclose(plain_frequencies(theta, size) / frequencies, table, rtol=1e-4):
        raise ValueError(f"Unsupported {ROPE_TABLE}: it is not Llama 3.1's scaling by {rope.factor:g}.")
    return {name: value for name, value in dataclasses.asdict(rope).items() if name != "rope_theta"}


def _tensor_names(kind: str, layers: int, stored: dict[str, Any]) -> dict[str, str]:
    """Returns Hugging Face's name -> GGUF's name for every tensor in the file."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], layers)
    ours = [name for path in NAMES for name in tensor_names(path, (layers,))]
    theirs = {name: table.get_name(name, (".weight", ".bias")) for name in ours}
    names = {name: found for name, found in theirs.items() if found in stored}
    if rest := sorted(stored.keys() - set(names.values()) - {ROPE_TABLE}):
        others = f" and {plural(len(rest) - 1, 'other')}" if rest[1:] else ""
        raise ValueError(f"Unexpected tensor in a {kind} model: {rest[0]!r}{others}.")
    return names


def _gguf_to_hf_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from GGUF's order (rotary pairs adjacent) to Hugging Face's (pairs half a head apart)."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _dtype(tensor: gguf.ReaderTensor) -> np.dtype:
    """Returns the dtype in which a tensor is written: its own if it is a 16-bit float, else float32."""
    halves = {Stored.F16: np.dtype(np.float16), Stored.BF16: np.dtype(ml_dtypes.bfloat16)}
    return halves.get(tensor.tensor_type, np.dtype(np.float32))


def _generation(field: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of generation_config.json: the tokens that start a text and end an answer."""
    ends = [field.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    stops = list(dict.fromkeys(token for token in ends if token is not None))
    return {
        "bos_token_id": field.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": field.get("tokenizer.ggml.padding_token_id"),
    }


def _decimal(value: Any) -> float:
    """Returns the shortest decimal that equals a float32, which is how its author wrote it."""
    return float(str(np.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
