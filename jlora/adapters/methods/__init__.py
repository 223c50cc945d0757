"""The registry of adapter methods, and functions that find the method of an adapter."""

import functools
from typing import cast

from jlora.adapters.methods.dora import Dora
from jlora.adapters.methods.ia3 import Ia3
from jlora.adapters.methods.lora import Lora
from jlora.adapters.methods.lora_bias import LoraBias
from jlora.adapters.methods.method import Method
from jlora.adapters.methods.mixture import LoraMixture
from jlora.adapters.methods.pissa import Pissa
from jlora.adapters.methods.rslora import RsLora
from jlora.adapters.methods.swept import SweptLora
from jlora.adapters.methods.tables import EmbeddingLora, HeadLora, TableMethod, TrainedCopy, TrainedRows
from jlora.adapters.spec import NO_ADAPTER, AdapterSpec

# Each method may build on those before it.
METHODS: tuple[type[Method], ...] = (Lora, RsLora, Pissa, Dora, LoraBias, Ia3)
TABLE_METHODS: tuple[type[TableMethod], ...] = (TrainedCopy, TrainedRows, EmbeddingLora, HeadLora)

SWEPT_LEAVES = {leaf.name: leaf for leaf in SweptLora.leaves()}
TABLE_LEAVES = {leaf.name: leaf for method in TABLE_METHODS for leaf in method(NO_ADAPTER, "").leaves()}
LEAVES = {**TABLE_LEAVES, **{leaf.name: leaf for m in METHODS for leaf in m.leaves()}, **SWEPT_LEAVES}
AXES = {name: leaf.axes for name, leaf in LEAVES.items()}


def component_methods(spec: AdapterSpec) -> tuple[type[Method], ...]:
    """Returns the methods that a spec combines, in the registry's order."""
    mine = (method for method in METHODS if method.peft_type == spec.peft_type)
    return tuple(method for method in mine if getattr(spec, method.chosen_by[0]) == method.chosen_by[1])


def method_class(spec: AdapterSpec) -> type[Method]:
    """Returns the method of a spec: its only one, or a class that inherits from all of them, the last one first."""
    if spec.mixed or spec.swept:
        return LoraMixture if spec.mixed else SweptLora
    return _combined(component_methods(spec))


@functools.cache
def _combined(parts: tuple[type[Method], ...]) -> type[Method]:
    names = "".join(part.__name__ for part in reversed(parts))
    return parts[0] if len(parts) == 1 else cast(type[Method], type(names, tuple(reversed(parts)), {}))


def make_method(spec: AdapterSpec, module: str) -> Method:
    """Returns the method at one projection, such as "self_attn.q_proj"."""
    return method_class(spec)(spec, module)


def table_method(spec: AdapterSpec, table: str, *, tied: bool) -> TableMethod:
    """Returns the adapter of a token table, "embed_tokens" or "lm_head"; one that changes nothing if it has none.

    Args:
      tied: whether the base model's head is its embedding table.
    """
    head_of_its_own = not tied or table == "embed_tokens"
    if head_of_its_own and spec.saves(table, tied=tied):
        return TrainedCopy(spec, table)
    if head_of_its_own and spec.trained_tokens(table):
        return TrainedRows(spec, table)
    if rank := spec.table_rank(table):
        lora = EmbeddingLora if table == "embed_tokens" else HeadLora
        return lora(spec, table, make_method(spec, table).scale(rank, spec.table_alpha(table)))
    return TableMethod(spec, table)


def training_labels(spec: AdapterSpec) -> dict[str, str]:
    """Returns how each array of an adapter trains, by name: TRAINS, FAST or FROZEN."""
    return {leaf.name: leaf.rate for leaf in (*TABLE_LEAVES.values(), *method_class(spec).leaves())}


def needs_base_weights(spec: AdapterSpec) -> bool:
    """Returns whether PEFT's file lacks arrays that `Method.complete` must compute from the base model's weights."""
    return not all(leaf.tensor for leaf in method_class(spec).leaves())


def base_method(peft_type: str) -> type[Method]:
    """Returns the method that a `peft_type` selects on its own."""
    return next(method for method in METHODS if method.chosen_by == ("peft_type", peft_type))


def choices(key: str) -> tuple[str, ...]:
    """Returns the values of a config key that select a method."""
    return tuple(str(value) for name, value in (method.chosen_by for method in METHODS) if name == key)
