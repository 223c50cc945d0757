"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and their scalings, as transformers computes them.

Each kind is a dataclass whose fields carry config.json's own names; no field has a default.
Axes: B batch, T position in a row, H head dim, h=H/2 rotary pair.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class DefaultRope:
    """theta^(-2i/H), section 3.2.2."""

    rope_theta: float

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """Radians a position, for head dim `size`; `length` is the longest example's tokens."""
        return jnp.asarray(plain_frequencies(self.rope_theta, size))

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearRope(DefaultRope):
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """As for the default."""
        return jnp.asarray(plain_frequencies(self.rope_theta, size) / np.float32(self.factor))


@dataclasses.dataclass(frozen=True)
class DynamicRope(DefaultRope):
    """Dynamic NTK: theta grows with the longest example beyond `max_position_embeddings` (arXiv:2309.00071, B.2)."""

    factor: float
    max_position_embeddings: int

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """As for the default."""
        longest = jnp.maximum(length, self.max_position_embeddings).astype(jnp.float32)
        growth = self.factor * longest / self.max_position_embeddings - (self.factor - 1)
        theta = self.rope_theta * growth ** (size / (size - 2))
        return 1.0 / theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)


@dataclasses.dataclass(frozen=True)
class Llama3Rope(DefaultRope):
    """Long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1, arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """As for the default."""
        plain = plain_frequencies(self.rope_theta, size)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)  # within the original length
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(ramp, 0.0, 1.0).astype(np.float32)
        return jnp.asarray((kept * plain + (1 - kept) * plain / self.factor).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class YarnRope(DefaultRope):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over dimensions; attention sharpened by a factor."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    def frequencies(self, size: int, length: Int[Array, ""]) -> Float[Array, " h"]:
        """As for the default."""
        plain = plain_frequencies(self.rope_theta, size)
        low, high = (self._dimension(turns, size) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
        divided = np.clip(ramp, 0.0, 1.0).astype(np.float32)
        return jnp.asarray((plain * (1 - divided) + plain / self.factor * divided).astype(np.float32))

    def _dimension(self, turns: float, size: int) -> float:
        """The dimension that makes so many turns within the original length."""
        wavelengths = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(self.rope_theta))

    @property
    def magnitude(self) -> float:
        """Factor of cosines and sines."""
        return self.attention_factor


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """0.1 ln(factor) + 1 (section 3.4), or the ratio of two such with DeepSeek's `mscale` and `mscale_all_dim`."""

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


KINDS: dict[str, type[DefaultRope]] = {
    "default": DefaultRope,
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}


def angles(
    rope: DefaultRope, positions: Int[Array, "B T"], size: int
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """Cosines and sines of position * frequency, float32, times the kind's magnitude."""
    frequencies = rope.frequencies(size, jnp.max(positions) + 1)
    turned = jnp.einsum("BT,h->BTh", positions.astype(jnp.float32), frequencies)
    return jnp.cos(turned) * rope.magnitude, jnp.sin(turned) * rope.magnitude


def rotate(
    x: Float[Array, "B T n H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]
) -> Float[Array, "B T n H"]:
    """Rotates each pair (i, i + H/2), Hugging Face's order of the rows, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def plain_frequencies(theta: float, size: int) -> np.ndarray:
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)
