"""Adapters of the token tables: the embedding and the output head.

A table has at most one of them: a trained copy (`modules_to_save`), trained rows (`trainable_token_indices`), or LoRA
(the table is one of the `target_modules`). If the head is tied to the embedding, it shares the embedding's trained copy
or rows, but not its LoRA, as in PEFT.

Axes of an array: V vocabulary, D model, n trained rows, r rank; E is D, or D + r for a head with LoRA.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters.methods.lora import dropout, merged_weight, uniform
from jlora.adapters.methods.method import FAST, Leaf, Leaves, Scale, Values, Weight
from jlora.adapters.spec import AdapterSpec


@dataclasses.dataclass(frozen=True)
class TableMethod:
    """The adapter of one table. This base class has no arrays and changes nothing."""

    spec: AdapterSpec
    table: str  # "embed_tokens" or "lm_head"
    scale: Scale = 1.0  # of LoRA

    shared: ClassVar[bool] = False  # whether a tied head uses the embedding's adapter

    def leaves(self) -> tuple[Leaf, ...]:
        """Returns the arrays that it adds to the table."""
        return ()

    def shapes(self, vocabulary: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array."""
        rows, rank = len(self.spec.trained_tokens(self.table)), self.spec.table_rank(self.table)
        sizes = {"V": vocabulary, "D": hidden, "n": rows, "r": rank}
        return {leaf.name: tuple(sizes[axis] for axis in leaf.axes) for leaf in self.leaves()}

    def embed(self, tokens: Int[Array, "B T"], weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "B T D"]:
        """Returns the embeddings of the tokens."""
        return weight[tokens]

    def head(
        self, hidden: Float[Array, "*N D"], weight: Float[Array, "V D"], leaves: Leaves, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "*N E"], Float[Array, "V E"]]:
        """Returns hidden states and a table whose products are the logits.

        Args:
          key: the random key for dropout; None turns it off.
        """
        return hidden, self.merge(weight, leaves)

    def merge(self, weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "V D"]:
        """Returns the table with the adapter merged into it."""
        return weight


class TrainedCopy(TableMethod):
    """Trains the whole table."""

    shared = True

    def leaves(self) -> tuple[Leaf, ...]:
        return (Leaf("modules_to_save", "VD", ".weight", neutral=copied),)

    def embed(self, tokens: Int[Array, "B T"], weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "B T D"]:
        return leaves["modules_to_save"][tokens]

    def merge(self, weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "V D"]:
        return jnp.asarray(leaves["modules_to_save"])


class TrainedRows(TableMethod):
    """Trains the rows of some tokens."""

    shared = True

    def leaves(self) -> tuple[Leaf, ...]:
        rows = partial(copied, rows=self.spec.trained_tokens(self.table))
        return (Leaf("trained_rows", "nD", ".token_adapter.trainable_tokens_delta", neutral=rows),)

    def embed(self, tokens: Int[Array, "B T"], weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "B T D"]:
        order = np.argsort(self.spec.trained_tokens(self.table))
        trained, rows = jnp.array(self.spec.trained_tokens(self.table))[order], leaves["trained_rows"][order]
        place = jnp.minimum(jnp.searchsorted(trained, tokens), len(order) - 1)
        return jnp.where((trained[place] == tokens)[..., None], rows[place], weight[tokens])

    def merge(self, weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "V D"]:
        trained = np.array(self.spec.trained_tokens(self.table))
        return weight.at[trained].set(leaves["trained_rows"].astype(weight.dtype))


class EmbeddingLora(TableMethod):
    """Adds scale * B A to the embedding, where A is [r, V] and B is [D, r]; LoRA's dropout does not act on it."""

    def leaves(self) -> tuple[Leaf, ...]:
        return (
            Leaf("lora_embedding_A", "rV", ".lora_embedding_A"),
            Leaf("lora_embedding_B", "Dr", ".lora_embedding_B", draw=normal),
        )

    def embed(self, tokens: Int[Array, "B T"], weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "B T D"]:
        low = leaves["lora_embedding_A"].T[tokens]
        return weight[tokens] + self.scale * jnp.einsum("BTr,Dr->BTD", low, leaves["lora_embedding_B"])

    def merge(self, weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "V D"]:
        a, b = leaves["lora_embedding_B"].T, leaves["lora_embedding_A"].T
        return merged_weight(weight, a, b, scale=self.scale)


class HeadLora(TableMethod):
    """Adds scale * B A to the head, where A is [r, D] and B is [V, r]."""

    def leaves(self) -> tuple[Leaf, ...]:
        return (
            Leaf("lora_A", "rD", ".lora_A.weight", draw=uniform),
            Leaf("lora_B", "Vr", ".lora_B.weight", rate=FAST),
        )

    def head(
        self, hidden: Float[Array, "*N D"], weight: Float[Array, "V D"], leaves: Leaves, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "*N E"], Float[Array, "V E"]]:
        """Lays A's outputs beside the hidden states, and B beside the weight, so that no product [V, D] is made."""
        dropped, dtype = dropout(hidden, self.spec.dropout, key), hidden.dtype
        low = jnp.einsum("...D,rD->...r", dropped, (self.scale * leaves["lora_A"]).astype(dtype))
        table = jnp.concatenate([weight.astype(dtype), leaves["lora_B"].astype(dtype)], axis=-1)
        return jnp.concatenate([hidden, low], axis=-1), table

    def merge(self, weight: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "V D"]:
        return merged_weight(weight, leaves["lora_A"], leaves["lora_B"], scale=self.scale)


def copied(values: Values, weight: Weight, rows: tuple[int, ...] | None = None) -> Array:
    """Returns a copy of the base model's table, or of some of its rows: the neutral value of what replaces them."""
    table = jnp.asarray(weight)
    return jnp.array(table if rows is None else table[np.array(rows)], values.dtype, copy=True)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws from the standard normal distribution, as PEFT draws the B of an embedding."""
    return jax.random.normal(key, shape, dtype)
