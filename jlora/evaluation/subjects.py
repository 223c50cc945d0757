"""The models that are compared: the base model, and each adapter on it."""

from collections.abc import Mapping
from typing import NamedTuple

from jlora.adapters.combining import AdapterSet, Mixture
from jlora.common.errors import UserError
from jlora.serve.generator import Generator

BASE = "base"  # the base model's name among them


class Subjects(NamedTuple):
    """A generator, and the mixture of each model that is evaluated: first the base model's, then each adapter's."""

    generator: Generator
    mixtures: Mapping[str, Mixture]


def subjects_of(generator: Generator) -> Subjects:
    """Returns the base model and each adapter of a generator.

    Raises:
      UserError: an adapter has the base model's name.
    """
    adapters: AdapterSet = generator.adapters
    if BASE in adapters.places:
        raise UserError(f"--adapter {BASE}=...: {BASE!r} names the base model. Choose another name.")
    own = {name: adapters.select([name]) for name in adapters.places}
    return Subjects(generator, {BASE: adapters.none, **own})
