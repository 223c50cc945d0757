"""Chooses the next token of each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

ALTERNATIVES = 20  # most likely tokens that a request may ask for beside the chosen one, as in OpenAI's API


class Sampling(NamedTuple):
    """How a row chooses its tokens."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # sample from the smallest set of tokens with this probability mass
    seed: int = 0


GREEDY = Sampling()


def greedy(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
    """Returns the most likely tokens."""
    return jnp.argmax(logits, axis=-1)


def sample(
    logits: Float[Array, "R V"],
    seeds: UInt32[Array, " R"],
    counts: Int[Array, " R"],
    temperatures: Float[Array, " R"],
    top_ps: Float[Array, " R"],
) -> Int[Array, " R"]:
    """Returns the tokens that rows draw; a row draws the same whatever the other rows are.

    Args:
      counts: number of tokens that each row has drawn.
    """

    def draw(logits: Array, seed: Array, count: Array, temperature: Array, top_p: Array) -> Array:
        return sample_token(logits, jax.random.fold_in(jax.random.key(seed), count), temperature, top_p)

    return jax.vmap(draw)(logits, seeds, counts, temperatures, top_ps)


def sample_token(
    logits: Float[Array, " V"], key: Array, temperature: Float[Array, ""], top_p: Float[Array, ""]
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


def log_probabilities(
    logits: Float[Array, "R V"], tokens: Int[Array, " R"]
) -> tuple[Float[Array, " R"], Float[Array, "R a"], Int[Array, "R a"]]:
    """Returns the log-probability of each row's token, and those of the ALTERNATIVES most likely tokens, with these."""
    logs = jax.nn.log_softmax(logits)
    highest, ids = jax.lax.top_k(logs, min(ALTERNATIVES, logits.shape[1]))
    return jnp.take_along_axis(logs, tokens[:, None], axis=1)[:, 0], highest, ids
