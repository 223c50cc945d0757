"""Several adapters of one base as one, exactly: `python -m jlora.combine --adapters A=0.7 B=-0.3 --output DIR`.

A negative weight takes an adapter away. The ranks are laid end to end, so nothing is approximated.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import jax

from jlora import lora, several, sources
from jlora.adapter_config import base_of, peft_config, read_spec
from jlora.data.templates import find_template
from jlora.errors import UserError, run_program
from jlora.model import hf
from jlora.model.compute import FLOAT32
from jlora.model.families import read_config
from jlora.peft_format import TEMPLATE, WEIGHTS, read_adapter, write_adapter
from jlora.provenance import BASE, base_hash, check_base
from jlora.sharding import make_mesh
from jlora.sites import LoraConfig


def read_all(directories: Mapping[str, Path], base: Path) -> dict[str, several.Form]:
    """The adapters of PEFT directories, by name, for the base of a model directory; PiSSA's frozen pairs are left zero.

    Raises:
      UserError: one is of another base, or one of several cannot stand beside others.
    """
    config, found = read_config(base), {}
    for name, place in directories.items():
        spec = read_spec(place, config.num_hidden_layers)
        if len(directories) > 1:
            several.check(name, spec)
        check_base(place / WEIGHTS, base)
        _, shapes, _ = hf.abstract(config, spec, FLOAT32)
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


def combine_directories(weights: Mapping[str, float], base: str, target: Path) -> int:
    """Writes the weighted sum of PEFT directories as one; returns its rank.

    Args:
      weights: by directory.
      base: where their base is; "" for what they themselves name.

    Raises:
      UserError: they name different bases, are of another base, cannot be summed, or `target` exists.
    """
    directories = {name: Path(name) for name in weights}
    places = {base_of(place) for place in directories.values()}
    if not base and len(places) > 1:
        raise UserError(
            f"the adapters name different bases, {', '.join(sorted(p for p, _ in places))}: choose by --base"
        )
    place, revision = (base, "") if base else next(iter(places))
    directory = sources.resolve(place, revision)
    template = common_template(directories)
    forms = list(read_all(directories, directory).values())
    for name, (_, spec) in zip(directories, forms, strict=True):
        several.check(name, spec)
    config = read_config(directory)
    if any(spec.pissa for _, spec in forms):  # saved with PiSSA's start, which only the base's weights tell
        nothing = LoraConfig(rank=1, alpha=1.0, dropout=0.0, target_modules=())
        _, _, shapes = hf.abstract(config, nothing, FLOAT32)
        frozen = hf.load_base(directory, shapes, make_mesh(jax.devices()[:1]))
        forms = [(lora.complete(spec, adapter, frozen), spec) for adapter, spec in forms]
    adapter, spec = several.combine(forms, list(weights.values()))
    called = place if sources.is_hub_id(place) else str(directory)
    written = peft_config(spec, called, revision or None, tied=config.tie_word_embeddings)
    card = _card(weights, called, spec)
    text = find_template(template) if template else ""
    write_adapter(adapter, spec, written, card, target, {BASE: base_hash(directory)}, None, text)
    return spec.rank


def _card(weights: Mapping[str, float], base: str, spec: LoraConfig) -> str:
    parts = "\n".join(f"- {weight:g} x {name}" for name, weight in weights.items())
    return f"""---
library_name: peft
base_model: {base}
---
A LoRA adapter of rank {spec.rank}, the sum that jlora made of

{parts}
"""


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.combine", description="Writes a sum of adapters as one.")
    parser.add_argument("--adapters", nargs="+", required=True, help="DIR=WEIGHT, as law/adapter=0.7; DIR alone is 1")
    parser.add_argument("--output", type=Path, required=True, help="where to")
    parser.add_argument("--base", default="", help="where the base is, if not where the adapters say")
    arguments = parser.parse_args(argv)
    parts = [several.read_weight(word) for word in arguments.adapters]
    if len({name for name, _ in parts}) < len(parts):
        parser.error("--adapters names one directory twice")
    rank = combine_directories(dict(parts), arguments.base, arguments.output)
    print(f"one adapter of rank {rank}: {arguments.output}")


if __name__ == "__main__":
    run_program(main)
