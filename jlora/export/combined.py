"""Combines adapters into one PEFT directory, as an exact weighted sum: their ranks are concatenated."""

from collections.abc import Mapping
from pathlib import Path

from jlora.adapters import combining
from jlora.adapters.peft_config import base_of, peft_config
from jlora.adapters.peft_io import write_adapter
from jlora.adapters.provenance import BASE
from jlora.adapters.spec import AdapterSpec
from jlora.bases.hashes import weights_hash
from jlora.bases.resolve import is_hub_id, public_id, resolve_base
from jlora.common.errors import UserError
from jlora.data.named_templates import find_template
from jlora.models.families import read_config
from jlora.serve.loading import common_template, read_complete


def combine_directories(weights: Mapping[str, float], base: str, target: Path) -> int:
    """Writes the weighted sum of PEFT directories as one PEFT directory, and returns its rank.

    Args:
      weights: PEFT directory -> weight.
      base: the base model; "": the one that the adapters name.
      target: the new directory.

    Raises:
      UserError: the adapters belong to different base models or cannot be summed, or `target` exists.
    """
    directories = {name: Path(name) for name in weights}
    places = {base_of(place) for place in directories.values()}
    if not base and len(places) > 1:
        raise UserError(
            f"The adapters name different base models: {', '.join(sorted(p for p, _ in places))}. Choose one with "
            "--base."
        )
    place, revision = (base, "") if base else next(iter(places))
    directory = resolve_base(place, revision)
    template = common_template(directories)
    forms = list(read_complete(directories, directory).values())
    for name, (_, spec) in zip(directories, forms, strict=True):
        combining.check_summable(name, spec)
    config = read_config(directory)
    adapter, spec = combining.combine(forms, list(weights.values()))
    base_name = place if is_hub_id(place) else str(directory)
    written = peft_config(spec, base_name, revision or None, tied=config.tie_word_embeddings)
    card = _card(weights, public_id(place), spec)
    text = find_template(template) if template else ""
    write_adapter(adapter, spec, written, card, target, {BASE: weights_hash(directory)}, None, text)
    return spec.rank


def _card(weights: Mapping[str, float], base: str, spec: AdapterSpec) -> str:
    parts = "\n".join(f"- {weight:g} x {Path(name).name}" for name, weight in weights.items())
    return f"""---
library_name: peft
{f"base_model: {base}" if base else "pipeline_tag: text-generation"}
---
A LoRA adapter of rank {spec.rank}, combined by jlora from

{parts}
"""
