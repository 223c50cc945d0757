"""Converts a PEFT directory to the form that a server loads, without the run that trained it."""

import json
from pathlib import Path

from jlora.adapters.params import Adapter
from jlora.adapters.peft_config import base_of, peft_config, read_spec
from jlora.adapters.peft_io import TEMPLATE, read_adapter, write_adapter
from jlora.adapters.plain_lora import deltas, relative_difference
from jlora.adapters.provenance import WEIGHTS, metadata
from jlora.adapters.spec import AdapterSpec
from jlora.bases.resolve import is_hub_id, public_id, resolve_base
from jlora.common.errors import UserError, VerificationError
from jlora.data.named_templates import find_template
from jlora.export.gguf_adapter import TOLERANCE, write_gguf
from jlora.export.servers import SERVERS, convert_for_server
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.models.model_config import ModelConfig
from jlora.serve.loading import read_complete


def convert_directory(adapter: Path, base: str, target: Path, server: str, max_rank: int) -> str:
    """Writes the adapter of a PEFT directory in the form that a server loads, and returns a sentence about the check.

    Args:
      adapter: a PEFT directory.
      base: its base model; "": the one that it names.
      target: the new directory.
      server, max_rank: as for `convert_for_server`; not "peft".

    Raises:
      UserError: the adapter cannot be read, or the server does not support it; `target` exists.
      VerificationError: what was written does not compute the same.
    """
    if server == "peft":
        raise UserError(f"--for peft: {adapter} is a PEFT directory already.")
    revision = ""
    if not base:
        base, revision = base_of(adapter)
    directory = resolve_base(base, revision)
    config = read_config(directory)
    (original,) = read_complete({str(adapter): adapter}, directory).values()
    converted = convert_for_server(server, *original, max_rank)
    if server == "llama.cpp":
        return write_gguf(original, converted, directory, target)
    sentence = ""

    def check(made: Path) -> str:
        nonlocal sentence
        count, largest = _compare(original, made, config)
        sentence = (
            f"Verified by reading the file back: the deltas of {count} weights differ by at most {largest:.1e} of "
            f"their largest entry ({SERVERS[server].title} itself was not run)"
        )
        figures = {"modules": count, "largest_relative_difference": largest, "sentence": sentence}
        return json.dumps(figures, indent=2) + "\n"

    name = base if is_hub_id(base) else str(directory)
    fields = peft_config(converted[1], name, revision or None, tied=config.tie_word_embeddings)
    template = find_template(str(adapter / TEMPLATE)) if (adapter / TEMPLATE).is_file() else ""
    card = _card(adapter.resolve().name, public_id(base), converted[1], SERVERS[server].title)
    write_adapter(*converted, fields, card, target, metadata(adapter / WEIGHTS), check, template)
    return sentence


def _compare(original: tuple[Adapter, AdapterSpec], made: Path, config: ModelConfig) -> tuple[int, float]:
    """Returns the number of weights that the adapter changes, and the largest relative difference of a delta."""
    spec = read_spec(made, config.num_hidden_layers)
    _, shapes, _ = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
    written = read_adapter(made, spec, shapes, tied=config.tie_word_embeddings)
    largest, count = 0.0, 0
    for (*place, got), (*expected, want) in zip(deltas(written, spec), deltas(*original), strict=True):
        if place != expected:
            raise VerificationError(f"The converted adapter changes {place}, expected {expected}.")
        largest, count = max(largest, relative_difference(got, want)), count + 1
    if not largest <= TOLERANCE:
        raise VerificationError(f"The converted adapter does not compute the same: a delta differs by {largest:.1e}.")
    return count, largest


def _card(name: str, base: str, spec: AdapterSpec, title: str) -> str:
    return f"""---
library_name: peft
{f"base_model: {base}" if base else "pipeline_tag: text-generation"}
---
The adapter {name}, converted by jlora to plain LoRA of rank {spec.rank}, which {title} loads.
"""
