"""The setting that fits and should be fastest: the same optimizer steps, laid out in another way."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from jlora.adapters.spec import spec_of
from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.distributed.sharding import row_ways
from jlora.models import hf_loader
from jlora.planning.forecast import Forecast, Job, Layout, bytes_of, compiled, forecast, make_job, make_programs, work
from jlora.planning.targets import GIB, TPUS, Target
from jlora.steps.programs import Programs, placed_shapes

REMATS = ("none", "dots", "full")  # the fastest first
TRIES = 4  # settings that are compiled: a large one takes a minute each


def first_fit(job: Job, target: Target, steps: int, say: Callable[[str], None]) -> tuple[Forecast, Programs]:
    """Compiles the training step; with remat="auto" until one fits, from the fastest on. Else it is the last."""
    on_cpu = target.devices[0].platform == "cpu"  # where to keep all is no faster than to keep the products
    for remat in REMATS[on_cpu:] if job.config.remat == "auto" else (job.config.remat,):
        tried = job.recomputing(remat)
        programs, state = make_programs(tried, steps)
        seen = compiled(tried, programs, state, say)
        if seen.fits(target.limit):
            break
    return seen, programs


def ensure_fits(seen: Forecast, target: Target, layout: Layout, say: Callable[[str], None]) -> None:
    """Raises UserError where a step would run out of memory; it names a setting that fits."""
    if not seen.fits(target.limit):
        say(f"{too_large(seen, target)}; looking for a setting that fits")
        raise UserError(f"{too_large(seen, target)}. {remedy(seen.job.config, search(seen, target, layout, say))}")


def too_large(seen: Forecast, target: Target) -> str:
    """A sentence for a job that does not fit."""
    room = "more than its memory" if target.limit is None else f"{target.limit / GIB:.2f} GiB are there"
    return f"this run needs {seen.needed / GIB:.2f} GiB on each device, and {room}"


def remedy(config: Config, other: Forecast | None) -> str:
    """What to set instead."""
    if other is None:
        return (
            "No batch_size, remat, mesh or quantize_base that was tried fits: take a smaller base, a smaller "
            "max_seq_length, or more or larger devices"
        )
    return f"This fits, at {other.needed / GIB:.2f} GiB: set {wanted(config, other.job.config)}"


def wanted(config: Config, other: Config) -> str:
    """What to set in `config` to get `other`."""
    return ", ".join(f"{key}={value}" for key, value in changes(config, other).items())


def settings(job: Job) -> Iterator[Config]:
    """Other ways to take the same optimizer steps: shorter forward passes, recomputing, a shared or quantised base."""
    config, shared = job.config, job.mesh.shape["fsdp"]
    ways = job.mesh.size // job.mesh.shape["tensor"]
    for parts in _divisors(config.batch_size):
        smaller: dict[str, Any] = {
            "batch_size": config.batch_size // parts,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * parts,
        }
        for kind, remat, fsdp in itertools.product(("none", "nf4"), REMATS, _divisors(ways)):
            mesh = {**config.mesh, "data": -1, "fsdp": fsdp} if fsdp != shared else config.mesh
            yield dataclasses.replace(config, **smaller, quantize_base=kind, remat=remat, mesh=mesh)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def changes(config: Config, other: Config) -> dict[str, Any]:
    """What to write into `config` to get `other`."""
    return {
        field.name: getattr(other, field.name)
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != getattr(other, field.name)
    }


def search(seen: Forecast, target: Target, layout: Layout, say: Callable[[str], None]) -> Forecast | None:
    """The setting of `settings` that should be fastest among those that fit, compiled to make sure; None: none does.

    Args:
      seen: what was compiled already; it is the answer where it is the fastest itself.
    """
    job, found = seen.job, []
    for config in settings(job):
        try:
            other = make_job(config, job.model, job.compute, target, layout)
            _, _, base = hf_loader.abstract(other.model, spec_of(dataclasses.asdict(config)), other.compute)
        except UserError:  # does not divide
            continue
        base = placed_shapes(base, other.mesh, "base")
        if target.limit is None or bytes_of(base) + _activations(other) <= target.limit:
            found.append(((*_order(other, base, target), other.config != job.config), other))
    for _, other in sorted(found, key=lambda pair: pair[0])[:TRIES]:
        if not changes(job.config, other.config):
            result = seen
        else:
            say(f"trying {wanted(job.config, other.config)}")
            result = forecast(other)
        if result.fits(target.limit):
            return result
    return None


def _activations(job: Job) -> float:
    """Bytes of activations that the backward pass needs at the least, on a device: what cannot fit is not compiled."""
    model, remat = job.model, job.compute.remat
    heads, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    kept = model.hidden_size
    if remat != "full":
        kept += (2 * heads + 2 * keys + 2 * model.intermediate_size) // job.mesh.shape["tensor"]
    tokens = job.rows // row_ways(job.mesh) * job.shape.length
    return float(tokens * model.num_hidden_layers * kept * jnp.dtype(job.compute.compute_dtype).itemsize)


def _order(job: Job, base: Any, target: Target) -> tuple[bool, float]:
    """Sorts settings: a base as it is before a quantised one, then by the time that their work takes at the least."""
    share = job.mesh.shape["fsdp"]
    done = work(job, base, [])
    done = dataclasses.replace(done, sent=done.read * (share - 1) / share)
    chip = target._replace(peak=target.peak or TPUS["v5e"])  # of any chip: only the order counts
    return job.config.quantize_base != "none", sum(done.seconds(chip).values())
