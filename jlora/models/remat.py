"""Rematerialization: which activations of a layer the backward pass keeps, and which it recomputes."""

from typing import Any

import jax

from jlora.adapters.methods.method import PRODUCT

ATTENTION_OUTPUT = "attention_output"  # checkpoint_name of the results that attention's backward pass reuses
CUDNN = "dot_product_attention_fwd_wrapper"  # name of the primitive that is cuDNN's attention, which JAX does not name

_named = jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION_OUTPUT)


def _products_and_attention(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    return primitive.name == CUDNN or _named(primitive, *arguments, **parameters)


# `ComputeSettings.remat` -> policy that selects the activations to keep; None keeps all. With remat=auto,
# planning/search.py chooses the first one that fits.
REMAT_POLICIES = {
    "none": None,
    "dots": _products_and_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}
