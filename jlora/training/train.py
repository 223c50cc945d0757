"""One run from files to its last step: the wiring. The loop itself is in loop.py."""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jlora.adapters import tree
from jlora.adapters.peft_io import read_adapter
from jlora.adapters.spec import AdapterSpec, spec_of
from jlora.common import malloc
from jlora.config.schema import Config
from jlora.distributed import processes
from jlora.distributed.sharding import describe, place, places_of, row_ways
from jlora.models import hf_loader
from jlora.planning.forecast import Job, bytes_of, laid_out
from jlora.planning.search import ensure_fits, first_fit
from jlora.planning.targets import find_target
from jlora.steps.programs import Programs, fresh_state, placed_shapes
from jlora.steps.step import TrainState
from jlora.training import resume
from jlora.training.checkpoint import Checkpoints, Progress, write_record
from jlora.training.known import Known
from jlora.training.loop import Loop, save
from jlora.training.metrics import Logger, loading_bar
from jlora.training.setup import Ready, make_ready


@dataclasses.dataclass
class Trained:
    """A run whose loop has ended, with all that is still in memory."""

    ready: Ready
    checkpoints: Checkpoints
    progress: Progress
    state: TrainState
    programs: Programs
    stopped: signal.Signals | None  # the signal that ended it before its last step


@contextlib.contextmanager
def train(config: Config) -> Iterator[Trained]:
    """Trains, from files to the last step; the run's directory is this process's own until the `with` ends."""
    with processes.together():
        ready = make_ready(config)
    run, config, record = Path(config.output_dir), ready.config, ready.record
    with contextlib.ExitStack() as held:  # the run's place, by the first process
        start = resume.Start(**processes.of_first(lambda: dataclasses.asdict(resume.take(config, record, held))))
        print(start.message)
        if start.remat and config.remat == "auto":  # else it would not be bit for bit the same
            ready = ready._replace(config=dataclasses.replace(config, remat=start.remat))
        programs, adapter = load(ready)
        state = fresh_state(adapter, programs.optimizer, ready.mesh, ready.compute.compute_dtype)
        state, progress = begin(start, state)
        stop, checkpoints = processes.Stop(), Checkpoints(run)
        warm = not start.exact and bool(start.source or config.init_adapter)
        with processes.together(), checkpoints.writable():
            if processes.is_first():
                for line in checkpoints.clear(keep=start.exact):
                    print(line)
        if warm:
            save(checkpoints, state, progress, None)
        with processes.together(), checkpoints.writable():
            checkpoints.wait()  # before the run has a record, so that no restart begins from nothing
            if processes.is_first():
                write_record(run, record)
            logger = Logger(run, int(state.step), ready.steps, silent=not processes.is_first())
        print(*outline(ready), sep="\n", flush=True)
        with logger:
            todo = (ready.batches, ready.held_out, ready.steps)
            known = functools.partial(base_loss, ready)
            state = Loop(config, programs, *todo, checkpoints, logger, progress, stop, known, warm).run(state)
        with processes.together():
            checkpoints.wait()
        yield Trained(ready, checkpoints, progress, state, programs, stop.signal)


def load(ready: Ready) -> tuple[Programs, tree.Adapter]:
    """The programs, with the base in its place and the training step compiled, and the adapter of step 0.

    Raises:
      UserError: it does not fit the memory; says what would.
    """
    config, mesh, batches = ready.config, ready.mesh, ready.batches
    spec = spec_of(ready.record["config"])
    _, shapes, base_shapes = hf_loader.abstract(ready.model, spec, ready.compute)
    here, layout = find_target("here", mesh.devices.flatten().tolist()), laid_out(ready.model, ready.examples)
    here = here._replace(limit=processes.least(here.limit))
    job = Job(config, ready.model, ready.compute, batches.micro_batches, batches.rows, batches.shapes[-1])
    with ThreadPoolExecutor(1) as beside:  # the step compiles while the base is read
        fitted = beside.submit(first_fit, job, here, ready.steps, print)
        size = bytes_of(placed_shapes(base_shapes, mesh, "base"))
        if here.limit is not None and size > here.limit:
            with processes.together():
                ensure_fits(fitted.result()[0], here, layout, print)
        with processes.together(), loading_bar(size, silent=not processes.is_first()) as bar:
            base = hf_loader.load_base(ready.directory, base_shapes, mesh, bar.update)
        seen, programs = fitted.result()
    with processes.together():
        ensure_fits(seen, here, layout, print)
    programs.base, ready.record["runtime"]["remat"] = base, seen.job.compute.remat
    if jax.default_backend() == "cpu":
        malloc.keep_freed()
    return programs, first_adapter(config, spec, shapes, base, tied=ready.model.tie_word_embeddings)


def first_adapter(config: Config, spec: AdapterSpec, shapes: tree.Adapter, base: Any, *, tied: bool) -> tree.Adapter:
    """The adapter of step 0: `init_adapter`, or one that does nothing yet."""
    if not config.init_adapter:
        return jax.jit(lambda base: tree.start(spec, shapes, base, jax.random.key(config.seed)))(base)
    given = processes.arrays_of_first(lambda: read_adapter(Path(config.init_adapter), spec, shapes, tied=tied), shapes)
    return jax.jit(lambda adapter, base: tree.complete(spec, adapter, base))(given, base)


def base_loss(ready: Ready) -> Known:
    """The base's own held-out loss, which many runs have in common."""
    record, files = ready.record, sorted(ready.directory.glob("*.safetensors"))
    follows = {
        "base": [record["base"]["fingerprint"], [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]],
        "adapter": str(spec_of(record["config"])),
        "computed": [ready.compute.quantize, record["versions"], record["runtime"]],
    }
    if ready.held_out is None:
        return Known(follows, ())
    whole = dataclasses.replace(ready.held_out, read=None)
    return Known(follows, (array for step in range(whole.steps_per_epoch) for array in whole[step]))


def begin(start: resume.Start, fresh: TrainState) -> tuple[TrainState, Progress]:
    """The state and progress that a run begins with: fresh, restored whole, or with only the adapter restored."""
    if not start.source:
        return fresh, Progress()
    places = places_of(fresh)
    with contextlib.closing(Checkpoints(Path(start.source))) as source:
        if not start.exact:
            adapter = processes.arrays_of_first(lambda: source.restore_adapter(start.step, fresh.lora), fresh.lora)
            return fresh._replace(lora=place(adapter, places.lora)), Progress()
        state = processes.arrays_of_first(lambda: source.restore(start.step, fresh), fresh)
        progress = processes.of_first(lambda: dataclasses.asdict(source.progress(start.step)))
    return place(state, places), Progress(**progress)


def outline(ready: Ready) -> list[str]:
    """What is about to happen, in words."""
    mesh, sizes = ready.mesh, len(ready.batches.shapes)
    shapes = f"batches come in {sizes} sizes, each compiled when it first comes" if sizes > 1 else "one size of batch"
    axes = "" if row_ways(mesh) == mesh.shape["data"] == mesh.size else f" ({describe(mesh)})"
    many = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    shared = ready.batches.sharing()
    return [
        f"{ready.steps} steps on {mesh.size} x {kind}{many}{axes}; {shapes}",
        f"attention: {ready.attention}{shared and f'; {shared}'}",
    ]
