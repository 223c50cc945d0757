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
from programs import process_options, run_program

from jlora import load_model
from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.serve.sampling import sample_token

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Say 你好 and an emoji.",
    "What is 12 + 30?",
]


ANSWER = """
import json, sys
from unittest.mock import patch
from jlora import load_model
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Message
generator, adapters = load_model(sys.argv[1])
for question in json.loads(sys.argv[2]):
    messages = (Message("user", question),)
    prompt = encode_prompt(generator.tokenizer, messages)
    tokens = list(generator.generate_tokens(adapters.none, prompt, 40))
    with patch.object(generator, "generate_tokens", lambda *_, **__: iter(tokens)):
        pieces = list(generator.generate_text(adapters.none, messages, max_new_tokens=40))
    print(json.dumps([prompt, tokens, pieces]))
"""


@pytest.mark.slow
def test_greedy_answers_equal_transformers_on_the_real_model(smollm):
    """jlora answers in another process, where XLA optimizes as it does for users, which is faster here too."""
    options = process_options(1)
    options["env"].pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", ANSWER, smollm, json.dumps(QUESTIONS)]
    answers = subprocess.run(command, **options, capture_output=True, check=True).stdout.splitlines()
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    for question, line in zip(QUESTIONS, answers, strict=True):
        prompt, got, pieces = json.loads(line)
        turns = [{"role": "user", "content": question}]
        assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        want = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
        )[0, len(prompt) :].tolist()
        assert got == [token for token in want if token != tokenizer.eos_token_id]
        assert "".join(pieces) == tokenizer.decode(got, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert "Paris" in "".join(json.loads(answers[0])[2])


@pytest.mark.slow
def test_the_command_answers(tiny):
    def answer(*options):
        told = ("--base", tiny, "--prompt", "Tell a story.", "--max_new_tokens", 6, "--system", "You are a bard.")
        return run_program("generate", *told, *options).stdout

    generator, adapters = load_model(str(tiny))
    turns = (Message("system", "You are a bard."), Message("user", "Tell a story."))
    assert answer() == "".join(generator.generate_text(adapters.none, turns, max_new_tokens=6)) + "\n"
    sampled = [answer("--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_top_p_samples_from_the_smallest_set_with_that_mass():
    logits = jnp.log(jnp.array([0.05, 0.5, 0.3, 0.15]))
    draw = jax.jit(jax.vmap(lambda key, t, p: sample_token(logits, key, t, p), in_axes=(0, None, None)))
    keys = jax.random.split(jax.random.key(0), 4000)
    assert set(np.asarray(draw(keys, 0.0, 1.0))) == {1}
    assert set(np.asarray(draw(keys, 1.0, 0.6))) == {1, 2}
    shares = np.bincount(np.asarray(draw(keys, 1.0, 1.0)), minlength=4) / 4000
    assert np.abs(shares - [0.05, 0.5, 0.3, 0.15]).max() < 0.03


def test_several_answers_may_be_read_in_turns(tiny):
    generator, adapters = load_model(str(tiny))
    prompts = [[5, 6, 7], [9, 8]]
    want = generator.generate_batch([adapters.none] * 2, prompts, 6)
    first, second = (generator.generate_tokens(adapters.none, prompt, 6) for prompt in prompts)
    begun = next(second)
    assert [list(first), [begun, *second]] == want
    with pytest.raises(UserError, match=r"max_new_tokens=0: Expected at least 1\."):
        list(generator.generate_tokens(adapters.none, prompts[0], 0))
