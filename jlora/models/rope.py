"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their scalings, as transformers computes them.

Each kind is a dataclass whose fields have the names of config.json's keys; no field has a default. pydantic checks the
values, which are somebody else's.
Axes: B batch, T position in a row, H head dim, h=H/2 rotary pair.
"""

import math
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Int
from pydantic.dataclasses import dataclass

from jlora.common.typed_json import Size

FINITE = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
Theta = Annotated[float, pydantic.Field(gt=1)]
Factor = Annotated[float, pydantic.Field(gt=0)]


@dataclass(frozen=True, config=FINITE)
class DefaultRope:
    """No scaling: the frequency of pair i is theta^(-2i/H) (section 3.2.2)."""

    rope_theta: Theta

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """Returns each pair's radians per position.

        Args:
          size: head dim H.
          length: tokens in the longest example.
        """
        return jnp.asarray(plain_frequencies(self.rope_theta, size))

    def context(self, positions: int) -> int:
        """Returns the tokens that the base model can read; `positions` is its max_position_embeddings."""
        return positions

    @property
    def magnitude(self) -> float:
        """Factor that multiplies cosines and sines."""
        return 1.0


@dataclass(frozen=True, config=FINITE)
class LinearRope(DefaultRope):
    """Divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: Factor

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """Returns each pair's radians per position; see `DefaultRope.frequencies`."""
        return jnp.asarray(plain_frequencies(self.rope_theta, size) / np.float32(self.factor))

    def context(self, positions: int) -> int:
        """Returns the tokens that the base model can read; see `DefaultRope.context`."""
        return max(positions, int(self.factor * positions))


@dataclass(frozen=True, config=FINITE)
class DynamicRope(DefaultRope):
    """Dynamic NTK: theta grows with the longest example beyond `max_position_embeddings` (arXiv:2309.00071, B.2)."""

    factor: Factor
    max_position_embeddings: Size

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """Returns each pair's radians per position; see `DefaultRope.frequencies`."""
        longest = jnp.maximum(length, self.max_position_embeddings).astype(jnp.float32)
        growth = self.factor * longest / self.max_position_embeddings - (self.factor - 1)
        theta = self.rope_theta * growth ** (size / (size - 2))
        return 1.0 / theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)

    def context(self, positions: int) -> int:
        """Returns the tokens that the base model can read; see `DefaultRope.context`."""
        return max(positions, int(self.factor * positions))


@dataclass(frozen=True, config=FINITE)
class Llama3Rope(DefaultRope):
    """Divides low frequencies by `factor`, keeps high ones and interpolates between (Llama 3.1, arXiv:2407.21783)."""

    factor: Factor
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position_embeddings: Size

    @pydantic.model_validator(mode="after")
    def _check_order(self) -> "Llama3Rope":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} (expected more than low_freq_factor={self.low_freq_factor})"
            )
        return self

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """Returns each pair's radians per position; see `DefaultRope.frequencies`."""
        plain = plain_frequencies(self.rope_theta, size)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)  # rotations within the original length
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(ramp, 0.0, 1.0).astype(np.float32)
        return jnp.asarray((kept * plain + (1 - kept) * plain / self.factor).astype(np.float32))


@dataclass(frozen=True, config=FINITE)
class YarnRope(DefaultRope):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over the pairs, and `attention_factor` to sharpen attention."""

    factor: Factor
    original_max_position_embeddings: Size
    beta_fast: Factor
    beta_slow: Factor
    attention_factor: Factor
    truncate: bool

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """Returns each pair's radians per position; see `DefaultRope.frequencies`."""
        plain = plain_frequencies(self.rope_theta, size)
        low, high = (self._dimension(turns, size) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
        divided = np.clip(ramp, 0.0, 1.0).astype(np.float32)
        return jnp.asarray((plain * (1 - divided) + plain / self.factor * divided).astype(np.float32))

    def context(self, positions: int) -> int:
        """Returns the tokens that the base model can read; see `DefaultRope.context`."""
        return max(positions, int(self.factor * self.original_max_position_embeddings))

    def _dimension(self, turns: float, size: int) -> float:
        """Returns the dimension that makes `turns` rotations within the original length."""
        wavelengths = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(self.rope_theta))

    @property
    def magnitude(self) -> float:
        """Factor that multiplies cosines and sines."""
        return self.attention_factor


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Returns 0.1 ln(factor) + 1 (section 3.4), or a ratio of two such values for DeepSeek's `mscale` keys."""

    def mscaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return mscaled(mscale) / mscaled(mscale_all_dim) if mscale and mscale_all_dim else mscaled(1.0)


KINDS: dict[str, type[DefaultRope]] = {
    "default": DefaultRope,
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}


def rotary_cos_sin(
    rope: DefaultRope, positions: Int[Array, "B T"], size: int
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """Returns cosines and sines of position * frequency, times the kind's magnitude; float32."""
    frequencies = rope.frequencies(size, jnp.max(positions) + 1)
    angles = jnp.einsum("BT,h->BTh", positions.astype(jnp.float32), frequencies)
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def rotate(
    x: Float[Array, "B T n H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]
) -> Float[Array, "B T n H"]:
    """Rotates each pair (i, i + H/2), which is Hugging Face's order, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def plain_frequencies(theta: float, size: int) -> Float[np.ndarray, " h"]:
    """Returns theta^(-2i/H) for each pair i of a head of `size` dimensions; float32."""
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)
