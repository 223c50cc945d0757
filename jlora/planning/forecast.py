"""Will it fit, how fast can it be, and what would fit: read from the real training step, compiled from shapes alone."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.adapters.spec import spec_of
from jlora.config.schema import Config
from jlora.data.batches import Shape
from jlora.data.chat import Example
from jlora.distributed.sharding import check_batch, make_mesh, row_ways
from jlora.models import hf_loader
from jlora.models.attention import BLOCK, in_slots
from jlora.models.compute import Compute, Packing
from jlora.models.llama import LlamaConfig
from jlora.planning import collectives
from jlora.planning.pipeline import plan
from jlora.planning.targets import Target
from jlora.steps import optim
from jlora.steps.programs import Programs, batch_shapes, placed_shapes, state_shapes
from jlora.steps.step import TrainState


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while the step runs."""

    base: int
    adapter: int
    optimizer: int
    batch: int
    rest: int  # activations and what else comes and goes; padding of the above
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in a step. FLOPs and bytes of memory are counted from the shapes, not by the compiler."""

    flops: float
    read: float  # bytes of weights, once for each time that they are gone through
    sent: float  # bytes to other devices

    def seconds(self, target: Target) -> dict[str, float]:
        """The least time that each of these takes, by what the chip's maker states; nothing where that is unknown."""
        if target.peak is None:
            return {}
        peak = target.peak
        return {
            "arithmetic": self.flops / peak.flops,
            "memory": self.read / peak.memory,
            "links": self.sent / peak.links,
        }


@dataclasses.dataclass(frozen=True)
class Job:
    """One training step to be compiled: a config on a base, on devices, with batches of one size."""

    config: Config
    model: LlamaConfig
    compute: Compute
    micro_batches: int  # A
    rows: int  # R
    shape: Shape

    @property
    def mesh(self) -> Mesh:
        """What it runs on."""
        assert self.compute.mesh is not None
        return self.compute.mesh

    def recomputing(self, remat: str) -> "Job":
        """The same with another, definite `remat`."""
        config, compute = dataclasses.replace(self.config, remat=remat), dataclasses.replace(self.compute, remat=remat)
        return dataclasses.replace(self, config=config, compute=compute)


# config, ways to split rows -> A, R, the largest shape, and what Compute.packing says
Layout = Callable[[Config, int], tuple[int, int, Shape, Packing]]


def laid_out(model: LlamaConfig, examples: Sequence[Example]) -> Layout:
    """Batches of real examples."""

    def layout(config: Config, ways: int) -> tuple[int, int, Shape, Packing]:
        _, batches, _ = plan(config, model, examples, [], ways)
        return batches.micro_batches, batches.rows, batches.shapes[-1], Packing(*batches.packing)

    return layout


def make_job(config: Config, model: LlamaConfig, compute: Compute, target: Target, layout: Layout) -> Job:
    """A config as a job on a target.

    Raises:
      UserError: the mesh or the batch does not divide.
    """
    mesh = make_mesh(target.devices, config.mesh)
    check_batch(mesh, config.batch_size)
    remat = "none" if config.remat == "auto" else config.remat
    micro_batches, rows, shape, packing = layout(config, row_ways(mesh))
    compute = dataclasses.replace(compute, remat=remat, quantize=config.quantize_base, mesh=mesh, packing=packing)
    return Job(config, model, compute, micro_batches, rows, shape)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What the compiler says of a job; where it refuses, `needed` bytes did not fit and the rest is not known."""

    job: Job
    memory: Memory | None
    needed: int
    work: Work
    collectives: list[collectives.Collective]

    def fits(self, limit: int | None) -> bool:
        """Within so many bytes a device; an unknown limit is the compiler's business."""
        return self.memory is not None and (limit is None or self.needed <= limit)


def make_programs(job: Job, steps: int) -> tuple[Programs, TrainState]:
    """The job's programs, nothing compiled yet, and its state as shapes; `steps` are those of the whole run."""
    spec = spec_of(dataclasses.asdict(job.config))
    graphdef, adapter, base = hf_loader.abstract(job.model, spec, job.compute)
    optimizer, base = optim.make_optimizer(job.config, spec, steps), placed_shapes(base, job.mesh, "base")
    programs = Programs(graphdef, base, optimizer, job.mesh, dropout=spec.draws, seed=job.config.seed + 1)
    return programs, state_shapes(adapter, optimizer, job.mesh, job.compute.compute_dtype)


def forecast(job: Job) -> Forecast:
    """Compiles the job's training step, without weights and without data."""
    return compiled(job, *make_programs(job, 1000), lambda line: None)


def compiled(job: Job, programs: Programs, state: TrainState, say: Callable[[str], None]) -> Forecast:
    """What the job's training step says of itself; it stays in `programs`, to be run."""
    batch = batch_shapes(job.micro_batches, job.rows, job.shape, job.mesh)
    base = programs.base
    try:
        program = programs.compile_training(state, batch, say)
    except jax.errors.JaxRuntimeError as error:
        return Forecast(job, None, _refused(error), work(job, base, []), [])
    analysis, text = program.memory_analysis(), program.as_text()
    assert analysis is not None and text is not None  # every backend that jlora knows has both
    kept, adapter, optimizer, rows = map(bytes_of, (base, state.lora, (state.optimizer, state.step), batch))
    total = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    rest = total + analysis.temp_size_in_bytes - kept - adapter - optimizer - rows
    memory = Memory(kept, adapter, optimizer, rows, rest, analysis.generated_code_size_in_bytes)
    sent = collectives.collectives(text, job.mesh.size)
    return Forecast(job, memory, memory.total, work(job, base, sent), sent)


def bytes_of(tree: Any) -> int:
    """Of a tree's arrays, or shapes, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _refused(error: Exception) -> int:
    """Bytes that a compiler asked for in vain, the largest size in its message; any other error is raised again.

    As "Used 20.1G of 15.75G hbm", or "required for HLO temporaries (61.30G) exceeds available HBM (15.75G)".
    """
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([MG])\b", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
        raise error
    return max(int(float(number) * {"M": 1 << 20, "G": 1 << 30}[unit]) for number, unit in sizes)


def work(job: Job, base: Any, sent: list[collectives.Collective]) -> Work:
    """What the step computes, by its shapes.

    A token costs 2 FLOPs a parameter of the layers forward and 2 backward (the base has no gradient), 2 more where the
    layer is computed anew. Each query and key that meet cost 4 N H a layer for attention forward, twice that backward,
    once more where its blocks are. A target costs 2 V D forward and 2 backward.
    """
    model, again = job.model, job.compute.remat == "full"
    heads = model.num_attention_heads * model.head_dim
    length, targets = job.shape
    slots = in_slots(length, job.compute.packing) if job.compute.attention == "xla" else None
    P, E, M = slots or (length, 0, 0)
    attention = 4 * (P**2 + E * M * (P + M)) * heads * (3 + again + (not slots and length > BLOCK))
    layer = length * model.matrices * (6 if again else 4) + attention
    rows = job.micro_batches * job.rows
    flops = rows * (model.num_hidden_layers * layer + targets * 4 * model.vocab_size * model.hidden_size)
    passes = (3 if again else 2) * job.micro_batches
    read = passes * bytes_of(base) * job.mesh.shape["fsdp"]  # gathered, it is read whole
    return Work(flops / job.mesh.size, float(read), math.fsum(c.sent for c in sent))
