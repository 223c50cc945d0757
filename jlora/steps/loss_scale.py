"""Dynamic loss scaling, which float16 needs and no other dtype (Micikevicius et al. 2018, arXiv:1710.03740).

Gradients below 6e-8 are 0 in float16, so the loss is multiplied by a scale before it is differentiated. Where that
makes a gradient infinite, the step is skipped and the scale halved; after enough good steps it is doubled. The figures
are those of torch.amp.GradScaler.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GROWTH_INTERVAL = 2000  # good steps until the scale is doubled


class LossScale(NamedTuple):
    """The part of the training state that float16 adds."""

    scale: Float[Array, ""]  # float32; below 1 the gradients overflow unscaled, so that no scale helps
    good: Int[Array, ""]  # steps since the scale last changed
    skipped: Int[Array, ""]  # steps in all that changed nothing


def first() -> LossScale:
    """Of a fresh state."""
    return LossScale(jnp.full((), 2.0**16, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def after(before: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """After a step whose gradients were all finite, or were not."""
    grows = finite & (before.good + 1 == GROWTH_INTERVAL)
    factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
    good = jnp.where(finite & ~grows, before.good + 1, 0)
    return LossScale(before.scale * factor, good, before.skipped + ~finite)


def hint(scaling: LossScale | None) -> str:
    """The end of a message that something is not finite: what float16 has to do with it."""
    if scaling is None:
        return ""
    return (
        "; or set compute_dtype='float32': nothing in float16 is larger than 65504, and a base trained in bfloat16 "
        "may need more"
    )
