"""Pure functions that put several adapters of one base model side by side, or add them up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters import params, plain_lora
from jlora.adapters.methods.method import Leaves
from jlora.adapters.params import Adapter
from jlora.adapters.spec import AdapterSpec
from jlora.common.errors import UserError

Form = tuple[Adapter, AdapterSpec]
HostModules = dict[tuple[str, ...], dict[str, np.ndarray]]  # the arrays of modules by path, in NumPy


def check_summable(name: str, spec: AdapterSpec) -> None:
    """Raises a UserError if an adapter cannot be combined with others; the message says what to do instead."""
    for what in plain_lora.unsupported_as_lora(spec):
        raise UserError(
            f"Adapter {name} uses {what}, which is not a low-rank sum, so it cannot be mixed or switched with others. "
            "Use it alone, or merge it into the base model (python -m jlora.export --merged) and pass the result as "
            "--base."
        )


def side_by_side(adapters: Sequence[Form]) -> Form:
    """Puts adapters side by side, so that each row of a batch may weigh them on its own (`LoraMixture`)."""
    found, targets = _same_modules(adapters)
    places = len(found)
    rank = max(leaves["lora_A"].shape[1] for modules in found for leaves in modules.values())
    made: HostModules = {}
    for path, like in found[0].items():
        (layers, _, inputs), (_, outputs, _) = like["lora_A"].shape, like["lora_B"].shape
        shapes = {"lora_A": (layers, places * rank, inputs), "lora_B": (layers, outputs, places * rank)}
        made[path] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for place, modules in enumerate(found):
        _put(made, place, rank, modules)
    return _on_device(made), AdapterSpec(places * rank, float(places * rank), 0.0, targets, mixed=places)


def placed(beside: Form, place: int, adapter: Form) -> Adapter:
    """Returns adapters side by side with another one at a place.

    Args:
      beside: from `side_by_side`.

    Raises:
      UserError: the adapter has a higher rank than they have, or other modules.
    """
    together, spec = beside
    rank = spec.rank // spec.mixed
    made = {path: {name: np.array(leaf) for name, leaf in own.items()} for path, own in params.modules(together)}
    own = dict(params.modules(plain_lora.to_plain_lora(*adapter)[0]))
    size = max(leaves["lora_A"].shape[1] for leaves in own.values())
    if size > rank or not own.keys() <= made.keys():
        raise UserError(
            f"The adapter has rank {size} in {', '.join(path[-1] for path in own)}. Expected at most rank {rank}, in "
            f"{', '.join(path[-1] for path in made)}. Start the server with this adapter, or with a higher --max_rank."
        )
    _put(made, place, rank, own)
    return _on_device(made)


def _put(together: HostModules, place: int, rank: int, adapter: Mapping[tuple[str, ...], Leaves]) -> None:
    """Writes an adapter to its place among those side by side; zeros fill the rest of the place."""
    first = place * rank
    for path, leaves in together.items():
        leaves["lora_A"][:, first : first + rank] = leaves["lora_B"][:, :, first : first + rank] = 0.0
        if path in adapter:
            last = first + adapter[path]["lora_A"].shape[1]
            leaves["lora_A"][:, first:last] = adapter[path]["lora_A"]
            leaves["lora_B"][:, :, first:last] = adapter[path]["lora_B"]


def _on_device(modules: HostModules) -> Adapter:
    return jax.tree.map(jnp.asarray, params.build({path: {**leaves} for path, leaves in modules.items()}))


def combine(adapters: Sequence[Form], weights: Sequence[float]) -> Form:
    """Returns one adapter that equals the weighted sum of several, by concatenating A's rows and B's columns.

    Args:
      weights: one per adapter; a negative weight subtracts the adapter.
    """
    found, targets = _same_modules(adapters)
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


def _same_modules(adapters: Sequence[Form]) -> tuple[list[dict[tuple[str, ...], Leaves]], tuple[str, ...]]:
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


Mixture = tuple[float, ...]  # the weight of each loaded adapter; all 0: the base model alone


@dataclass(frozen=True)
class AdapterSet:
    """The loaded adapters: several side by side, or one in its own form.

    Args:
      places: name -> position among the adapters.
    """

    places: Mapping[str, int]
    adapter: Adapter
    spec: AdapterSpec

    @property
    def none(self) -> Mixture:
        """The mixture that leaves the base model as it is."""
        return (0.0,) * max(self.spec.mixed, 1)

    def select(self, words: Sequence[str]) -> Mixture:
        """Returns the mixture that `words` select: `NAME`, or a weighted sum such as `NAME=0.7 OTHER=-0.3`.

        Raises:
          UserError: a name is unknown, a weight is not a number, or an adapter cannot be part of a sum.
        """
        mixture = list(self.none)
        for name, weight in map(read_weight, words):
            if name not in self.places:
                available = ", ".join(self.places) or "none, because --adapter was not set"
                raise UserError(f"Unknown adapter {name!r}. Available adapters: {available}.")
            if weight != 1 or len(words) > 1:
                check_summable(name, self.spec)
            mixture[self.places[name]] += weight
        return tuple(mixture)
