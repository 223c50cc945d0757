"""The optimizer (AdamW on the adapter, no update of the base model) and the learning-rate schedule.

The base model enters `multi_transform` as a masked node: it has no gradient, no state and no update.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.adapters.methods import training_labels
from jlora.adapters.methods.method import FAST, FROZEN, TRAINS
from jlora.adapters.params import Adapter
from jlora.adapters.spec import AdapterSpec
from jlora.config.schema import Config

State = optax.OptState


def schedule(config: Config, steps: int) -> optax.Schedule:
    """Returns the learning rate by step, as in transformers: linear warm-up from 0, then `lr_scheduler_type`.

    Args:
      steps: number of optimizer steps in the run.
    """
    warmup = -int(-(config.warmup_ratio * steps) // 1)
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.lr_scheduler_type]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


def make_optimizer(config: Config, spec: AdapterSpec, steps: int) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), clipped by global norm; the base model is frozen.

    LoRA+ gives some arrays a higher learning rate, as PEFT does (Hayou et al. 2024, arXiv:2402.12354).
    """
    rate, by_name = schedule(config, steps), training_labels(spec)

    def adamw(ratio: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: ratio * rate(step),
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )

    def label(path: tuple[Any, ...], _: Any) -> str:
        label = by_name[path[-1].key]
        return TRAINS if label == FAST and config.loraplus_lr_ratio == 1 else label

    def labels(tree: dict[str, Any]) -> dict[str, Any]:
        return {"lora": jax.tree_util.tree_map_with_path(label, tree["lora"]), "base": FROZEN}

    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    rates = {TRAINS: adamw(1.0), FROZEN: optax.set_to_zero()}
    if config.loraplus_lr_ratio != 1:
        rates[FAST] = adamw(config.loraplus_lr_ratio)
    return optax.chain(clip, optax.multi_transform(rates, labels))


def make_swept_optimizer(config: Config, spec: AdapterSpec, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the same optimizer with `learning_rate` and `weight_decay` in its state, as arrays (`hyperparams`)."""

    def with_arrays(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
        varied = dataclasses.replace(config, learning_rate=learning_rate, weight_decay=weight_decay)
        return make_optimizer(varied, spec, steps)

    made = optax.inject_hyperparams(with_arrays, hyperparam_dtype=jnp.float32)
    return made(learning_rate=config.learning_rate, weight_decay=config.weight_decay)


def _tree(lora: Adapter) -> dict[str, Any]:
    return {"lora": lora, "base": optax.MaskedNode()}


def init(optimizer: optax.GradientTransformation, lora: Adapter) -> State:
    """Returns the initial optimizer state: two float32 moments for every trained leaf, and counters."""
    return optimizer.init(_tree(lora))


def update(
    optimizer: optax.GradientTransformation, grads: Adapter, state: State, lora: Adapter
) -> tuple[Adapter, State]:
    """Returns the adapter and the optimizer state after one step."""
    updates, state = optimizer.update(_tree(grads), state, _tree(lora))
    return optax.apply_updates(lora, updates["lora"]), state
