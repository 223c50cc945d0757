"""The training and evaluation steps: pure functions of arrays.

Axes: A micro-batch, R row, T place in a row, S target in a row, D model, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters.tree import Adapter
from jlora.data.batches import Batch
from jlora.models.llama import Llama
from jlora.steps import loss_scale, optim
from jlora.steps.loss import target_loss
from jlora.steps.loss_scale import LossScale


class TrainState(NamedTuple):
    """All that changes in training."""

    lora: Adapter
    optimizer: optim.State
    step: Int[Array, ""]  # steps done, skipped ones too
    scaling: LossScale | None = None  # in float16 only


class Metrics(NamedTuple):
    """Of one step, on the device."""

    loss: Float[Array, ""]  # nats a target
    grad_norm: Float[Array, ""]  # before clipping; not finite where the step was skipped
    adapter_norm: Float[Array, ""]  # after the step
    targets: Float[Array, ""]
    scaling: LossScale | None = None  # after the step, in float16 only

    def broken(self) -> bool:
        """Whether training cannot go on: a number is not finite, and it is not a step that a smaller scale mends."""
        if self.scaling is not None and math.isfinite(self.loss) and math.isfinite(self.adapter_norm):
            return bool(self.scaling.scale < 1)
        return not all(map(math.isfinite, (self.loss, self.grad_norm, self.adapter_norm, self.targets)))


def loss_sum(
    graphdef: nnx.GraphDef[Llama], lora: Adapter, base: Any, micro: Batch, key: PRNGKeyArray | None, devices: int
) -> Float[Array, ""]:
    """Summed loss of one micro-batch (no leading axis A)."""
    model = nnx.merge(graphdef, lora, base)
    hidden, _ = model(micro.tokens, micro.segments, micro.positions, key=key)
    return target_loss(model.head(), hidden, micro.predict_at, micro.targets, micro.weights, devices)


def make_train_step(
    graphdef: nnx.GraphDef[Llama], optimizer: optax.GradientTransformation, *, dropout: bool, devices: int
) -> Callable[[TrainState, Any, Batch, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """`step(state, base, batch, key) -> (state, metrics)`, to be jitted with the state donated.

    The loss is summed over the targets of all micro-batches and all devices, and divided by their number once.
    Gradients are taken with respect to the adapter alone. Where the state has a loss scale, a step whose gradients
    overflow changes neither adapter nor optimizer, and so not the schedule either.
    """

    def train_step(state: TrainState, base: Any, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        total = jnp.sum(batch.weights)

        def mean_loss(lora: Adapter, micro: Batch, key: PRNGKeyArray) -> Array:
            loss = loss_sum(graphdef, lora, base, micro, key if dropout else None, devices) / total
            return loss if state.scaling is None else loss * state.scaling.scale

        def accumulate(carry: tuple[Array, Adapter], leaves: tuple[Batch, PRNGKeyArray]) -> tuple[Any, None]:
            loss, grads = jax.value_and_grad(mean_loss)(state.lora, *leaves)
            return jax.tree.map(jnp.add, carry, (loss, grads)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.lora))
        keys = jax.random.split(key, len(batch.tokens))
        (loss, grads), _ = jax.lax.scan(accumulate, zero, (batch, keys))
        scaling = state.scaling
        if scaling is not None:
            scale = scaling.scale
            loss, grads = jax.tree.map(lambda x: x / scale, (loss, grads))
        lora, opt = optim.update(optimizer, grads, state.optimizer, state.lora)
        grad_norm = optax.tree.norm(grads)
        if scaling is not None:
            finite, before = jnp.isfinite(grad_norm), (state.lora, state.optimizer)
            lora, opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (lora, opt), before)
            scaling = loss_scale.after(scaling, finite)
        metrics = Metrics(loss, grad_norm, optax.tree.norm(lora), total, scaling)
        return TrainState(lora, opt, state.step + 1, scaling), metrics

    return train_step


def make_eval_step(
    graphdef: nnx.GraphDef[Llama], *, devices: int
) -> Callable[[Adapter, Any, Batch], tuple[Array, Array]]:
    """`step(lora, base, batch) -> (summed loss in nats, number of targets)`, without dropout."""

    def eval_step(lora: Adapter, base: Any, batch: Batch) -> tuple[Array, Array]:
        losses = jax.lax.map(lambda micro: loss_sum(graphdef, lora, base, micro, None, devices), batch)
        return jnp.sum(losses), jnp.sum(batch.weights)

    return eval_step
