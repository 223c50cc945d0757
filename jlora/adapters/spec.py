"""The modules that an adapter changes, with its rank and alpha in each, by PEFT's rules for names and patterns."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jlora.common import patterns

LAYER = "model.layers.{i}."  # Hugging Face's prefix of a projection, such as "self_attn.q_proj"
EMBEDDINGS = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}  # token tables, and their full names
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ("all-linear",)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """An adapter in PEFT's terms. By default it is plain LoRA with one rank and one alpha.

    `methods.method_class` returns the method that computes it.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]  # module names, or their last parts
    peft_type: str = "LORA"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "true"
    rank_pattern: tuple[tuple[str, int], ...] = ()  # the first pattern that matches a module decides its rank
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] = ()  # () is all
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()  # of EMBEDDINGS
    trainable_token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()  # rows of EMBEDDINGS
    vocabulary: int = 0  # rows of the token tables, if the adapter added some; 0: as many as the base model has
    feedforward_modules: tuple[str, ...] = ()  # the targets whose input IA3 scales, not their output
    mixed: int = 0  # number of adapters side by side, of which each has `rank / mixed`; 0: one adapter
    swept: bool = False  # whether scale and dropout are arrays, for sweeps
    neftune_noise_alpha: float = 0.0  # noise on embeddings in training (Jain et al. 2023, arXiv:2310.05914)

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers, for dropout or noise."""
        return self.dropout > 0 or self.neftune_noise_alpha > 0

    def ranks(self, module: str, layers: int) -> tuple[int, ...]:
        """Returns the rank of a projection (such as "self_attn.q_proj") in each layer; 0 without an adapter."""
        names = [LAYER.format(i=i) + module for i in range(layers)]
        return tuple(
            _first(self.rank_pattern, name, self.rank) if self._targets(name, i) else 0 for i, name in enumerate(names)
        )

    def alphas(self, module: str, layers: int) -> tuple[float, ...]:
        """Returns the alpha of a projection in each layer."""
        return tuple(_first(self.alpha_pattern, LAYER.format(i=i) + module, self.alpha) for i in range(layers))

    def table_rank(self, table: str) -> int:
        """Returns LoRA's rank in a table of EMBEDDINGS; 0 without LoRA."""
        name = EMBEDDINGS[table]
        return _first(self.rank_pattern, name, self.rank) if self._targets(name, None) else 0

    def table_alpha(self, table: str) -> float:
        """Returns LoRA's alpha in a table of EMBEDDINGS."""
        return _first(self.alpha_pattern, EMBEDDINGS[table], self.alpha)

    def trained_tokens(self, table: str) -> tuple[int, ...]:
        """Returns the ids of the tokens whose rows are trained in a table of EMBEDDINGS."""
        return dict(self.trainable_token_indices).get(table, ())

    def _targets(self, name: str, layer: int | None) -> bool:
        """Returns whether `target_modules` contains a module; `layer` is None outside of the layers."""
        if name in self.target_modules:  # a full name overrides `layers_to_transform`
            return True
        chosen = not self.layers_to_transform or layer in self.layers_to_transform
        return chosen and any(name.endswith(f".{target}") for target in self.target_modules)

    def saves(self, table: str, *, tied: bool) -> bool:
        """Returns whether a table of EMBEDDINGS is trained in full; tied tables are one."""
        return bool(self.modules_to_save) if tied else table in self.modules_to_save

    def table_keys(self, table: str) -> list[str]:
        """Returns the settings that change a table of EMBEDDINGS."""
        uses = {
            "modules_to_save": table in self.modules_to_save,
            "trainable_token_indices": bool(self.trained_tokens(table)),
            "target_modules": self.table_rank(table) > 0,
        }
        return [key for key, used in uses.items() if used]

    def problems(self, modules: list[str], layers: int) -> list[str]:
        """Lists the settings that have no effect on a model with these projections and layers."""
        names = {
            LAYER.format(i=i) + module
            for module in modules
            for i, rank in enumerate(self.ranks(module, layers))
            if rank
        }
        names |= {name for table, name in EMBEDDINGS.items() if self.table_rank(table)}
        beyond = [i for i in self.layers_to_transform if i >= layers]
        unused = [
            f"{key} has {pattern!r}, which matches no trained module."
            for key, entries in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern, _ in entries
            if not any(_matches(pattern, name) for name in names)
        ]
        unused += [
            f"target_modules has {target!r}, which matches no module."
            for target in self.target_modules
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
        return [f"layers_to_transform has {i}: Expected layers from 0 to {layers - 1}." for i in beyond] or unused


def tokens_by_table(value: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Returns trainable_token_indices by table: from ids, which are the embedding's, or from lists of ids by table.

    Raises:
      TypeError, ValueError: it is neither.
    """
    entries = list(value.items() if isinstance(value, Mapping) else value or ())
    pairs = entries if any(isinstance(entry, list | tuple) for entry in entries) else [("embed_tokens", entries)]
    return tuple((str(table).split(".")[-1], tuple(int(str(token)) for token in ids)) for table, ids in pairs if ids)


def _matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern matches the full name, or the part after one of its dots, as in PEFT."""
    return patterns.matches(rf"(.*\.)?({pattern})", name)


def _first(entries: tuple[tuple[str, T], ...], name: str, default: T) -> T:
    return next((value for pattern, value in entries if _matches(pattern, name)), default)


# An adapter that changes no module: the base model alone.
NO_ADAPTER = AdapterSpec(rank=1, alpha=1.0, dropout=0.0, target_modules=())
