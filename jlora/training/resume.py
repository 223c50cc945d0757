"""Decides where a run starts: new, where it stopped, or warm (a new run from the adapter of another run)."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.adapters.peft_config import CONFIG
from jlora.adapters.settings import settings_of
from jlora.adapters.spec import NO_ADAPTER
from jlora.common.atomic_io import finished_names
from jlora.common.errors import UserError
from jlora.common.paths import looked_for
from jlora.config.schema import MAY_CHANGE_ON_RESUME, Config
from jlora.training.checkpoint import Checkpoints, read_record

try:
    import fcntl
except ImportError:  # Windows has no flock, so two runs in one directory go unnoticed there
    fcntl = None  # type: ignore[assignment]

RESUME_KEY = "resume_from_checkpoint"
ADAPTER_KEYS = [key for key in settings_of(NO_ADAPTER) if key != "lora_dropout"]  # a warm start cannot change these
# Files that a run writes before its first checkpoint.
EARLY_FILES = {"config.json", "metrics.jsonl", "logs", "checkpoints", "trackers.json", ".lock"}


@dataclasses.dataclass(frozen=True)
class StartPoint:
    """Where a run starts."""

    source: str  # the run whose checkpoint it starts from; "": a new run
    step: int  # of that checkpoint
    exact: bool  # continue with the optimizer state and schedule; False: take only the adapter
    message: str  # for the user
    remat: str = ""  # the remat that the run used before; "": as configured


def check_output(config: Config) -> None:
    """Checks `output_dir` before any work is done.

    Raises:
      UserError: it is not a directory, or contains files but the config does not resume a run.
    """
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output} is a file. Set output_dir to a directory.")
    if _contains_files(output) and not config.resume_from_checkpoint:
        if (output / "config.json").exists():
            raise UserError(
                f"output_dir={output} already contains a run, and jlora never overwrites one. To continue it, add "
                f"--config.{RESUME_KEY}=auto. To start a new run, set another output_dir."
            )
        raise UserError(f"output_dir={output} already contains files, and jlora never overwrites. Set another one.")


def find_date(config: Config) -> str:
    """Returns the date that a chat template states: `chat_date`, that of the run which continues, or today's."""
    output, recorded = Path(config.output_dir), ""
    if config.resume_from_checkpoint == "auto" and (output / "config.json").exists():
        recorded = read_record(output, f"{RESUME_KEY}=auto, output_dir")["config"]["chat_date"]
    return config.chat_date or recorded or datetime.date.today().isoformat()


@contextlib.contextmanager
def lock_run_directory(output: Path) -> Iterator[None]:
    """Creates and locks the run's directory; removes it at the end if it is still empty."""
    file = output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+")
    except OSError as error:
        raise UserError(f"output_dir={output} cannot be written: {error.strerror}. Set another output_dir.") from None
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"Another process is training in output_dir={output}. Stop it, or set another output_dir."
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [path.name for path in output.iterdir()] == [file.name]:
                    file.unlink()
                    output.rmdir()


def lock_and_decide(config: Config, record: dict[str, Any], stack: contextlib.ExitStack) -> StartPoint:
    """Decides where the run starts, and locks its directory until `stack` closes; errors leave no directory behind."""
    decide_start(config, record)
    stack.enter_context(lock_run_directory(Path(config.output_dir)))
    return decide_start(config, record)  # again: another process may have trained there until it was locked


def decide_start(config: Config, record: dict[str, Any]) -> StartPoint:
    """Decides where the run described by `record` starts.

    Args:
      config: the run; its `resume_from_checkpoint` is "", "auto", a run's directory, or one of its checkpoints.
      record: the contents of the run's config.json: settings, data hashes, base model, versions.

    Raises:
      UserError: there is nothing to continue, it does not match the config, or `output_dir` contains other files.
    """
    output, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if not wanted:
        return StartPoint("", 0, False, "Starting a new run")
    if wanted == "auto" or Path(wanted).expanduser().resolve() == output.resolve():
        return _continue_in_place(output, record)
    if _contains_files(output):
        raise UserError(
            f"output_dir={output} is not empty, but a warm start is a new run and needs its own directory. Set another "
            f"output_dir. To continue the run in {output} instead, set --config.{RESUME_KEY}=auto."
        )
    source, step = _find_checkpoint(Path(wanted).expanduser())
    changes = describe_changes(read_record(source, RESUME_KEY), record)
    conflicts = [changes[key] for key in (*ADAPTER_KEYS, "base") if key in changes]
    if conflicts:
        raise UserError(
            f"The adapter of {RESUME_KEY}={wanted} does not fit this config: {'; '.join(conflicts)}. "
            "Undo these changes."
        )
    listed = f" ({'; '.join(changes.values())})" if changes else ""
    start = f"Warm start from the adapter of {source}, step {step}, with a fresh learning rate schedule{listed}"
    return StartPoint(str(source), step, False, start)


def _continue_in_place(output: Path, record: dict[str, Any]) -> StartPoint:
    """Continues from the latest intact checkpoint in `output`; starts a new run if no checkpoint was written yet."""
    if not _contains_files(output):
        if (output / "checkpoints").exists() and not record["config"]["init_adapter"]:
            raise UserError(
                f"The warm start in {output} was killed before it was recorded. Start it again with the "
                f"{RESUME_KEY} that it was first started with."
            )
        return StartPoint("", 0, False, f"Starting a new run: {output} contains nothing to continue")
    old = read_record(output, f"{RESUME_KEY}=auto, output_dir")
    if changes := describe_changes(old, record):
        raise UserError(
            f"The run in {output} cannot continue exactly: {'; '.join(changes.values())}. Undo these changes. Or start "
            f"a new run from its adapter (a warm start): set another output_dir and --config.{RESUME_KEY}={output}."
        )
    with contextlib.closing(Checkpoints(output)) as checkpoints:
        steps, damaged = checkpoints.intact_steps()
    if not steps:
        if damaged:
            raise UserError(
                f"{output} has no checkpoint to continue from: {'; '.join(damaged)}. Set another output_dir."
            )
        if other := finished_names(output) - EARLY_FILES:
            raise UserError(
                f"{output} has no checkpoint to continue from, but contains {', '.join(sorted(other))}. Set another "
                "output_dir."
            )
        return StartPoint("", 0, False, f"Starting a new run: {output} was stopped before its first checkpoint")
    before, now = ({**r["versions"], **r["runtime"]} for r in (old, record))
    moved = [f"{key} changed from {before[key]} to {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
    exactly = f"but not bit for bit, because {'; '.join(moved)}" if moved else "exactly"
    skipped = "".join(f"Warning: {description}. Skipping it\n" for description in damaged)
    message = f"{skipped}Continuing {output} from step {steps[-1]}, {exactly}"
    return StartPoint(str(output), steps[-1], True, message, "" if moved else old["runtime"]["remat"])


def _contains_files(output: Path) -> bool:
    """Returns whether `output` contains more than what a start leaves that was killed before it wrote config.json."""
    return output.is_dir() and not finished_names(output) <= {".lock", "checkpoints"}


def _find_checkpoint(path: Path) -> tuple[Path, int]:
    """Returns run and step for a run's directory (its best step, else its latest) or for `RUN/checkpoints/STEP`."""
    run, step = (path.parent.parent, path.name) if path.parent.name == "checkpoints" else (path, "")
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        steps = checkpoints.steps()
        if not steps and (path / CONFIG).is_file():
            raise UserError(
                f"{RESUME_KEY}={path} is a PEFT directory, and not a run of jlora. To train its adapter further, set "
                f"init_adapter={path} instead."
            )
        if not steps:
            raise UserError(
                f"{RESUME_KEY}={path} contains no checkpoints. Expected the output_dir of a run, or "
                f"RUN/checkpoints/STEP.{'' if path.exists() else looked_for(path)}"
            )
        if step and (not step.isdigit() or int(step) not in steps):
            raise UserError(f"{RESUME_KEY}={path} does not exist. Available steps: {', '.join(map(str, steps))}.")
        if step:
            return run, int(step)
        best = checkpoints.best()
    return run, best if best in steps else steps[-1]


def describe_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Describes the differences between two runs' records that affect training, by key."""
    changes = {}
    before, now = old["config"], new["config"]
    data_keys = {"train_data_dir", "eval_data_dir", "base_model", "revision"}  # compared by content, below
    for key in sorted(now.keys() - MAY_CHANGE_ON_RESUME - data_keys):
        if before[key] != now[key]:
            changes[key] = f"{key} changed from {before[key]!r} to {now[key]!r}"
    parts = {"train": "the training data", "held_out": "the held-out set"}
    parts |= {"template": "the chat template", "tokenizer": "the tokenizer"}
    for part, words in parts.items():
        if part in old["data"] and old["data"][part] != new["data"][part]:  # runs from older versions lack some hashes
            commit = old["data"].get(f"{part}_commit", "")
            changes[part] = f"{words} changed{f' (it was commit {commit} on the hub)' if commit else ''}"
    dtypes = [record["runtime"]["compute_dtype"] for record in (old, new)]
    if dtypes[0] != dtypes[1] and "float16" in dtypes:  # float16 adds a loss scale to the state
        changes["float16"] = f"the compute dtype changed from {dtypes[0]} to {dtypes[1]}"
    if old["base"]["fingerprint"] != new["base"]["fingerprint"]:
        commit = old["base"]["commit"]
        pin = f" (to get it back, set revision={commit})" if commit else ""
        changes["base"] = (
            f"the weights of the base model changed: it was {before['base_model']}{pin} and is now {now['base_model']}"
        )
    return changes
