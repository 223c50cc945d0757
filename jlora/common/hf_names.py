"""Tensor names on disk, in one table for the loader, the GGUF reader, PEFT files and merged export."""

# Path in the model -> Hugging Face's tensor name; {i} is the layer. Adapter tensors derive their names from these.
# All families share the table; each uses the entries of its own modules.
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


def projections() -> list[str]:
    """Returns all linear modules of a layer, such as "self_attn.q_proj"."""
    return [".".join(path[1:-1]) for path in NAMES if path[-1] == "weight" and path[-2].endswith("_proj")]


def tensor_names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """Returns the names on disk of the leaf at a path: one name, or one per layer if its shape has a layer axis."""
    name = NAMES[path]
    return [name.format(i=i) for i in range(shape[0])] if path[0] == "layers" else [name]
