"""A base with adapters, read and ready to answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jlora.adapters import mixing, tree
from jlora.adapters.mixing import Voices
from jlora.adapters.peft_config import base_of, read_spec
from jlora.adapters.peft_io import TEMPLATE, read_adapter
from jlora.adapters.portable import beyond_portable
from jlora.adapters.provenance import WEIGHTS
from jlora.adapters.spec import NOTHING
from jlora.bases.identity import check_base
from jlora.bases.resolve import resolve_base
from jlora.common.errors import UserError
from jlora.data.chat import load_tokenizer
from jlora.data.conversation import Message
from jlora.data.templates import find_template
from jlora.distributed.sharding import make_mesh
from jlora.models import hf_loader
from jlora.models.compute import FLOAT32, Compute, default_dtype
from jlora.models.families import read_config
from jlora.serve.generator import Generator


class Model(NamedTuple):
    """A base with adapters, ready to answer."""

    generator: Generator
    voices: Voices

    def answer(self, question: str, adapter: str = "", system: str = "", **options: Any) -> str:
        """The answer to one question.

        Args:
          adapter: a name, or a weighted sum as "law=0.7 brief=0.3"; "" is the base alone.
          system: the system message before it; "" is none.
          options: `max_new_tokens` (256), `temperature` (0 is greedy), `top_p` and `seed`, as for `Generator.rows`.

        Raises:
          UserError: there is no adapter of that name.
        """
        first = next(iter(self.voices.adapters.values()), {})
        weights = self.voices.mixed(adapter.split()) if adapter else self.generator.neutral(first)
        messages = (*([Message("system", system)] if system else []), Message("user", question))
        return self.generator.answers([weights], [messages], **{"max_new_tokens": 256, **options})[0]


def load_model(
    base: str = "", adapters: Mapping[str, Path | str] | None = None, revision: str = "", quantize: str = "none"
) -> Model:
    """A base, and the adapters of PEFT directories by name.

    They are brought to one form, so that to switch is to pass another argument; one that has no such form (DoRA, IA3,
    trained tables) must be alone.

    Args:
      base: a `base_model`; "" is what the first adapter names.
      quantize: "nf4" or "int8" hold the base in 4 or 8 bits.

    Raises:
      UserError: one is of another base, or cannot stand beside others; or they speak different chat templates.
    """
    directories = {name: Path(place) for name, place in (adapters or {}).items()}
    if not base:
        if not directories:
            raise UserError("load_model: expected a base, adapters, or both; got neither")
        base, named_revision = base_of(next(iter(directories.values())))
        revision = revision or named_revision
    directory = resolve_base(base, revision)
    config, dtype = read_config(directory), default_dtype(jax.devices()[0])
    compute = Compute(dtype, dtype, quantize=quantize)
    template, found = common_template(directories), read_all(directories, directory)
    _, _, base_shapes = hf_loader.abstract(config, NOTHING, compute)
    frozen = hf_loader.load_base(directory, base_shapes, make_mesh(jax.devices()[:1]))
    forms = [(tree.complete(spec, adapter, frozen), spec) for adapter, spec in found.values()]
    weights, spec = [adapter for adapter, _ in forms], forms[0][1] if forms else NOTHING
    if forms and not beyond_portable(spec):
        weights, spec = mixing.alike(forms)
    graphdef, _, _ = hf_loader.abstract(config, spec, compute)
    tokenizer = load_tokenizer(directory, template)
    generator = Generator(directory, tokenizer, graphdef, frozen, compute.compute_dtype)
    return Model(generator, Voices(dict(zip(found, weights, strict=True)), spec))


def read_all(directories: Mapping[str, Path], base: Path) -> dict[str, mixing.Form]:
    """The adapters of PEFT directories, by name, for the base of a model directory; PiSSA's frozen pairs are left zero.

    Raises:
      UserError: one is of another base, or one of several cannot stand beside others.
    """
    config, found = read_config(base), {}
    for name, place in directories.items():
        spec = read_spec(place, config.num_hidden_layers)
        if len(directories) > 1:
            mixing.check(name, spec)
        check_base(place / WEIGHTS, base)
        _, shapes, _ = hf_loader.abstract(config, spec, FLOAT32)
        found[name] = read_adapter(place, spec, shapes, tied=config.tie_word_embeddings), spec
    return found


def common_template(directories: Mapping[str, Path]) -> str:
    """The file with the chat template that the adapters were trained on; "" for the base's own.

    Raises:
      UserError: they were trained on different ones.
    """
    files = {name: str(place / TEMPLATE) for name, place in directories.items() if (place / TEMPLATE).is_file()}
    texts = {name: find_template(files[name]) if name in files else "" for name in directories}
    first, *others = [*texts] or [""]
    for other in others:
        if texts[other] != texts[first]:
            raise UserError(
                f"adapters {first} and {other} were trained on different chat templates ({TEMPLATE} in their "
                "directories): give them one by one, or train them on one template"
            )
    return next(iter(files.values()), "")
