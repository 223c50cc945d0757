"""Which base an adapter belongs to: a cheap hash of the weights, kept in the adapter's file."""

import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import UserError
from jlora.model.weights import Weights

BASE, STEP = "jlora_base", "jlora_step"  # keys of the safetensors metadata
SAMPLE = 64  # values of every tensor that count


def base_hash(directory: Path) -> str:
    """A hash of every tensor's name, shape and first values, as bfloat16: the same in other files or another dtype."""
    weights, digest = Weights(directory), hashlib.sha256()
    for name in sorted(weights.names()):
        values, shape = weights.read(name), list(weights.shape(name))
        first = np.asarray(values[0] if len(shape) > 1 else values, np.float32)[:SAMPLE]
        digest.update(f"{name} {shape}\n".encode() + first.astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def metadata(weights: Path) -> dict[str, str]:
    """What jlora noted in an adapter's file; nothing where another program wrote it."""
    try:
        with safe_open(weights, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def check_base(weights: Path, base: Path) -> None:
    """Raises UserError where an adapter's file notes another base than the one at hand."""
    noted = metadata(weights).get(BASE)
    if noted and noted != (here := base_hash(base)):
        raise UserError(
            f"adapter {weights.parent} was trained on other weights than {base} holds (hash {noted[:12]}, here "
            f"{here[:12]}): name the base that it was trained on"
        )
