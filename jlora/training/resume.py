"""Where a run begins: new; exactly where it stopped, in place; or warm, from another run's adapter, in a new place."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.adapters.spec import NOTHING, settings_of
from jlora.common.atomic_io import names_in
from jlora.common.errors import UserError
from jlora.config.schema import NOT_TRAINING, Config
from jlora.training.checkpoint import Checkpoints, read_record

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two runs in one place are not noticed
    fcntl = None  # type: ignore[assignment]

KEY = "resume_from_checkpoint"
ADAPTER_KEYS = [key for key in settings_of(NOTHING) if key != "lora_dropout"]  # what an adapter cannot change
# What a run has written before its first checkpoint.
BEGUN = {"config.json", "metrics.jsonl", "logs", "checkpoints", ".lock"}


@dataclasses.dataclass(frozen=True)
class Start:
    """The run and step to take over (none: a new run), whether to go on exactly, that in words, and with what remat."""

    source: str  # "": none
    step: int
    exact: bool
    message: str
    remat: str = ""  # "": as the config has it


def check_output(config: Config) -> None:
    """What can be said of `output_dir` before any work is done.

    Raises:
      UserError: it is in use, or is no directory.
    """
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output}: a file stands there; name a directory")
    if _in_use(output) and not config.resume_from_checkpoint:
        raise UserError(
            f"output_dir={output} is not empty, and jlora never overwrites. To continue that run add "
            f"--config.{KEY}=auto; to start a new one set another output_dir"
        )


@contextlib.contextmanager
def claim(output: Path) -> Iterator[None]:
    """Makes the run's directory and keeps every other process out of it; where nothing came into it, it goes again."""
    file = output / ".lock"
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    except OSError as error:
        raise UserError(f"output_dir={output} cannot be written: {error.strerror}") from None
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"output_dir={output}: another process is training there; set another output_dir") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [path.name for path in output.iterdir()] == [file.name]:
                    file.unlink()
                    output.rmdir()


def take(config: Config, record: dict[str, Any], held: contextlib.ExitStack) -> Start:
    """How the run begins, as `decide` has it, and its place, claimed until `held` ends; what does not fit stays."""
    decide(config, record)
    held.enter_context(claim(Path(config.output_dir)))
    return decide(config, record)  # anew: another process may have gone on until then


def decide(config: Config, record: dict[str, Any]) -> Start:
    """How the run that `record` describes begins.

    Args:
      config: the run; its `resume_from_checkpoint` is "", "auto", a run's directory, or one of its checkpoints.
      record: config, data hashes and base, as they will be written to the run's config.json.

    Raises:
      UserError: there is nothing to take over, or it does not fit, or `output_dir` holds something else.
    """
    output, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if not wanted:
        return Start("", 0, False, "a new run")
    if wanted == "auto" or Path(wanted).expanduser().resolve() == output.resolve():
        return _continue(output, record)
    if _in_use(output):
        raise UserError(
            f"output_dir={output} is not empty: a warm start is a new run and needs a new place. Set another "
            f"output_dir; or, to continue the run that is there, --config.{KEY}=auto"
        )
    source, step = _find(Path(wanted).expanduser())
    changes = _changes(read_record(source, KEY), record)
    unfit = [changes[key] for key in (*ADAPTER_KEYS, "base") if key in changes]
    if unfit:
        raise UserError(f"{KEY}={wanted}: its adapter does not fit this config: {'; '.join(unfit)}")
    why = f", since {'; '.join(changes.values())}" if changes else ""
    return Start(
        str(source), step, False, f"warm start: the adapter of {source}, step {step}, on a fresh schedule{why}"
    )


def _continue(output: Path, record: dict[str, Any]) -> Start:
    """Exactly on from the latest checkpoint in place; or a new run where none was completed yet."""
    if not _in_use(output):
        if (output / "checkpoints").exists() and not record["config"]["init_adapter"]:
            raise UserError(
                f"{output} was stopped before it had begun: start it with the {KEY} that it was first started with"
            )
        return Start("", 0, False, f"a new run: there is nothing to continue in {output}")
    old = read_record(output, f"{KEY}=auto, output_dir")
    if changes := _changes(old, record):
        raise UserError(
            f"{output} cannot go on exactly: {'; '.join(changes.values())}. To start a new run from its adapter "
            f"(a warm start), set another output_dir and --config.{KEY}={output}"
        )
    with contextlib.closing(Checkpoints(output)) as checkpoints:
        steps, damaged = checkpoints.sound_steps()
    if not steps:
        if damaged:
            raise UserError(f"{output} has no checkpoint to continue from: {'; '.join(damaged)}. Set another one")
        if other := names_in(output) - BEGUN:
            raise UserError(
                f"{output} has no checkpoint to continue from, but {', '.join(sorted(other))}: set another one"
            )
        return Start("", 0, False, f"a new run: {output} was stopped before its first checkpoint")
    there, here = ({**r["versions"], **r["runtime"]} for r in (old, record))
    moved = [f"{key} was {there[key]} and is {here[key]}" for key in here if there.get(key, here[key]) != here[key]]
    exactly = f"but not bit for bit, since {'; '.join(moved)}" if moved else "exactly"
    passed = "".join(f"{words}: passed over\n" for words in damaged)
    message = f"{passed}continuing {output} from step {steps[-1]}, {exactly}"
    return Start(str(output), steps[-1], True, message, "" if moved else old["runtime"]["remat"])


def _in_use(output: Path) -> bool:
    """Is anything there but what is left of a start that was killed before config.json was written?"""
    return output.is_dir() and not names_in(output) <= {".lock", "checkpoints"}


def _find(path: Path) -> tuple[Path, int]:
    """A run's directory (its best step, else its latest), or `RUN/checkpoints/STEP`, as run and step."""
    run, step = (path.parent.parent, path.name) if path.parent.name == "checkpoints" else (path, "")
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(
                f"{KEY}={path}: no checkpoints there; expected a run's output_dir, or one of its checkpoints"
            )
        if step and (not step.isdigit() or int(step) not in steps):
            raise UserError(f"{KEY}={path}: no such checkpoint; there are {', '.join(map(str, steps))}")
        if step:
            return run, int(step)
        best = checkpoints.best()
    return run, best if best in steps else steps[-1]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What differs between two runs' records in ways that touch training, by key, in words."""
    changes = {}
    before, now = old["config"], new["config"]
    data_keys = {"train_data_dir", "eval_data_dir", "base_model", "revision"}  # compared by content below
    for key in sorted(now.keys() - NOT_TRAINING - data_keys):
        if before[key] != now[key]:
            changes[key] = f"{key} was {before[key]!r} and is {now[key]!r}"
    parts = {"train": "the training data", "held_out": "the held-out data"}
    parts |= {"template": "the chat template", "tokenizer": "the tokenizer"}
    for part, words in parts.items():
        if part in old["data"] and old["data"][part] != new["data"][part]:  # a run of old has no hash of the latter
            changes[part] = f"{words} changed"
    dtypes = [record["runtime"]["compute_dtype"] for record in (old, new)]
    if dtypes[0] != dtypes[1] and "float16" in dtypes:  # which has a loss scale in its state
        changes["float16"] = f"it computed in {dtypes[0]} and now would in {dtypes[1]}"
    if old["base"]["fingerprint"] != new["base"]["fingerprint"]:
        pin = f" (its commit was {old['base']['commit']}: set revision to it)" if old["base"]["commit"] else ""
        changes["base"] = (
            f"the base was {old['config']['base_model']}{pin} and is {now['base_model']}, with other weights"
        )
    return changes
