"""LoRA with a scale and a dropout rate in arrays, so that adapters with other settings share one compiled program."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.adapters.methods.lora import Lora, delta
from jlora.adapters.methods.method import FROZEN, Frozen, Leaf, Leaves, Scale, kept

SETTINGS = "lora_settings"  # scale, probability that dropout keeps an entry, and 1 / probability


class SweptLora(Lora):
    """Plain LoRA in a padded form: ranks below the spec's have zeros in A's last rows and B's last columns.

    These stay exactly zero in training. A module with scale 0 has no adapter.
    """

    title: ClassVar[str] = "LoRA of a sweep"

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        return (*super().leaves(), Leaf(SETTINGS, "n", rate=FROZEN))

    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (rank, inputs), "lora_B": (outputs, rank), SETTINGS: (3,)}

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        own_scale, keeps, factor = leaves[SETTINGS]
        dropped = x
        if key is not None:
            entries = jax.random.bernoulli(key, keeps, x.shape)
            dropped = jnp.where(entries, x * factor.astype(x.dtype), jnp.zeros((), x.dtype))
        change = delta(dropped, leaves["lora_A"], leaves["lora_B"], own_scale)
        return kept(frozen.product(x) + change) + frozen.bias
