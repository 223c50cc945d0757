"""LoRA: adds a product of two thin matrices to a weight, W + scale * B A (Hu et al. 2021, arXiv:2106.09685)."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.adapters.methods.method import FAST, Frozen, Leaf, Leaves, Method, Scale, Values, Weight, kept
from jlora.adapters.spec import EMBEDDINGS, AdapterSpec, tokens_by_table


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws uniformly from +-1/sqrt(in), like PEFT's kaiming_uniform(a=sqrt(5))."""
    bound = 1.0 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Lora(Method):
    """Low-rank adaptation.

    If ranks differ by layer, A's rows and B's columns beyond a layer's rank are zero. Their gradient is zero too, so
    they stay exactly zero.
    """

    chosen_by: ClassVar[tuple[str, str | bool]] = ("peft_type", "LORA")
    peft_type, title = "LORA", "LoRA"
    unused = ("feedforward_modules",)
    required = ("r", "lora_alpha")
    reads: ClassVar[tuple[str, ...]] = (
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "ensure_weight_tying", "trainable_token_indices"),
    )

    @classmethod
    def leaves(cls) -> tuple[Leaf, ...]:
        return (
            Leaf("lora_A", "ri", ".lora_A.weight", draw=uniform),
            Leaf("lora_B", "or", ".lora_B.weight", rate=FAST),
        )

    @staticmethod
    def divisor(rank: int) -> float:
        """Returns the divisor of alpha. It is multiplicative: divisor(2 * rank) = divisor(2) * divisor(rank)."""
        return float(rank)

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / self.divisor(rank)

    def start(self, leaves: Leaves, weight: Weight) -> Leaves:
        ranks = jnp.array(self.site(len(leaves["lora_A"])).ranks)
        within = jnp.arange(leaves["lora_A"].shape[1])[None] < ranks[:, None]
        return super().start({**leaves, "lora_A": jnp.where(within[..., None], leaves["lora_A"], 0.0)}, weight)

    def apply(
        self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale, key: PRNGKeyArray | None
    ) -> Float[Array, "B T o"]:
        y = self.product(x, frozen, leaves, scale)
        dropped = dropout(x, self.spec.dropout, key)
        return kept(y + delta(dropped, leaves["lora_A"], leaves["lora_B"], scale)) + frozen.bias

    def product(self, x: Float[Array, "B T i"], frozen: Frozen, leaves: Leaves, scale: Scale) -> Float[Array, "B T o"]:
        """Returns W x, where W is the weight to which B A is added."""
        return frozen.product(x)

    def pair(self, leaves: Leaves, rank: int | None = None) -> tuple[Values, Values]:
        return leaves["lora_A"][:rank], leaves["lora_B"][:, :rank]

    def merge(self, weight: Float[Array, "o i"], leaves: Leaves, scale: Scale) -> Float[Array, "o i"]:
        return merged_weight(weight, *self.pair(leaves), scale=scale)

    def to_peft(self, leaves: Leaves, rank: int) -> Leaves:
        a, b = self.pair(leaves, rank)
        return {**super().to_peft(leaves, rank), ".lora_A.weight": a, ".lora_B.weight": b}

    @classmethod
    def peft_fields(cls, spec: AdapterSpec, *, tied: bool) -> dict[str, Any]:
        saved, rows = bool(spec.modules_to_save), dict(spec.trainable_token_indices)
        if tied:
            rows.pop("lm_head", None)
        indices: Any = {table: list(ids) for table, ids in rows.items()}
        if indices.keys() == {"embed_tokens"}:
            indices = indices["embed_tokens"]
        return {
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "lora_dropout": spec.dropout,
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "modules_to_save": ["embed_tokens"] if saved and tied else list(spec.modules_to_save) or None,
            "ensure_weight_tying": saved and tied,
            "layers_to_transform": list(spec.layers_to_transform) or None,
            "rank_pattern": dict(spec.rank_pattern),
            "alpha_pattern": dict(spec.alpha_pattern),
            **({"trainable_token_indices": indices} if indices else {}),  # older versions of PEFT do not know it
        }

    @classmethod
    def read_fields(cls, config: dict[str, Any]) -> dict[str, Any]:
        only, saved = config.get("layers_to_transform"), config.get("modules_to_save") or []
        return {
            "rank": config["r"],
            "alpha": float(config["lora_alpha"]),
            "dropout": float(config.get("lora_dropout") or 0.0),
            "rank_pattern": tuple((config.get("rank_pattern") or {}).items()),
            "alpha_pattern": tuple((k, float(v)) for k, v in (config.get("alpha_pattern") or {}).items()),
            "layers_to_transform": (only,) if isinstance(only, int) else tuple(only or ()),
            "modules_to_save": tuple(t for t in EMBEDDINGS if any(t == name.split(".")[-1] for name in saved)),
            "trainable_token_indices": tokens_by_table(config.get("trainable_token_indices")),
        }

    @classmethod
    def described(cls, config: dict[str, Any]) -> str:
        return f"A LoRA (rank {config['r']}, alpha {config['lora_alpha']:g})"


def dropout(x: Float[Array, "*B i"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*B i"]:
    """Zeroes a share `rate` of x's entries and scales up the rest; returns x itself without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))


def delta(
    x: Float[Array, "B T i"], a: Float[Values, "r i"], b: Float[Values, "o r"], scale: Scale
) -> Float[Array, "B T o"]:
    """Returns scale * B A x in x's dtype. The scale is applied before A is rounded to that dtype."""
    return thin_product(thin_product(x, scale * a), b)


@jax.custom_vjp
def thin_product(x: Float[Array, "B T i"], weight: Float[Values, "o i"]) -> Float[Array, "B T o"]:
    """Returns W x in x's dtype. The gradient of W is in float32, also where devices add up their parts of it."""
    return jnp.einsum("BTi,oi->BTo", x, weight.astype(x.dtype))


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return thin_product(x, weight), (x, weight)


def _backward(residuals: tuple[Array, Array], gradient: Float[Array, "B T o"]) -> tuple[Array, Array]:
    x, weight = residuals
    of_weight = jnp.einsum("BTo,BTi->oi", gradient, x, preferred_element_type=jnp.float32)
    return jnp.einsum("BTo,oi->BTi", gradient, weight.astype(x.dtype)), of_weight.astype(weight.dtype)


thin_product.defvjp(_forward, _backward)


def merged_weight(
    weight: Float[Array, "o i"], a: Float[Values, "r i"], b: Float[Values, "o r"], *, scale: Scale
) -> Float[Array, "o i"]:
    """Returns W + scale * B A, computed in float32, in the weight's dtype."""
    product = jnp.einsum("or,ri->oi", b.astype(jnp.float32), a.astype(jnp.float32))
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)
