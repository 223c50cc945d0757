"""GGUF files as base models: architectures and quantizations against transformers' reader, and
an error message for each kind of broken file."""

import struct

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from test_families import SIZES
from test_model import load, logits, torch_logits

from jlora.bases.gguf_base import convert_gguf
from jlora.bases.resolve import resolve_base
from jlora.common.errors import UserError
from jlora.models.families import read_config
from jlora.models.rope import Llama3Rope
from jlora.models.safetensors_files import Weights


def values_of(kind, shape, random):
    """Returns random quantized data as bytes; if gguf cannot quantize to this kind, random codes and small scales."""
    try:
        return gguf.quants.quantize((0.1 * random.standard_normal(shape)).astype(np.float32), kind)
    except NotImplementedError:
        return random.integers(0, 0x14, gguf.quants.quant_shape_to_byte_shape(shape, kind), dtype=np.uint8)


SMALL = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}


def dimensions(sizes):
    """D, F, N, K and H."""
    names = "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split()
    return [sizes[name] for name in names]


def gguf_shapes(arch, sizes, tied):
    """The shape of every tensor of a GGUF model with 300 tokens."""
    D, F, N, K, H = dimensions(sizes)
    shapes = {"token_embd.weight": (300, D), "output_norm.weight": (D,)}
    if not tied:
        shapes["output.weight"] = (300, D)
    for i in range(sizes["num_hidden_layers"]):
        layer = {
            "attn_norm.weight": (D,),
            "ffn_norm.weight": (D,),
            "attn_q.weight": (N * H, D),
            "attn_k.weight": (K * H, D),
            "attn_v.weight": (K * H, D),
            "attn_output.weight": (D, N * H),
            "ffn_gate.weight": (F, D),
            "ffn_up.weight": (F, D),
            "ffn_down.weight": (D, F),
        }
        if arch == "qwen2":
            layer |= {"attn_q.bias": (N * H,), "attn_k.bias": (K * H,), "attn_v.bias": (K * H,)}
        if arch == "qwen3":
            layer |= {"attn_q_norm.weight": (H,), "attn_k_norm.weight": (H,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def write_gguf(file, arch, kind=Q.F32, drop=(), extra=None, tensors=None, tied=False, sizes=SMALL):
    """Writes a random GGUF model with a tokenizer like SmolLM2's, of 300 tokens."""
    random, writer = np.random.default_rng(0), gguf.GGUFWriter(file, arch)
    D, F, N, K, H = dimensions(sizes)
    fields = {
        "block_count": sizes["num_hidden_layers"],
        "context_length": 64,
        "embedding_length": D,
        "feed_forward_length": F,
        "attention.head_count": N,
        "attention.head_count_kv": K,
        "attention.key_length": H,
        "attention.value_length": H,
        "rope.dimension_count": H,
        "rope.freq_base": 500000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    own = {f"{arch}.{name}": value for name, value in fields.items()}
    letters = [chr(0x100 + i) for i in range(295)]
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<u>", "Ā", "ā", *letters[2:], "Āā", "āĀ"][:300],
        "tokenizer.ggml.token_type": [3, 3, 4, *[1] * 297],
        "tokenizer.ggml.merges": ["Ā ā", "ā Ā"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    for name, value in {**own, **tokenizer, **(extra or {})}.items():
        if name in drop:
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    shapes = gguf_shapes(arch, sizes, tied)
    for name, shape in shapes.items():
        if name in drop:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, random.uniform(0.5, 1.5, shape).astype(np.float32))
        elif kind == Q.F32:
            writer.add_tensor(name, (0.1 * random.standard_normal(shape)).astype(np.float32))
        else:
            writer.add_tensor(name, values_of(kind, shape, random), raw_dtype=kind)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def converted(file):
    directory = file.with_suffix("")
    directory.mkdir()
    convert_gguf(file, directory)
    return directory


TOKENS = np.random.RandomState(2).randint(0, 300, (1, 40)).astype(np.int32)


@pytest.mark.parametrize(
    ("arch", "kind", "tied"),
    [
        ("llama", Q.F32, False),
        ("llama", Q.Q4_K, True),
        ("qwen2", Q.Q8_0, False),
        ("qwen3", Q.Q6_K, True),
    ],
    ids=str,
)
def test_architectures_equal_transformers(tmp_path, arch, kind, tied):
    sizes = {**SMALL, "head_dim": 128} if arch == "qwen3" else SMALL  # the only one that transformers reads for Qwen3
    file = write_gguf(tmp_path / "m.gguf", arch, kind, tied=tied, sizes=sizes)
    directory = converted(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    graphdef, adapter, base = load(directory)
    got = logits(graphdef, adapter, base, TOKENS)
    assert np.abs(want).max() > 0.1 and np.abs(got - want).max() < 2e-4
    assert np.abs(torch_logits(directory, TOKENS) - want).max() < 1e-6  # the directory is a Hugging Face one


def test_every_quantization_of_the_gguf_package_is_supported(tmp_path):
    read = [Q.F16, *gguf.quants._type_traits]
    assert len(read) > 20
    for kind in read:
        file = write_gguf(tmp_path / f"{kind.name}.gguf", "llama", kind, sizes={**SMALL, "num_hidden_layers": 1})
        weights = Weights(converted(file))
        tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_down.weight")
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        got = weights.read("model.layers.0.mlp.down_proj.weight")
        assert np.array_equal(got.astype(np.float32), want, equal_nan=True), kind
        assert got.dtype == {Q.F16: "float16", Q.BF16: "bfloat16"}.get(kind, "float32"), kind
        file.unlink()


def llama3_tensors():
    """The table of divisors that scales RoPE as in Llama 3.2: theta 500000, heads of 64, factor 32."""
    waves = 2 * np.pi * 5e5 ** (np.arange(0, 64, 2) / 64)  # lengths in tokens; from 2048 to 8192 the divisor ramps
    ramp = np.clip((8192 / waves - 1) / (4 - 1), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - ramp) / 32 + ramp)).astype(np.float32)}


def test_rope_scalings_are_converted(tmp_path):
    rope = Llama3Rope(5e5, 32.0, 1.0, 4.0, 8192)
    file = write_gguf(tmp_path / "llama3.gguf", "llama", tensors=llama3_tensors())
    assert read_config(converted(file)).rope == rope
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    rope = read_config(converted(write_gguf(tmp_path / "linear.gguf", "llama", extra=extra))).rope
    assert (type(rope).__name__, rope.rope_theta, rope.factor) == ("LinearRope", 5e5, 4.0)
    extra = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 16,
    }
    rope = read_config(converted(write_gguf(tmp_path / "yarn.gguf", "qwen2", extra=extra))).rope
    assert (type(rope).__name__, rope.factor, rope.original_max_position_embeddings) == ("YarnRope", 4.0, 16)
    config = read_config(
        converted(write_gguf(tmp_path / "window.gguf", "llama", extra={"llama.attention.sliding_window": 20}))
    )
    assert config.sliding_window == 20


ODD = np.ones(32, np.float32)
REFUSED = {
    "architecture": ({"arch": "gemma2"}, "Unsupported general.architecture 'gemma2'. Supported: llama, qwen2, qwen3."),
    "experts": ({"extra": {"llama.expert_count": 8}}, "Unsupported: llama.expert_count=8."),
    "part": (
        {"extra": {"split.count": 3}},
        "one of 3 parts. Join them with `llama-gguf-split --merge FIRST_PART OUTPUT`",
    ),
    "rope": (
        {"extra": {"llama.rope.scaling.type": "longrope"}},
        "Unsupported rope.scaling.type 'longrope'. Supported: none,",
    ),
    "partial rope": (
        {"extra": {"llama.rope.dimension_count": 32}},
        "Unsupported llama.rope.dimension_count=32. Expected the head size, 64",
    ),
    "table": (
        {"tensors": {"rope_freqs.weight": ODD * 3}},
        "Unsupported rope_freqs.weight: it is not Llama 3.1's scaling by 3",
    ),
    "surplus": ({"tensors": {"blk.0.attn_sinks": ODD}}, "Unexpected tensor in a llama model: 'blk.0.attn_sinks'."),
    "pre": (
        {"extra": {"tokenizer.ggml.pre": "chatglm-bpe"}},
        "Unsupported tokenizer.ggml.pre 'chatglm-bpe'. Supported: gpt-2",
    ),
    "tokenizer": (
        {"extra": {"tokenizer.ggml.model": "t5"}},
        "Unsupported tokenizer.ggml.model 't5'. Supported: gpt2, llama.",
    ),
    "type": ({"extra": {"llama.rope.scaling.type": 3}}, "llama.rope.scaling.type=3 (expected string)"),
    "infinite": ({"extra": {"llama.rope.freq_base": float("inf")}}, "llama.rope.freq_base=inf (expected a finite"),
    "text": ({"extra": {"tokenizer.ggml.eot_token_id": "2"}}, "tokenizer.ggml.eot_token_id='2' (expected integer)"),
    "layers": (
        {"extra": {"llama.block_count": 50_000_000}},
        "llama.block_count=50000000 (expected less than or equal to 1000)",
    ),
    "heads": (
        {"extra": {"llama.attention.head_count": 3}},
        "A tensor does not have the shape that the fields imply",
    ),
    "field": ({"drop": ["llama.embedding_length"]}, "Field 'embedding_length' is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_features_are_rejected_by_name(tmp_path, name):
    changes, message = REFUSED[name]
    file = write_gguf(tmp_path / "m.gguf", **{"arch": "llama", **changes})
    with pytest.raises(UserError) as error:
        converted(file)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -100])
def test_truncated_files_are_rejected(tmp_path, keep):
    file = write_gguf(tmp_path / "m.gguf", "llama")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m.gguf cannot be read as GGUF: .*Check that it was downloaded completely"):
        converted(file)


def test_a_list_longer_than_the_file_is_rejected_at_once(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", "llama")
    before, name, after = file.read_bytes().partition(b"tokenizer.ggml.tokens")
    file.write_bytes(before + name + after[:8] + struct.pack("<Q", 2**40) + after[16:])
    with pytest.raises(UserError, match=r"m.gguf cannot be read as GGUF: it ends too early\."):
        converted(file)


def test_missing_tensors_are_reported_on_loading(tmp_path):
    directory = converted(write_gguf(tmp_path / "m.gguf", "llama", drop=["blk.1.ffn_up.weight"]))
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        load(directory)


def test_files_are_converted_once_and_again_after_a_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "mine.gguf", "llama")
    first = resolve_base(str(file))
    assert first.parent == tmp_path / "cache" / "jlora" and "mine.gguf to a model directory" in capsys.readouterr().out
    assert resolve_base(str(file)) == first and not capsys.readouterr().out
    write_gguf(file, "llama", Q.Q8_0)
    assert resolve_base(str(file)) != first
    assert not list(first.parent.glob(".unfinished*"))
