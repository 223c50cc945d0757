"""DoRA: trains magnitude and direction of each output's weights separately (Liu et al. 2024, arXiv:2402.09353)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.adapters.methods.lora import Lora, delta, dropout, merged_weight
from jlora.adapters.methods.method import FAST, Frozen, Leaf, Leaves, Scale, Values, Weight, kept
from jlora.adapters.spec import AdapterSpec


def initial_magnitude(values: Values, weight: Weight) -> Float[Array, "L o"]:
    """Returns the norm of each output's weights."""
    return jax.lax.map(lambda w: jnp.linalg.norm(w.astype(jnp.float32), axis=-1), weight)


class Dora(Lora):
    """LoRA that trains the direction, plus a magnitude: magnitude * (W + scale * B A) / ||W + scale * B A||."""

    chosen_by, title, portable = ("use_dora", True), "DoRA (use_dora)", False

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        name = "lora_magnitude_vector"
        return (*super().leaves(), Leaf(name, "o", f".{name}", rate=FAST, neutral=initial_magnitude))

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        y = kept(self.product(x, frozen, leaves, scale))
        dropped = dropout(x, self.spec.dropout, key)
        change = kept(delta(dropped, leaves["lora_A"], leaves["lora_B"], scale))
        factor = self.magnitude_over_norm(frozen.weight, leaves, scale)[None, None]
        direction = y if dropped is x else kept(self.product(dropped, frozen, leaves, scale))
        return y + ((factor - 1.0) * direction + factor * change).astype(x.dtype) + frozen.bias

    def magnitude_over_norm(self, weight: Weight, leaves: Leaves, scale: Scale) -> Float[Array, " o"]:
        """Returns magnitude / ||W + scale * B A|| by output, float32. No gradient flows through the norm (section 4.3).

        The factor is 1 in a layer without an adapter, whose scale is 0.
        """
        norm = jnp.linalg.norm(merged_weight(weight.astype(jnp.float32), *self.pair(leaves), scale=scale), axis=1)
        return jnp.where(scale == 0, 1.0, leaves["lora_magnitude_vector"] / jax.lax.stop_gradient(norm))

    def merge(self, weight: Float[Array, "o i"], leaves: Leaves, scale: Scale) -> Float[Array, "o i"]:
        factor = self.magnitude_over_norm(weight, leaves, scale)[:, None]
        return (super().merge(weight.astype(jnp.float32), leaves, scale) * factor).astype(weight.dtype)

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        return {**super().peft_fields(spec, tied=tied), "use_dora": True}
