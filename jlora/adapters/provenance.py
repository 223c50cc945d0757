"""Provenance of an adapter: what it was trained with, as metadata in its safetensors file."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.common.errors import UserError

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


def recorded_vocabulary(weights: Path, trained_tokens: Iterable[int]) -> int:
    """Returns the rows that the token tables of the base model must have for an adapter; 0 if it added none.

    Args:
      trained_tokens: the ids of its trained rows.

    Raises:
      UserError: the adapter has neither a table nor a trained row that reaches so far.
    """
    recorded = metadata(weights).get(VOCABULARY, "")
    if not recorded:
        return 0
    with safe_open(weights, framework="numpy") as file:
        tables = [name for name in list(file.keys()) if name.endswith((".embed_tokens.weight", ".lm_head.weight"))]
        heights = {rows for name in tables for rows in file.get_slice(name).get_shape()[:1]}
    heights.add(max(trained_tokens, default=-1) + 1)
    if not recorded.isdecimal() or int(recorded) not in heights:
        raise UserError(
            f"Adapter {weights.parent} records {VOCABULARY}={recorded[:20]!r}, but it trains no token with the id "
            "before that. Export it again."
        )
    return int(recorded)


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
