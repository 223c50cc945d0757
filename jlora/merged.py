"""A base and an adapter as one Hugging Face directory: the base's own names, dtype, tokenizer and template."""

import math
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import lora
from jlora.errors import UserError
from jlora.lora import Adapter
from jlora.model import hf
from jlora.model.families import read_config
from jlora.model.llama import LoraConfig
from jlora.model.weights import DTYPES, INDEX, write_weights
from jlora.whole import new_directory

# What a model directory may hold besides its model: other forms of the weights, and the base's own description.
LEFT_OUT = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}


def write_merged(base: Path, adapter: Adapter, spec: LoraConfig, target: Path, template: str) -> None:
    """Writes W + scale B A for every adapted weight, and every other tensor byte by byte as it is.

    Args:
      base: the model directory.
      adapter: its leaves as hf.abstract has them; {} for the base alone.
      target: the new directory; whole or not at all.
      template: the chat template to write instead of the base's own; "" for the latter.

    Raises:
      UserError: `target` exists or cannot be written; or the base does not fit its config.json.
    """
    if target.exists():
        raise UserError(f"{target} exists, and jlora never overwrites: name another directory with --output")
    _, _, shapes = hf.abstract(read_config(base), spec, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    weights, added = hf.open_base(base, shapes), dict(_by_name(adapter))

    def read(name: str) -> np.ndarray:
        values = weights.read(name)
        if name not in added:
            return values
        a, b = added[name]
        return np.asarray(lora.merge(jnp.asarray(values), a, b, scale=lora.scaling(spec.rank, spec.alpha)))

    names = [name for name in weights.names() if weights.format(name) in DTYPES]
    sizes = {name: math.prod(weights.shape(name)) * DTYPES[weights.format(name)].itemsize for name in sorted(names)}
    try:
        with new_directory(target) as made:
            write_weights(made, sizes, read)
            for file in base.iterdir():
                if file.is_file() and file.suffix not in LEFT_OUT and file.name != INDEX:
                    shutil.copyfile(file, made / file.name)
            if template:
                (made / "chat_template.jinja").write_text(template, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the merged model could not be written to {target}: {error}") from None


def _by_name(adapter: Adapter) -> Any:
    """The file's name of each adapted weight, with its A and B."""
    for path in hf.NAMES:
        module: Any = adapter
        for key in path[:-1]:
            module = module.get(key, {})
        if path[-1] == "weight" and "lora_A" in module:
            names = hf.tensor_names(path, module["lora_A"].shape)
            yield from zip(names, zip(module["lora_A"], module["lora_B"], strict=True), strict=True)
