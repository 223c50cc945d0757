"""Several adapters of one base, as pure functions: in one form, so that one program runs them all; and their sum."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jlora.adapters import portable, tree
from jlora.adapters.methods.method import Leaves
from jlora.adapters.spec import AdapterSpec
from jlora.adapters.tree import Adapter
from jlora.common.errors import UserError

Form = tuple[Adapter, AdapterSpec]


def check_mixable(name: str, spec: AdapterSpec) -> None:
    """Raises UserError where an adapter cannot stand beside others, with the way out."""
    for what in portable.beyond_portable(spec):
        raise UserError(
            f"adapter {name} has {what}, which is no low-rank sum, so that it cannot be mixed or switched with others. "
            "Use it alone, or merge it into the base (python -m jlora.export --merged) and use that as --base"
        )


def to_common_form(adapters: Sequence[Form]) -> tuple[list[Adapter], AdapterSpec]:
    """The same adapters in one form: scale 1, the largest rank, all modules that any of them has; zeros elsewhere.

    They are then arguments of one compiled program, and rows of one batch may have different ones.
    """
    found, targets = _side_by_side(adapters)
    rank = max(leaves["lora_A"].shape[1] for modules in found for leaves in modules.values())

    def padded(leaves: Leaves) -> Leaves:
        missing = rank - leaves["lora_A"].shape[1]
        return {
            "lora_A": jnp.pad(leaves["lora_A"], [(0, 0), (0, missing), (0, 0)]),
            "lora_B": jnp.pad(leaves["lora_B"], [(0, 0), (0, 0), (0, missing)]),
        }

    made = [tree.build({path: padded(leaves) for path, leaves in modules.items()}) for modules in found]
    return made, AdapterSpec(rank, float(rank), 0.0, targets)


def combine(adapters: Sequence[Form], weights: Sequence[float]) -> Form:
    """One adapter whose change of the base is the weighted sum of theirs: A's rows and B's columns, end to end.

    Args:
      weights: one an adapter; a negative one takes that adapter away.
    """
    found, targets = _side_by_side(adapters)
    made: dict[tuple[str, ...], Leaves] = {}
    for path in found[0]:
        parts = [modules[path] for modules in found]
        made[path] = {
            "lora_A": jnp.concatenate([part["lora_A"] for part in parts], axis=1),
            "lora_B": jnp.concatenate([w * part["lora_B"] for w, part in zip(weights, parts, strict=True)], axis=2),
        }
    rank = next(iter(made.values()))["lora_A"].shape[1]
    return tree.build(made), AdapterSpec(rank, float(rank), 0.0, targets)


def read_weight(word: str) -> tuple[str, float]:
    """`NAME=WEIGHT` in its parts; NAME alone is a weight of 1.

    Raises:
      UserError: the weight is no number.
    """
    name, equals, number = word.rpartition("=")
    if not equals:
        return word, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{word}: expected NAME, or NAME=WEIGHT with a number, as {name or 'law'}=0.7")
    return name, weight


def _side_by_side(adapters: Sequence[Form]) -> tuple[list[dict[tuple[str, ...], Leaves]], tuple[str, ...]]:
    """The portable form of each, by module, with zeros for the modules that only others have; and all targets."""
    found = [dict(tree.modules(portable.to_portable(adapter, spec)[0])) for adapter, spec in adapters]
    every = {path: leaves for modules in found for path, leaves in modules.items()}
    for modules in found:
        rank = next(iter(modules.values()))["lora_A"].shape[1]
        for path, like in every.items():
            (layers, _, inputs), (_, outputs, _) = like["lora_A"].shape, like["lora_B"].shape
            nothing: Leaves = {
                "lora_A": jnp.zeros((layers, rank, inputs)),
                "lora_B": jnp.zeros((layers, outputs, rank)),
            }
            modules.setdefault(path, nothing)
    return found, tuple(path[-1] for path in every)


@dataclass(frozen=True)
class AdapterSet:
    """The adapters at hand, all of one form."""

    by_name: Mapping[str, Adapter]
    spec: AdapterSpec

    def select(self, words: Sequence[str]) -> Adapter:
        """The adapter that words name: `NAME`, or a sum as `NAME=0.7 OTHER=-0.3`.

        A sum of n adapters has n times their rank, which is another program to compile, once for each n.

        Raises:
          UserError: a name or a weight is none, or the adapter cannot be weighted.
        """
        weights = [read_weight(word) for word in words]
        for name, _ in weights:
            if name not in self.by_name:
                there = ", ".join(self.by_name) or "none, as no --adapter was given"
                raise UserError(f"there is no adapter {name!r}; there are: {there}")
        if len(weights) == 1 and weights[0][1] == 1:
            return self.by_name[weights[0][0]]
        for name, _ in weights:
            check_mixable(name, self.spec)
        forms = [(self.by_name[name], self.spec) for name, _ in weights]
        return combine(forms, [weight for _, weight in weights])[0]
