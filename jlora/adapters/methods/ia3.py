"""IA3: trains one factor for each output of a projection, or for each input (Liu et al. 2022, arXiv:2205.05638)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.adapters.methods.method import Frozen, Leaf, Leaves, Method, Scale, Values, Weight, kept
from jlora.adapters.spec import AdapterSpec


def ones_like(values: Values, weight: Weight) -> Array:
    """Returns factors of 1, which change nothing."""
    return jnp.ones_like(values)


class Ia3(Method):
    """Scales the output of a projection, including the bias; in `feedforward_modules`, scales the input instead."""

    chosen_by = ("peft_type", "IA3")
    peft_type, title, portable = "IA3", "IA3", False
    unused = (
        *("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern"),
        *("alpha_pattern", "layers_to_transform", "modules_to_save", "trainable_token_indices", "lora_bias"),
        "loraplus_lr_ratio",
    )
    reads = ("feedforward_modules",)

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        return (Leaf("ia3_l", "c", ".ia3_l", neutral=ones_like),)

    @property
    def scales_input(self) -> bool:
        """Whether the factors scale the input."""
        return self.module.split(".")[-1] in self.spec.feedforward_modules

    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"ia3_l": (inputs if self.scales_input else outputs,)}

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        factor = jnp.where(scale == 0, 1.0, leaves["ia3_l"]).astype(x.dtype)[None, None]
        if self.scales_input:
            return kept(frozen.product(x * factor)) + frozen.bias
        return (kept(frozen.product(x)) + frozen.bias) * factor

    def merge(self, weight: Float[Array, "o i"], leaves: Leaves, scale: Scale) -> Float[Array, "o i"]:
        return (weight.astype(jnp.float32) * self.in_file(leaves["ia3_l"])).astype(weight.dtype)

    def merge_bias(self, bias: Float[Array, " o"], leaves: Leaves, scale: Scale) -> Float[Array, " o"]:
        return bias if self.scales_input else (bias.astype(jnp.float32) * leaves["ia3_l"]).astype(bias.dtype)

    def in_file(self, values: Values) -> Values:
        """Returns a row [1, in] if the factors scale the input, otherwise a column [out, 1]."""
        return values[None] if self.scales_input else values[:, None]

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        scaled = [name for name in spec.target_modules if name.split(".")[-1] in spec.feedforward_modules]
        return {"feedforward_modules": scaled}  # PEFT expects the names of target_modules

    @classmethod
    def read_fields(cls, config: dict[str, Any]) -> dict[str, Any]:
        names = config.get("feedforward_modules") or ()
        return {"feedforward_modules": tuple(dict.fromkeys(name.split(".")[-1] for name in names))}

    @classmethod
    def described(cls, config: dict[str, Any]) -> str:
        return "An IA3"
