"""The training and evaluation steps, as pure functions of arrays.

Axes: A micro-batch, R row, T position in a row, S target in a row, D model, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.adapters.params import Adapter
from jlora.data.batches import Batch
from jlora.models.compute_settings import UNKNOWN, Packing
from jlora.models.llama import Llama
from jlora.steps import loss_scale, optim
from jlora.steps.loss import Loss
from jlora.steps.loss_scale import LossScale


class TrainState(NamedTuple):
    """Everything that changes in training."""

    lora: Adapter
    optimizer: optim.State
    step: Int[Array, ""]  # steps done, including skipped ones
    scaling: LossScale | None = None  # float16 only


class Metrics(NamedTuple):
    """Results of one step, on the device."""

    loss: Float[Array, ""]  # mean; for cross-entropy in nats per target
    grad_norm: Float[Array, ""]  # before clipping; not finite if the step was skipped
    adapter_norm: Float[Array, ""]  # after the step
    targets: Float[Array, ""]
    scaling: LossScale | None = None  # after the step; float16 only

    def broken(self) -> bool:
        """Returns whether training must stop: a number is not finite, and a smaller loss scale cannot fix it."""
        if self.scaling is not None and math.isfinite(self.loss) and math.isfinite(self.adapter_norm):
            return bool(self.scaling.scale < 1)
        return not all(map(math.isfinite, (self.loss, self.grad_norm, self.adapter_norm, self.targets)))


def loss_sum(
    graphdef: nnx.GraphDef[Llama],
    loss: Loss,
    lora: Adapter,
    base: Any,
    micro: Batch,
    key: PRNGKeyArray | None,
    packing: Packing,
    devices: int,
) -> Float[Array, ""]:
    """Returns the summed loss of one micro-batch (no leading axis A)."""
    model = nnx.merge(graphdef, lora, base)
    hidden, _ = model(micro.tokens, micro.segments, micro.positions, key=key, packing=packing)
    head_key = None if key is None else jax.random.fold_in(key, 0)
    return loss(*model.head(hidden, head_key), micro, devices)


def make_train_step(
    graphdef: nnx.GraphDef[Llama],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    packing: Packing = UNKNOWN,
    dropout: bool,
    devices: int,
) -> Callable[[TrainState, Any, Batch, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """Returns `step(state, base, batch, key) -> (state, metrics)`, to be jitted with the state donated.

    The loss is summed over all micro-batches and devices, and divided by the batch's count once. Gradients are taken
    with respect to the adapter alone. If the state has a loss scale, a step whose gradients overflow changes neither
    adapter nor optimizer, and so does not advance the schedule.
    """

    def train_step(state: TrainState, base: Any, batch: Batch, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        count = loss.count(batch)
        count = jnp.where(count == 0, 1.0, count)  # a sweep can leave out all examples of a batch

        def mean_loss(lora: Adapter, micro: Batch, key: PRNGKeyArray) -> Array:
            mean = loss_sum(graphdef, loss, lora, base, micro, key if dropout else None, packing, devices) / count
            return mean if state.scaling is None else mean * state.scaling.scale

        def accumulate(carry: tuple[Array, Adapter], leaves: tuple[Batch, PRNGKeyArray]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(mean_loss)(state.lora, *leaves)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.lora))
        keys = jax.random.split(key, len(batch.tokens))
        (mean, grads), _ = jax.lax.scan(accumulate, zero, (batch, keys))
        scaling = state.scaling
        if scaling is not None:
            scale = scaling.scale
            mean, grads = jax.tree.map(lambda x: x / scale, (mean, grads))
        lora, opt = optim.update(optimizer, grads, state.optimizer, state.lora)
        grad_norm = optax.tree.norm(grads)
        if scaling is not None:
            finite, before = jnp.isfinite(grad_norm), (state.lora, state.optimizer)
            lora, opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (lora, opt), before)
            scaling = loss_scale.update_loss_scale(scaling, finite)
        metrics = Metrics(mean, grad_norm, optax.tree.norm(lora), jnp.sum(batch.weights), scaling)
        return TrainState(lora, opt, state.step + 1, scaling), metrics

    return train_step


def make_eval_step(
    graphdef: nnx.GraphDef[Llama], loss: Loss, *, packing: Packing = UNKNOWN, devices: int
) -> Callable[[Adapter, Any, Batch], tuple[Array, Array]]:
    """Returns `step(lora, base, batch) -> (summed loss, count)`, without dropout."""

    def eval_step(lora: Adapter, base: Any, batch: Batch) -> tuple[Array, Array]:
        losses = jax.lax.map(lambda micro: loss_sum(graphdef, loss, lora, base, micro, None, packing, devices), batch)
        return jnp.sum(losses), loss.count(batch)

    return eval_step
