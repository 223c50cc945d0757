"""Answers requests of OpenAI's API with an engine: checks them, runs them, and stops what nobody reads."""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from jlora.common.errors import UserError
from jlora.data.chat_template import encode_prompt
from jlora.data.tokenizer import check_embedded
from jlora.serve.answer_text import AnswerText
from jlora.serve.engine import Request, Token
from jlora.serve.engine_thread import EngineThread
from jlora.serve.generator import Generator
from jlora.serve.metrics import Metrics
from jlora.serve.openai_answers import Answers, Json, error, event, usage
from jlora.serve.openai_bodies import ChatBody, CompletionBody
from jlora.serve.output_rules import Rules
from jlora.serve.sampling import Sampling
from jlora.serve.served_models import ServedModels

logger = logging.getLogger(__name__)
ANSWER = 1024  # tokens of an answer at most, unless the request says otherwise
Piece = tuple[int, str, Sequence[Token], str | None]  # number of the answer, text, tokens, why it ended if it did


class Refused(Exception):
    """A request that is not answered: its message, HTTP status, and OpenAI's code for it."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Args:
      queue: requests that may wait.
      seconds: time for a request, from its arrival to its end.
      body: bytes of a request.
    """

    queue: int = 64
    seconds: float = 600.0
    body: int = 4 << 20


class Answering:
    """Answers requests with one engine."""

    def __init__(
        self,
        generator: Generator,
        models: ServedModels,
        thread: EngineThread,
        metrics: Metrics,
        rules: Rules,
        limits: Limits,
    ) -> None:
        self._generator, self._models, self._thread, self._metrics = generator, models, thread, metrics
        self._rules, self._limits = rules, limits
        self._accepted = weakref.WeakSet[Request]()  # not yet in the engine's queue; some may never be

    async def requests(self, body: ChatBody | CompletionBody) -> list[Request]:
        """Returns the engine's requests for a body, one for each of its n answers.

        Raises:
          Refused: it cannot be answered, or not now.
        """
        engine, count = self._thread.engine, body.n or 1
        # A long prompt takes seconds, in which others are answered; nothing below waits, so it holds until they start.
        prompt = await asyncio.to_thread(self._prompt, body)
        try:
            mixture = self._models.select(body.model)
        except UserError as problem:
            raise Refused(f"model: {problem}", 404, "model_not_found") from None
        context = min(self._generator.context, engine.context)
        room = context - len(prompt)
        limit = body.limit or min(ANSWER, max(room, 1))
        if limit > room:
            raise Refused(
                f"The prompt has {len(prompt):,} tokens and the answer may have {limit:,}, but together they can have "
                f"{context:,} at most. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        if self._rules and body.alternatives is not None:
            raise Refused("logprobs: Not available, because this server applies output rules to answers.")
        if count > self._limits.queue:
            raise Refused(f"n={count}: This server gives {self._limits.queue} answers to a request at most.")
        running = len(engine.requests()) - len(engine.waiting)
        most = self._limits.queue + max(engine.places - running, 0)
        if len(engine.waiting) + len(self._accepted) + count > most:
            raise Refused("Too many requests are waiting. Try again later.", 429, "queue_full")
        temperature = 1.0 if body.temperature is None else body.temperature
        seed = secrets.randbits(31) if body.seed is None else body.seed
        samplings = [Sampling(temperature, body.top_p or 1.0, seed + i) for i in range(count)]
        logprobs = body.alternatives is not None
        requests = [Request(prompt, mixture, limit, sampling, logprobs) for sampling in samplings]
        self._accepted.update(requests)
        return requests

    def _prompt(self, body: ChatBody | CompletionBody) -> list[int]:
        tokenizer = self._generator.tokenizer
        try:
            if isinstance(body, ChatBody):
                prompt = encode_prompt(tokenizer, [turn.message() for turn in body.messages])
            elif isinstance(body.prompt, list) and isinstance(body.prompt[0], int):
                prompt = [token for token in body.prompt if isinstance(token, int)]
            else:
                text = body.prompt if isinstance(body.prompt, str) else str(body.prompt[0])
                prompt = tokenizer(text)["input_ids"]
            check_embedded(tokenizer, prompt, self._generator.vocabulary)
        except UserError as problem:
            raise Refused(str(problem)) from None
        if not prompt:
            raise Refused("prompt: Expected at least one token.")
        return prompt

    async def whole(self, body: ChatBody | CompletionBody, requests: Sequence[Request]) -> Json:
        """Returns the complete answers.

        Raises:
          TimeoutError: they take too long.
        """
        answers = self._answers(body)
        try:
            async with asyncio.timeout(self._limits.seconds), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._choice(answers, i, body, r)) for i, r in enumerate(requests)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        made = [task.result() for task in tasks]
        return answers.whole([choice for choice, _ in made], _usage(requests, sum(count for _, count in made)))

    async def stream(self, body: ChatBody | CompletionBody, requests: Sequence[Request]) -> AsyncIterator[str]:
        """Yields the events of a stream; an error ends it with an event of its own."""
        answers, end = self._answers(body), time.monotonic() + self._limits.seconds
        news = asyncio.Queue[Piece | Exception]()
        tasks = [asyncio.create_task(self._feed(i, body, request, news)) for i, request in enumerate(requests)]
        try:
            yield event(answers.chunk([answers.opening(i) for i in range(len(requests))]))
            running, count = len(requests), 0
            while running:
                piece = await asyncio.wait_for(news.get(), end - time.monotonic())
                if isinstance(piece, Exception):
                    raise piece
                running, count = running - (piece[3] is not None), count + len(piece[2])
                yield event(answers.chunk([answers.piece(*piece)]))
            if body.stream_options and body.stream_options.include_usage:
                yield event(answers.chunk([], _usage(requests, count)))
            yield "data: [DONE]\n\n"
        except TimeoutError:
            yield event(error("The answer took too long.", 504))
        except RuntimeError as failure:
            yield event(error(str(failure), 500))
        except Exception:  # a bug; the client must not wait for the rest
            logger.exception("A stream has failed")
            yield event(error("The server has failed. Its log says why.", 500))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _answers(self, body: ChatBody | CompletionBody) -> Answers:
        chat = isinstance(body, ChatBody)
        return Answers(self._generator.tokenizer, body.model, chat=chat, alternatives=body.alternatives)

    async def _choice(
        self, answers: Answers, index: int, body: ChatBody | CompletionBody, request: Request
    ) -> tuple[Json, int]:
        """Returns a complete answer, and its number of tokens."""
        async with contextlib.aclosing(self._pieces(index, body, request)) as arriving:
            pieces = [piece async for piece in arriving]
        _, texts, tokens, ends = zip(*pieces, strict=True)
        said = [token for some in tokens for token in some]
        return answers.choice(index, "".join(texts), said, ends[-1]), len(said)

    async def _feed(
        self, index: int, body: ChatBody | CompletionBody, request: Request, news: asyncio.Queue[Piece | Exception]
    ) -> None:
        try:
            async with contextlib.aclosing(self._pieces(index, body, request)) as pieces:
                async for piece in pieces:
                    if any(piece[1:]):
                        news.put_nowait(piece)
        except Exception as failure:  # whoever reads the news raises it
            news.put_nowait(failure)

    async def _pieces(self, index: int, body: ChatBody | CompletionBody, request: Request) -> AsyncGenerator[Piece]:
        """Yields an answer in pieces; only the last one has a reason for its end."""
        start, text = time.monotonic(), AnswerText(self._generator.tokenizer, body.stops, self._rules)
        self._accepted.discard(request)
        try:
            async with contextlib.aclosing(self._thread.tokens(request)) as arriving:
                async for tokens in arriving:
                    if tokens and len(request.answer) == len(tokens):
                        self._metrics.first_token.observe(time.monotonic() - start)
                    piece = ""
                    for count, token in enumerate(tokens, 1):
                        piece += text.push([token.id])
                        if text.stopped:  # the engine may have computed more
                            yield index, piece + text.close(), tokens[:count], "stop"
                            return
                    yield index, piece, tokens, None
            yield index, text.close(), (), "length" if request.finish == "length" and not text.stopped else "stop"
        finally:
            self._metrics.whole.observe(time.monotonic() - start)
            known = body.model if body.model in self._models.names else "sum"
            self._metrics.count(known, "stop" if text.stopped else request.finish or "cancelled", request)


def _usage(requests: Sequence[Request], count: int) -> Json:
    """Returns the usage of a request with n answers of `count` tokens together: its prompt counts once."""
    return usage(len(requests[0].prompt), requests[0].reused, count)
