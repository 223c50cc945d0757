"""Forecast of memory and time on a device, from the real training step, compiled from shapes alone."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.adapters.settings import spec_of
from jlora.adapters.spec import AdapterSpec
from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.data.examples import Example
from jlora.distributed.sharding import check_batch, data_parallel_size, make_mesh
from jlora.models import hf_loader
from jlora.models.attention import pairs
from jlora.models.compute_settings import UNKNOWN, ComputeSettings, Packing
from jlora.models.model_config import ModelConfig
from jlora.models.quant import storage
from jlora.planning import collectives
from jlora.planning.data_pipeline import make_run_batches
from jlora.planning.hardware import Target
from jlora.planning.hlo import Program
from jlora.steps import optim
from jlora.steps.programs import Programs, batch_shapes, needed_bytes, placed_shapes, stacked_shapes, state_shapes
from jlora.steps.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device during a step."""

    base: int
    adapter: int
    optimizer: int
    batch: int
    rest: int  # activations, temporaries, and padding of the fields above
    code: int

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a device per step. FLOPs are computed from the shapes, not by the compiler."""

    flops: float
    moved: float  # bytes read from and written to memory: on GPUs by all kernels, elsewhere reads of weights alone
    sent: float  # bytes to other devices
    attention: float  # FLOPs of attention, contained in `flops`

    def seconds(self, target: Target) -> dict[str, float]:
        """Returns the minimum time for each kind of work at the chip's published peaks; {} if those are unknown."""
        if target.peak is None:
            return {}
        peak = target.peak
        return {
            "arithmetic": self.flops / peak.flops,
            "memory": self.moved / peak.memory,
            "links": self.sent / peak.links,
        }


@dataclasses.dataclass(frozen=True)
class Job:
    """One training step to compile: a config and a base model on certain devices, with batches of one shape."""

    config: Config
    model: ModelConfig
    compute: ComputeSettings
    micro_batches: int  # A
    rows: int  # R
    shape: Shape
    packing: Packing
    held_out_packing: Packing = UNKNOWN
    team: int = 0  # adapters of a sweep that train in one step, each with its own settings; 0: not a sweep

    @property
    def spec(self) -> AdapterSpec:
        """The adapter; if several train in one step, in the form that they share."""
        return dataclasses.replace(spec_of(dataclasses.asdict(self.config)), swept=self.team > 1)

    @property
    def mesh(self) -> Mesh:
        """The mesh of devices that it runs on."""
        assert self.compute.mesh is not None
        return self.compute.mesh

    def with_remat(self, remat: str) -> "Job":
        """Returns the same job with another `remat`, other than "auto"."""
        config, compute = dataclasses.replace(self.config, remat=remat), dataclasses.replace(self.compute, remat=remat)
        return dataclasses.replace(self, config=config, compute=compute)


# config, ways to split rows -> A, R, the largest shape, and the bounds on the rows
Layout = Callable[[Config, int], tuple[int, int, Shape, Packing]]


def layout_from_examples(model: ModelConfig, examples: Sequence[Example]) -> Layout:
    """Returns a layout whose batches hold these examples."""

    def layout(config: Config, ways: int) -> tuple[int, int, Shape, Packing]:
        _, batches, _ = make_run_batches(config, model, examples, [], ways)
        return batches.micro_batches, batches.rows, batches.shapes[-1], Packing(*batches.packing)

    return layout


def layout_of_length(length: int) -> Layout:
    """Returns a layout whose rows each hold one example of this many tokens, all of them trained on."""

    def layout(config: Config, ways: int) -> tuple[int, int, Shape, Packing]:
        return config.gradient_accumulation_steps, config.batch_size, Shape(length, length), Packing(0, 1, length)

    return layout


def make_job(config: Config, model: ModelConfig, compute: ComputeSettings, target: Target, layout: Layout) -> Job:
    """Makes a job of a config and a target.

    Raises:
      UserError: the mesh does not fit the devices, or the batch the mesh.
    """
    mesh = make_mesh(target.devices, config.mesh)
    check_batch(mesh, config.batch_size)
    remat = "none" if config.remat == "auto" else config.remat
    micro_batches, rows, shape, packing = layout(config, data_parallel_size(mesh))
    stored = storage(config.quantize_base, compute.param_dtype, mesh.devices.flat[0].platform)
    compute = dataclasses.replace(compute, remat=remat, quantize=stored, mesh=mesh)
    return Job(config, model, compute, micro_batches, rows, shape, packing)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The compiler's figures for a job; if it ran out of memory, only `needed`, the bytes it asked for, is known."""

    job: Job
    memory: Memory | None
    needed: int
    work: Work
    collectives: list[collectives.Collective]
    kernels: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # GPU: kind -> runs, bytes moved

    def fits(self, limit: int | None) -> bool:
        """Returns whether the job fits in `limit` bytes per device; with None, whether it compiled."""
        return self.memory is not None and (limit is None or self.needed <= limit)


def make_run_programs(job: Job, steps: int) -> tuple[Programs, TrainState]:
    """Returns the job's programs, not yet compiled, and its state as shapes; `steps` is the length of the whole run."""
    graphdef, adapter, base = hf_loader.abstract_model(job.model, job.spec, job.compute)
    make_optimizer = optim.make_swept_optimizer if job.team else optim.make_optimizer
    optimizer, base = make_optimizer(job.config, job.spec, steps), placed_shapes(base, job.mesh, "base")
    programs = Programs(
        graphdef,
        base,
        optimizer,
        job.mesh,
        packing=job.packing,
        held_out_packing=job.held_out_packing,
        dropout=job.spec.draws,
        seed=job.config.seed + 1,
        stacked=job.team > 0,
    )
    state = state_shapes(adapter, optimizer, job.mesh, job.compute.compute_dtype)
    return programs, stacked_shapes(state, job.team) if job.team else state


def forecast(job: Job) -> Forecast:
    """Compiles the job's training step, without weights and without data, and returns its forecast."""
    return compile_and_forecast(job, *make_run_programs(job, 1000), lambda line: None)


def compile_and_forecast(job: Job, programs: Programs, state: TrainState, log: Callable[[str], None]) -> Forecast:
    """Compiles the job's training step into `programs`, ready to run, and returns its forecast."""
    stacked = (job.team,) if job.team else ()
    batch = batch_shapes(job.micro_batches, job.rows, job.shape, job.mesh, stacked)
    base = programs.base
    try:
        program = programs.compile_training(state, batch, log)
    except jax.errors.JaxRuntimeError as error:
        return Forecast(job, None, _bytes_requested(error), count_work(job, base, []), [])
    analysis, text = program.memory_analysis(), program.as_text()
    assert analysis is not None and text is not None  # all backends that jlora supports provide both
    kept, adapter, optimizer, rows = map(bytes_per_device, (base, state.lora, (state.optimizer, state.step), batch))
    code = analysis.generated_code_size_in_bytes
    rest = needed_bytes(analysis) - code - kept - adapter - optimizer - rows
    memory = Memory(kept, adapter, optimizer, rows, rest, code)
    listing = Program(text)
    sent = collectives.find_collectives(listing, job.mesh.size)
    work, kernels = count_work(job, base, sent), dict[str, tuple[int, float]]()
    if job.mesh.devices.flat[0].platform == "gpu":
        for kernel in listing.kernels():
            runs, moved = kernels.get(kernel.kind, (0, 0.0))
            kernels[kernel.kind] = runs + kernel.times, moved + kernel.times * (kernel.read + kernel.written)
        work = dataclasses.replace(work, moved=sum(moved for _, moved in kernels.values()))
    return Forecast(job, memory, memory.total, work, sent, kernels)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that a tree of arrays, or of shapes, takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _bytes_requested(error: Exception) -> int:
    """Returns the largest size in a compiler's out-of-memory message, in bytes; raises any other error again.

    For example "Used 20.1G of 15.75G hbm", or "required for HLO temporaries (61.30G) exceeds available HBM (15.75G)".
    """
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([MG])\b", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
        raise error
    return max(int(float(number) * {"M": 1 << 20, "G": 1 << 30}[unit]) for number, unit in sizes)


def count_work(job: Job, base: Any, sent: list[collectives.Collective]) -> Work:
    """Computes the work of a step from its shapes.

    Per token, the layers cost 2 FLOPs per parameter forward and 2 backward (the base model has no gradient), and 2 more
    if the layer is recomputed. Attention costs 4 N H per layer and pair of query and key forward, 2.5 times that
    backward, which computes the scores again, and once more if the layer is recomputed. The output layer costs 2 V D
    per target forward and 2 backward.
    """
    model, again = job.model, job.compute.remat == "full"
    heads = model.num_attention_heads * model.head_dim
    length, targets = job.shape
    attention = 4 * heads * pairs(job.compute.attention, length, job.packing) * (3.5 + again)
    layer = length * model.matrices * (6 if again else 4) + attention
    rows = job.micro_batches * job.rows * max(job.team, 1)
    flops = rows * (model.num_hidden_layers * layer + targets * 4 * model.vocab_size * model.hidden_size)
    attention *= rows * model.num_hidden_layers
    passes = (3 if again else 2) * job.micro_batches
    moved = passes * bytes_per_device(base) * job.mesh.shape["fsdp"]  # after gathering, a device reads all of it
    return Work(flops / job.mesh.size, float(moved), math.fsum(c.sent for c in sent), attention / job.mesh.size)
