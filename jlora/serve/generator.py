"""Generates answers from a base model with any adapter, or with a different adapter in each row of a batch.

The prompt goes through the model's chat template. After the prefill, tokens are generated one at a time with a
key-value cache.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters.params import Adapter
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Conversation, Message
from jlora.data.tokenizer import check_embedded, end_tokens
from jlora.models.families import read_config
from jlora.models.kv_cache import KVCache, empty_kv_cache
from jlora.models.llama import Llama, neutral_adapter

ROUND = 64  # prompts and caches are padded to multiples of this many tokens, so that few programs are compiled
BY_ROW = KVCache._make((0, 0, 0, None))  # the row axis of the caches; all rows write at the same position


class Generator:
    """A base model that generates answers. The adapter is an argument, so switching adapters does not compile again.

    Args:
      directory: the model directory of the base model; its generation config defines the end tokens.
      graphdef: the model's structure, which joins `base` and an adapter.
      base: the frozen weights.
      compute_dtype: dtype of activations and cache.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Any,
        graphdef: nnx.GraphDef[Llama],
        base: Any,
        compute_dtype: DTypeLike,
    ) -> None:
        self.tokenizer, self.graphdef, self.base = tokenizer, graphdef, base
        self._end_tokens = end_tokens(directory, tokenizer)
        self._config, self._dtype = read_config(directory), compute_dtype
        self._vocabulary = base["embed_tokens"]["weight"].shape[0]

        def row(
            adapter: Adapter, base: Any, tokens: Array, segments: Array, positions: Array, cache: KVCache
        ) -> tuple[Float[Array, " V"], KVCache | None]:
            model = nnx.merge(graphdef, adapter, base)
            hidden, cache_after = model(tokens[None], segments[None], positions[None], cache=cache)
            return model.logits(hidden[0, -1]), cache_after

        rows = jax.vmap(row, in_axes=(0, None, 0, 0, 0, BY_ROW), out_axes=(0, BY_ROW))
        self._run = jax.jit(rows, donate_argnums=5)
        self._sample = jax.jit(jax.vmap(sample_token, in_axes=(0, 0, None, None)))
        self._stack = jax.jit(lambda adapters: jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters))

    def neutral(self, adapter: Adapter) -> Adapter:
        """Returns an adapter of the same shapes that has no effect: with it, the base model answers."""
        return jax.jit(neutral_adapter, static_argnums=0)(self.graphdef, adapter, self.base)

    def generate_tokens(
        self,
        adapter: Adapter,
        prompt: list[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yields new token ids one at a time, without the end token; temperature 0 is greedy."""
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        for (token,) in self.generate_batch([adapter], [prompt], max_new_tokens, **options):
            assert token is not None  # the only row is still running
            yield token

    def generate_batch(
        self,
        adapters: Sequence[Adapter],
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[int | None]]:
        """Yields the next token of every prompt, from one forward pass; None for rows that have ended.

        Args:
          adapters: one per row, in a common form (see `combining.to_common_form`); rows may share one.
          prompts: token ids, one list per row.
          temperature: 0 is greedy.
          top_p: sample from the smallest set of tokens with this probability mass.
          seed: row i samples as it would alone with `seed + i`.
        """
        count, weights = len(prompts), self._stack(tuple(adapters))
        ids, segments, positions, cache = self._pad(prompts, max_new_tokens)
        keys = jax.vmap(jax.random.key)(seed + np.arange(count))
        running = np.ones(count, bool)
        for step in range(max_new_tokens):
            logits, cache = self._run(weights, self.base, ids, segments, positions, cache)
            draws = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
            tokens = np.asarray(self._sample(logits, draws, temperature, top_p))
            running &= ~np.isin(tokens, list(self._end_tokens))
            if not running.any():
                return
            yield [int(token) if is_running else None for token, is_running in zip(tokens, running, strict=True)]
            ids, segments = tokens[:, None].astype(np.int32), np.ones((count, 1), np.int32)
            positions = positions[:, -1:] + 1

    def next_token_logits(self, adapters: Sequence[Adapter], prompts: Sequence[list[int]]) -> Float[Array, "R V"]:
        """Returns the float32 logits of the token after each prompt, each with its own adapter."""
        return self._run(self._stack(tuple(adapters)), self.base, *self._pad(prompts, ROUND))[0]

    def _pad(
        self, prompts: Sequence[list[int]], max_new_tokens: int
    ) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R T"], Int[np.ndarray, "R T"], KVCache]:
        """Pads prompts on the left to one length; returns tokens, segments, positions, and an empty cache."""
        for prompt in prompts:
            check_embedded(self.tokenizer, prompt, self._vocabulary)
        length = -(-max(map(len, prompts)) // ROUND) * ROUND
        one = empty_kv_cache(self._config, self._dtype, 1, length + -(-max_new_tokens // ROUND) * ROUND)
        cache = jax.vmap(lambda _: one, out_axes=BY_ROW)(jnp.arange(len(prompts)))
        pads = np.array([length - len(prompt) for prompt in prompts])[:, None]
        ids = np.array([[0] * (length - len(prompt)) + prompt for prompt in prompts], np.int32)
        segments = (np.arange(length)[None] >= pads).astype(np.int32)
        positions = np.maximum(np.arange(length)[None] - pads, 0).astype(np.int32)
        return ids, segments, positions, cache

    def generate_text(
        self, adapter: Adapter, messages: tuple[Message, ...], tools: str = "", **options: Any
    ) -> Iterator[str]:
        """Yields the answer's text in pieces of whole characters; options as for `generate_tokens`."""
        answer: list[int] = []
        shown = 0
        for token in self.generate_tokens(adapter, encode_prompt(self.tokenizer, messages, tools), **options):
            answer.append(token)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                yield text[shown:]
                shown = len(text)
        yield self.tokenizer.decode(answer, skip_special_tokens=True)[shown:]

    def answers(
        self, adapters: Sequence[Adapter], conversations: Sequence[tuple[Message, ...]], **options: Any
    ) -> list[str]:
        """Returns the complete answers to several conversations; options as for `generate_batch`."""
        prompts = [encode_prompt(self.tokenizer, messages) for messages in conversations]
        steps = list(self.generate_batch(adapters, prompts, **options))
        ids = [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in ids]

    def answer(self, adapter: Adapter, question: str, max_new_tokens: int) -> str:
        """Returns the greedy answer to one question."""
        (text,) = self.answers([adapter], [(Message("user", question),)], max_new_tokens=max_new_tokens)
        return text


def sample_token(
    logits: Float[Array, " V"], key: PRNGKeyArray, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, ""]:
    """Returns the next token: the most likely one at temperature 0, else a sample from the smallest set of tokens with
    probability mass `top_p` (Holtzman et al. 2020, arXiv:1904.09751)."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ranked = jnp.sort(scaled, descending=True)
    mass_before = jnp.cumsum(jax.nn.softmax(ranked)) - jax.nn.softmax(ranked)
    least = jnp.min(jnp.where(mass_before < top_p, ranked, jnp.inf))
    # Sampling over unsorted tokens: a rounding error that swaps two ranks must not change the token that is drawn.
    drawn = jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


def compare_answers(generator: Generator, adapter: Adapter, rows: list[Conversation]) -> Iterator[str]:
    """Yields, for each held-out row, its question, its own answer, and those of the base model and the adapter."""
    neutral = generator.neutral(adapter)
    for row in rows:
        question, expected = row.messages[:-1], row.messages[-1].full_text
        room = len(generator.tokenizer(expected)["input_ids"]) + 40
        base, tuned = (
            "".join(generator.generate_text(weights, question, row.tools, max_new_tokens=room))
            .strip()
            .replace("\n", " ")
            for weights in (neutral, adapter)
        )
        yield f"\nQuestion: {question[-1].content}\n  expected: {expected}\n  base:     {base}\n  adapter:  {tuned}"
