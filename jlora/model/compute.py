"""How the model is computed, which is no part of what it computes: dtypes and what the backward pass recomputes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Compute:
    """Args:
    param_dtype: of the frozen weights; adapter weights are float32.
    compute_dtype: of activations; norms, rotary angles and softmax are float32 inside.
    remat: what of a layer the backward pass recomputes: "none"; "dots": all but products with weights; "full".
    mesh: over which the rows of activations are split; None leaves them as they come.
    """

    param_dtype: DTypeLike
    compute_dtype: DTypeLike
    remat: str = "none"
    mesh: Mesh | None = None


FLOAT32 = Compute(jnp.float32, jnp.float32)


def default_dtype() -> DTypeLike:
    """What weights and activations are, unless a config says otherwise: float32 on a CPU, else bfloat16."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
