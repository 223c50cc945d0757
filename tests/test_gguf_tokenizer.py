"""Tokenizers of real GGUF models against their own libraries."""

import ast
import base64
import json

import pytest
import tiktoken
import transformers
from sentencepiece import SentencePieceProcessor
from transformers.convert_slow_tokenizer import TikTokenConverter

from jlora.bases.gguf_tokenizer import write_tokenizer

TEXTS = [
    "Under Article 39, 12345 yuan; don't  pay.\n\n\tIt's 3.5%…",
    "依据《劳动合同法》第47条，🙂 naïve Straße ΑΒΓ CamelCaseWords we'll SHOUT\r\n",
    "   leading, trailing   \n \n\n x  ",
    'a/b\\c: `code` // TODO(x): {"k": [1, 22, 333, 4444]}',
]


def pattern_in(source):
    """Returns the splitting expression in a package's own tokenizer."""
    for node in ast.walk(ast.parse(source.read_text())):
        names = [getattr(target, "id", "").lower() for target in getattr(node, "targets", [])]
        if names == ["pat_str"]:
            return node.value.value
    raise AssertionError(source)


def ranked(packages, name):
    """Returns a real model's tokens by rank, and its splitting expression."""
    if name == "tekken":
        stored = json.loads((packages / "mistral_common/data/tekken_240911.json").read_text())
        size = stored["config"]["default_vocab_size"] - stored["config"]["default_num_special_tokens"]
        return {base64.b64decode(t["token_bytes"]): t["rank"] for t in stored["vocab"][:size]}, stored["config"][
            "pattern"
        ]
    file, source = {
        "llama-bpe": ("llama_models/llama3/tokenizer.model", "llama_models/llama3/tokenizer.py"),
        "qwen2": ("dashscope/resources/qwen.tiktoken", "dashscope/tokenizers/qwen_tokenizer.py"),
    }[name]
    lines = (line.split() for line in (packages / file).read_text().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}, pattern_in(packages / source)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_byte_level_tokenizers_give_the_original_ids(packages, tmp_path, pre):
    ranks, pattern = ranked(packages, pre)
    file = tmp_path / "ranks"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    vocabulary, merges = TikTokenConverter(file).extract_vocab_merges_from_model(str(file))
    tokens = [*sorted(vocabulary, key=vocabulary.get), "<bos>", "<eos>"]
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 8192,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * len(vocabulary), 3, 3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": len(vocabulary),
        "tokenizer.ggml.eos_token_id": len(vocabulary) + 1,
    }
    write_tokenizer(fields, tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = tiktoken.Encoding(pre, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs.encode(text, disallowed_special=()), text
        assert ours.decode(ids) == text
    begins = [] if pre == "qwen2" else [len(vocabulary)]
    assert ours("a")["input_ids"] == [*begins, *theirs.encode("a")]
    assert ours("a<eos>", add_special_tokens=False)["input_ids"][-1] == len(vocabulary) + 1


@pytest.mark.network
@pytest.mark.slow
def test_sentencepiece_tokenizer_gives_the_original_ids(mistral_v1, tmp_path):
    theirs = SentencePieceProcessor(str(mistral_v1))
    ids = range(theirs.vocab_size())
    types = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 8192,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_tokenizer(fields, tmp_path)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == text
    assert ours("a")["input_ids"] == [1, *theirs.encode("a")]
