"""Hugging Face's side of the model: THE table of names in both directions, and the loader.

Weights lie in jlora as they lie on disk, [out, in], stacked over layers; no row is ever permuted or transposed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from jlora.errors import UserError
from jlora.model.llama import Llama, LlamaConfig
from jlora.sharding import shardings
from jlora.sites import LoraConfig

# Place in the model -> tensor name in the files; {i} is the layer. The adapter's tensors are named after these.
NAMES = {
    ("embed_tokens", "weight"): "model.embed_tokens.weight",
    ("layers", "input_layernorm", "weight"): "model.layers.{i}.input_layernorm.weight",
    ("layers", "self_attn", "q_proj", "weight"): "model.layers.{i}.self_attn.q_proj.weight",
    ("layers", "self_attn", "k_proj", "weight"): "model.layers.{i}.self_attn.k_proj.weight",
    ("layers", "self_attn", "v_proj", "weight"): "model.layers.{i}.self_attn.v_proj.weight",
    ("layers", "self_attn", "o_proj", "weight"): "model.layers.{i}.self_attn.o_proj.weight",
    ("layers", "post_attention_layernorm", "weight"): "model.layers.{i}.post_attention_layernorm.weight",
    ("layers", "mlp", "gate_proj", "weight"): "model.layers.{i}.mlp.gate_proj.weight",
    ("layers", "mlp", "up_proj", "weight"): "model.layers.{i}.mlp.up_proj.weight",
    ("layers", "mlp", "down_proj", "weight"): "model.layers.{i}.mlp.down_proj.weight",
    ("layers", "self_attn", "q_proj", "bias"): "model.layers.{i}.self_attn.q_proj.bias",
    ("layers", "self_attn", "k_proj", "bias"): "model.layers.{i}.self_attn.k_proj.bias",
    ("layers", "self_attn", "v_proj", "bias"): "model.layers.{i}.self_attn.v_proj.bias",
    ("layers", "self_attn", "o_proj", "bias"): "model.layers.{i}.self_attn.o_proj.bias",
    ("layers", "self_attn", "q_norm", "weight"): "model.layers.{i}.self_attn.q_norm.weight",
    ("layers", "self_attn", "k_norm", "weight"): "model.layers.{i}.self_attn.k_norm.weight",
    ("layers", "mlp", "gate_proj", "bias"): "model.layers.{i}.mlp.gate_proj.bias",
    ("layers", "mlp", "up_proj", "bias"): "model.layers.{i}.mlp.up_proj.bias",
    ("layers", "mlp", "down_proj", "bias"): "model.layers.{i}.mlp.down_proj.bias",
    ("norm", "weight"): "model.norm.weight",
    ("lm_head", "weight"): "lm_head.weight",
}


def default_dtype() -> DTypeLike:
    """What weights and activations are, unless a config says otherwise: float32 on a CPU, else bfloat16."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def abstract(
    config: LlamaConfig,
    spec: LoraConfig,
    *,
    param_dtype: DTypeLike,
    compute_dtype: DTypeLike,
    remat: bool = False,
) -> tuple[nnx.GraphDef[Llama], dict[str, Any], dict[str, Any]]:
    """The model as shapes: its structure, the adapter's tree and the base's tree. `nnx.merge` joins them again."""
    model = nnx.eval_shape(
        lambda: Llama(config, spec, param_dtype=param_dtype, compute_dtype=compute_dtype, remat=remat)
    )
    graphdef, state = nnx.split(model)
    adapter, base = nnx.split_state(state, nnx.LoRAParam, ...)
    return graphdef, nnx.to_pure_dict(adapter), nnx.to_pure_dict(base)


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    Raises:
      UserError: there are no safetensors files (pickled weights are named, with the way out), or one is broken.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in [*directory.glob("*.bin"), *directory.glob("*.pt*")])
        if pickled:
            raise UserError(
                f"base_model {directory} has only pickled weights ({pickled[0]}), which can run code when opened. "
                "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR, safe_serialization=True)"
            )
        raise UserError(f"base_model {directory}: expected *.safetensors files, found none")
    listed = _index(directory)
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                names = [name for name in tensors.keys() if listed.get(name, file.name) == file.name]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}") from None
        if twice := found.keys() & set(names):
            raise UserError(f"{min(twice)} stands in both {found[min(twice)].name} and {file.name}: remove one of them")
        found.update(dict.fromkeys(names, file))
    return found


def _index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index of a sharded model has it; empty where there is none."""
    path = directory / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from None
    for name in sorted(set(listed.values())):
        if Path(name).name != name or not (directory / name).is_file():
            raise UserError(f"{path} names {name!r}, which is not a file beside it")
    return listed


def load_base(
    directory: Path, shapes: dict[str, Any], mesh: Mesh, progress: Callable[[int], object] = lambda size: None
) -> dict[str, Any]:
    """Reads the frozen weights, each tensor straight to its place on the mesh.

    Args:
      directory: the model directory.
      shapes: the base's tree of shapes and dtypes; values are cast to these dtypes.
      progress: called with the bytes placed after each stacked tensor.

    Raises:
      UserError: all missing, surplus and misshapen tensors at once.
    """
    files = weight_files(directory)
    opened = {file: safe_open(file, framework="numpy") for file in set(files.values())}
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    placed = jax.tree.leaves(shardings(shapes, mesh, "base"))
    paths = [tuple(key.key for key in path) for path, _ in leaves]
    problems, expected = [], set()
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
        for name in tensor_names(path, leaf.shape):
            expected.add(name)
            if name not in files:
                problems.append(f"{name} is missing")
            elif (got := tuple(opened[files[name]].get_slice(name).get_shape())) != shape:
                problems.append(f"{name} has shape {got}, expected {shape}")
    tied = "lm_head" not in shapes
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    problems += [f"{name} is not part of the model" for name in sorted(files.keys() - expected - ignored)]
    if problems:
        listed = "\n  ".join(problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20))
        raise UserError(f"base_model {directory}: {len(problems)} tensor(s) do not fit its config.json:\n  {listed}")

    def place(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        names = tensor_names(path, leaf.shape)

        def read(index: Any) -> np.ndarray:
            if path[0] != "layers":
                return opened[files[names[0]]].get_slice(names[0])[index].astype(leaf.dtype)
            parts = [opened[files[name]].get_slice(name)[index[1:]] for name in names[index[0]]]
            return np.stack([part.astype(leaf.dtype, copy=False) for part in parts])

        array = jax.make_array_from_callback(leaf.shape, sharding, read)
        progress(array.nbytes)
        return array

    arrays = [place(path, leaf, at) for path, (_, leaf), at in zip(paths, leaves, placed, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def projections() -> list[str]:
    """Every linear module of a layer, as "self_attn.q_proj"."""
    return [".".join(path[1:-1]) for path in NAMES if path[-1] == "weight" and path[-2].endswith("_proj")]


def tensor_names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """The file's names for one leaf: one, or one a layer."""
    name = NAMES[path]
    return [name.format(i=i) for i in range(shape[0])] if path[0] == "layers" else [name]
