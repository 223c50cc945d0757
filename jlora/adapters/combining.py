"""Pure functions that convert several adapters of one base model to a common form, or add them up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jlora.adapters import params, plain_lora
from jlora.adapters.methods.method import Leaves
from jlora.adapters.params import Adapter
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import UserError

Form = tuple[Adapter, AdapterSpec]


def check_summable(name: str, spec: AdapterSpec) -> None:
    """Raises a UserError if an adapter cannot be combined with others; the message says what to do instead."""
    for what in plain_lora.unsupported_as_lora(spec):
        raise UserError(
            f"Adapter {name} uses {what}, which is not a low-rank sum, so it cannot be mixed or switched with others. "
            "Use it alone, or merge it into the base model (python -m jlora.export --merged) and pass the result as "
            "--base."
        )


def to_common_form(adapters: Sequence[Form]) -> tuple[list[Adapter], AdapterSpec]:
    """Converts adapters to one form: scale 1, the largest rank, and the modules of all of them; zeros fill the rest.

    One compiled program can then run all of them, and each row of a batch may use a different one.
    """
    found, targets = _side_by_side(adapters)
    rank = max(leaves["lora_A"].shape[1] for modules in found for leaves in modules.values())

    def padded(leaves: Leaves) -> Leaves:
        missing = rank - leaves["lora_A"].shape[1]
        return {
            "lora_A": jnp.pad(leaves["lora_A"], [(0, 0), (0, missing), (0, 0)]),
            "lora_B": jnp.pad(leaves["lora_B"], [(0, 0), (0, 0), (0, missing)]),
        }

    made = [params.build({path: padded(leaves) for path, leaves in modules.items()}) for modules in found]
    return made, AdapterSpec(rank, float(rank), 0.0, targets)


def combine(adapters: Sequence[Form], weights: Sequence[float]) -> Form:
    """Returns one adapter that equals the weighted sum of several, by concatenating A's rows and B's columns.

    Args:
      weights: one per adapter; a negative weight subtracts the adapter.
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
    return params.build(made), AdapterSpec(rank, float(rank), 0.0, targets)


def read_weight(word: str) -> tuple[str, float]:
    """Splits `NAME=WEIGHT`; the weight is 1 if it is left out.

    Raises:
      UserError: the weight is not a finite number.
    """
    name, equals, number = word.rpartition("=")
    if not equals:
        return word, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{word}: Expected NAME, or NAME=WEIGHT with a number, such as {name or 'law'}=0.7.")
    return name, weight


def _side_by_side(adapters: Sequence[Form]) -> tuple[list[dict[tuple[str, ...], Leaves]], tuple[str, ...]]:
    """Returns each portable form by module, with zeros for modules that only others adapt; and all target modules."""
    found = [dict(params.modules(plain_lora.to_plain_lora(adapter, spec)[0])) for adapter, spec in adapters]
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
    """The loaded adapters, all in one form."""

    by_name: Mapping[str, Adapter]
    spec: AdapterSpec

    def select(self, words: Sequence[str]) -> Adapter:
        """Returns the adapter that `words` select: `NAME`, or a weighted sum such as `NAME=0.7 OTHER=-0.3`.

        A sum of n adapters has n times their rank, so each n compiles another program.

        Raises:
          UserError: a name is unknown, a weight is not a number, or an adapter cannot be part of a sum.
        """
        weights = [read_weight(word) for word in words]
        for name, _ in weights:
            if name not in self.by_name:
                available = ", ".join(self.by_name) or "none, because --adapter was not set"
                raise UserError(f"Unknown adapter {name!r}. Available adapters: {available}.")
        if len(weights) == 1 and weights[0][1] == 1:
            return self.by_name[weights[0][0]]
        for name, _ in weights:
            check_summable(name, self.spec)
        forms = [(self.by_name[name], self.spec) for name, _ in weights]
        return combine(forms, [weight for _, weight in weights])[0]
