"""The compiled programs of a run, built from arrays or from shapes alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PRNGKeyArray

from jlora.adapters.methods import AXES
from jlora.adapters.params import Adapter
from jlora.data.batches import Batch, Batches, Shape
from jlora.distributed.sharding import data_parallel_size, place, places_of, shardings
from jlora.models.compute_settings import UNKNOWN, Packing
from jlora.models.llama import Llama, neutral_adapter
from jlora.steps import loss_scale, optim
from jlora.steps.compilation import Compiler
from jlora.steps.loss import CROSS_ENTROPY, Loss
from jlora.steps.train_step import Metrics, TrainState, make_eval_step, make_train_step


def fresh_state(
    adapter: Adapter, optimizer: optax.GradientTransformation, mesh: Mesh, compute_dtype: DTypeLike
) -> TrainState:
    """Returns the training state before step 1, placed on the mesh."""
    out_shardings = places_of(state_shapes(adapter, optimizer, mesh, compute_dtype))
    return jax.jit(lambda adapter: first_state(adapter, optimizer, compute_dtype), out_shardings=out_shardings)(adapter)


def first_state(adapter: Adapter, optimizer: optax.GradientTransformation, compute_dtype: DTypeLike) -> TrainState:
    """Returns the training state before step 1, inside a program."""
    scaling = loss_scale.init_loss_scale() if compute_dtype == jnp.float16 else None
    return TrainState(adapter, optim.init(optimizer, adapter), jnp.zeros((), jnp.int32), scaling)


def placed_shapes(tree: Any, mesh: Mesh, root: str) -> Any:
    """Returns shapes and dtypes with their shardings on the mesh, to compile programs from."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh, root, AXES),
    )


def state_shapes(
    adapter: Adapter, optimizer: optax.GradientTransformation, mesh: Mesh, compute_dtype: DTypeLike
) -> TrainState:
    """Returns the result of `fresh_state` as shapes."""
    made = jax.eval_shape(lambda adapter: first_state(adapter, optimizer, compute_dtype), adapter)
    return placed_shapes(made, mesh, "state")


def stacked_shapes(state: TrainState, count: int) -> TrainState:
    """Returns `count` states of one form as shapes, stacked along a new first axis, which no device splits."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (count, *leaf.shape),
            leaf.dtype,
            sharding=NamedSharding(leaf.sharding.mesh, P(None, *leaf.sharding.spec)),
        ),
        state,
    )


def batch_shapes(micro_batches: int, rows: int, shape: Shape, mesh: Mesh, stacked: tuple[int, ...] = ()) -> Batch:
    """Returns a batch of one size as shapes; with `stacked` trainings, (K,), each has its own weights."""
    positions, targets = (micro_batches, rows, shape.length), (micro_batches, rows, shape.targets)
    tokens, supervised = (jax.ShapeDtypeStruct(size, jnp.int32) for size in (positions, targets))
    weights = jax.ShapeDtypeStruct((*stacked, *targets), jnp.float32)
    root = "stacked" if stacked else "batch"
    return placed_shapes(Batch(tokens, tokens, tokens, supervised, supervised, weights), mesh, root)


def needed_bytes(analysis: Any) -> int:
    """Returns the bytes of a program's arguments, results, temporaries and code, from its `memory_analysis`."""
    arrays = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(arrays + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes)


def _stacked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a step over a new first axis of states or adapters, and of keys.

    The trainings share the batch, but each gets its own copy: kernels of attention need this axis on all their inputs.
    A single training does without the axis, so that it has the bits of a run.
    """

    def run(state: Any, base: Any, batch: Batch, *keys: Array) -> Any:
        count, shared = len(jax.tree.leaves(state)[0]), batch.targets.ndim  # weights may have the axis already
        own = Batch(*(x if x.ndim > shared else jnp.broadcast_to(x, (count, *x.shape)) for x in batch))
        if count == 1:
            state, own, keys = jax.tree.map(lambda x: x[0], (state, own, keys))
            return jax.tree.map(lambda x: x[None], step(state, base, own, *keys))
        return jax.vmap(step, (0, None, 0, *(0 for _ in keys)))(state, base, own, *keys)

    return run


class Programs:
    """The compiled steps of one run on one mesh. Shapes that `compile_all` has not compiled are compiled on first use.

    Args:
      base: the frozen weights, placed on the mesh; placed shapes are enough to compile, but not to run.
      packing, held_out_packing: bounds on the rows of the training and held-out batches.
      loss: what the run minimizes.
      stacked: whether states, keys, the weights of training batches, and all results have a new first axis, over
        trainings that see the same batches. Each computes what it would alone.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[Llama],
        base: Any,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        *,
        packing: Packing = UNKNOWN,
        held_out_packing: Packing = UNKNOWN,
        loss: Loss = CROSS_ENTROPY,
        dropout: bool,
        seed: int,
        stacked: bool = False,
    ) -> None:
        self.graphdef, self.base, self.optimizer, self._mesh = graphdef, base, optimizer, mesh
        self.everywhere = NamedSharding(mesh, P())
        self._seed = seed
        devices = data_parallel_size(mesh)
        train_step = make_train_step(graphdef, loss, optimizer, packing=packing, dropout=dropout, devices=devices)
        eval_step = make_eval_step(graphdef, loss, packing=held_out_packing, devices=devices)
        self._neutral = functools.partial(neutral_adapter, graphdef)
        if stacked:
            train_step, eval_step = _stacked(train_step), _stacked(eval_step)
            self._neutral = jax.vmap(self._neutral, (0, None))
        self._train_step, self._eval = train_step, jax.jit(eval_step, out_shardings=self.everywhere)
        self._compile = Compiler(mesh.devices.flat[0].platform)
        self.compiled: dict[tuple[str, Shape], Any] = {}

    def train_step(
        self, state: TrainState, batch: Batch, say: Callable[[str], None], key: Key[Array, "..."] | None = None
    ) -> tuple[TrainState, Metrics]:
        """Runs one optimizer step. The given state is donated and must not be used again.

        Args:
          key: for everything random, or one for each stacked training; None: the run's own.
        """
        placed = self._place(batch)
        drawn = self._key if key is None else key
        return self.compile_training(state, placed, say)(state, self.base, placed, drawn)

    def held_out_loss(self, adapter: Adapter, batches: Batches, say: Callable[[str], None]) -> float:
        """Returns the mean loss on the held-out set; for cross-entropy in nats per target."""
        return self.held_out_losses(adapter, batches, say)[""]

    def held_out_losses(self, adapter: Adapter, batches: Batches, say: Callable[[str], None]) -> dict[str, float]:
        """Returns the mean loss on all held-out examples, under "", and on those of each set, under its name."""
        sums = self.held_out_sums(adapter, batches, say)
        names = [batches.set_name(step) for step in range(len(sums))]
        by_set = {name: sums[[name == other for other in names]].sum(axis=0) for name in names if name}
        return {name: float(total / count) for name, (total, count) in {"": sums.sum(axis=0), **by_set}.items()}

    def held_out_sums(self, adapter: Adapter, batches: Batches, say: Callable[[str], None]) -> np.ndarray:
        """Returns the summed loss and the count of every held-out batch: [batches, 2], or [batches, 2, stacked]."""
        sums = []
        for step in range(batches.steps_per_epoch):
            batch = self._place(batches[step])
            sums.append(self.compile_evaluation(adapter, batch, say)(adapter, self.base, batch))
        return np.array(jax.device_get(sums))

    def neutral(self, adapter: Adapter) -> Adapter:
        """Returns an adapter with the same structure and shardings that leaves the base model's output unchanged."""
        return jax.jit(self._neutral, out_shardings=places_of(adapter))(adapter, self.base)

    def compile_all(
        self, state: TrainState, batches: Batches, held_out: Batches | None, say: Callable[[str], None]
    ) -> None:
        """Compiles the steps for every batch shape of a run, the largest first; `state` may be placed shapes."""
        for shape in reversed(batches.shapes):
            sizes = (batches.micro_batches, batches.rows, shape, self._mesh, state.step.shape)
            self.compile_training(state, batch_shapes(*sizes), say)
        if held_out is not None:
            for shape in held_out.shapes:
                batch = batch_shapes(held_out.micro_batches, held_out.rows, shape, self._mesh)
                self.compile_evaluation(state.lora, batch, say)

    def compile_evaluation(self, adapter: Adapter, batch: Batch, say: Callable[[str], None]) -> jax.stages.Compiled:
        """Returns the evaluation step for the batch's shape; `adapter` and `batch` may be placed shapes."""
        return self._program("evaluation", batch, lambda: self._eval.lower(adapter, self.base, batch), say)

    def compile_training(self, state: TrainState, batch: Batch, say: Callable[[str], None]) -> jax.stages.Compiled:
        """Returns the training step for the batch's shape; `state` and `batch` may be placed shapes."""

        def lower() -> jax.stages.Lowered:
            step = jax.jit(self._train_step, donate_argnums=0, out_shardings=(places_of(state), self.everywhere))
            drawn = jax.eval_shape(jax.random.key, self._seed)
            key = jax.ShapeDtypeStruct(state.step.shape, drawn.dtype, sharding=self.everywhere)
            return step.lower(state, self.base, batch, key)

        return self._program("training", batch, lower, say)

    def needed_bytes(self, name: str) -> int:
        """Returns the most bytes per device that the compiled "training" or "evaluation" steps need; 0 without one."""
        analyses = [program.memory_analysis() for (kind, _), program in self.compiled.items() if kind == name]
        return max((needed_bytes(analysis) for analysis in analyses), default=0)

    def _place(self, batch: Batch) -> Batch:
        """Copies a host batch to the mesh, with its rows split."""
        root = "stacked" if batch.weights.ndim > batch.targets.ndim else "batch"
        return place(batch, shardings(batch, self._mesh, root))

    @functools.cached_property
    def _key(self) -> PRNGKeyArray:
        """The key for everything random in training."""
        return jax.jit(lambda: jax.random.key(self._seed), out_shardings=self.everywhere)()

    def _program(
        self, name: str, batch: Batch, lower: Callable[[], jax.stages.Lowered], say: Callable[[str], None]
    ) -> Any:
        key = (name, Shape(batch.tokens.shape[2], batch.targets.shape[2]))
        if key not in self.compiled:
            rows, length = batch.tokens.shape[1:]
            self.compiled[key] = self._compile(f"the {name} step for {rows} x {length} tokens", lower, say)
        return self.compiled[key]
