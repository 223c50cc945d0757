"""Writes an adapter as a GGUF file for llama.cpp's --lora, and verifies the file before it is published.

Source of the layout: convert_lora_to_gguf.py of llama.cpp. Its scale is adapter.lora.alpha / rank.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from jlora.adapters import params
from jlora.adapters.methods.method import Leaves
from jlora.adapters.params import Adapter
from jlora.adapters.plain_lora import deltas, relative_difference
from jlora.adapters.spec import AdapterSpec
from jlora.common import hf_names
from jlora.common.atomic_io import new_directory
from jlora.common.errors import UserError, VerificationError
from jlora.models.families import FAMILIES, read_config

FILE, REPORT = "adapter.gguf", "parity.json"
TOLERANCE = 1e-5  # relative to the largest entry of a module's delta


def write_gguf(
    trained: tuple[Adapter, AdapterSpec], portable: tuple[Adapter, AdapterSpec], base: Path, target: Path
) -> str:
    """Writes `target`/adapter.gguf atomically, and returns a sentence with the figures of its verification.

    Args:
      trained: the trained adapter and its spec, which the file is compared with.
      portable: the same adapter as plain LoRA, which is written.
      base: the directory of the base model; its config.json names the architecture.

    Raises:
      UserError: `target` exists or cannot be written, or the model type is not supported.
      VerificationError: the file does not contain what was trained.
    """
    if target.exists():
        raise UserError(f"{target} exists, and jlora never overwrites. Choose another directory with --output.")
    model_type = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type not in FAMILIES:
        raise UserError(
            f"--for llama.cpp does not support model_type={model_type!r}. Expected one of {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    config = read_config(base)
    heads = (
        {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if family.gguf_pairs_adjacent
        else {}
    )
    adapter, spec = jax.device_get(portable[0]), portable[1]
    try:
        with new_directory(target) as made:
            writer = gguf.GGUFWriter(made / FILE, family.gguf_architecture)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", spec.alpha)
            for path, leaves in params.modules(adapter):
                for name, a, b in zip(_names(path, leaves), leaves["lora_A"], leaves["lora_B"], strict=True):
                    b = hf_to_gguf_rows(b, heads[path[-1]]) if path[-1] in heads else b
                    writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
                    writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            report = check_gguf(made / FILE, trained, heads)
            (made / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"The adapter could not be written to {target}: {error}.") from None
    return (
        f"Verified by reading the file back: the deltas of {report['modules']} weights differ by at most "
        f"{report['largest_relative_difference']:.1e} of their largest entry (llama.cpp itself was not run)"
    )


def check_gguf(file: Path, trained: tuple[Adapter, AdapterSpec], heads: dict[str, int]) -> dict[str, Any]:
    """Compares the delta of every weight in a file with that of the trained adapter.

    Args:
      file: the GGUF file.
      trained: the trained adapter and its spec.
      heads: the number of heads of each projection whose rows the file reorders.

    Returns:
      The figures for the report.

    Raises:
      VerificationError: they disagree; the message names the weight.
    """
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = {path: _names(path, leaves) for path, leaves in params.modules(trained[0])}
    largest, count = 0.0, 0
    for path, layer, want in deltas(*trained):
        name = names[path][layer]
        a, b = found.pop(f"{name}.lora_a", np.zeros((1, 1))), found.pop(f"{name}.lora_b", np.zeros((1, 1)))
        got = alpha / len(a) * b.astype(np.float64) @ a.astype(np.float64)
        if path[-1] in heads:
            want = hf_to_gguf_rows(want, heads[path[-1]])
        off = relative_difference(got, want)
        if not off <= TOLERANCE:
            raise VerificationError(
                f"The exported adapter does not compute what was trained: {name} differs by {off:.1e}."
            )
        largest, count = max(largest, off), count + 1
    if found:
        raise VerificationError(f"The exported adapter contains {min(found)}, which was not trained.")
    return {"modules": count, "largest_relative_difference": largest, "checked_with": "jlora on the file read back"}


def _names(path: tuple[str, ...], leaves: Leaves) -> list[str]:
    """Returns llama.cpp's name of a projection's weight in each layer; all architectures use the same names."""
    layers = len(leaves["lora_A"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    names = [table.get_name(name, (".weight",)) for name in hf_names.tensor_names((*path, "weight"), (layers,))]
    assert all(names), path
    return [name for name in names if name]


def hf_to_gguf_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from Hugging Face's order (rotary pairs half a head apart) to GGUF llama's (pairs side by side)."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)
