"""Generation: greedy answers equal transformers', streamed text is complete, sampling respects top_p."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import process_options, run_program

from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Message
from jlora.serve import loading
from jlora.serve.generator import sample_token

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Say 你好 and an emoji.",
    "What is 12 + 30?",
]


ANSWER = """
import json, sys
from jlora import load_model
from jlora.cli.program import run_command
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Message
generator = load_model(sys.argv[1]).generator
prompts = [encode_prompt(generator.tokenizer, (Message("user", question),)) for question in json.loads(sys.argv[2])]
print(json.dumps([list(generator.generate_tokens({}, prompt, 40)) for prompt in prompts]))
run_command("generate", ["--base", sys.argv[1], "--prompt", json.loads(sys.argv[2])[0], "--max_new_tokens", "8"])
"""


@pytest.fixture(scope="module")
def said(smollm) -> list[str]:
    """The lines of a process with the real model: its answers as tokens, then what the command prints.

    XLA optimizes as it does for users, which is faster here too.
    """
    options = process_options(1)
    options["env"].pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", ANSWER, smollm, json.dumps(QUESTIONS)]
    return subprocess.run(command, **options, capture_output=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_greedy_answers_equal_transformers_on_the_real_model(smollm, monkeypatch, said):
    generator, nothing = loading.load_model(str(smollm)).generator, {}
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm)
    for question, got in zip(QUESTIONS, json.loads(said[0]), strict=True):
        prompt = encode_prompt(generator.tokenizer, (Message("user", question),))
        want = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
        )[0, len(prompt) :].tolist()
        assert got == [token for token in want if token != generator.tokenizer.eos_token_id]
        with monkeypatch.context() as patch:
            patch.setattr(generator, "generate_tokens", lambda *_, tokens=got, **__: iter(tokens))
            pieces = list(generator.generate_text(nothing, (Message("user", question),), max_new_tokens=40))
        assert "".join(pieces) == generator.tokenizer.decode(got, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces[:-1])


@pytest.mark.slow
def test_the_command_answers(said, tiny):
    assert any("Paris" in line for line in said[1:])
    sampled = [
        run_program(
            *("generate", "--base", tiny, "--prompt", "Tell a story.", "--max_new_tokens", 6),
            *("--temperature", 1.5, "--seed", seed, "--system", "You are a bard."),
        ).stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_top_p_samples_from_the_smallest_set_with_that_mass():
    logits = jnp.log(jnp.array([0.05, 0.5, 0.3, 0.15]))
    draw = jax.jit(jax.vmap(lambda key, t, p: sample_token(logits, key, t, p), in_axes=(0, None, None)))
    keys = jax.random.split(jax.random.key(0), 4000)
    assert set(np.asarray(draw(keys, 0.0, 1.0))) == {1}
    assert set(np.asarray(draw(keys, 1.0, 0.6))) == {1, 2}
    shares = np.bincount(np.asarray(draw(keys, 1.0, 1.0)), minlength=4) / 4000
    assert np.abs(shares - [0.05, 0.5, 0.3, 0.15]).max() < 0.03
