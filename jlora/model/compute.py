"""How the model is computed, which is no part of what it computes: dtypes and what the backward pass recomputes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Compute:
    """Args:
    param_dtype: of the frozen weights; adapter weights are float32.
    compute_dtype: of activations; norms, rotary angles and softmax are float32 inside.
    remat: "none" keeps each layer's activations for the backward pass; "full" recomputes them.
    attention: "xla", or the kernel that mixes the tokens of a row, as backend.choose found it to run here.
    mesh: over which the rows of activations are split; None leaves them as they come.
    """

    param_dtype: DTypeLike
    compute_dtype: DTypeLike
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None


FLOAT32 = Compute(jnp.float32, jnp.float32)


def compute_capability(device: Any) -> float:
    """Of an NVIDIA card, as 7.5; 0 of any other device."""
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's, as "gfx90a"
        return 0.0


def default_dtype(device: Any) -> DTypeLike:
    """What weights and activations are, unless a config says otherwise: float32 on a CPU, else bfloat16; float16 on
    NVIDIA's cards before Ampere (T4, V100), which have no bfloat16."""
    if device.platform == "cpu":
        return jnp.float32
    return jnp.float16 if 0 < compute_capability(device) < 8 else jnp.bfloat16
