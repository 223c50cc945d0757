"""Several LoRA adapters side by side: every row of a batch weighs them on its own."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.adapters.methods.lora import Lora, thin_product
from jlora.adapters.methods.method import FROZEN, Frozen, Leaf, Leaves, Scale

MIXTURE = "mixture"


class LoraMixture(Lora):
    """The sum of n adapters with the weights of each row; a row of zeros is the base model.

    A's rows and B's columns are those of all adapters, one after the other, with their scales folded into B. All rows
    of the batch take the same two products, and the n weights of a row, an array [B, n], choose between them.
    """

    title: ClassVar[str] = "mixture of LoRA adapters"

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        return (*super().leaves(), Leaf(MIXTURE, "Bn", rate=FROZEN))

    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (rank, inputs), "lora_B": (outputs, rank), MIXTURE: (1, self.spec.mixed)}

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        ranks = leaves["lora_A"].shape[0] // self.spec.mixed
        weights = jnp.repeat(jnp.asarray(leaves[MIXTURE]), ranks, axis=1)[:, None].astype(x.dtype)
        inner = jnp.einsum("BTr,BUr->BTr", thin_product(x, leaves["lora_A"]), weights)
        return frozen.product(x) + thin_product(inner, leaves["lora_B"]) + frozen.bias
