"""A trained bias beside LoRA's B, as PEFT's lora_bias: W x + scale * (B A x + b)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.adapters.methods.lora import Lora
from jlora.adapters.methods.method import FAST, Frozen, Leaf, Leaves, Scale
from jlora.adapters.spec import AdapterSpec


class LoraBias(Lora):
    """LoRA that also trains a bias for each output."""

    chosen_by, title, portable, adds_bias = ("lora_bias", True), "lora_bias", False, True

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        return (*super().leaves(), Leaf("lora_bias", "o", ".lora_B.bias", rate=FAST))

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        added = (scale * leaves["lora_bias"]).astype(x.dtype)
        return super().apply(x, frozen, leaves, scale, key) + added[None, None]

    def merge_bias(self, bias: Float[Array, " o"], leaves: Leaves, scale: Scale) -> Float[Array, " o"]:
        merged = super().merge_bias(bias, leaves, scale).astype(jnp.float32) + scale * leaves["lora_bias"]
        return merged.astype(bias.dtype)

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        return {**super().peft_fields(spec, tied=tied), "lora_bias": True}
