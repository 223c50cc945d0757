"""Provenance of an adapter: what it was trained with, as metadata in its safetensors file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"  # PEFT's name for the tensors of an adapter
# Keys of the safetensors metadata; all values are strings.
BASE, TOKENIZER, TEMPLATE = "jlora_base", "jlora_tokenizer", "jlora_template"
DATA, HELD_OUT = "jlora_data", "jlora_held_out_data"
VERSION, CONFIG, STEP = "jlora_version", "jlora_config", "jlora_step"
TENSORS = "jlora_tensors"
VOCABULARY = "jlora_vocabulary"  # rows of the token tables, if the adapter added some
BASE_LOSS, LOSS = "jlora_base_loss", "jlora_held_out_loss"  # nats per target


def metadata(weights: Path) -> dict[str, str]:
    """Returns the metadata of an adapter file; {} if it has none or cannot be read."""
    try:
        with safe_open(weights, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def tensors_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """Hashes the name, shape and float32 values of each tensor; their order in the file does not matter."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values, np.float32).tobytes())
    return digest.hexdigest()


def exported_step(directory: Path) -> int | None:
    """Returns the step from which an adapter was exported; None if jlora did not write it."""
    step = metadata(directory / WEIGHTS).get(STEP, "")
    return int(step) if step.isdigit() else None
