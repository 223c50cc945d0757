"""Orbax checkpoints of what training changes: adapter, optimizer state, step; and what the loop remembers.

Each is written beside training, whole or not at all, with the hashes of its files, which are looked at before it is
read. The latest two and the best are kept. The base is never saved. Arrays are of the host here, whole, so that any
mesh of any number of processes can go on with them.
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

from jlora.adapters.tree import Adapter
from jlora.common.atomic_io import UNFINISHED, new_directory, replace_text
from jlora.common.errors import UserError
from jlora.config.files import typed
from jlora.config.schema import Config
from jlora.steps.step import TrainState

SUMS = "sha256.json"  # in a checkpoint: file -> hash of its content


@dataclasses.dataclass
class Progress:
    """What the loop remembers besides arrays. Losses are of the held-out examples, nats a target."""

    base_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    worse_since: int | None = None  # the first evaluation after the best one
    worse: int = 0  # evaluations since the best one
    eval_loss: float | None = None  # of the checkpoint that this is saved in; None where it was not evaluated

    def record(self, step: int, loss: float) -> None:
        """Takes in one evaluation; an equal loss counts as better, as the later checkpoint is the one kept."""
        if self.best_loss is None or loss <= self.best_loss:
            self.best_loss, self.best_step, self.worse_since, self.worse = loss, step, None, 0
        else:
            self.worse_since = self.worse_since or step
            self.worse += 1


class Checkpoints:
    """The checkpoints of one run, in `output_dir/checkpoints/STEP`."""

    def __init__(self, run: Path) -> None:
        self.directory = run.resolve() / "checkpoints"
        me = jax.process_index()  # Orbax else waits for the other processes of the run, which have no part in this
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"of process {me}"
        )
        items = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
        self._orbax = ocp.Checkpointer(items, multiprocessing_options=alone)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first; a damaged one is among them."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def latest(self) -> int | None:
        """The newest complete checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step that evaluated best, whether or not it is still there; without evaluations the newest sound one."""
        steps, _ = self.sound_steps()
        newest = steps[-1] if steps else self.latest()
        return None if newest is None else self.progress(newest).best_step or newest

    def damage(self, step: int) -> str:
        """How a checkpoint differs from what was written; "" where it does not."""
        try:
            sums = json.loads((self.directory / str(step) / SUMS).read_text(encoding="utf-8"))
            for name, expected in sums.items():
                with (self.directory / str(step) / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        return f"{name} is not what was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).relative_to(self.directory / str(step))} is missing"
        except (OSError, ValueError, AttributeError) as error:
            return f"{SUMS} or a file that it lists cannot be read: {error}"
        return ""

    def sound_steps(self) -> tuple[list[int], list[str]]:
        """The checkpoints up to the newest that is not damaged, and how those after it are."""
        steps, damaged = self.steps(), []
        while steps and (damage := self.damage(steps[-1])):
            damaged.append(f"the checkpoint of step {steps.pop()} is damaged ({damage})")
        return steps, damaged

    def clear(self, *, keep: bool) -> list[str]:
        """Removes what a killed process left half written, and sets damaged checkpoints aside; only under `claim`.

        Args:
          keep: the run goes on from what is there; else all of it is of a start that was never recorded, and set aside.

        Returns:
          What was set aside, in words.
        """
        for path in self.directory.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        said = []
        for step in self.steps():
            why = self.damage(step) if keep else "of a start that was not recorded"
            if why:
                place = self.directory / str(step)
                aside = next(p for n in range(1000) if not (p := Path(f"{place}.damaged-{n}")).exists())
                place.rename(aside)
                said.append(f"the checkpoint of step {step} ({why}) is now {aside}")
        return said

    def save(self, state: TrainState, progress: Progress, eval_loss: float | None) -> None:
        """Begins to write the state's step, unless it is there already; waits for the one before, but not for this.

        Args:
          state: of arrays that nobody changes from now on.

        Raises:
          UserError: this or the one before could not be written; says why, and which checkpoint is safe.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            return
        items = {
            "lora": ocp.args.StandardSave(state.lora),
            "optimizer": ocp.args.StandardSave(_besides_adapter(state)),
            "progress": ocp.args.JsonSave(dataclasses.asdict(dataclasses.replace(progress, eval_loss=eval_loss))),
        }
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._writing = self._writer.submit(self._write, step, size, items, progress.best_step)

    def wait(self) -> None:
        """Until what was saved is written.

        Raises:
          UserError: as for `save`.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"a checkpoint could not be saved in {self.directory}: {self._cannot_write(error)}"
            ) from error

    def _write(self, step: int, size: int, items: dict[str, Any], best: int | None) -> None:
        """Writes one checkpoint and then removes those that are no longer wanted."""
        self.directory.mkdir(exist_ok=True)  # not its parents: where the run's directory has gone, that is an error
        with new_directory(self.directory / str(step)) as made:
            self._reserve(size)
            self._orbax.save(made, args=ocp.args.Composite(**items), force=True)
            files = sorted(path for path in made.rglob("*") if path.is_file())
            sums = {str(file.relative_to(made)): _settled(file) for file in files}
            (made / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")  # without an end that may be lost
            _settled(made / SUMS)
        steps = self.steps()
        for old in steps:
            if old not in (*steps[-2:], best):
                with contextlib.suppress(OSError):  # what cannot be removed now is so at the next start
                    gone = (self.directory / str(old)).rename(self.directory / f"{UNFINISHED}{old}")  # at once
                    shutil.rmtree(gone)

    def _reserve(self, size: int) -> None:
        """Raises OSError where `size` bytes and Orbax's files do not fit: once, where Orbax would in many threads."""
        with tempfile.TemporaryFile(dir=self.directory) as probe:
            if hasattr(os, "posix_fallocate"):  # macOS lacks it
                os.posix_fallocate(probe.fileno(), 0, size + size // 4 + (1 << 18))

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """What of the run cannot be written within is said, with the checkpoint that is safe."""
        try:
            yield
        except BrokenPipeError:  # of what is printed
            raise
        except OSError as error:
            raise UserError(f"the run could not be written: {self._cannot_write(error)}") from error

    def _cannot_write(self, error: Exception) -> str:
        """Why a write failed, which checkpoint is safe, and how to go on."""
        reason = str(error).strip().split("\n")[0]
        latest = self.latest()
        safe = "Nothing was saved before" if latest is None else f"The checkpoint of step {latest} is safe"
        return (
            f"{reason[:300]}. {safe}. Free space or mend the directory, then run again with "
            "--config.resume_from_checkpoint=auto"
        )

    def restore(self, step: int, shapes: TrainState) -> TrainState:
        """The state of a step; `shapes` gives shapes and dtypes."""
        found = self._read(
            step,
            lora=ocp.args.StandardRestore(_host(shapes.lora)),
            optimizer=ocp.args.StandardRestore(_host(_besides_adapter(shapes))),
        )
        return TrainState(found["lora"], **found["optimizer"])

    def restore_adapter(self, step: int, shapes: Adapter) -> Adapter:
        """Only the adapter of a step; `shapes` gives shapes and dtypes."""
        return self._read(step, lora=ocp.args.StandardRestore(_host(shapes)))["lora"]

    def progress(self, step: int) -> Progress:
        """Only what the loop remembered at a step; without a best step whose checkpoint is lost or damaged."""
        progress = Progress(**self._read(step, progress=ocp.args.JsonRestore())["progress"])
        best = progress.best_step
        if best is None or best == step or (best in self.steps() and not self.damage(best)):
            return progress
        return dataclasses.replace(progress, best_loss=None, best_step=None, worse_since=None, worse=0)

    def _read(self, step: int, **items: Any) -> Any:
        if damage := self.damage(step):
            others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} is damaged ({damage}). Other steps there: {others}"
            )
        return self._orbax.restore(self.directory / str(step), args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Ends the threads, after what is being written."""
        self.wait()
        self._writer.shutdown()
        self._orbax.close()


def _settled(file: Path) -> str:
    """A file's hash, once its content is on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _host(shapes: Any) -> Any:
    """Arrays of the host for Orbax to read into."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)


def _besides_adapter(state: TrainState) -> dict[str, Any]:
    """The fields that are saved with the optimizer; a loss scale only where there is one."""
    return {name: value for name, value in state._asdict().items() if name != "lora" and value is not None}


def write_record(run: Path, record: dict[str, Any]) -> None:
    """config.json of a run: what was run, resolved, with versions and data hashes."""
    replace_text(run / "config.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_record(run: Path, key: str) -> dict[str, Any]:
    """config.json of a run that `key` names."""
    try:
        record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if not isinstance(record, dict) or not {"config", "data", "base", "versions", "runtime"} <= record.keys():
        raise UserError(f"{key}={run}: not the output_dir of a run (its config.json is not a run's)")
    settings = {**dataclasses.asdict(Config()), **record["config"]}  # a setting newer than the run was off
    record["config"], problems = typed(settings)
    if problems:
        raise UserError(f"{key}={run}: its config.json is damaged: {'; '.join(problems)}")
    record["base"] = {"commit": "", **record["base"]}
    record["runtime"] = {"attention": "xla", "remat": "none", **record["runtime"]}
    return record
