"""Converts a GGUF file's tokenizer to tokenizer.json, tokenizer_config.json and chat_template.jinja.

Source of the fields: the GGUF specification. GGUF does not store the expression that splits text before the merges, but
only its name; the expressions here are those of each model's own tokenizer.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # GGUF's types of tokens that are not ordinary text
SPACE = "\u2581"  # sentencepiece's character for a space

WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{WORD}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{WORD}|\p{{N}}|{REST}"
UPPER, LOWER, BEFORE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
CAMEL = rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*"
TEKKEN = rf"{CAMEL}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> the expression that splits text; None is GPT-2's, which the tokenizers library has built in.
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
}
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # a word in the vocabulary is used without its merges
ADD_BOS = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # text starts with BOS unless the file says otherwise


def write_tokenizer(field: dict[str, Any], directory: Path) -> None:
    """Writes the tokenizer files for a GGUF file's fields into `directory`.

    Raises:
      KeyError: a field is missing.
      ValueError: jlora does not support this kind of tokenizer.
    """
    kind, tokens = field["tokenizer.ggml.model"], field["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        tokenizer = _byte_level(field, tokens)
        add_bos = field.get("tokenizer.ggml.add_bos_token", field["tokenizer.ggml.pre"] in ADD_BOS)
    elif kind == "llama":
        tokenizer = _sentencepiece(field, tokens)
        add_bos = field.get("tokenizer.ggml.add_bos_token", True)
    else:
        raise ValueError(f"Unsupported tokenizer.ggml.model {kind!r}. Supported: gpt2, llama.")
    types = field["tokenizer.ggml.token_type"]
    for token, token_type in zip(tokens, types, strict=True):  # one by one, which keeps their order and thus their ids
        if token_type in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    ids = {
        role: field.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    special = {f"{role}_token": tokens[index] for role, index in ids.items() if index is not None}
    if add_bos and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    length = field[f"{field['general.architecture']}.context_length"]
    settings = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if template := field.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _byte_level(field: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Builds a byte-level BPE tokenizer, as GPT-2 and most later models use."""
    kind = field["tokenizer.ggml.pre"]
    if kind not in SPLITS:
        raise ValueError(f"Unsupported tokenizer.ggml.pre {kind!r}. Supported: {', '.join(SPLITS)}.")
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind in WHOLE_WORDS))
    pattern = SPLITS[kind]
    if pattern is None:
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_of])
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    if pattern == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(field: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """Builds sentencepiece's BPE with byte fallback. The merges are derived from the scores of the pieces."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores, types = field["tokenizer.ggml.scores"], field["tokenizer.ggml.token_type"]
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    merges = [pair for *_, pair in sorted(ranked)]
    unknown = tokens[field.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = field.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer
