"""The base class of adapter methods: the arrays a method adds to a projection, and everything done with them.

A new variant is one file beside this one, and one line in the registry (`methods/__init__.py`).

Axes of an array: r rank, i inputs and o outputs of the projection, c the channels that a factor scales, V vocabulary,
D model. A is [r, i], B is [o, r], a weight is [o, i], as PEFT writes them; in a model each has a leading axis L.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters.spec import AdapterSpec

Values = jax.Array | np.ndarray  # the latter of the host
Leaves = dict[str, Values]  # the arrays of one module by name: of one layer, or stacked over L
Scale = float | Float[Array, ""]
TRAINS, FAST, FROZEN = "train", "fast", "frozen"  # FAST: LoRA+ gives it a learning rate of its own


@runtime_checkable
class Weight(Protocol):
    """A frozen weight: an array, or a quantised weight (models/quant.py), which `astype` makes an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[o, i], or [L, o, i] for a stack."""

    def astype(self, dtype: DTypeLike) -> Any:
        """The weight as an array of this dtype."""


class Frozen(NamedTuple):
    """One layer of the base's projection, W x + bias."""

    weight: Weight
    bias: Array | float
    product: Callable[[Array], Array]  # x -> W x, without the bias


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a projection has an adapter, layer by layer."""

    ranks: tuple[int, ...]  # 0 where the layer has none
    scales: tuple[float, ...]  # 0 where the layer has none

    def scale(self, layer: Int[Array, ""]) -> Scale:
        """One layer's scale; a plain number where all layers have the same."""
        return self.scales[0] if len(set(self.scales)) == 1 else jnp.array(self.scales, jnp.float32)[layer]


def zero(values: Values, weight: Weight) -> Array:
    """The neutral value of most arrays."""
    return jnp.zeros_like(values)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array that a method adds to a module."""

    name: str
    axes: str
    tensor: str = ""  # the end of its name in PEFT's file; "" where the file does not have it
    rate: str = TRAINS  # or FAST, or FROZEN
    # `neutral` gives the value that turns the adapter off, from the array and the base's weight, both stacked over L.
    # Arrays that change nothing by themselves have `draw` instead, which gives the value that training starts from.
    neutral: Callable[[Values, Weight], Array] = zero
    draw: Callable[[PRNGKeyArray, tuple[int, ...], Any], Array] | None = None  # key, shape, dtype

    def cut(self, values: Values, rank: int | None) -> Values:
        """One layer's values without the rows or columns beyond the layer's own rank."""
        return values[tuple(slice(rank if axis == "r" else None) for axis in self.axes)]


@dataclasses.dataclass(frozen=True)
class Method:
    """How one projection is adapted.

    Methods combine by inheritance: a variant of LoRA overrides the parts it changes and calls `super()` for the rest.
    A spec that asks for several variants gets a class that inherits from all of them.
    """

    spec: AdapterSpec
    module: str  # as "self_attn.q_proj"

    # The key and value that choose the method, in the config, in the spec and in adapter_config.json.
    chosen_by: ClassVar[tuple[str, str | bool]]
    peft_type: ClassVar[str]
    title: ClassVar[str]  # as a user knows it
    portable: ClassVar[bool] = True  # whether its change is a product B A, which the portable form can express
    reads: ClassVar[tuple[str, ...]] = ()  # the fields of adapter_config.json that `read_fields` understands
    required: ClassVar[tuple[str, ...]] = ()  # those of them that must be there
    unused: ClassVar[tuple[str, ...]] = ()  # the keys of the config that have no effect with it

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        """The arrays that it adds to a projection."""
        raise NotImplementedError

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of the adapter's change in one layer; never 0, because 0 marks a layer without an adapter."""
        return 1.0

    def site(self, layers: int) -> Site:
        """The ranks and scales in a model with this many layers."""
        ranks, alphas = self.spec.ranks(self.module, layers), self.spec.alphas(self.module, layers)
        scales = (self.scale(rank, alpha) if rank else 0.0 for rank, alpha in zip(ranks, alphas, strict=True))
        return Site(ranks, tuple(scales))

    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """The shape of each array in one layer."""
        sizes = {"r": rank, "i": inputs, "o": outputs}
        return {leaf.name: tuple(sizes[axis] for axis in leaf.axes) for leaf in self.leaves()}

    # Values of all layers: stacks with a leading axis L.

    def start(self, leaves: Leaves, weight: Weight) -> Leaves:
        """The values that training starts with, from the leaves' own first values."""
        return self.complete(leaves, weight)

    def complete(self, leaves: Leaves, weight: Weight) -> Leaves:
        """The values, with the arrays that PEFT's file lacks computed from the base's weight."""
        return leaves

    # Values of one layer.

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        """The projection's output with the adapter, bias included.

        Args:
          leaves: those that are FROZEN take no gradient.
          scale: 0 where the layer has no adapter.
          key: of dropout; None turns it off.
        """
        raise NotImplementedError

    def merge(self, weight: Float[Array, "o i"], leaves: Leaves, scale: Scale) -> Float[Array, "o i"]:
        """The weight with the adapter in it: computed in float32, in the weight's dtype."""
        raise NotImplementedError

    def merge_bias(self, bias: Float[Array, " o"], leaves: Leaves) -> Float[Array, " o"]:
        """The bias with the adapter in it, in the bias's dtype."""
        return bias

    def pair(self, leaves: Leaves, rank: int | None = None) -> tuple[Values, Values]:
        """A and B, cut to `rank`, such that a portable method adds scale * B A to the weight."""
        raise NotImplementedError

    # PEFT's files.

    def to_peft(self, leaves: Leaves, rank: int) -> Leaves:
        """One layer's tensors in PEFT's file, by the ends of their names."""
        files = (leaf for leaf in self.leaves() if leaf.tensor)
        return {leaf.tensor: self.in_file(leaf.cut(leaves[leaf.name], rank)) for leaf in files}

    def in_file(self, values: Values) -> Values:
        """An array in the shape that PEFT gives it."""
        return values

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        """The method's own fields of adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def read_fields(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The fields of the spec that an adapter_config.json gives."""
        raise NotImplementedError

    @classmethod
    def described(cls, config: dict[str, Any]) -> str:
        """The adapter of an adapter_config.json in words, as "A LoRA (rank 8, alpha 16)"."""
        return f"A {cls.title}"
