"""Dynamic loss scaling, which only float16 needs (Micikevicius et al. 2018, arXiv:1710.03740).

Gradients below 6e-8 are 0 in float16, so the loss is multiplied by a scale before differentiation. If a gradient
overflows, the step is skipped and the scale halved; after enough good steps the scale is doubled. The constants are
those of torch.amp.GradScaler.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GROWTH_INTERVAL = 2000  # consecutive good steps after which the scale is doubled


class LossScale(NamedTuple):
    """State of the loss scale; part of the training state in float16."""

    scale: Float[Array, ""]  # float32; below 1, gradients overflow even unscaled, and training stops
    good: Int[Array, ""]  # steps since the scale last changed
    skipped: Int[Array, ""]  # number of skipped steps


def init_loss_scale() -> LossScale:
    """Returns the state before the first step."""
    return LossScale(jnp.full((), 2.0**16, jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def update_loss_scale(before: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """Returns the state after a step; `finite` tells whether all its gradients were finite."""
    grows = finite & (before.good + 1 == GROWTH_INTERVAL)
    factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
    good = jnp.where(finite & ~grows, before.good + 1, 0)
    return LossScale(before.scale * factor, good, before.skipped + ~finite)


def overflow_advice(scaling: LossScale | None) -> str:
    """Returns the end of an error message about NaN or infinity: a suggestion, if the run uses float16."""
    if scaling is None:
        return ""
    return (
        "; or set compute_dtype='float32', because float16 has no values above 65504, and a base model trained in "
        "bfloat16 may need them"
    )
