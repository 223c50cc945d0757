"""Trains a LoRA adapter: `python -m jlora.train --config configs/law.py [--config.KEY=VALUE ...]`.

This file is the wiring; the loop is in loop.py. Exit codes: 0 done, or saved on SIGTERM; 2 something to change;
130 saved on Ctrl-C; 1 another process of the run is gone, or a fault of ours.
"""

import contextlib
import dataclasses
import functools
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jlora import heap, hosts, lora, resume
from jlora.checkpoint import Checkpoints, Progress, write_record
from jlora.compiling import keep_programs
from jlora.config import Config
from jlora.config_files import config_parser, load_config
from jlora.errors import run_program
from jlora.export import export_run, spec_of
from jlora.forecast import Job, bytes_of, laid_out
from jlora.generator import Generator, show_answers
from jlora.known import Known
from jlora.loop import Loop, overfitting, save
from jlora.metrics import Logger, loading_bar
from jlora.model import hf
from jlora.peft_format import read_adapter, written_step
from jlora.programs import Programs, fresh_state, placed_shapes
from jlora.ready import Ready, choose_platform, find_devices, make_ready
from jlora.search import ensure_fits, first_fit
from jlora.sharding import describe, place, places_of, row_ways
from jlora.sites import LoraConfig
from jlora.step import TrainState
from jlora.targets import find_target


def main(argv: list[str]) -> None:
    """The command line."""
    parser = config_parser("jlora.train", "Trains a LoRA adapter.")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    own = tuple(f"--config.{key}=" for key in (resume.KEY, "process_id"))
    kept = [word for word in overrides if not word.startswith(own)]
    if config.process_id >= 0:
        kept.append("--config.process_id=N")
    again = [sys.executable, "-m", "jlora.train", "--config", arguments.config, *kept, f"--config.{resume.KEY}=auto"]
    choose_platform(config)
    hosts.join(config.coordinator_address, config.num_processes, config.process_id)
    find_devices(config)
    hosts.hush()
    keep_programs()
    with hosts.surviving():
        train(config, shlex.join(again))


def train(config: Config, again: str) -> None:
    """One run, from files to an adapter; `again` is the command that would continue it."""
    with hosts.together():
        ready = make_ready(config)
    run, config, record = Path(config.output_dir), ready.config, ready.record
    with contextlib.ExitStack() as held:  # the run's place, by the first process
        start = resume.Start(**hosts.of_first(lambda: dataclasses.asdict(resume.take(config, record, held))))
        print(start.message)
        if start.remat and config.remat == "auto":  # else it would not be bit for bit the same
            ready = ready._replace(config=dataclasses.replace(config, remat=start.remat))
        programs, adapter = load(ready)
        state = fresh_state(adapter, programs.optimizer, ready.mesh, ready.compute.compute_dtype)
        state, progress = begin(start, state)
        stop, checkpoints = hosts.Stop(), Checkpoints(run)
        warm = not start.exact and bool(start.source or config.init_adapter)
        with hosts.together(), checkpoints.writable():
            if hosts.is_first():
                for line in checkpoints.clear(keep=start.exact):
                    print(line)
        if warm:
            save(checkpoints, state, progress, None)
        with hosts.together(), checkpoints.writable():
            checkpoints.wait()  # before the run has a record, so that no restart begins from nothing
            if hosts.is_first():
                write_record(run, record)
            logger = Logger(run, int(state.step), ready.steps, silent=not hosts.is_first())
        print(*outline(ready), sep="\n", flush=True)
        with logger:
            todo = (ready.batches, ready.held_out, ready.steps)
            known = functools.partial(base_loss, ready)
            state = Loop(config, programs, *todo, checkpoints, logger, progress, stop, known, warm).run(state)
        with hosts.together():
            checkpoints.wait()
        if stop.signal:
            print(
                f"stopped after step {int(state.step)} of {ready.steps}; it is saved. To continue"
                f"{', in every process' if jax.process_count() > 1 else ''}:\n  {again}\n"
                f"The adapter so far: {sys.executable} -m jlora.export --run {run} --step latest"
            )
            sys.exit(130 if stop.signal is signal.SIGINT else 0)
        finish(ready, run, checkpoints, progress, state, programs)


def load(ready: Ready) -> tuple[Programs, lora.Adapter]:
    """The programs, with the base in its place and the training step compiled, and the adapter of step 0.

    Raises:
      UserError: it does not fit the memory; says what would.
    """
    config, mesh, batches = ready.config, ready.mesh, ready.batches
    spec = spec_of(ready.record["config"])
    _, shapes, base_shapes = hf.abstract(ready.model, spec, ready.compute)
    here, layout = find_target("here", mesh.devices.flatten().tolist()), laid_out(ready.model, ready.examples)
    here = here._replace(limit=hosts.least(here.limit))
    job = Job(config, ready.model, ready.compute, batches.micro_batches, batches.rows, batches.shapes[-1])
    with ThreadPoolExecutor(1) as beside:  # the step compiles while the base is read
        fitted = beside.submit(first_fit, job, here, ready.steps, print)
        size = bytes_of(placed_shapes(base_shapes, mesh, "base"))
        if here.limit is not None and size > here.limit:
            with hosts.together():
                ensure_fits(fitted.result()[0], here, layout, print)
        with hosts.together(), loading_bar(size, silent=not hosts.is_first()) as bar:
            base = hf.load_base(ready.directory, base_shapes, mesh, bar.update)
        seen, programs = fitted.result()
    with hosts.together():
        ensure_fits(seen, here, layout, print)
    programs.base, ready.record["runtime"]["remat"] = base, seen.job.compute.remat
    if jax.default_backend() == "cpu":
        heap.keep_freed()
    return programs, first_adapter(config, spec, shapes, base, tied=ready.model.tie_word_embeddings)


def first_adapter(config: Config, spec: LoraConfig, shapes: lora.Adapter, base: Any, *, tied: bool) -> lora.Adapter:
    """The adapter of step 0: `init_adapter`, or one that does nothing yet."""
    if not config.init_adapter:
        return jax.jit(lambda base: lora.start(spec, shapes, base, jax.random.key(config.seed)))(base)
    given = hosts.arrays_of_first(lambda: read_adapter(Path(config.init_adapter), spec, shapes, tied=tied), shapes)
    return jax.jit(lambda adapter, base: lora.complete(spec, adapter, base))(given, base)


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
            adapter = hosts.arrays_of_first(lambda: source.restore_adapter(start.step, fresh.lora), fresh.lora)
            return fresh._replace(lora=place(adapter, places.lora)), Progress()
        state = hosts.arrays_of_first(lambda: source.restore(start.step, fresh), fresh)
        progress = hosts.of_first(lambda: dataclasses.asdict(source.progress(start.step)))
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


def finish(
    ready: Ready, run: Path, checkpoints: Checkpoints, progress: Progress, state: TrainState, programs: Programs
) -> None:
    """Exports the best adapter, says how it did, and lets base and adapter answer some held-out questions."""
    step, adapter = progress.best_step or int(state.step), state.lora
    if step != int(state.step):
        best = hosts.arrays_of_first(lambda: checkpoints.restore_adapter(step, adapter), adapter)
        adapter = place(best, places_of(adapter))
    checkpoints.close()
    if progress.best_loss is not None and progress.base_loss is not None:
        change = progress.best_loss / progress.base_loss - 1
        print(
            f"held-out loss: {progress.base_loss:.4f} before, {progress.best_loss:.4f} at step {step} ({change:+.0%})"
        )
    if progress.worse_since:
        print(overfitting(progress))
    asked = [row for row in ready.asked if not row.plain]
    generator = Generator(
        ready.directory, ready.tokenizer, programs.graphdef, programs.base, ready.compute.compute_dtype
    )
    for line in show_answers(generator, adapter, asked[: ready.config.sample_questions]):
        print(line)
    target = run / "adapter"
    with hosts.together():
        if not hosts.is_first():
            return
        if target.exists() and written_step(target) != step:  # of an earlier end of this run, gone on from since
            target = run / f"adapter-{step}"
        if not target.exists():
            export_run(run, step, target)
    print(f"adapter of step {step}: {target}")
    if ready.config.system_prompt:
        asked_with = shlex.quote(ready.config.system_prompt)
        print(f"it knows one system prompt, so ask it with the same: --system {asked_with}")


if __name__ == "__main__":
    run_program(main)
