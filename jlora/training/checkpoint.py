"""Orbax checkpoints of a run: adapter, optimizer state, step, and the progress of the evaluations.

Checkpoints are written atomically, in the background, with a checksum of each file that is verified before reading. The
latest two and the best are kept. The base model is never saved. The arrays here are complete arrays in host memory, so
that a run can continue on any mesh and any number of processes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora.adapters.params import Adapter
from jlora.common import typed_json
from jlora.common.atomic_io import UNFINISHED, new_directory, replace_text
from jlora.common.errors import UserError
from jlora.config.files import typed
from jlora.config.schema import Config
from jlora.steps.train_step import TrainState

CHECKSUMS = "sha256.json"  # in each checkpoint: file -> sha256 of its content


@dataclasses.dataclass
class Progress:
    """The results of a run's evaluations. Losses are mean held-out losses, in nats per target."""

    base_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    worse_since: int | None = None  # the first evaluation after the best one
    worse: int = 0  # evaluations since the best one
    eval_loss: float | None = None  # at the step of the checkpoint; None if that step was not evaluated

    def record(self, step: int, loss: float) -> None:
        """Records an evaluation; an equal loss counts as better, since the later checkpoint is kept."""
        if self.best_loss is None or loss <= self.best_loss:
            self.best_loss, self.best_step, self.worse_since, self.worse = loss, step, None, 0
        else:
            self.worse_since = self.worse_since or step
            self.worse += 1


class Checkpoints:
    """The checkpoints of one run, in `output_dir/checkpoints/STEP`."""

    def __init__(self, run: Path) -> None:
        self.directory = run.resolve() / "checkpoints"
        me = jax.process_index()  # otherwise Orbax waits for the other processes, which do not take part
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"of process {me}"
        )
        items = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
        self._orbax = ocp.Checkpointer(items, multiprocessing_options=alone)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first, damaged ones included."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the lowest held-out loss, whether or not its checkpoint is left; else the newest."""
        steps, _ = self.intact_steps()
        newest = steps[-1] if steps else self.latest()
        return None if newest is None else self.progress(newest).best_step or newest

    def find_damage(self, step: int) -> str:
        """Describes how a checkpoint differs from what was written; returns "" if it is intact."""
        try:
            sums = json.loads((self.directory / str(step) / CHECKSUMS).read_text(encoding="utf-8"))
            for name, expected in sums.items():
                with (self.directory / str(step) / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        return f"{name} differs from what was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).relative_to(self.directory / str(step))} is missing"
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            return f"{CHECKSUMS} or a file listed in it cannot be read: {error}"
        return ""

    def intact_steps(self) -> tuple[list[int], list[str]]:
        """Returns the steps up to the newest intact checkpoint, and a description of each damaged one after it."""
        steps, damaged = self.steps(), []
        while steps and (damage := self.find_damage(steps[-1])):
            damaged.append(f"the checkpoint of step {steps.pop()} is damaged ({damage})")
        return steps, damaged

    def clean_up(self, *, keep_intact: bool) -> list[str]:
        """Removes unfinished checkpoints and renames damaged ones; the caller holds the lock of the run's directory.

        Args:
          keep_intact: the run continues from these checkpoints. If False, they are left over from a start that was
            killed before it was recorded, and all of them are renamed.

        Returns:
          A line for each renamed checkpoint.
        """
        for path in self.directory.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        lines = []
        for step in self.steps():
            problem = self.find_damage(step) if keep_intact else "left over from a start that was killed"
            if problem:
                directory = self.directory / str(step)
                renamed = next(p for n in range(1000) if not (p := Path(f"{directory}.damaged-{n}")).exists())
                directory.rename(renamed)
                lines.append(f"Moved the checkpoint of step {step} ({problem}) to {renamed}")
        return lines

    def save(self, state: TrainState, progress: Progress, eval_loss: float | None) -> None:
        """Starts to write a checkpoint in the background, unless the step is already saved.

        It first waits for the previous checkpoint to be written.

        Args:
          state: arrays that the caller no longer changes.

        Raises:
          UserError: the previous checkpoint could not be written; the message names the newest one that is safe.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        items = {
            "lora": ocp.args.StandardSave(state.lora),
            "optimizer": ocp.args.StandardSave(_state_without_adapter(state)),
            "progress": ocp.args.JsonSave(dataclasses.asdict(dataclasses.replace(progress, eval_loss=eval_loss))),
        }
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._writing = self._writer.submit(self._write, step, size, items, progress.best_step)

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
          UserError: it could not be written; the message names the newest checkpoint that is safe.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"A checkpoint could not be saved in {self.directory}: {self._explain(error)}") from error

    def _write(self, step: int, size: int, items: dict[str, Any], best: int | None) -> None:
        """Writes a checkpoint, then removes all but the latest two and the best."""
        self.directory.mkdir(exist_ok=True)  # not its parents: a missing run directory is an error
        with new_directory(self.directory / str(step)) as made:
            self._check_space(size)
            self._orbax.save(made, args=ocp.args.Composite(**items), force=True)
            files = sorted(path for path in made.rglob("*") if path.is_file())
            checksums = {str(file.relative_to(made)): _sync_and_hash(file) for file in files}
            # No final newline: a file that loses its last byte must not parse.
            (made / CHECKSUMS).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
            _sync_and_hash(made / CHECKSUMS)
        steps = self.steps()
        for old in steps:
            if old not in (*steps[-2:], best):
                self._remove(old)

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps; the caller holds the lock of the run's directory."""
        for later in [other for other in self.steps() if other > step]:
            self._remove(later)

    def _remove(self, step: int) -> None:
        with contextlib.suppress(OSError):  # the next start removes what is left
            shutil.rmtree((self.directory / str(step)).rename(self.directory / f"{UNFINISHED}{step}"))  # atomic

    def _check_space(self, size: int) -> None:
        """Raises an OSError if `size` bytes and Orbax's own files do not fit: Orbax would raise it in many threads."""
        with tempfile.TemporaryFile(dir=self.directory) as probe:
            if hasattr(os, "posix_fallocate"):  # macOS lacks it
                os.posix_fallocate(probe.fileno(), 0, size + size // 4 + (1 << 18))

    @contextlib.contextmanager
    def explain_write_errors(self) -> Iterator[None]:
        """Turns an OSError into a UserError that names the newest checkpoint that is safe."""
        try:
            yield
        except BrokenPipeError:  # from printing
            raise
        except OSError as error:
            raise UserError(f"The run could not be written: {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        """Explains why a write failed, which checkpoint is safe, and how to continue."""
        reason = str(error).strip().split("\n")[0]
        latest = self.latest()
        safe = "No checkpoint was saved before" if latest is None else f"The checkpoint of step {latest} is safe"
        return (
            f"{reason[:300]}. {safe}. Free disk space or fix the directory, then run again with "
            "--config.resume_from_checkpoint=auto."
        )

    def restore(self, step: int, shapes: TrainState) -> TrainState:
        """Reads the state of a step; `shapes` gives the shapes and dtypes."""
        found = self._read(
            step,
            lora=ocp.args.StandardRestore(_empty_arrays(shapes.lora)),
            optimizer=ocp.args.StandardRestore(_empty_arrays(_state_without_adapter(shapes))),
        )
        return TrainState(found["lora"], **found["optimizer"])

    def restore_adapter(self, step: int, shapes: Adapter) -> Adapter:
        """Reads only the adapter of a step; `shapes` gives the shapes and dtypes."""
        return self._read(step, lora=ocp.args.StandardRestore(_empty_arrays(shapes)))["lora"]

    def progress(self, step: int) -> Progress:
        """Reads only the progress at a step; its best step is dropped if that checkpoint is missing or damaged."""
        progress = Progress(**self._read(step, progress=ocp.args.JsonRestore())["progress"])
        best = progress.best_step
        if best is None or best == step or (best in self.steps() and not self.find_damage(best)):
            return progress
        return dataclasses.replace(progress, best_loss=None, best_step=None, worse_since=None, worse=0)

    def _read(self, step: int, **items: Any) -> Any:
        if damage := self.find_damage(step):
            others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
            raise UserError(
                f"The checkpoint of step {step} in {self.directory} is damaged ({damage}). Other available steps: "
                f"{others}."
            )
        return self._orbax.restore(self.directory / str(step), args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Waits for the last checkpoint and ends the threads."""
        self.wait()
        self._writer.shutdown()
        self._orbax.close()


def _sync_and_hash(file: Path) -> str:
    """Flushes a file to disk and returns its sha256."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _empty_arrays(shapes: Any) -> Any:
    """Returns host arrays for Orbax to read into."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)


def _state_without_adapter(state: TrainState) -> dict[str, Any]:
    """Returns the fields that are saved with the optimizer; the loss scale only if there is one."""
    return {name: value for name, value in state._asdict().items() if name != "lora" and value is not None}


def write_record(run: Path, record: dict[str, Any]) -> None:
    """Writes config.json of a run: its resolved settings, package versions, and hashes of data and base model."""
    replace_text(run / "config.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


class Record(typed_json.Strict):
    """The parts of a run's config.json."""

    config: dict[str, Any]
    data: dict[str, str]
    base: dict[str, str]
    versions: dict[str, str]
    runtime: dict[str, Any]


def read_record(run: Path, key: str) -> dict[str, Any]:
    """Reads config.json of a run.

    Args:
      run: the run's output_dir.
      key: the setting or option that named it, for the error message.

    Raises:
      UserError: `run` is not the output_dir of a run.
    """
    try:
        read, _ = typed_json.parse(Record, typed_json.read_object(run / "config.json"))
    except (OSError, UserError):
        read = None
    if read is None:
        raise UserError(
            f"{key}={run} is not the output_dir of a run: it has no config.json that jlora wrote. Expected a directory "
            "that `jlora train` created."
        )
    record: dict[str, Any] = read.model_dump()
    settings = {**dataclasses.asdict(Config()), **record["config"]}  # settings newer than the run have their defaults
    record["config"], problems = typed(settings)
    if problems:
        raise UserError(f"{key}={run}: Its config.json is damaged: {' '.join(problems)}")
    record["base"] = {"commit": "", "vocabulary": "", **record["base"]}
    record["runtime"] = {"attention": "xla", "remat": "none", **record["runtime"]}
    return record
