"""Runs one training run, from its files to the last step. The loop itself is in loop.py."""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jlora.adapters import params
from jlora.adapters.peft_io import read_adapter
from jlora.adapters.settings import spec_of
from jlora.common import malloc
from jlora.common.errors import UserError
from jlora.common.plural import plural
from jlora.config.schema import Config
from jlora.distributed import processes
from jlora.distributed.sharding import data_parallel_size, describe, place, places_of
from jlora.distributed.stop_signal import StopSignal
from jlora.models import hf_loader
from jlora.models.compute_settings import UNKNOWN, ComputeSettings, Packing
from jlora.models.model_config import ModelConfig
from jlora.planning.forecast import Forecast, Job, bytes_per_device, count_work, layout_from_examples
from jlora.planning.hardware import GIB, Target, find_target
from jlora.planning.search import choose_team, ensure_fits
from jlora.planning.step_time import check_step_time
from jlora.steps.programs import Programs, fresh_state, placed_shapes
from jlora.steps.train_step import TrainState
from jlora.training import base_loss_cache, resume
from jlora.training.checkpoint import Checkpoints, Progress, write_record
from jlora.training.loop import TrainingLoop, save
from jlora.training.metrics import Logger, loading_bar
from jlora.training.setup import RunSetup, prepare_run
from jlora.training.trackers import start_trackers

# Answers held-out questions with an adapter; and what makes such a function, and compiles its programs.
Answers = Callable[[params.Adapter], Iterable[str]]
MakeAnswers = Callable[[RunSetup, Programs, params.Adapter], Answers]


@dataclasses.dataclass
class TrainedRun:
    """A run whose loop has ended, with everything that is still in memory."""

    setup: RunSetup
    checkpoints: Checkpoints
    progress: Progress
    state: TrainState
    programs: Programs
    answers: Answers
    stopped: signal.Signals | None  # the signal that stopped it before its last step


@contextlib.contextmanager
def train(config: Config, make_answers: MakeAnswers) -> Iterator[TrainedRun]:
    """Trains from files to the last step; the run's directory stays locked until the `with` block ends."""
    with processes.fail_together():
        setup = prepare_run(config)
    run, config, record = Path(config.output_dir), setup.config, setup.record
    with contextlib.ExitStack() as stack:  # holds the lock of the run's directory, in the first process
        start = resume.StartPoint(
            **processes.broadcast_from_first(lambda: dataclasses.asdict(resume.lock_and_decide(config, record, stack)))
        )
        print(start.message)
        if start.remat and config.remat == "auto":  # another choice would not be bit for bit the same
            setup = setup._replace(config=dataclasses.replace(config, remat=start.remat))
        print(*outline(setup), sep="\n", flush=True)
        programs = load(setup, start.step if start.exact else 0)
        adapter = first_adapter(setup.config, setup.model, setup.compute, programs.base)
        state = fresh_state(adapter, programs.optimizer, setup.mesh, setup.compute.compute_dtype)
        state, progress = restore(start, state)
        answers = make_answers(setup, programs, state.lora)
        stop, checkpoints = StopSignal(), Checkpoints(run)
        warm_start = not start.exact and bool(start.source or config.init_adapter)
        with processes.fail_together(), checkpoints.explain_write_errors():
            if processes.is_first():
                for line in checkpoints.clean_up(keep_intact=start.exact):
                    print(line)
        if warm_start:
            save(checkpoints, state, progress, None)
        with processes.fail_together(), checkpoints.explain_write_errors():
            checkpoints.wait()  # before config.json exists: a restart must find the warm start's adapter
            if processes.is_first():
                write_record(run, record)
            trackers = start_trackers(config, int(state.step), print) if processes.is_first() else {}
            logger = Logger(run, int(state.step), setup.steps, trackers, silent=not processes.is_first())
        with logger:
            work = (setup.batches, setup.held_out, setup.steps)
            file = functools.partial(base_loss_file, setup)
            loop = TrainingLoop(config, programs, *work, checkpoints, logger, progress, stop, file, answers, warm_start)
            state = loop.run(state)
        with processes.fail_together():
            checkpoints.wait()
        yield TrainedRun(setup, checkpoints, progress, state, programs, answers, stop.received)


def load(setup: RunSetup, first: int, *, team: int = 0) -> Programs:
    """Returns the programs, with the base model loaded and the training step compiled.

    Args:
      first: the number of steps done before.
      team: for a sweep, how many adapters train in one step, at most; how many do is written into the record.

    Raises:
      UserError: the run does not fit into memory, or a step takes too long; the message suggests other settings.
    """
    mesh, batches, job = setup.mesh, setup.batches, make_run_job(setup, team)
    _, _, base_shapes = hf_loader.abstract_model(setup.model, spec_of(setup.record["config"]), setup.compute)
    here = find_target("here", mesh.devices.flatten().tolist())
    here = here._replace(limit=processes.minimum(here.limit))
    layout = layout_from_examples(setup.model, setup.examples)
    placed = placed_shapes(base_shapes, mesh, "base")
    if first < setup.steps:
        with processes.fail_together():
            check_step_time(job, count_work(job, placed, []), batches, first, print)
    with ThreadPoolExecutor(1) as background:  # the programs compile while the base model is read
        fitted = background.submit(compile_programs, job, here, setup)
        size = bytes_per_device(placed)
        if here.limit is not None and size > here.limit:
            with processes.fail_together():
                ensure_fits(fitted.result()[0], here, layout, print)
        with processes.fail_together(), loading_bar(size, silent=not processes.is_first()) as bar:
            base = hf_loader.load_base(setup.directory, base_shapes, mesh, bar.update)
        forecast, programs = fitted.result()
    with processes.fail_together():
        ensure_fits(forecast, here, layout, print)
        ensure_evaluation_fits(programs, here)
    programs.base, setup.record["runtime"]["remat"] = base, forecast.job.compute.remat
    if team:
        setup.record["runtime"]["team"] = forecast.job.team
    if jax.default_backend() == "cpu":
        malloc.retain_freed_memory()
    return programs


def make_run_job(setup: RunSetup, team: int = 0) -> Job:
    """Returns the training step of a run, for its largest batch; `team` as for `load`."""
    batches = setup.batches
    return Job(
        config=setup.config,
        model=setup.model,
        compute=setup.compute,
        micro_batches=batches.micro_batches,
        rows=batches.rows,
        shape=batches.shapes[-1],
        packing=Packing(*batches.packing),
        held_out_packing=Packing(*setup.held_out.packing) if setup.held_out else UNKNOWN,
        team=team,
    )


def compile_programs(job: Job, here: Target, setup: RunSetup) -> tuple[Forecast, Programs]:
    """Compiles the steps for all batch shapes; if the largest does not fit into memory, only that one."""
    forecast, programs, state = choose_team(job, here, setup.steps, print)
    if forecast.fits(here.limit):
        programs.compile_all(state, setup.batches, setup.held_out, print)
    return forecast, programs


def ensure_evaluation_fits(programs: Programs, here: Target) -> None:
    """Raises a UserError if the evaluation step would run out of memory, because its rows are longer."""
    needed = programs.needed_bytes("evaluation")
    if here.limit is not None and needed > here.limit:
        raise UserError(
            f"Evaluating on eval_data_dir needs {needed / GIB:.2f} GiB on each device, but only "
            f"{here.limit / GIB:.2f} GiB is available. Its examples are longer than those of train_data_dir. Set a "
            "smaller max_seq_length with overlong=truncate, split or drop, or a smaller batch_size."
        )


def first_adapter(config: Config, model: ModelConfig, compute: ComputeSettings, base: Any) -> params.Adapter:
    """Returns the adapter of step 0: `init_adapter`, or a fresh one that does not change the base model yet."""
    spec, tied = spec_of(dataclasses.asdict(config)), model.tie_word_embeddings
    _, shapes, _ = hf_loader.abstract_model(model, spec, compute)
    if not config.init_adapter:
        return jax.jit(lambda base: params.start(spec, shapes, base, jax.random.key(config.seed)))(base)
    given = processes.broadcast_arrays_from_first(
        lambda: read_adapter(Path(config.init_adapter), spec, shapes, tied=tied), shapes
    )
    return jax.jit(lambda adapter, base: params.complete(spec, adapter, base))(given, base)


def base_loss_file(setup: RunSetup) -> Path:
    """Returns the cache file of the base model's held-out loss; its name is a hash of all that the loss depends on."""
    record, files = setup.record, sorted(setup.directory.glob("*.safetensors"))
    values = {
        "base": [record["base"]["fingerprint"], [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]],
        "adapter": str(spec_of(record["config"])),  # its shapes are part of the compiled program
        "compute": [setup.compute.quantize, record["versions"], record["runtime"]],
    }
    assert setup.held_out is not None
    batches = dataclasses.replace(setup.held_out, local_rows=None)  # all rows, not only this process's own
    return base_loss_cache.cache_file(
        values, (array for step in range(batches.steps_per_epoch) for array in batches[step])
    )


def restore(start: resume.StartPoint, fresh: TrainState) -> tuple[TrainState, Progress]:
    """Returns the state and progress at the start: fresh, restored completely, or with only the adapter restored."""
    if not start.source:
        return fresh, Progress()
    places = places_of(fresh)
    with contextlib.closing(Checkpoints(Path(start.source))) as source:
        if not start.exact:
            adapter = processes.broadcast_arrays_from_first(
                lambda: source.restore_adapter(start.step, fresh.lora), fresh.lora
            )
            return fresh._replace(lora=place(adapter, places.lora)), Progress()
        state = processes.broadcast_arrays_from_first(lambda: source.restore(start.step, fresh), fresh)
        progress = processes.broadcast_from_first(lambda: dataclasses.asdict(source.progress(start.step)))
    return place(state, places), Progress(**progress)


def outline(setup: RunSetup) -> list[str]:
    """Describes what is about to run, and where."""
    mesh, sizes = setup.mesh, len(setup.batches.shapes)
    shapes = f"{sizes} batch shapes" if sizes > 1 else "1 batch shape"
    axes = "" if data_parallel_size(mesh) == mesh.shape["data"] == mesh.size else f" ({describe(mesh)})"
    many = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind.replace("cpu", "CPU")
    shared = setup.batches.prefix_note()
    return [
        f"Training for {plural(setup.steps, 'step')} on {plural(mesh.size, f'{kind} device')}{many}{axes}; {shapes}",
        f"Attention: {setup.attention}{shared and f'; {shared}'}",
    ]
