"""A base that answers, with any adapter, or with another adapter in every row of a batch.

Prefill, then one token at a time with a key-value cache; the prompt goes through the model's chat template.
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

from jlora.adapters import tree
from jlora.adapters.tree import Adapter
from jlora.data.chat import encode_prompt, end_tokens
from jlora.data.conversation import Conversation, Message
from jlora.models.families import read_config
from jlora.models.llama import Cache, Llama, empty_cache

ROUND = 64  # prompts and caches are rounded up to multiples of this, so that few programs are compiled
BY_ROW = Cache._make((0, 0, 0, None))  # the leading axis of each row's own cache; all rows write at the same place


class Generator:
    """A base ready to answer; the adapter is an argument, so switching it costs nothing.

    Args:
      directory: the base's model directory; its generation config says which tokens end an answer.
      base: the frozen weights; `graphdef` joins them with an adapter.
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
        self._stops = end_tokens(directory, tokenizer)
        self._config, self._dtype = read_config(directory), compute_dtype

        def row(
            adapter: Adapter, base: Any, tokens: Array, segments: Array, positions: Array, cache: Cache
        ) -> tuple[Float[Array, " V"], Cache | None]:
            model = nnx.merge(graphdef, adapter, base)
            hidden, cache_after = model(tokens[None], segments[None], positions[None], cache=cache)
            return model.logits(hidden[0, -1]), cache_after

        rows = jax.vmap(row, in_axes=(0, None, 0, 0, 0, BY_ROW), out_axes=(0, BY_ROW))
        self._run = jax.jit(rows, donate_argnums=5)
        self._pick = jax.jit(jax.vmap(pick, in_axes=(0, 0, None, None)))
        self._stack = jax.jit(lambda adapters: jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters))

    def neutral(self, adapter: Adapter) -> Adapter:
        """An adapter of the same form that does nothing: with it, the base answers."""
        return jax.jit(tree.neutral)(adapter, self.base)

    def tokens(
        self,
        adapter: Adapter,
        prompt: list[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """New token ids, one by one, up to and without the end token; temperature 0 is greedy."""
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        for (token,) in self.rows([adapter], [prompt], max_new_tokens, **options):
            assert token is not None  # the only row has not ended
            yield token

    def rows(
        self,
        adapters: Sequence[Adapter],
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[int | None]]:
        """The next token of every prompt, each with its own adapter, in one forward pass; None after a row's end.

        Args:
          adapters: one a row, of one form (see `several.alike`); a row may have another's.
          seed: a row draws what it would draw alone with `seed` plus its number.
        """
        count, weights = len(prompts), self._stack(tuple(adapters))
        ids, segments, positions, cache = self._layout(prompts, max_new_tokens)
        keys = jax.vmap(jax.random.key)(seed + np.arange(count))
        running = np.ones(count, bool)
        for step in range(max_new_tokens):
            logits, cache = self._run(weights, self.base, ids, segments, positions, cache)
            draws = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
            tokens = np.asarray(self._pick(logits, draws, temperature, top_p))
            running &= ~np.isin(tokens, list(self._stops))
            if not running.any():
                return
            yield [int(token) if goes_on else None for token, goes_on in zip(tokens, running, strict=True)]
            ids, segments = tokens[:, None].astype(np.int32), np.ones((count, 1), np.int32)
            positions = positions[:, -1:] + 1

    def first_logits(self, adapters: Sequence[Adapter], prompts: Sequence[list[int]]) -> Float[Array, "R V"]:
        """Scores of the token after each prompt, each with its own adapter; float32."""
        return self._run(self._stack(tuple(adapters)), self.base, *self._layout(prompts, ROUND))[0]

    def _layout(
        self, prompts: Sequence[list[int]], max_new_tokens: int
    ) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R T"], Int[np.ndarray, "R T"], Cache]:
        """Prompts as tokens, segments and positions, padded on the left to one length, and room to go on."""
        length = -(-max(map(len, prompts)) // ROUND) * ROUND
        one = empty_cache(self._config, self._dtype, 1, length + -(-max_new_tokens // ROUND) * ROUND)
        cache = jax.vmap(lambda _: one, out_axes=BY_ROW)(jnp.arange(len(prompts)))
        pads = np.array([length - len(prompt) for prompt in prompts])[:, None]
        ids = np.array([[0] * (length - len(prompt)) + prompt for prompt in prompts], np.int32)
        segments = (np.arange(length)[None] >= pads).astype(np.int32)
        positions = np.maximum(np.arange(length)[None] - pads, 0).astype(np.int32)
        return ids, segments, positions, cache

    def pieces(self, adapter: Adapter, messages: tuple[Message, ...], **options: Any) -> Iterator[str]:
        """The answer's text as it grows; options as for `tokens`. A piece never ends within a character."""
        said: list[int] = []
        shown = 0
        for token in self.tokens(adapter, encode_prompt(self.tokenizer, messages), **options):
            said.append(token)
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            if not text.endswith("\ufffd"):
                yield text[shown:]
                shown = len(text)
        yield self.tokenizer.decode(said, skip_special_tokens=True)[shown:]

    def answers(
        self, adapters: Sequence[Adapter], conversations: Sequence[tuple[Message, ...]], **options: Any
    ) -> list[str]:
        """The whole answers to several conversations, each with its own adapter; options as for `rows`."""
        prompts = [encode_prompt(self.tokenizer, messages) for messages in conversations]
        steps = list(self.rows(adapters, prompts, **options))
        said = [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in said]

    def answer(self, adapter: Adapter, question: str, max_new_tokens: int) -> str:
        """The greedy answer to one question."""
        (text,) = self.answers([adapter], [(Message("user", question),)], max_new_tokens=max_new_tokens)
        return text


def pick(
    logits: Float[Array, " V"], key: PRNGKeyArray, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, ""]:
    """The next token: the likeliest at temperature 0, else a draw from the smallest set of mass `top_p`
    (Holtzman et al. 2020, arXiv:1904.09751)."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ranked = jnp.sort(scaled, descending=True)
    mass_before = jnp.cumsum(jax.nn.softmax(ranked)) - jax.nn.softmax(ranked)
    least = jnp.min(jnp.where(mass_before < top_p, ranked, jnp.inf))
    # Tokens keep their places, and so their luck, where rounding makes two of them change ranks.
    drawn = jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


def show_answers(generator: Generator, adapter: Adapter, rows: list[Conversation]) -> Iterator[str]:
    """For each held-out row: its question, its own answer, the base's, and the adapter's."""
    nothing = generator.neutral(adapter)
    for row in rows:
        question, expected = row.messages[:-1], row.messages[-1].content
        room = len(generator.tokenizer(expected)["input_ids"]) + 40
        base, tuned = (
            "".join(generator.pieces(weights, question, max_new_tokens=room)).strip().replace("\n", " ")
            for weights in (nothing, adapter)
        )
        yield f"\nquestion: {question[-1].content}\n  written: {expected}\n  base:    {base}\n  adapter: {tuned}"
