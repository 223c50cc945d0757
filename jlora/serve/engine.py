"""Answers many requests at once, with one base model and an adapter of its own for each (Yu et al. 2022, Orca).

Requests join and leave between two steps. A step computes a part of one new prompt, of a fixed size, and then the next
token of every request whose prompt is complete. All shapes are known from the start, so nothing compiles later.
"""

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jlora.adapters import params
from jlora.adapters.combining import Mixture
from jlora.adapters.methods.mixture import MIXTURE
from jlora.adapters.params import Adapter
from jlora.adapters.spec import AdapterSpec
from jlora.models.kv_cache import BLOCK, SPAN, KVCache, cache_shardings, empty_kv_cache
from jlora.models.llama import Llama, neutral_adapter
from jlora.models.model_config import ModelConfig
from jlora.serve.block_pool import BlockPool
from jlora.serve.sampling import GREEDY, Sampling, greedy, log_probabilities, sample
from jlora.steps.compilation import supported_options

CHUNKS = (16, 32, 48, 64, 128, 256)  # tokens of a prompt that one forward pass computes; padding fills the rest


class Token(NamedTuple):
    """One generated token."""

    id: int
    logprob: float | None = None  # None unless the request asks for it
    alternatives: tuple[tuple[int, float], ...] = ()  # the most likely tokens, with their log-probabilities


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, and its answer so far.

    Args:
      prompt: token ids.
      mixture: the weight of each adapter.
      max_new_tokens: length of the answer at most, at least 1.
      logprobs: whether the answer's tokens have log-probabilities.
      notify: called in the engine's thread after each token, and at the end.
    """

    prompt: Sequence[int]
    mixture: Mixture
    max_new_tokens: int
    sampling: Sampling = GREEDY
    logprobs: bool = False
    notify: Callable[[], None] = lambda: None
    answer: list[Token] = dataclasses.field(default_factory=list)  # without the end token
    finish: str = ""  # why it ended: "stop" (at an end token), "length" or "cancelled"; "" before
    tokens: list[int] = dataclasses.field(init=False)  # prompt and answer
    blocks: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the cache
    reused: int = 0  # those of them that other requests had computed

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)


class Engine:
    """The compiled programs, the cache, and the requests that wait or run.

    `submit` and `cancel` may be called in any thread, all else in one.

    Args:
      graphdef: the model's structure, which joins `base` and an adapter.
      adapter, spec: one adapter in any form; or several side by side (`combining.side_by_side`).
      ends: ids of the tokens that end an answer.
      places: requests that run at the same time.
      cache_tokens: tokens of all running requests, at most.
      row_counts: the numbers of rows of the programs that compute one token for each row, of which the smallest
        sufficient one runs; (): powers of two up to `places`.
    """

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef[Llama],
        base: Any,
        adapter: Adapter,
        spec: AdapterSpec,
        compute_dtype: DTypeLike,
        ends: frozenset[int],
        places: int,
        cache_tokens: int,
        row_counts: Sequence[int] = (),
    ) -> None:
        self.base, self.spec, self.ends, self.places = base, spec, ends, places
        self.row_counts = row_counts or sorted({places, *(2**i for i in range(places.bit_length()) if 2**i < places)})
        self._graphdef = graphdef
        self._neutral: Adapter | None = None
        span = SPAN * BLOCK
        self.context = -(-cache_tokens // span) * span
        blocks = self.context // BLOCK + 1
        mesh = getattr(jax.tree.leaves(base)[0].sharding, "mesh", None)
        # The base model's devices, so that no program compiles again for arrays that are on the same device by default.
        self._devices = NamedSharding(mesh, PartitionSpec()) if mesh else None
        places_of_cache = cache_shardings(mesh) if mesh else None
        self._empty = jax.jit(lambda: empty_kv_cache(config, compute_dtype, blocks), out_shardings=places_of_cache)
        self._cache: KVCache | None = self._empty()
        self.adapter = jax.device_put(adapter, self._devices) if mesh else adapter
        self.pool = BlockPool(blocks)
        self._lock = threading.Lock()
        self.waiting: deque[Request] = deque()
        self._filling: Request | None = None
        self.running: list[Request] = []

        def forward(
            adapter: Adapter,
            base: Any,
            cache: KVCache,
            blocks: Int[Array, "R M"],
            tokens: Int[Array, "R T"],
            segments: Int[Array, "R T"],
            positions: Int[Array, "R T"],
            mixture: Float[Array, "R n"],
        ) -> tuple[Float[Array, "R V"], KVCache]:
            model = nnx.merge(graphdef, weighed(adapter, mixture) if spec.mixed else adapter, base)
            hidden, after = model(tokens, segments, positions, cache=cache._replace(blocks=blocks))
            assert after is not None
            last = jnp.maximum(jnp.sum(segments, axis=1) - 1, 0)
            logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
            return logits, after._replace(blocks=cache.blocks)

        options = supported_options(jax.default_backend())
        self._forward = jax.jit(forward, donate_argnums=2, compiler_options=options)
        self._greedy, self._sample, self._logs = jax.jit(greedy), jax.jit(sample), jax.jit(log_probabilities)

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self._filling or self.running)

    def requests(self) -> list[Request]:
        """Returns the requests that wait or run."""
        return [*self.waiting, *([self._filling] if self._filling else []), *self.running]

    @property
    def free_tokens(self) -> int:
        """Number of tokens that the cache has room for."""
        return self.pool.free * BLOCK

    def uses(self, place: int) -> bool:
        """Returns whether a request waits or runs with the adapter at this place."""
        return any(request.mixture[place] for request in self.requests())

    def replace_adapter(self, adapter: Adapter) -> None:
        """Sets the adapters side by side, of the same shapes; between two steps."""
        self.adapter = jax.device_put(adapter, self._devices) if self._devices else adapter
        self.pool.forget()

    def free_cache(self) -> None:
        """Frees the memory of the cache until the next step; no request may run."""
        self._cache = None
        self.pool.forget()

    def submit(self, request: Request) -> None:
        """Puts a request at the end of the queue."""
        assert len(request.prompt) + request.max_new_tokens <= self.context, "the cache cannot hold it"
        with self._lock:
            self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request before the next step."""
        request.finish = request.finish or "cancelled"

    def step(self, *, fill: bool = False) -> None:
        """Computes a part of the first waiting prompt, and the next token of each running request.

        Args:
          fill: first compute all prompts for which there is a place, so that answers start late and end together.
        """
        self._drop_cancelled()
        for _ in itertools.count() if fill else range(1):
            self._filling = self._filling or self._admit()
            if self._filling is None:
                break
            self._fill(self._filling)
        for rows in self._groups():
            logits = self._run(rows, next(count for count in self.row_counts if count >= len(rows)))
            for request in rows:
                request.computed += 1
            self._append(rows, logits)

    def run(self) -> None:
        """Steps until no request is left."""
        while self.busy:
            self.step()

    def next_token_logits(self, request: Request) -> Float[np.ndarray, " V"]:
        """Returns the logits of the token after a request's prompt; no other request may run."""
        taken = self.pool.take(request.tokens, len(request.tokens), request.mixture)
        assert taken is not None, "the cache cannot hold it"
        request.blocks, request.computed = taken
        while True:
            logits = self._run_chunk(request)
            if request.computed == len(request.tokens):
                self._release(request)
                return np.asarray(logits)[0]

    def compile_all(self) -> None:
        """Compiles all programs that requests will need."""
        for logits in [*(self._run([], rows) for rows in self.row_counts), *(self._run([], 1, T) for T in CHUNKS)]:
            self._choose(logits, [])
            self._choose(logits, [Request([], (), 1, Sampling(temperature=1.0), logprobs=True)])

    def _admit(self) -> Request | None:
        """Returns the first request of the queue, if there are a place and blocks for it."""
        with self._lock:
            if not self.waiting or len(self.running) >= self.places:
                return None
            request = self.waiting[0]
            positions = len(request.prompt) + request.max_new_tokens
            taken = self.pool.take(request.tokens, positions, request.mixture)
            if taken is None:
                return None
            self.waiting.popleft()
        request.blocks, request.computed = taken
        request.reused = request.computed
        return request

    def _fill(self, request: Request) -> None:
        """Computes the next part of a prompt; after the last one, the first token of the answer."""
        logits = self._run_chunk(request)
        if request.computed == len(request.tokens):
            self._filling = None
            self.pool.remember(request.blocks, request.tokens, request.mixture)
            self.running.append(request)
            self._append([request], logits)

    def _run_chunk(self, request: Request) -> Float[Array, "1 V"]:
        missing = len(request.tokens) - request.computed
        size = next((size for size in CHUNKS if size >= missing), CHUNKS[-1])
        logits = self._run([request], 1, size)
        request.computed += min(size, missing)
        return logits

    def _groups(self) -> list[list[Request]]:
        """Returns the running requests by the adapter that they share: one group if adapters are side by side."""
        if self.spec.mixed:
            return [list(self.running)] if self.running else []
        chosen = {request.mixture for request in self.running}
        return [[request for request in self.running if request.mixture == mixture] for mixture in chosen]

    def _run(self, requests: Sequence[Request], rows: int, length: int = 1) -> Float[Array, "R V"]:
        """Computes the next `length` tokens of each request, and returns the logits of what follows them.

        Args:
          rows: rows of the program; padding fills those without a request.
        """
        tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
        blocks = np.zeros((rows, self.context // BLOCK), np.int32)
        mixture = np.zeros((rows, max(self.spec.mixed, 1)), np.float32)
        for row, request in enumerate(requests):
            new = request.tokens[request.computed :][:length]
            tokens[row, : len(new)], segments[row, : len(new)] = new, 1
            positions[row, : len(new)] = range(request.computed, request.computed + len(new))
            blocks[row, : len(request.blocks)], mixture[row] = request.blocks, request.mixture
        adapter = self.adapter if self.spec.mixed or mixture.any() else self._base_alone()
        inputs = blocks, tokens, segments, positions, mixture
        logits, self._cache = self._forward(adapter, self.base, self._cache or self._empty(), *inputs)
        return logits

    def _base_alone(self) -> Adapter:
        """Returns the adapter's form without an effect, for adapters that no mixture can weigh."""
        if self._neutral is None:
            neutral = jax.jit(neutral_adapter, static_argnums=0, out_shardings=self._devices)
            self._neutral = neutral(self._graphdef, self.adapter, self.base)
        return self._neutral

    def _choose(self, logits: Float[Array, "R V"], requests: Sequence[Request]) -> list[Token]:
        """Returns the next token of each request."""
        rows = len(logits)
        chosen: Array
        if any(request.sampling.temperature > 0 for request in requests):
            settings = np.zeros((4, rows))
            for row, request in enumerate(requests):
                seed = request.sampling.seed % 2**32
                settings[:, row] = seed, len(request.answer), request.sampling.temperature, request.sampling.top_p
            seeds, counts = settings[0].astype(np.uint32), settings[1].astype(np.int32)
            chosen = self._sample(logits, seeds, counts, *settings[2:].astype(np.float32))
        else:
            chosen = self._greedy(logits)
        tokens = [Token(id) for id in np.asarray(chosen)[: len(requests)].tolist()]
        if any(request.logprobs for request in requests):
            found = [np.asarray(values).tolist() for values in self._logs(logits, chosen)]
            tokens = [
                Token(token.id, own, tuple(zip(ids, highest, strict=True))) if request.logprobs else token
                for request, token, own, highest, ids in zip(requests, tokens, *found, strict=False)
            ]
        return tokens

    def _append(self, requests: Sequence[Request], logits: Float[Array, "R V"]) -> None:
        """Appends a token to each answer, and lets the requests go that end with it."""
        for request, token in zip(requests, self._choose(logits, requests), strict=True):
            if token.id in self.ends:
                request.finish = request.finish or "stop"
            else:
                request.answer.append(token)
                request.tokens.append(token.id)
                if len(request.answer) >= request.max_new_tokens:
                    request.finish = request.finish or "length"
            if request.finish:
                self.running.remove(request)
                self._release(request)
            request.notify()

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [request for request in self.waiting if request.finish]
            self.waiting = deque(request for request in self.waiting if not request.finish)
        if self._filling and self._filling.finish:
            self._release(self._filling)
            gone.append(self._filling)
            self._filling = None
        for request in [request for request in self.running if request.finish]:
            self.running.remove(request)
            self._release(request)
            gone.append(request)
        for request in gone:
            request.notify()

    def _release(self, request: Request) -> None:
        """Gives a request's blocks back; what they contain stays known."""
        self.pool.remember(request.blocks, request.tokens[: request.computed], request.mixture)
        self.pool.give_back(request.blocks)
        request.blocks = []


def weighed(adapter: Adapter, mixture: Float[Array, "R n"]) -> Adapter:
    """Returns adapters side by side with the weights of each row."""
    found = dict(params.modules(adapter))
    for path, leaves in found.items():
        layers = len(leaves["lora_A"])
        found[path] = {**leaves, MIXTURE: jnp.broadcast_to(mixture, (layers, *mixture.shape))}
    return params.build(found)
