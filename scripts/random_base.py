"""Writes a base model with random weights in the shape of a real one, for measurements that need no download."""

import math
import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jlora.adapters.spec import NO_ADAPTER
from jlora.common import hf_names
from jlora.models import hf_loader
from jlora.models.compute_settings import ComputeSettings
from jlora.models.families import read_config
from jlora.models.safetensors_files import write_weights

SHAPES = Path(__file__).parent / "shapes"


def random_base(directory: Path, shape: str, tokenizer_of: Path) -> Path:
    """Writes a model directory for a config in shapes/, with random bfloat16 weights and another model's tokenizer."""
    directory.mkdir(parents=True)
    for file in tokenizer_of.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json" and "safetensors" not in file.name:
            shutil.copy(file, directory)
    shutil.copy(SHAPES / f"{shape}.json", directory / "config.json")
    _, _, shapes = hf_loader.abstract_model(
        read_config(directory), NO_ADAPTER, ComputeSettings(jnp.bfloat16, jnp.bfloat16)
    )
    tensors = {
        name: leaf.shape[1:] if path[0].key == "layers" else leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
        for name in hf_names.tensor_names(tuple(key.key for key in path), leaf.shape)
    }

    def draw(name: str) -> np.ndarray:
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        values = generator.standard_normal(tensors[name], np.float32) * 0.02
        return (np.ones_like(values) if name.endswith("norm.weight") else values).astype(ml_dtypes.bfloat16)

    write_weights(directory, {name: 2 * math.prod(size) for name, size in tensors.items()}, draw)
    return directory
