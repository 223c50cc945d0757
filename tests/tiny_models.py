"""Random models with real head sizes and a real tokenizer, small enough to train within seconds."""

import json
from pathlib import Path

import torch
import transformers

VOCABULARY = 4096  # tokens of the tiny models, so that the head does not take most of the time


def make_model(directory: Path, smollm: Path, **changes) -> Path:
    """Writes a random Llama with the first tokens of SmolLM2's tokenizer; `changes` go into its config."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.08,
            **changes,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:  # all ones would hide a norm that is not applied
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(directory)
    for file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (directory / file).write_bytes((smollm / file).read_bytes())
    (directory / "tokenizer.json").write_text(first_tokens(smollm / "tokenizer.json", config.vocab_size))
    return directory


def first_tokens(file: Path, count: int) -> str:
    """Returns a BPE tokenizer without the ids from `count` on; merges are in the order of the ids that they make."""
    tokenizer = json.loads(file.read_text())
    model = tokenizer["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < count}
    model["vocab"], merges = kept, (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    model["merges"] = [[left, right] for left, right in merges if {left, right, left + right} <= kept.keys()]
    return json.dumps(tokenizer, ensure_ascii=False)
