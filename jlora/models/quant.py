"""Frozen weights in 4 or 8 bits, with bitsandbytes' codes and rounding.

NF4 with double quantisation is QLoRA's (Dettmers et al. 2023, arXiv:2305.14314, section 3); int8 by output row is that
of LLM.int8() (arXiv:2208.07339, section 2.1), for weights alone.

A quantised weight stands where an array [out, in] would: it has that `shape`, and `astype` makes that array of it. Its
leaves lie the other way round, [in, out], so that the two values of a byte follow each other along the outer axis: a
compiler for TPU would else turn the whole stack first. They can be split over either, over `in` between blocks.
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

BLOCK = 64  # neighbours along `in` that share a scale
SCALES = 256  # scales, in the order of the flattened weight, that share a scale of their own
CHUNK = 1 << 18  # values that a thread works on at a time, so that they stay in its cache
TINY = np.float32(1e-36)  # in place of the largest magnitude of nothing but zeros

# The normal distribution's quantiles as bitsandbytes rounds them (functional.get_4bit_type("nf4")).
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
    """The 8-bit code for scales: 2^e steps in each decade 10^(e-7) to 10^(e-6), e from 0 to 6, both signs; 0 and 1.

    Dettmers 2015, arXiv:1511.04561, as bitsandbytes has it (functional.create_dynamic_map).
    """
    positive: list[float] = []
    for e in range(7):
        edges = np.linspace(0.1, 1.0, 2**e + 1, dtype=np.float32)
        positive += ((10.0 ** (e - 6)) * ((edges[1:] + edges[:-1]) / 2)).tolist()
    return np.sort(np.array([*positive, *(-value for value in positive), 0.0, 1.0], np.float32))


DYNAMIC = _dynamic()


class NF4(NamedTuple):
    """One weight in 4 bits a value, or a stack of them with a leading axis L.

    With h = i / 2, b = i / BLOCK and n = ceil(o b / SCALES). A value is NORMAL[code] * scale, and a scale is
    DYNAMIC[scale code] * scale_absmax + scale_mean.
    """

    codes: Any  # uint8 [h, o]: two codes a byte, the first in the high bits
    scales: Any  # uint8 [b, o]: the codes of the blocks' scales
    scale_absmax: Any  # float32 [n]
    scale_mean: Any  # float32 []

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for."""
        return (*self.codes.shape[:-2], self.codes.shape[-1], 2 * self.codes.shape[-2])

    def astype(self, dtype: DTypeLike) -> Float[Array, "o i"]:
        """The weight, computed in float32."""
        blocks, outputs = self.scales.shape
        absmax = jnp.repeat(self.scale_absmax, SCALES)[: self.scales.size].reshape(outputs, blocks).T
        scales = _look_up(DYNAMIC, self.scales) * absmax + self.scale_mean
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=1).reshape(blocks, BLOCK, outputs)
        values = jax.lax.platform_dependent(codes, tpu=_choose, default=partial(_look_up, NORMAL))
        return (values * scales[:, None]).reshape(-1, outputs).astype(dtype).T

    @staticmethod
    def zeros(outputs: int, inputs: int) -> "NF4":
        """UserError where the inputs are not whole blocks."""
        if inputs % BLOCK:
            raise UserError(
                f"quantize_base=nf4 needs a multiple of {BLOCK} inputs, and this base has a weight with {inputs}: set "
                "quantize_base=int8, or none"
            )
        blocks = inputs // BLOCK
        absmax = jnp.zeros(-(-outputs * blocks // SCALES), jnp.float32)
        codes, scales = (jnp.zeros((size, outputs), jnp.uint8) for size in (inputs // 2, blocks))
        return NF4(codes, scales, absmax, jnp.zeros((), jnp.float32))

    @staticmethod
    def quantized(weight: Shaped[np.ndarray, "o i"]) -> "NF4":
        """The weight's nearest codes, in NumPy; any dtype of floats, read a few rows at a time."""
        codes, absmax = (np.concatenate(parts) for parts in zip(*_by_rows(_normal_codes, weight), strict=True))
        mean = np.float32(absmax.mean(dtype=np.float64))
        rest = -absmax.size % SCALES  # the last block may be a short one
        with np.errstate(invalid="ignore"):  # a value that is not finite shows in the mean
            scaled, scale_absmax = _scaled(np.append(absmax - mean, np.zeros(rest, np.float32)), SCALES)
        scales = _nearest(DYNAMIC, scaled).reshape(-1)[: absmax.size].reshape(absmax.shape)
        return NF4(codes.T, scales.T, scale_absmax, mean)


class Int8(NamedTuple):
    """One weight in 8 bits a value, or a stack of them with a leading axis L: codes * absmax / 127."""

    codes: Any  # int8 [i, o]
    absmax: Any  # float32 [o]: the largest value of an output's row

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that this stands for."""
        return (*self.codes.shape[:-2], self.codes.shape[-1], self.codes.shape[-2])

    def astype(self, dtype: DTypeLike) -> Float[Array, "o i"]:
        """The weight, computed in float32."""
        return (self.codes.astype(jnp.float32) * self.absmax[None] * np.float32(1 / 127)).astype(dtype).T

    @staticmethod
    def zeros(outputs: int, inputs: int) -> "Int8":
        """Of these sizes."""
        return Int8(jnp.zeros((inputs, outputs), jnp.int8), jnp.zeros(outputs, jnp.float32))

    @staticmethod
    def quantized(weight: Shaped[np.ndarray, "o i"]) -> "Int8":
        """The weight's nearest codes, in NumPy; any dtype of floats, read a few rows at a time."""
        codes, absmax = (np.concatenate(parts) for parts in zip(*_by_rows(_int8_codes, weight), strict=True))
        return Int8(codes.T, absmax)


KINDS: dict[str, type[NF4] | type[Int8]] = {"nf4": NF4, "int8": Int8}


def is_quantized(node: Any) -> bool:
    """Is this node of a tree a whole quantised weight?"""
    return isinstance(node, NF4 | Int8)


def zeros(kind: str, outputs: int, inputs: int, dtype: DTypeLike) -> Any:
    """A weight of these sizes: of `dtype` where `kind` is "none", else quantised."""
    return jnp.zeros((outputs, inputs), dtype) if kind == "none" else KINDS[kind].zeros(outputs, inputs)


def linear(x: Float[Array, "B T i"], weight: Any) -> Float[Array, "B T o"]:
    """W x. What is made of a quantised weight for it is made again in the backward pass, and never kept."""

    def product(x: Float[Array, "B T i"], weight: Any) -> Float[Array, "B T o"]:
        return jnp.einsum("BTi,oi->BTo", x, weight.astype(x.dtype))

    return (jax.checkpoint(product, prevent_cse=False) if is_quantized(weight) else product)(x, weight)


def _look_up(table: Float[np.ndarray, " c"], codes: UInt8[Array, "*o"]) -> Float[Array, "*o"]:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _choose(codes: UInt8[Array, "*o"]) -> Float[Array, "*o"]:
    """NORMAL[codes] by choices between neighbours, bit by bit: on TPU a look-up of single values is slow."""
    values: list[Any] = [*NORMAL]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, above, below) for below, above in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _by_rows(function: Callable[[Any], Any], weight: np.ndarray) -> list[Any]:
    """What `function` makes of groups of rows as float32, on all cores."""
    rows = max(1, CHUNK // weight.shape[1])

    def group(first: int) -> Any:
        with np.errstate(invalid="ignore"):  # a value that is not finite shows in the scale
            return function(np.asarray(weight[first : first + rows], np.float32))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(group, range(0, len(weight), rows)))


def _normal_codes(rows: Float[np.ndarray, "o i"]) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes [o, h] and the largest magnitude of each block [o, b]."""
    values, absmax = _scaled(rows, BLOCK)
    codes = _nearest(NORMAL, values).reshape(rows.shape)
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax.reshape(len(rows), -1)


def _int8_codes(rows: Float[np.ndarray, "o i"]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [o, i] and the largest magnitude of each row [o]."""
    absmax = np.abs(rows).max(axis=1)
    factor = np.float32(1) / np.maximum(absmax, TINY) * np.float32(127)
    return np.rint(rows * factor[:, None]).astype(np.int8), absmax


def _scaled(values: Float[np.ndarray, "*n"], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Values in blocks, divided by the largest magnitude of each, as bitsandbytes divides: by way of the inverse."""
    blocks = values.reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1)
    return blocks * (np.float32(1) / np.maximum(absmax, TINY))[:, None], absmax


def _nearest(code: Float[np.ndarray, " c"], values: Float[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    """The index of the nearest value of an ascending `code`, the lower one where two are equally near."""
    found = np.zeros(values.shape, np.uint8)
    for middle in (code[1:] + code[:-1]) / 2:
        found += values > middle
    return found
