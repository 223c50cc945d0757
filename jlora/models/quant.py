"""Frozen weights quantized to 4 or 8 bits, with bitsandbytes' codes and rounding; and bfloat16 on a CPU.

NF4 with double quantization follows QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3); int8 per output row
follows LLM.int8() (arXiv:2208.07339, section 2.1), for weights only.

A quantized weight replaces an array [out, in]: it has that `shape`, and `astype` dequantizes it. Its leaves are
transposed, [in, out], so that the two values of a byte are neighbors along the outer axis: otherwise the TPU compiler
transposes the whole stack first. A mesh can split them along `out`, and along `in` between blocks.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from jlora.common.errors import UserError

BLOCK = 64  # consecutive values along `in` that share a scale
SCALES = 256  # consecutive scales of the flattened weight that share a second-level scale
CHUNK = 1 << 18  # values that a thread quantizes at a time, few enough for its cache
TINY = np.float32(1e-36)  # replaces the largest magnitude of an all-zero block

# NF4's levels: quantiles of the normal distribution, as bitsandbytes rounds them (functional.get_4bit_type("nf4")).
NORMAL = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic() -> Float[np.ndarray, "256"]:
    """Returns the 8-bit levels for scales: 2^e steps from 10^(e-7) to 10^(e-6), e from 0 to 6, both signs; 0 and 1.

    Source: Dettmers 2015, arXiv:1511.04561, and bitsandbytes (functional.create_dynamic_map).
    """
    positive: list[float] = []
    for e in range(7):
        edges = np.linspace(0.1, 1.0, 2**e + 1, dtype=np.float32)
        positive += ((10.0 ** (e - 6)) * ((edges[1:] + edges[:-1]) / 2)).tolist()
    return np.sort(np.array([*positive, *(-value for value in positive), 0.0, 1.0], np.float32))


DYNAMIC = _dynamic()


class NF4(NamedTuple):
    """A weight with 4 bits per value, or a stack of weights with a leading axis L.

    Shapes use h = i / 2, b = i / BLOCK and n = ceil(o b / SCALES). A value is NORMAL[code] * scale, and a scale is
    DYNAMIC[scale code] * scale_absmax + scale_mean.
    """

    codes: Any  # uint8 [h, o]: two codes per byte, the first in the high bits
    scales: Any  # uint8 [b, o]: the codes of the blocks' scales
    scale_absmax: Any  # float32 [n]
    scale_mean: Any  # float32 []

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized weight."""
        return (*self.codes.shape[:-2], self.codes.shape[-1], 2 * self.codes.shape[-2])

    def astype(self, dtype: DTypeLike) -> Float[Array, "o i"]:
        """Returns the weight, dequantized in float32."""
        blocks, outputs = self.scales.shape
        absmax = jnp.repeat(self.scale_absmax, SCALES)[: self.scales.size].reshape(outputs, blocks).T
        scales = _look_up(DYNAMIC, self.scales) * absmax + self.scale_mean
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=1).reshape(blocks, BLOCK, outputs)
        values = jax.lax.platform_dependent(codes, tpu=_choose, default=partial(_look_up, NORMAL))
        return (values * scales[:, None]).reshape(-1, outputs).astype(dtype).T

    @staticmethod
    def zeros(outputs: int, inputs: int) -> "NF4":
        """Returns a weight of zeros.

        Raises:
          UserError: `inputs` is not a multiple of the block size.
        """
        if inputs % BLOCK:
            raise UserError(
                f"quantize_base=nf4 requires weights with a multiple of {BLOCK} inputs, and the base model has one "
                f"with {inputs}. Set quantize_base to int8 or none."
            )
        blocks = inputs // BLOCK
        absmax = jnp.zeros(-(-outputs * blocks // SCALES), jnp.float32)
        codes, scales = (jnp.zeros((size, outputs), jnp.uint8) for size in (inputs // 2, blocks))
        return NF4(codes, scales, absmax, jnp.zeros((), jnp.float32))

    @staticmethod
    def quantized(weight: Shaped[np.ndarray, "o i"]) -> "NF4":
        """Quantizes a weight of any float dtype to the nearest codes, in NumPy, a few rows at a time."""
        codes, absmax = (np.concatenate(parts) for parts in zip(*_by_rows(_normal_codes, weight), strict=True))
        mean = np.float32(absmax.mean(dtype=np.float64))
        rest = -absmax.size % SCALES  # pads the last block
        with np.errstate(invalid="ignore"):  # NaN or infinity shows in the mean
            scaled, scale_absmax = _scaled(np.append(absmax - mean, np.zeros(rest, np.float32)), SCALES)
        scales = _nearest(DYNAMIC, scaled).reshape(-1)[: absmax.size].reshape(absmax.shape)
        return NF4(codes.T, scales.T, scale_absmax, mean)


class Int8(NamedTuple):
    """A weight with 8 bits per value, or a stack of weights with a leading axis L: codes * absmax / 127."""

    codes: Any  # int8 [i, o]
    absmax: Any  # float32 [o]: the largest magnitude in an output's row

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized weight."""
        return (*self.codes.shape[:-2], self.codes.shape[-1], self.codes.shape[-2])

    def astype(self, dtype: DTypeLike) -> Float[Array, "o i"]:
        """Returns the weight, dequantized in float32."""
        return (self.codes.astype(jnp.float32) * self.absmax[None] * np.float32(1 / 127)).astype(dtype).T

    @staticmethod
    def zeros(outputs: int, inputs: int) -> "Int8":
        """Returns a weight of zeros."""
        return Int8(jnp.zeros((inputs, outputs), jnp.int8), jnp.zeros(outputs, jnp.float32))

    @staticmethod
    def quantized(weight: Shaped[np.ndarray, "o i"]) -> "Int8":
        """Quantizes a weight of any float dtype to the nearest codes, in NumPy, a few rows at a time."""
        codes, absmax = (np.concatenate(parts) for parts in zip(*_by_rows(_int8_codes, weight), strict=True))
        return Int8(codes.T, absmax)


class Bits(NamedTuple):
    """A weight in bfloat16, exactly, or a stack of such weights with a leading axis L.

    A CPU does not compute in bfloat16. XLA would convert a whole stack of arrays to float32 before its loop over the
    layers; it leaves integers alone, so that only the weights of one layer are converted at a time.
    """

    bits: Any  # uint16 [o, i]: the upper half of a float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.bits.shape)

    def astype(self, dtype: DTypeLike) -> Float[Array, "o i"]:
        """Returns the weight."""
        return jax.lax.bitcast_convert_type(self.bits.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)

    @staticmethod
    def zeros(outputs: int, inputs: int) -> "Bits":
        """Returns a weight of zeros."""
        return Bits(jnp.zeros((outputs, inputs), jnp.uint16))

    @staticmethod
    def quantized(weight: Shaped[np.ndarray, "o i"]) -> "Bits":
        """Rounds a weight of any float dtype to bfloat16."""
        with np.errstate(over="ignore"):  # overflowing values are reported by the loader
            return Bits(np.asarray(weight, jnp.bfloat16).view(np.uint16))


KINDS: dict[str, type[NF4] | type[Int8] | type[Bits]] = {"nf4": NF4, "int8": Int8, "bits": Bits}


def storage(quantize_base: str, param_dtype: DTypeLike, platform: str) -> str:
    """Returns how weights are stored, for `ComputeSettings.quantize`: as the setting says, or as bits of bfloat16."""
    as_bits = quantize_base == "none" and param_dtype == jnp.bfloat16 and platform == "cpu"
    return "bits" if as_bits else quantize_base


def is_quantized(node: Any) -> bool:
    """Returns whether this node of a tree is a whole weight of one of KINDS."""
    return isinstance(node, tuple(KINDS.values()))


def zeros(kind: str, outputs: int, inputs: int, dtype: DTypeLike) -> Any:
    """Returns a weight of zeros: an array of `dtype` if `kind` is "none", otherwise a quantized weight."""
    return jnp.zeros((outputs, inputs), dtype) if kind == "none" else KINDS[kind].zeros(outputs, inputs)


def linear(x: Float[Array, "B T i"], weight: Any) -> Float[Array, "B T o"]:
    """Returns W x. The backward pass dequantizes a quantized weight again instead of keeping it."""

    def product(x: Float[Array, "B T i"], weight: Any) -> Float[Array, "B T o"]:
        return jnp.einsum("BTi,oi->BTo", x, weight.astype(x.dtype))

    return (jax.checkpoint(product, prevent_cse=False) if is_quantized(weight) else product)(x, weight)


def _look_up(table: Float[np.ndarray, " c"], codes: UInt8[Array, "*o"]) -> Float[Array, "*o"]:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _choose(codes: UInt8[Array, "*o"]) -> Float[Array, "*o"]:
    """Returns NORMAL[codes] by selecting between neighbors, bit by bit: a gather of single values is slow on TPU."""
    values: list[Any] = [*NORMAL]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, above, below) for below, above in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _by_rows(function: Callable[[Any], Any], weight: np.ndarray) -> list[Any]:
    """Applies `function` to groups of rows as float32, on all cores, and returns the results in order."""
    rows = max(1, CHUNK // weight.shape[1])

    def group(first: int) -> Any:
        with np.errstate(invalid="ignore"):  # NaN or infinity shows in the scale
            return function(np.asarray(weight[first : first + rows], np.float32))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(group, range(0, len(weight), rows)))


def _normal_codes(rows: Float[np.ndarray, "o i"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns packed codes [o, h] and the largest magnitude of each block [o, b]."""
    values, absmax = _scaled(rows, BLOCK)
    codes = _nearest(NORMAL, values).reshape(rows.shape)
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax.reshape(len(rows), -1)


def _int8_codes(rows: Float[np.ndarray, "o i"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes [o, i] and the largest magnitude of each row [o]."""
    absmax = np.abs(rows).max(axis=1)
    factor = np.float32(1) / np.maximum(absmax, TINY) * np.float32(127)
    return np.rint(rows * factor[:, None]).astype(np.int8), absmax


def _scaled(values: Float[np.ndarray, "*n"], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides blocks of values by their largest magnitude; as in bitsandbytes, by multiplying with its inverse."""
    blocks = values.reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1)
    return blocks * (np.float32(1) / np.maximum(absmax, TINY))[:, None], absmax


def _nearest(code: Float[np.ndarray, " c"], values: Float[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """Returns the index of the nearest level of an ascending `code`; the lower one if two are equally near."""
    found = np.zeros(values.shape, np.uint8)
    for middle in (code[1:] + code[:-1]) / 2:
        found += values > middle
    return found
