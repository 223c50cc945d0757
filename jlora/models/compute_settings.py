"""Choices that do not belong to the model's config: dtypes, quantization, recomputation, attention kernel, mesh."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike


class Packing(NamedTuple):
    """Upper bounds that hold for every packed row, so that attention can skip pairs of different examples."""

    prefix: int = 0  # tokens at the start of a row that all its examples share
    examples: int = 0  # examples in a row; 0 if no bounds are known
    longest: int = 0  # tokens in one example, without the prefix


UNKNOWN = Packing()


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """Choices that change speed and memory, but not the model.

    Args:
      param_dtype: dtype of the frozen weights. Adapter weights are float32.
      compute_dtype: dtype of activations. Norms, rotary angles and softmax are computed in float32.
      remat: what the backward pass recomputes in a layer: "none"; "dots", everything except products with weights and
        the output of attention; or "full".
      attention: "xla", or a kernel that `attention_backend.choose_backend` found to work on the device.
      mesh: splits the rows of activations; None leaves them where they are.
      quantize: "nf4" or "int8" stores the projections' weights in 4 or 8 bits, "bits" those in bfloat16 on a CPU
        (quant.py), and all others in `param_dtype`; "none" stores all in `param_dtype`.
    """

    param_dtype: DTypeLike
    compute_dtype: DTypeLike
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None
    quantize: str = "none"


FLOAT32_COMPUTE = ComputeSettings(jnp.float32, jnp.float32)


def compute_capability(device: Any) -> float:
    """Returns the compute capability of an NVIDIA card, such as 7.5; 0 for any other device."""
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's is a name, such as "gfx90a"
        return 0.0


def default_dtype(device: Any) -> DTypeLike:
    """Returns the dtype of weights and activations, unless the config sets another.

    Returns:
      float32 on a CPU; float16 on NVIDIA cards before Ampere (T4, V100), which lack bfloat16; bfloat16 elsewhere.
    """
    if device.platform == "cpu":
        return jnp.float32
    return jnp.float16 if 0 < compute_capability(device) < 8 else jnp.bfloat16
