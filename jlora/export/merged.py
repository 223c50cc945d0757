"""Merges an adapter into a base model, as a Hugging Face directory with the same names, dtypes and tokenizer."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters import params
from jlora.adapters.methods import make_method, method_class, table_method
from jlora.adapters.methods.method import Leaves
from jlora.adapters.methods.tables import TableMethod
from jlora.adapters.params import Adapter
from jlora.adapters.spec import EMBEDDINGS, AdapterSpec
from jlora.common import hf_names
from jlora.common.atomic_io import new_directory
from jlora.common.errors import UserError
from jlora.common.typed_json import read_object
from jlora.models import hf_loader
from jlora.models.compute_settings import FLOAT32_COMPUTE
from jlora.models.families import read_config
from jlora.models.safetensors_files import DTYPES, INDEX, Weights, write_weights

# Files of a model directory that are not copied: other formats of the weights, and the description of the base model.
LEFT_OUT = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}


def write_merged(base: Path, adapter: Adapter, spec: AdapterSpec, target: Path, template: str) -> None:
    """Merges the adapter into every adapted weight, and copies every other tensor byte by byte.

    Args:
      base: the directory of the base model.
      adapter: leaves as in hf_loader.abstract_model; {}: the base model alone.
      spec: the adapter's settings.
      target: the new directory, written atomically.
      template: the chat template to write instead of the base model's; "": keep the base model's.

    Raises:
      UserError: `target` exists or cannot be written, or the base model does not match its config.json.
    """
    if target.exists():
        raise UserError(f"{target} exists, and jlora never overwrites. Choose another directory with --output.")
    config = read_config(base)
    _, _, shapes = hf_loader.abstract_model(config, spec, FLOAT32_COMPUTE)
    tied = config.tie_word_embeddings
    weights, changes = hf_loader.open_base(base, shapes), dict(_changes(adapter, spec, tied=tied))
    _check_mergeable(spec, weights, changes, tied=tied)

    def read(name: str) -> np.ndarray:
        values = weights.read(name)
        return np.asarray(changes[name](jnp.asarray(values))) if name in changes else values

    names = [name for name in weights.names() if weights.format(name) in DTYPES]
    sizes = {name: math.prod(weights.shape(name)) * DTYPES[weights.format(name)].itemsize for name in sorted(names)}
    try:
        with new_directory(target) as made:
            write_weights(made, sizes, read)
            for file in base.iterdir():
                if file.is_file() and file.suffix not in LEFT_OUT and file.name != INDEX:
                    shutil.copyfile(file, made / file.name)
            if spec.vocabulary > config.vocab_size:
                keys = read_object(base / "config.json") | {"vocab_size": spec.vocabulary}
                (made / "config.json").write_text(json.dumps(keys, indent=2) + "\n", encoding="utf-8")
            if template:
                (made / "chat_template.jinja").write_text(template, encoding="utf-8")
    except OSError as error:
        raise UserError(f"The merged model could not be written to {target}: {error}.") from None


def _changes(
    adapter: Adapter, spec: AdapterSpec, *, tied: bool
) -> Iterator[tuple[str, Callable[[jax.Array], jax.Array]]]:
    """Yields the name of each tensor that the adapter changes, and the function that changes it."""
    for path, leaves in params.modules(adapter):
        if not (name := params.projection(path)):
            change = partial(_merged_table, table_method(spec, path[0], tied=tied), leaves)
            for table in EMBEDDINGS if tied else path:
                yield hf_names.NAMES[table, "weight"], change
            continue
        layers, method = len(next(iter(leaves.values()))), make_method(spec, name)
        site = method.site(layers)
        weights, biases = (hf_names.tensor_names((*path, part), (layers,)) for part in ("weight", "bias"))
        for layer, (rank, scale) in enumerate(zip(site.ranks, site.scales, strict=True)):
            if rank:
                own = {part: leaf[layer] for part, leaf in leaves.items()}
                yield weights[layer], partial(method.merge, leaves=own, scale=scale)
                yield biases[layer], partial(method.merge_bias, leaves=own, scale=scale)


def _merged_table(method: TableMethod, leaves: Leaves, values: jax.Array) -> jax.Array:
    return method.merge(values, leaves).astype(values.dtype)


def _check_mergeable(spec: AdapterSpec, weights: Weights, changes: Mapping[str, Any], *, tied: bool) -> None:
    """Raises a UserError if the base model has no tensor for a part of the adapter."""
    missing = sorted(name for name in changes.keys() - weights.names() if name.endswith(".bias"))
    if method_class(spec).adds_bias and missing:
        raise UserError(
            f"--merged: lora_bias trains biases that the base model does not have, such as {missing[0]}. Load "
            "the adapter with PEFT instead."
        )
    lora = [table for table in EMBEDDINGS if spec.table_rank(table)]
    if tied and lora:
        raise UserError(
            f"--merged: LoRA on {lora[0]} changes only one side of a table that the base model ties. Load the adapter "
            "with PEFT instead."
        )
