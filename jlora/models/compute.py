"""How the model is computed, which is no part of its config: dtypes, bits, and what the backward pass recomputes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike


class Packing(NamedTuple):
    """What is known of all rows beforehand, so that attention can be cut to it."""

    prefix: int = 0  # tokens that the examples of a row share, laid once before them, at most
    examples: int = 0  # in a row, at most; 0: nothing is known
    longest: int = 0  # places of an example, at most, those of the prefix aside


UNKNOWN = Packing()


@dataclasses.dataclass(frozen=True)
class Compute:
    """Args:
    param_dtype: of the frozen weights; adapter weights are float32.
    compute_dtype: of activations; norms, rotary angles and softmax are float32 inside.
    remat: what of a layer the backward pass recomputes: "none"; "dots": all but products with weights, and what
      attention mixed; "full".
    attention: "xla", or the kernel that mixes the tokens of a row, as backend.choose found it to run here.
    packing: what is known of the rows.
    mesh: over which the rows of activations are split; None leaves them as they come.
    quantize: "nf4" and "int8" hold the projections' weights in 4 or 8 bits, and the rest in `param_dtype`.
    """

    param_dtype: DTypeLike
    compute_dtype: DTypeLike
    remat: str = "none"
    attention: str = "xla"
    mesh: Mesh | None = None
    quantize: str = "none"
    packing: Packing = UNKNOWN


FLOAT32 = Compute(jnp.float32, jnp.float32)

MIXED = "mixed"  # checkpoint_name of what attention's backward pass needs of its forward pass

# What of a layer's activations the backward pass finds kept, by `Compute.remat`; None is all.
KEPT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(MIXED)
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
