"""Hugging Face's tensor names: one table for the loader, the PEFT files and the merged export, in both directions."""

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


def projections() -> list[str]:
    """Every linear module of a layer, as "self_attn.q_proj"."""
    return [".".join(path[1:-1]) for path in NAMES if path[-1] == "weight" and path[-2].endswith("_proj")]


def tensor_names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """The file's names for one leaf: one, or one a layer."""
    name = NAMES[path]
    return [name.format(i=i) for i in range(shape[0])] if path[0] == "layers" else [name]
