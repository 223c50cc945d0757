"""Searches for the fastest settings that fit in memory, with the same optimizer steps."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from jlora.adapters.settings import spec_of
from jlora.common.errors import UserError
from jlora.config.schema import Config
from jlora.distributed.sharding import data_parallel_size
from jlora.models import hf_loader
from jlora.planning.forecast import (
    Forecast,
    Job,
    Layout,
    bytes_per_device,
    compile_and_forecast,
    count_work,
    forecast,
    make_job,
    make_run_programs,
)
from jlora.planning.hardware import GIB, TPUS, Target
from jlora.steps.programs import Programs, placed_shapes
from jlora.steps.train_step import TrainState

REMATS = ("none", "dots", "full")  # fastest first
MAX_COMPILATIONS = 4  # a large model takes a minute per compilation


def choose_remat(
    job: Job, target: Target, steps: int, log: Callable[[str], None]
) -> tuple[Forecast, Programs, TrainState]:
    """Compiles the training step. With remat="auto", tries the fastest first until one fits; else returns the last.

    Returns:
      The forecast, the programs with that step compiled, and the state as shapes.
    """
    for remat in _remats(job, target):
        attempt = job.with_remat(remat)
        programs, state = make_run_programs(attempt, steps)
        current = compile_and_forecast(attempt, programs, state, log)
        if current.fits(target.limit):
            break
    return current, programs, state


def choose_team(
    job: Job, target: Target, steps: int, log: Callable[[str], None]
) -> tuple[Forecast, Programs, TrainState]:
    """Compiles the training step, as `choose_remat` does; halves a sweep's team until the fastest `remat` fits."""
    while job.team > 1:
        found = choose_remat(job.with_remat(_remats(job, target)[0]), target, steps, log)
        if found[0].fits(target.limit):
            return found
        job = dataclasses.replace(job, team=job.team // 2)
    return choose_remat(job, target, steps, log)


def _remats(job: Job, target: Target) -> tuple[str, ...]:
    """Returns the values of `remat` to try, the fastest first."""
    on_cpu = target.devices[0].platform == "cpu"  # there, "none" is not faster than "dots"
    return REMATS[on_cpu:] if job.config.remat == "auto" else (job.config.remat,)


def ensure_fits(current: Forecast, target: Target, layout: Layout, log: Callable[[str], None]) -> None:
    """Raises a UserError if a step would run out of memory; the message contains settings that fit."""
    if not current.fits(target.limit):
        shortfall = describe_shortfall(current, target)
        log(f"{shortfall} Searching for settings that fit")
        raise UserError(f"{shortfall} {suggest_fix(current.job.config, find_fastest(current, target, layout, log))}")


def describe_shortfall(current: Forecast, target: Target) -> str:
    """Returns a sentence that compares the memory that a job needs with the memory of the device."""
    available = (
        "which is more than its memory"
        if target.limit is None
        else f"but only {target.limit / GIB:.2f} GiB is available"
    )
    return f"This run needs {current.needed / GIB:.2f} GiB on each device, {available}."


def suggest_fix(config: Config, other: Forecast | None) -> str:
    """Returns a sentence with the settings that fit, or advice if there are none."""
    if other is None:
        return (
            "None of the batch_size, remat, mesh and quantize_base settings that were tried fits. Use a smaller base "
            "model, a smaller max_seq_length, or more or larger devices."
        )
    return f"To fit in {other.needed / GIB:.2f} GiB, set {format_changes(config, other.job.config)}."


def format_changes(config: Config, other: Config) -> str:
    """Returns the changes that turn `config` into `other`, as text."""
    return ", ".join(f"{key}={value}" for key, value in changed_settings(config, other).items())


def alternative_configs(job: Job) -> Iterator[Config]:
    """Yields configs with the same optimizer steps: smaller batches, recomputing, a sharded or quantized base model."""
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


def changed_settings(config: Config, other: Config) -> dict[str, Any]:
    """Returns the keys and values that turn `config` into `other`."""
    return {
        field.name: getattr(other, field.name)
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != getattr(other, field.name)
    }


def find_fastest(current: Forecast, target: Target, layout: Layout, log: Callable[[str], None]) -> Forecast | None:
    """Returns the forecast of the fastest alternative config that fits, compiled to make sure; None if none fits.

    Args:
      current: the forecast that exists already; it is returned if it is the fastest itself.
    """
    job, found = current.job, []
    for config in alternative_configs(job):
        try:
            other = make_job(config, job.model, job.compute, target, layout)
            _, _, base = hf_loader.abstract_model(other.model, spec_of(dataclasses.asdict(config)), other.compute)
        except UserError:  # the mesh or the batch does not divide
            continue
        base = placed_shapes(base, other.mesh, "base")
        if target.limit is None or bytes_per_device(base) + _activations(other) <= target.limit:
            found.append(((*_sort_key(other, base, target), other.config != job.config), other))
    for _, other in sorted(found, key=lambda pair: pair[0])[:MAX_COMPILATIONS]:
        if not changed_settings(job.config, other.config):
            result = current
        else:
            log(f"Trying {format_changes(job.config, other.config)}")
            result = forecast(other)
        if result.fits(target.limit):
            return result
    return None


def _activations(job: Job) -> float:
    """Returns a lower bound on the bytes of activations per device, to avoid compiling what cannot fit."""
    model, remat = job.model, job.compute.remat
    heads, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    kept = model.hidden_size
    if remat != "full":
        kept += (2 * heads + 2 * keys + 2 * model.intermediate_size) // job.mesh.shape["tensor"]
    tokens = job.rows // data_parallel_size(job.mesh) * job.shape.length
    return float(tokens * model.num_hidden_layers * kept * jnp.dtype(job.compute.compute_dtype).itemsize)


def _sort_key(job: Job, base: Any, target: Target) -> tuple[bool, float]:
    """Sorts jobs: those with an unquantized base model first, then by the minimum time for their work."""
    share = job.mesh.shape["fsdp"]
    done = count_work(job, base, [])
    done = dataclasses.replace(done, sent=done.moved * (share - 1) / share)
    chip = target._replace(peak=target.peak or TPUS["v5e"])  # any chip will do, because only the order counts
    return job.config.quantize_base != "none", sum(done.seconds(chip).values())
