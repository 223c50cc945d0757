"""PiSSA: trains the principal components of a weight and freezes the rest (Meng et al. 2024, arXiv:2404.02948).

The base model stays unchanged: A and B start equal to a frozen pair A0 and B0, whose product is subtracted from W x.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.adapters.methods.lora import Lora, delta
from jlora.adapters.methods.method import FROZEN, Frozen, Leaf, Leaves, Scale, Values, Weight
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import UserError


class Pissa(Lora):
    """LoRA whose A and B start at the principal singular components. PEFT reads it as plain LoRA of twice the rank."""

    chosen_by, title = ("init_lora_weights", "pissa"), "PiSSA"

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        return (*super().leaves(), Leaf("pissa_A", "ri", rate=FROZEN), Leaf("pissa_B", "or", rate=FROZEN))

    def start(self, leaves: Leaves, weight: Weight) -> Leaves:
        started = super().start(leaves, weight)
        return {**started, "lora_A": jnp.copy(started["pissa_A"]), "lora_B": jnp.copy(started["pissa_B"])}

    def complete(self, leaves: Leaves, weight: Weight) -> Leaves:
        """Computes the frozen pair from the base model: the `rank` largest singular components of each layer."""
        layers, size, _ = leaves["pissa_A"].shape
        site = self.site(layers)
        if size > (most := min(weight.shape[1:])):
            name = self.module.split(".")[-1]
            raise UserError(
                f"init_lora_weights=pissa: Found rank {size} for {name}, which has {most} singular components. Set a "
                f"rank of at most {most}."
            )
        a, b = principal(weight, jnp.array(site.ranks), jnp.array(site.scales, jnp.float32), size)
        return {**super().complete(leaves, weight), "pissa_A": a, "pissa_B": b}

    def product(self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale) -> Float[Array, "B T o"]:
        return super().product(x, frozen, leaves, scale) - delta(x, leaves["pissa_A"], leaves["pissa_B"], scale)

    def pair(self, leaves: Leaves, rank: int | None = None) -> tuple[Values, Values]:
        """Returns [A; A0] and [B, -B0], which have twice the rank."""
        a, b = super().pair(leaves, rank)
        frozen_a, frozen_b = leaves["pissa_A"][:rank], leaves["pissa_B"][:, :rank]
        return jnp.concatenate([a, frozen_a]), jnp.concatenate([b, -frozen_b], axis=1)

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        """Returns the fields for twice the rank, with an alpha that keeps the scale."""
        fields, stronger = super().peft_fields(spec, tied=tied), cls.divisor(2)
        return {
            **fields,
            "r": spec.rank * 2,
            "lora_alpha": spec.alpha * stronger,
            "rank_pattern": {pattern: rank * 2 for pattern, rank in spec.rank_pattern},
            "alpha_pattern": {pattern: alpha * stronger for pattern, alpha in spec.alpha_pattern},
        }


@jax.jit(static_argnames="size")
def principal(
    weight: Any, ranks: Int[Array, " L"], scales: Float[Array, " L"], size: int
) -> tuple[Float[Array, "L r i"], Float[Array, "L o r"]]:
    """Returns A and B of each layer, such that scale * B A is the sum of its `ranks` largest singular components; zeros
    fill them up to `size`."""

    def one(leaves: tuple[Any, Array, Array]) -> tuple[Array, Array]:
        weight, rank, scale = leaves
        u, s, v = jnp.linalg.svd(weight.astype(jnp.float32), full_matrices=False)
        root = jnp.where(jnp.arange(size) < rank, jnp.sqrt(s[:size] / jnp.where(scale > 0, scale, 1.0)), 0.0)
        return root[:, None] * v[:size], u[:, :size] * root[None]

    return jax.lax.map(one, (weight, ranks, scales))
