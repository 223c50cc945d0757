"""How likely given texts are under the base model and each adapter, and how far these are apart.

Axes: E example, T position, S target, D model, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jlora.adapters.params import Adapter
from jlora.data.examples import Example
from jlora.evaluation.subjects import BASE, Subjects
from jlora.models.llama import Llama, neutral_adapter, scores
from jlora.serve.engine import weighed
from jlora.steps.compilation import supported_options

ROWS = 8  # examples of a forward pass
SHORTEST = 64  # positions; longer batches have a power of two of them, so that few programs are compiled
CHUNK = 256  # targets whose logits exist at the same time: [CHUNK, V] float32, of two models


class Measured(NamedTuple):
    """What a model computes for each target of one example: [targets]."""

    log_probs: np.ndarray  # float32, nats
    greedy: np.ndarray  # bool: whether the target is the most likely token
    divergence: np.ndarray  # float32, nats: KL(base model || this model), over the whole vocabulary


class Likelihood:
    """Measures the targets of examples under the base model and each adapter."""

    def __init__(self, subjects: Subjects) -> None:
        self._generator, self._mixtures = subjects
        graphdef = self._generator.graphdef
        options = supported_options(jax.default_backend())

        def states(adapter: Adapter, base: Any, tokens: Any, segments: Any, at: Any) -> Float[Array, "E S D"]:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            hidden, _ = nnx.merge(graphdef, adapter, base)(tokens, segments, positions)
            return jnp.take_along_axis(hidden, at[..., None], axis=1)

        self._states = jax.jit(states, compiler_options=options)
        self._compare = jax.jit(lambda *inputs: _compare(graphdef, *inputs), compiler_options=options)

    def measure(self, examples: Sequence[Example]) -> Iterator[dict[str, Measured]]:
        """Yields, for each example, what each model computes for its targets, which have a weight above 0."""
        base, forms = self._generator.base, {name: self._adapter(own) for name, own in self._mixtures.items()}
        neutral = forms[BASE]
        for start in range(0, len(examples), ROWS):
            some = [examples[i] for i in range(start, min(start + ROWS, len(examples)))]
            tokens, segments, at, targets, counts = _batch(some)
            reference = self._states(neutral, base, tokens, segments, at)
            found = {}
            for name, adapter in forms.items():
                own = reference if adapter is neutral else self._states(adapter, base, tokens, segments, at)
                compared = self._compare(adapter, neutral, base, own, reference, targets)
                found[name] = [np.asarray(values) for values in compared]
            for row, count in enumerate(counts):
                yield {name: Measured(*(values[row, :count] for values in own)) for name, own in found.items()}

    def _adapter(self, mixture: tuple[float, ...]) -> Adapter:
        """Returns the adapter that computes a mixture for all rows."""
        adapters = self._generator.adapters
        if adapters.spec.mixed:
            return weighed(adapters.adapter, jnp.tile(jnp.array(mixture), (ROWS, 1)))
        if any(mixture):
            return adapters.adapter
        return jax.jit(neutral_adapter, static_argnums=0)(
            self._generator.graphdef, adapters.adapter, self._generator.base
        )


def _batch(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Returns tokens, segments, where each target is predicted, the targets, and their number in each example."""
    at = [np.flatnonzero(example.weights[1:]) for example in examples]
    length, size = _padded(max(len(example.tokens) for example in examples)), _padded(max(map(len, at)))
    tokens, segments = np.zeros((ROWS, length), np.int32), np.zeros((ROWS, length), np.int32)
    places, targets = np.zeros((ROWS, size), np.int32), np.zeros((ROWS, size), np.int32)
    for row, (example, own) in enumerate(zip(examples, at, strict=True)):
        tokens[row, : len(example.tokens)], segments[row, : len(example.tokens)] = example.tokens, 1
        places[row, : len(own)], targets[row, : len(own)] = own, example.tokens[own + 1]
    return tokens, segments, places, targets, list(map(len, at))


def _padded(count: int) -> int:
    """Returns the size to which `count` is padded."""
    return SHORTEST if count <= SHORTEST else 2 * _padded(-(-count // 2))


def _compare(
    graphdef: nnx.GraphDef[Llama],
    adapter: Adapter,
    neutral: Adapter,
    base: Any,
    own: Float[Array, "E S D"],
    reference: Float[Array, "E S D"],
    targets: Int[Array, "E S"],
) -> tuple[Float[Array, "E S"], Array, Float[Array, "E S"]]:
    states, table = nnx.merge(graphdef, adapter, base).head(own)
    others, other_table = nnx.merge(graphdef, neutral, base).head(reference)
    width = CHUNK // ROWS

    def chunk(leaves: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        states, others, targets = leaves
        logs, base_logs = (jax.nn.log_softmax(scores(*pair)) for pair in ((states, table), (others, other_table)))
        chosen = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
        divergence = jnp.sum(jnp.exp(base_logs) * (base_logs - logs), axis=-1)
        return chosen, jnp.argmax(logs, axis=-1) == targets, divergence

    def chunks(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)

    found = jax.lax.map(chunk, (chunks(states), chunks(others), chunks(targets)))
    log_probs, greedy, divergence = (jnp.moveaxis(x, 0, 1).reshape(targets.shape) for x in found)
    return log_probs, greedy, divergence
