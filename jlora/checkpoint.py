"""Orbax checkpoints of what training changes: adapter, optimizer state, step; and what the loop remembers.

The latest two and the best are kept. The base is never saved.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora.config import Config
from jlora.errors import UserError
from jlora.lora import Adapter
from jlora.step import TrainState
from jlora.whole import replace_text


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


class LatestAndBest:
    """Orbax's preservation policy: the latest two and the best. (Orbax's own forgets all losses when a run goes on.)"""

    best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer for each checkpoint, oldest first."""
        latest = [checkpoint.step for checkpoint in checkpoints[-2:]]
        return [checkpoint.step in (*latest, self.best_step) for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one run, in `output_dir/checkpoints/STEP`."""

    def __init__(self, run: Path) -> None:
        self.directory = run.resolve() / "checkpoints"
        self._kept = LatestAndBest()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=self._kept, enable_async_checkpointing=False),
        )

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest complete checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step that evaluated best, whether or not it is still there; without evaluations the latest."""
        latest = self.latest()
        return None if latest is None else self.progress(latest).best_step or latest

    def save(self, state: TrainState, progress: Progress, eval_loss: float | None) -> None:
        """Saves the state's step, unless it is saved already.

        Raises:
          UserError: it could not be written; says why, and which checkpoint is safe.
        """
        step = int(state.step)
        if step in self.steps():
            return
        items = {
            "lora": ocp.args.StandardSave(state.lora),
            "optimizer": ocp.args.StandardSave(_besides_adapter(state)),
            "progress": ocp.args.JsonSave(dataclasses.asdict(dataclasses.replace(progress, eval_loss=eval_loss))),
        }
        self._kept.best_step = progress.best_step
        try:
            self._reserve(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            saved = self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"step {step} could not be saved in {self.directory}: {self.cannot_write(error)}"
            ) from error
        assert saved, f"Orbax refused step {step}; it has {self.steps()}"

    def _reserve(self, size: int) -> None:
        """Raises OSError where `size` bytes and Orbax's files do not fit: once, where Orbax would in many threads."""
        with tempfile.TemporaryFile(dir=self.directory) as probe:
            if hasattr(os, "posix_fallocate"):  # macOS lacks it
                os.posix_fallocate(probe.fileno(), 0, size + size // 4 + (1 << 18))

    def cannot_write(self, error: Exception) -> str:
        """Why a write failed, which checkpoint is safe, and how to go on."""
        reason = str(error).strip().split("\n")[0]
        latest = self.latest()
        safe = "Nothing was saved before" if latest is None else f"The checkpoint of step {latest} is safe"
        return (
            f"{reason[:300]}. {safe}. Free space or mend the directory, then run again with "
            "--config.resume_from_checkpoint=auto"
        )

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, Progress]:
        """State and progress of a step; `target` gives shapes, dtypes and shardings."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        found = self._read(
            step,
            lora=ocp.args.StandardRestore(shapes.lora),
            optimizer=ocp.args.StandardRestore(_besides_adapter(shapes)),
            progress=ocp.args.JsonRestore(),
        )
        return TrainState(found["lora"], **found["optimizer"]), Progress(**found["progress"])

    def restore_adapter(self, step: int, shapes: Adapter) -> Adapter:
        """Only the adapter of a step; `shapes` gives shapes, dtypes and, where not one device holds it, shardings."""
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # else Orbax wants the devices that saved it
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or one), shapes
        )
        return self._read(step, lora=ocp.args.StandardRestore(placed))["lora"]

    def progress(self, step: int) -> Progress:
        """Only what the loop remembered at a step."""
        return Progress(**self._read(step, progress=ocp.args.JsonRestore())["progress"])

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError, TypeError) as error:  # whatever a damaged file makes of Orbax
            reason = str(error).strip().split("\n")[0][:200]
            others = ", ".join(str(other) for other in self.steps() if other != step) or "none"
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} is damaged ({reason}). Other steps there: "
                f"{others}. Move {self.directory / str(step)} away to use the latest of them"
            ) from error

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


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
    record["config"] = {**dataclasses.asdict(Config()), **record["config"]}  # a setting newer than the run was off
    record["base"] = {"commit": "", **record["base"]}
    record["runtime"] = {"attention": "xla", "remat": "none", **record["runtime"]}
    return record
