"""An adapter as a GGUF file for llama.cpp's --lora, read back before it gets its name.

Source of the layout: convert_lora_to_gguf.py of llama.cpp. There, the scale is adapter.lora.alpha / rank.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

from jlora.adapters import hf_names, tree
from jlora.adapters.methods import method_of
from jlora.adapters.methods.method import Leaves
from jlora.adapters.spec import AdapterSpec
from jlora.adapters.tree import Adapter
from jlora.common.atomic_io import new_directory
from jlora.common.errors import UserError
from jlora.models.families import read_config

FILE, REPORT = "adapter.gguf", "parity.json"
# config.json's model_type -> llama.cpp's architecture, and whether its q and k rows have rotary pairs side by side.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
TOLERANCE = 1e-5  # of the largest entry of a module's delta


def write_gguf(
    trained: tuple[Adapter, AdapterSpec], portable: tuple[Adapter, AdapterSpec], base: Path, target: Path
) -> str:
    """Writes `target`/adapter.gguf, whole or not at all, and returns the figures of the check in a sentence.

    Args:
      trained: adapter and form as they were trained; the file is held against them.
      portable: the same in the portable form, which is what the file holds.
      base: the base's model directory; its config.json names the architecture.

    Raises:
      UserError: `target` exists or cannot be written, or llama.cpp's name for the architecture is not known here.
    """
    if target.exists():
        raise UserError(f"{target} exists, and jlora never overwrites: name another directory with --output")
    model_type = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type not in ARCHITECTURES:
        raise UserError(f"--for llama.cpp: model_type={model_type!r}; expected one of {', '.join(ARCHITECTURES)}")
    architecture, paired = ARCHITECTURES[model_type]
    config = read_config(base)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if paired else {}
    adapter, spec = jax.device_get(portable[0]), portable[1]
    try:
        with new_directory(target) as made:
            writer = gguf.GGUFWriter(made / FILE, architecture)
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", spec.alpha)
            for path, leaves in tree.modules(adapter):
                for name, a, b in zip(_names(path, leaves), leaves["lora_A"], leaves["lora_B"], strict=True):
                    b = side_by_side(b, heads[path[-1]]) if path[-1] in heads else b
                    writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
                    writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            report = check_gguf(made / FILE, trained, heads)
            (made / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"the adapter could not be written to {target}: {error}") from None
    return (
        f"verified: read back, the change of each of {report['modules']} weights differs by at most "
        f"{report['largest_relative_difference']:.1e} of its largest entry; llama.cpp itself was not run"
    )


def check_gguf(file: Path, trained: tuple[Adapter, AdapterSpec], heads: dict[str, int]) -> dict[str, Any]:
    """Holds the change of every weight that a file makes against that of the trained adapter.

    Args:
      heads: of the projections whose rows the file has in another order.

    Raises:
      SystemExit: they disagree (exit code 1, with the weight's name).
    """
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    adapter, spec = jax.device_get(trained[0]), trained[1]
    largest, count = 0.0, 0
    for path, leaves in tree.modules(adapter):
        method = method_of(spec, tree.projection(path))
        site = method.site(len(leaves["lora_A"]))
        by_layer = zip(_names(path, leaves), site.ranks, site.scales, strict=True)
        for layer, (name, rank, scale) in enumerate(by_layer):
            a, b = found.pop(f"{name}.lora_a", np.zeros((1, 1))), found.pop(f"{name}.lora_b", np.zeros((1, 1)))
            got = alpha / len(a) * b.astype(np.float64) @ a.astype(np.float64)
            own_a, own_b = method.pair({part: leaf[layer] for part, leaf in leaves.items()}, rank)
            want = scale * np.asarray(own_b, np.float64) @ np.asarray(own_a, np.float64)
            if path[-1] in heads:
                want = side_by_side(want, heads[path[-1]])
            size = np.abs(want).max() or 1.0
            off = np.abs(got - want).max() / size if got.shape == want.shape else np.inf
            if not off <= TOLERANCE:
                raise SystemExit(f"error: the written adapter is not the trained one: {name} is off by {off:.1e}")
            largest, count = max(largest, float(off)), count + 1
    if found:
        raise SystemExit(f"error: the written adapter has {min(found)}, which was not trained")
    return {"modules": count, "largest_relative_difference": largest, "checked_with": "jlora on the file read back"}


def _names(path: tuple[str, ...], leaves: Leaves) -> list[str]:
    """llama.cpp's name of a projection's weight in each layer; the three architectures have the same."""
    layers = len(leaves["lora_A"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    names = [table.get_name(name, (".weight",)) for name in hf_names.tensor_names((*path, "weight"), (layers,))]
    assert all(names), path
    return [name for name in names if name]


def side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows from Hugging Face's order (rotary pairs half a head apart) to that of GGUF's llama (pairs side by side)."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)
