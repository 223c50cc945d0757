"""NEFTune: adds noise to the embeddings during training (Jain et al. 2023, arXiv:2310.05914)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def noise(
    x: Float[Array, "B T D"], segments: Int[Array, "B T"], alpha: float, key: PRNGKeyArray
) -> Float[Array, "B T D"]:
    """Adds uniform noise within alpha / sqrt(T D), where T is the length of the token's own example (Algorithm 1)."""
    length = jax.vmap(lambda row: jnp.bincount(row, length=row.size + 1)[row])(segments)
    bound = alpha / jnp.sqrt(length * x.shape[-1])
    return x + (jax.random.uniform(key, x.shape, jnp.float32, -1.0, 1.0) * bound[..., None]).astype(x.dtype)
