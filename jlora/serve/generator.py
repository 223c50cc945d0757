"""Answers of a base model with adapters, as text: prompts go through the model's chat template."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from jlora.adapters.combining import AdapterSet, Mixture
from jlora.common.errors import UserError
from jlora.data.chat_template import encode_prompt
from jlora.data.conversation import Conversation, Message
from jlora.data.tokenizer import check_embedded, end_tokens
from jlora.models.compute_settings import ComputeSettings
from jlora.models.families import read_config, read_context
from jlora.models.llama import Llama
from jlora.serve.answer_text import AnswerText
from jlora.serve.engine import Engine, Request
from jlora.serve.sampling import GREEDY, Sampling

PLACES = 8  # rows of a batch that are answered at a time
MANY_PLACES = 32  # the same if there are very many, unless they are so long that the cache has no room
CACHE_TOKENS = 32768  # tokens of all of these


class Generator:
    """A base model that generates answers, with one of its adapters or a sum of them for each.

    Args:
      directory: the model directory of the base model; its generation config defines the end tokens.
      graphdef: the model's structure, which joins `base` and `adapters.adapter`.
      base: the frozen weights.
      compute: its dtypes and devices.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Any,
        graphdef: nnx.GraphDef[Llama],
        base: Any,
        adapters: AdapterSet,
        compute: ComputeSettings,
    ) -> None:
        self.tokenizer, self.graphdef, self.base, self.adapters = tokenizer, graphdef, base, adapters
        self.directory, self.config, self.context = directory, read_config(directory), read_context(directory)
        self.ends = end_tokens(directory, tokenizer)
        self.compute, self.vocabulary = compute, base["embed_tokens"]["weight"].shape[0]
        self._engine: Engine | None = None

    def make_engine(self, places: int, cache_tokens: int, row_counts: Sequence[int] = ()) -> Engine:
        """Returns an engine for this model; see `Engine` for the arguments."""
        model = self.config, self.graphdef, self.base, self.adapters.adapter, self.adapters.spec
        return Engine(*model, self.compute.compute_dtype, self.ends, places, cache_tokens, row_counts)

    def replace_adapters(self, adapters: AdapterSet) -> None:
        """Sets other adapters of the same form, such as those of a later step."""
        self.adapters = adapters
        if self._engine:
            self._engine.replace_adapter(adapters.adapter)

    def generate_tokens(
        self,
        mixture: Mixture,
        prompt: list[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yields new token ids one at a time, without the end token; temperature 0 is greedy."""
        request = self._request(mixture, prompt, max_new_tokens, Sampling(temperature, top_p, seed))
        engine, shown = self._engine_for([request]), 0
        engine.submit(request)
        try:
            while shown < len(request.answer) or not request.finish:
                if shown == len(request.answer):
                    engine.step()
                else:
                    shown += 1
                    yield request.answer[shown - 1].id
        finally:  # the caller may stop early
            engine.cancel(request)
            engine.step()

    def generate_batch(
        self,
        mixtures: Sequence[Mixture],
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Returns the answers to several prompts, as token ids without the end token.

        Args:
          mixtures: one per prompt.
          prompts: token ids.
          temperature: 0 is greedy.
          top_p: sample from the smallest set of tokens with this probability mass.
          seed: prompt i samples as it would alone with `seed + i`.
        """
        requests = [
            self._request(mixture, prompt, max_new_tokens, Sampling(temperature, top_p, seed + i))
            for i, (mixture, prompt) in enumerate(zip(mixtures, prompts, strict=True))
        ]
        engine = self._engine_for(requests)
        for request in requests:
            engine.submit(request)
        engine.run()
        return [[token.id for token in request.answer] for request in requests]

    def compile_for(self, mixtures: Sequence[Mixture], prompts: Sequence[list[int]], max_new_tokens: int) -> None:
        """Compiles all that `generate_batch` will need for the same prompts, and frees the memory of its cache."""
        engine = self._engine_for([self._request(*one, max_new_tokens) for one in zip(mixtures, prompts, strict=True)])
        self.generate_batch(mixtures, prompts, min(max_new_tokens, 2))
        engine.free_cache()

    def generate_each(self, requests: Iterable[Request], longest: int, count: int) -> Iterator[Request]:
        """Yields requests as their answers are complete, in the order in which they end.

        Args:
          requests: drawn as places become free, so that any number of them takes little memory.
          longest: tokens of the longest prompt with its answer.
          count: the number of requests.
        """
        places = max(1, min(MANY_PLACES, count, CACHE_TOKENS // longest))
        engine = self._engine_with(places, longest)
        running, rest = list[Request](), iter(requests)
        while True:
            for request in itertools.islice(rest, 2 * places - len(running)):
                check_embedded(self.tokenizer, request.prompt, self.vocabulary)
                engine.submit(request)
                running.append(request)
            if not running:
                return
            engine.step(fill=True)
            yield from (request for request in running if request.finish)
            running = [request for request in running if not request.finish]

    def next_token_logits(self, mixtures: Sequence[Mixture], prompts: Sequence[list[int]]) -> Float[np.ndarray, "R V"]:
        """Returns the float32 logits of the token after each prompt, each with its own mixture."""
        requests = [self._request(mixture, prompt, 1) for mixture, prompt in zip(mixtures, prompts, strict=True)]
        engine = self._engine_for(requests)
        return np.stack([engine.next_token_logits(request) for request in requests])

    def _request(
        self, mixture: Mixture, prompt: list[int], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Request:
        check_embedded(self.tokenizer, prompt, self.vocabulary)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: Expected at least 1.")
        return Request(prompt, mixture, max_new_tokens, sampling)

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """Returns an engine that holds the longest of these requests, and as many as it has places for."""
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        return self._engine_with(min(len(requests), PLACES), longest)

    def _engine_with(self, rows: int, longest: int) -> Engine:
        """Returns an engine that answers this many requests at a time, each with at most `longest` tokens."""
        if self._engine is None or self._engine.places < rows or self._engine.context < longest * rows:
            before = 0 if self._engine is None else self._engine.context
            self._engine = None  # its cache is freed first
            self._engine = self.make_engine(rows, max(longest * rows, 2 * before), (rows,))  # one program to compile
        return self._engine

    def generate_text(
        self, mixture: Mixture, messages: tuple[Message, ...], tools: str = "", **options: Any
    ) -> Iterator[str]:
        """Yields the answer's text in pieces of whole characters; options as for `generate_tokens`."""
        text = AnswerText(self.tokenizer)
        for token in self.generate_tokens(mixture, encode_prompt(self.tokenizer, messages, tools), **options):
            yield text.push([token])
        yield text.close()

    def answers(
        self, mixtures: Sequence[Mixture], conversations: Sequence[tuple[Message, ...]], **options: Any
    ) -> list[str]:
        """Returns the complete answers to several conversations; options as for `generate_batch`."""
        prompts = [encode_prompt(self.tokenizer, messages) for messages in conversations]
        answers = self.generate_batch(mixtures, prompts, **options)
        return [self.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]


class Comparison:
    """Answers of the base model and an adapter to held-out questions.

    Args:
      generator: has the adapter, under any name.
    """

    def __init__(self, generator: Generator, rows: Sequence[Conversation]) -> None:
        self._generator, self._rows = generator, rows
        first, none = generator.adapters.select(list(generator.adapters.places)[:1]), generator.adapters.none
        self._expected = [row.messages[-1].full_text for row in rows]
        room = max((len(generator.tokenizer(text)["input_ids"]) for text in self._expected), default=0) + 40
        prompts = [encode_prompt(generator.tokenizer, row.messages[:-1], row.tools) for row in rows]
        pairs = [(mixture, prompt) for prompt in prompts for mixture in (none, first)]
        self._inputs = [mixture for mixture, _ in pairs], [prompt for _, prompt in pairs], room

    def compile_all(self) -> None:
        """Compiles everything before it is needed."""
        self._generator.compile_for(*self._inputs)

    def texts(self, adapters: AdapterSet) -> Iterator[str]:
        """Yields, for each row, its question, its own answer, and those of the base model and the adapter."""
        generator = self._generator
        generator.replace_adapters(adapters)
        answers = generator.generate_batch(*self._inputs)
        texts = [" ".join(generator.tokenizer.decode(answer, skip_special_tokens=True).split()) for answer in answers]
        for row, written, base, tuned in zip(self._rows, self._expected, texts[::2], texts[1::2], strict=True):
            question = row.messages[-2].content
            yield f"\nQuestion: {question}\n  expected: {written}\n  base:     {base}\n  adapter:  {tuned}"
