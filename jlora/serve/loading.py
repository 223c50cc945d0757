"""Loads a base model with adapters."""

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.adapters import combining, params
from jlora.adapters.combining import AdapterSet
from jlora.adapters.methods import needs_base_weights
from jlora.adapters.peft_config import base_of, read_spec
from jlora.adapters.peft_io import TEMPLATE, read_adapter
from jlora.adapters.plain_lora import unsupported_as_lora
from jlora.adapters.provenance import CONFIG, WEIGHTS, metadata
from jlora.adapters.spec import NO_ADAPTER, TARGETS, AdapterSpec
from jlora.bases.hashes import check_base
from jlora.bases.resolve import resolve_base
from jlora.common.errors import UserError
from jlora.data.conversation import Message
from jlora.data.named_templates import find_template
from jlora.data.tokenizer import load_tokenizer
from jlora.distributed.platforms import find_devices
from jlora.distributed.sharding import make_mesh
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE, ComputeSettings, default_dtype
from jlora.models.families import read_config
from jlora.serve.generator import Generator
from jlora.steps.compilation import enable_compilation_cache


class Model(NamedTuple):
    """A base model with adapters, ready to answer."""

    generator: Generator
    adapters: AdapterSet

    def answer(self, question: str, adapter: str = "", system: str = "", **options: Any) -> str:
        """Returns the answer to one question.

        Args:
          question: the user's turn; it goes through the chat template.
          adapter: a name, or a weighted sum such as "law=0.7 brief=0.3"; "": the base model alone.
          system: the system turn before the question; "": none.
          options: `max_new_tokens` (256), `temperature` (0: greedy), `top_p` (1) and `seed` (0).

        Raises:
          UserError: no adapter has that name, or it cannot be part of a sum.
        """
        messages = (*([Message("system", system)] if system else []), Message("user", question))
        mixture = self.adapters.select(adapter.split())
        return self.generator.answers([mixture], [messages], **{"max_new_tokens": 256, **options})[0]


class Spare(NamedTuple):
    """Room for plain LoRA adapters that are added later, in all projections."""

    places: int
    rank: int


def load_model(
    base: str = "",
    adapters: Mapping[str, Path | str] | None = None,
    revision: str = "",
    quantize: str = "none",
    spare: Spare | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Model:
    """Loads a base model and adapters.

    Several adapters are put side by side, so that switching between them does not compile again, and neither does a
    weighted sum. Adapters that have no such form (DoRA, IA3, biases, a trained embedding or head) must be loaded alone.

    Args:
      base: a model directory, hub id, or `pypi:NAME==VERSION`; "": the base model that the first adapter names.
      adapters: name -> PEFT directory.
      revision: branch, tag or commit of a hub id; "": the hub's default branch.
      quantize: "nf4" or "int8" keeps the base model in 4 or 8 bits; "none": in the device's default dtype.
      spare: room for more adapters beside these.
      mesh: devices over which the base model is split, by axis ("fsdp", "tensor"); None: one device.

    Raises:
      UserError: an adapter belongs to another base model or must be loaded alone, or the adapters were trained with
        different chat templates.
    """
    directories = {name: Path(place) for name, place in (adapters or {}).items()}
    if not base:
        if not directories:
            raise UserError("load_model got neither a base model nor adapters. Pass base=..., adapters=..., or both.")
        base, named_revision = base_of(next(iter(directories.values())))
        revision = revision or named_revision
    directory = resolve_base(base, revision)
    devices = find_devices()
    dtype = default_dtype(devices[0])
    enable_compilation_cache()
    split = make_mesh(devices[: math.prod(mesh.values())], {"data": 1, **mesh}) if mesh else None
    compute = ComputeSettings(dtype, dtype, quantize=quantize, mesh=split)
    template, found = common_template(directories), read_all(directories, directory)
    rows = max((spec.vocabulary for _, spec in found.values()), default=0)
    with ThreadPoolExecutor(1) as beside:  # imports transformers while the weights are read
        tokenizer = beside.submit(load_tokenizer, directory, template, *template_settings(directories))
        frozen = hf_loader.load_base_alone(directory, compute, rows)
    forms = {name: (params.complete(spec, adapter, frozen), spec) for name, (adapter, spec) in found.items()}
    generator = make_generator(directory, tokenizer.result(), frozen, forms, compute, spare)
    return Model(generator, generator.adapters)


def make_generator(
    directory: Path,
    tokenizer: Any,
    base: Any,
    forms: Mapping[str, combining.Form],
    compute: ComputeSettings,
    spare: Spare | None = None,
) -> Generator:
    """Returns a generator for a loaded base model with adapters: side by side, or one that must be alone."""
    blank = [_blank(directory, spare.rank)] * spare.places if spare else []
    adapters = adapter_set(forms, blank)
    graphdef, _, _ = hf_loader.abstract_model(read_config(directory), adapters.spec, compute)
    return Generator(directory, tokenizer, graphdef, base, adapters, compute)


def adapter_set(forms: Mapping[str, combining.Form], blank: Sequence[combining.Form] = ()) -> AdapterSet:
    """Returns adapters by name: side by side with `blank` ones, or one that must be alone."""
    places = {name: place for place, name in enumerate(forms)}
    adapter, spec = next(iter(forms.values()), ({}, NO_ADAPTER))
    if blank:
        for name, (_, other) in forms.items():
            combining.check_summable(name, other)
    beside = [*forms.values(), *blank]
    if beside and not unsupported_as_lora(spec):
        adapter, spec = combining.side_by_side(beside)
    return AdapterSet(places, adapter, spec)


def _blank(directory: Path, rank: int) -> combining.Form:
    """Returns an adapter in all projections that changes nothing."""
    spec = AdapterSpec(rank, float(rank), 0.0, TARGETS)
    _, shapes, _ = hf_loader.abstract_model(read_config(directory), spec, FLOAT32_COMPUTE)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), spec


def read_complete(directories: Mapping[str, Path], base: Path) -> dict[str, combining.Form]:
    """Reads PEFT directories as `read_all` does, and computes what their files lack from the base model's weights."""
    found = read_all(directories, base)
    if any(needs_base_weights(spec) for _, spec in found.values()):
        rows = max(spec.vocabulary for _, spec in found.values())
        frozen = hf_loader.load_base_alone(base, FLOAT32_COMPUTE, rows)
        found = {name: (params.complete(spec, adapter, frozen), spec) for name, (adapter, spec) in found.items()}
    return found


def read_all(directories: Mapping[str, Path], base: Path) -> dict[str, combining.Form]:
    """Reads PEFT directories, by name, for the base model in a directory; PiSSA's frozen pairs stay zero.

    Raises:
      UserError: an adapter belongs to another base model, or one of several must be loaded alone.
    """
    config, found = read_config(base), {}
    for name, place in directories.items():
        spec = read_spec(place, config.num_hidden_layers)
        if len(directories) > 1:
            combining.check_summable(name, spec)
        check_base(place / WEIGHTS, base)
        _, shapes, _ = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
        found[name] = read_adapter(place, spec, shapes, tied=config.tie_word_embeddings), spec
    return found


def template_settings(directories: Mapping[str, Path]) -> tuple[str, str]:
    """Returns the `chat_date` and `enable_thinking` that adapters were trained with; the defaults if they differ."""
    recorded = [json.loads(metadata(place / WEIGHTS).get(CONFIG, "{}")) for place in directories.values()]
    dates = {settings.get("chat_date", "") for settings in recorded}
    thinking = {settings.get("enable_thinking", "auto") for settings in recorded}
    return dates.pop() if len(dates) == 1 else "", thinking.pop() if len(thinking) == 1 else "auto"


def template_text(directories: Mapping[str, Path]) -> str:
    """Returns the text of the chat template with which adapters were trained; "": the base model's own."""
    file = common_template(directories)
    return find_template(file) if file else ""


def common_template(directories: Mapping[str, Path]) -> str:
    """Returns the file of the chat template with which the adapters were trained; "": the base model's own.

    Raises:
      UserError: they were trained with different chat templates.
    """
    files = {name: str(place / TEMPLATE) for name, place in directories.items() if (place / TEMPLATE).is_file()}
    texts = {name: find_template(files[name]) if name in files else "" for name in directories}
    first, *others = [*texts] or [""]
    for other in others:
        if texts[other] != texts[first]:
            raise UserError(
                f"Adapters {first} and {other} were trained with different chat templates ({TEMPLATE} in their "
                "directories). Load them one at a time, or train them with the same chat_template."
            )
    return next(iter(files.values()), "")
