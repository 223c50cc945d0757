"""Rematerialization: which activations of a layer the backward pass keeps, and which it recomputes."""

import jax

ATTENTION_OUTPUT = "attention_output"  # checkpoint_name of the results that attention's backward pass reuses

# `ComputeSettings.remat` -> policy that selects the activations to keep; None keeps all. With remat=auto,
# planning/search.py chooses the first one that fits.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
