"""The base class of adapter methods: the arrays that a method adds to a projection, and all operations on them.

To add a method, write one file in this directory and add one line to the registry (`methods/__init__.py`).

Axes of an array: r rank, i inputs and o outputs of the projection, c the channels that a factor scales, V vocabulary,
D model. A is [r, i], B is [o, r] and a weight is [o, i], as in PEFT's files; in a model, each has a leading axis L.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters.spec import AdapterSpec

Values = jax.Array | np.ndarray  # on a device, or on the host
Leaves = dict[str, Values]  # the arrays of one module, by name: for one layer, or stacked over L
Scale = float | Float[Array, ""]
PRODUCT = "product"  # checkpoint_name of the results that `kept` marks
TRAINS, FAST, FROZEN = "train", "fast", "frozen"  # FAST: LoRA+ trains it with a higher rate


@runtime_checkable
class Weight(Protocol):
    """A frozen weight: an array, or a quantized weight (models/quant.py), which `astype` dequantizes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, [o, i], or [L, o, i] for a stack."""

    def astype(self, dtype: DTypeLike) -> Any:
        """Returns the weight as an array of this dtype."""


class Frozen(NamedTuple):
    """One layer of a projection of the base model, W x + bias."""

    weight: Weight
    bias: Array | float
    product: Callable[[Array], Array]  # x -> W x, without the bias


@dataclasses.dataclass(frozen=True)
class Site:
    """The rank and scale of a projection's adapter, by layer."""

    ranks: tuple[int, ...]  # 0 in a layer without an adapter
    scales: tuple[float, ...]  # 0 in a layer without an adapter

    def scale(self, layer: Int[Array, ""]) -> Scale:
        """Returns the scale of one layer; a plain number if it is the same in all layers."""
        return self.scales[0] if len(set(self.scales)) == 1 else jnp.array(self.scales, jnp.float32)[layer]


def kept(product: Float[Array, "B T o"]) -> Float[Array, "B T o"]:
    """Marks a product with a weight of the base model as one that the backward pass keeps, with remat="dots"."""
    return checkpoint_name(product, PRODUCT)


def zero(values: Values, weight: Weight) -> Array:
    """Returns zeros, the neutral value of most arrays."""
    return jnp.zeros_like(values)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array that a method adds to a module."""

    name: str
    axes: str
    tensor: str = ""  # the end of its name in PEFT's file; "" if the file lacks it
    rate: str = TRAINS  # or FAST, or FROZEN
    # `neutral` returns the value that turns the adapter off, from the array and the base model's weight, both stacked
    # over L. An array that changes nothing by itself has `draw` instead, which returns its initial value.
    neutral: Callable[[Values, Weight], Array] = zero
    draw: Callable[[PRNGKeyArray, tuple[int, ...], Any], Array] | None = None  # key, shape, dtype

    def cut(self, values: Values, rank: int | None) -> Values:
        """Returns one layer's values without the rows or columns beyond the layer's own rank."""
        return values[tuple(slice(rank if axis == "r" else None) for axis in self.axes)]


@dataclasses.dataclass(frozen=True)
class Method:
    """An adapter method at one projection.

    Methods combine by inheritance: a variant of LoRA overrides only the parts that differ and calls `super()` for the
    rest. A spec that selects several variants gets a class that inherits from all of them.
    """

    spec: AdapterSpec
    module: str  # such as "self_attn.q_proj"

    # The key and value that select the method in the config, the spec and adapter_config.json.
    chosen_by: ClassVar[tuple[str, str | bool]]
    peft_type: ClassVar[str]
    title: ClassVar[str]  # its name in messages
    portable: ClassVar[bool] = True  # whether the portable form can express it, that is, as a product B A
    adds_bias: ClassVar[bool] = False  # whether it adds to the output of a projection what only a bias can hold
    reads: ClassVar[tuple[str, ...]] = ()  # fields of adapter_config.json that `read_fields` reads
    required: ClassVar[tuple[str, ...]] = ()  # those of them that must be present
    unused: ClassVar[tuple[str, ...]] = ()  # config keys that have no effect with it

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        """Returns the arrays that the method adds to a projection."""
        raise NotImplementedError

    def scale(self, rank: int, alpha: float) -> float:
        """Returns the scale in one layer. It is never 0, because 0 marks a layer without an adapter."""
        return 1.0

    def site(self, layers: int) -> Site:
        """Returns the ranks and scales in a model with this many layers."""
        ranks, alphas = self.spec.ranks(self.module, layers), self.spec.alphas(self.module, layers)
        scales = (self.scale(rank, alpha) if rank else 0.0 for rank, alpha in zip(ranks, alphas, strict=True))
        return Site(ranks, tuple(scales))

    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array in one layer."""
        sizes = {"r": rank, "i": inputs, "o": outputs}
        return {leaf.name: tuple(sizes[axis] for axis in leaf.axes) for leaf in self.leaves()}

    # These two take the values of all layers, stacked along a leading axis L.

    def start(self, leaves: Leaves, weight: Weight) -> Leaves:
        """Returns the values with which training starts, given the initial value of each array."""
        return self.complete(leaves, weight)

    def complete(self, leaves: Leaves, weight: Weight) -> Leaves:
        """Returns the values, after computing the arrays that PEFT's file lacks from the base model's weight."""
        return leaves

    # These four take the values of one layer.

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        """Returns the projection's output with the adapter, including the bias.

        What the backward pass needs of a product with the frozen weight is marked with `kept`.

        Args:
          leaves: the values; no gradient reaches the FROZEN ones.
          scale: the layer's scale; 0 if it has no adapter.
          key: the random key for dropout; None turns it off.
        """
        raise NotImplementedError

    def merge(self, weight: Float[Array, "o i"], leaves: Leaves, scale: Scale) -> Float[Array, "o i"]:
        """Returns the weight with the adapter merged into it, computed in float32, in the weight's dtype."""
        raise NotImplementedError

    def merge_bias(self, bias: Float[Array, " o"], leaves: Leaves, scale: Scale) -> Float[Array, " o"]:
        """Returns the bias with the adapter merged into it, in the bias's dtype."""
        return bias

    def pair(self, leaves: Leaves, rank: int | None = None) -> tuple[Values, Values]:
        """Returns A and B, cut to `rank`, such that a portable method adds scale * B A to the weight."""
        raise NotImplementedError

    # These convert to and from PEFT's files.

    def to_peft(self, leaves: Leaves, rank: int) -> Leaves:
        """Returns one layer's tensors as in PEFT's file, by the ends of their names."""
        files = (leaf for leaf in self.leaves() if leaf.tensor)
        return {leaf.tensor: self.in_file(leaf.cut(leaves[leaf.name], rank)) for leaf in files}

    def in_file(self, values: Values) -> Values:
        """Returns an array in the shape that it has in PEFT's file."""
        return values

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        """Returns the method's own fields of adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def read_fields(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields of the spec that an adapter_config.json sets."""
        raise NotImplementedError

    @classmethod
    def described(cls, config: dict[str, Any]) -> str:
        """Returns the start of a sentence about an adapter, such as "A LoRA (rank 8, alpha 16)"; "adapter" follows."""
        return f"A {cls.title}"
