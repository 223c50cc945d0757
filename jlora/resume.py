"""Where a run begins: new, exactly where it stopped, or warm from another run's adapter."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from jlora.checkpoint import Checkpoints, read_record
from jlora.config import NOT_TRAINING, Config
from jlora.errors import UserError

KEY = "resume_from_checkpoint"
# What an adapter cannot change about itself.
ADAPTER_KEYS = ("lora_rank", "lora_alpha", "target_modules")


@dataclasses.dataclass(frozen=True)
class Start:
    """The run and step to take over (none: a new run), and whether to go on exactly or only take the adapter."""

    source: Path | None
    step: int
    exact: bool
    message: str


def check_output(config: Config) -> None:
    """Raises UserError where a new run would write into an `output_dir` that is in use."""
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output}: a file stands there; name a directory")
    if output.is_dir() and any(output.iterdir()) and not config.resume_from_checkpoint:
        raise UserError(
            f"output_dir={output} is not empty, and jlora never overwrites. To continue that run add "
            f"--config.{KEY}=auto; to start a new one set another output_dir"
        )


def decide(config: Config, record: dict[str, Any]) -> Start:
    """How the run that `record` describes begins.

    Args:
      config: the run; its `resume_from_checkpoint` is "", "auto", a run's directory, or one of its checkpoints.
      record: config, data hashes and base, as written to the run's config.json.

    Raises:
      UserError: there is nothing to take over, or it does not fit.
    """
    output = Path(config.output_dir)
    wanted = config.resume_from_checkpoint
    if not wanted or (wanted == "auto" and not _steps(output)):
        return Start(None, 0, False, "a new run")
    source, step = _find(output if wanted == "auto" else Path(wanted).expanduser())
    old = read_record(source, KEY)
    changed = _changes(old, record)
    same_place = source.resolve() == output.resolve()
    if not changed:
        return Start(source, step, True, f"continuing {source} exactly, from step {step}")
    listed = "; ".join(changed.values())
    unfit = [changed[key] for key in (*ADAPTER_KEYS, "base") if key in changed]
    if unfit:
        raise UserError(f"{KEY}={wanted}: its adapter does not fit this config: {'; '.join(unfit)}")
    if same_place:
        raise UserError(
            f"{output} cannot go on exactly: {listed}. To start a new run from its adapter (a warm start), "
            f"set another output_dir and --config.{KEY}={output}"
        )
    return Start(
        source,
        step,
        False,
        f"warm start: the adapter of {source}, step {step}, on a fresh schedule, since {listed}",
    )


def _steps(run: Path) -> list[int]:
    """The run's complete checkpoints; none where it has no directory yet."""
    if not (run / "checkpoints").is_dir():
        return []
    checkpoints = Checkpoints(run)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def _find(path: Path) -> tuple[Path, int]:
    """A run's directory, or `RUN/checkpoints/STEP`, as run and step."""
    run, step = (path.parent.parent, path.name) if path.parent.name == "checkpoints" else (path, "")
    steps = _steps(run)
    if not steps:
        raise UserError(f"{KEY}={path}: no checkpoints there; expected a run's output_dir, or one of its checkpoints")
    if step and (not step.isdigit() or int(step) not in steps):
        raise UserError(f"{KEY}={path}: no such checkpoint; there are {', '.join(map(str, steps))}")
    return run, int(step) if step else steps[-1]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What differs between two runs' records in ways that touch training, by key, in words."""
    changes = {}
    before, now = old["config"], new["config"]
    data_keys = {"train_data_dir", "eval_data_dir", "base_model", "revision"}  # compared by content below
    for key in sorted(now.keys() - NOT_TRAINING - data_keys):
        a, b = before.get(key), now[key]
        a, b = (tuple(v) if isinstance(v, list) else v for v in (a, b))
        if a != b:
            changes[key] = f"{key} was {a!r} and is {b!r}"
    for part, words in {"train": "the training data", "held_out": "the held-out data"}.items():
        if old["data"].get(part) != new["data"].get(part):
            changes[part] = f"{words} changed"
    if old["base"]["fingerprint"] != new["base"]["fingerprint"]:
        changes["base"] = f"the base was {old['config']['base_model']} and is {now['base_model']}, with other weights"
    return changes


def fingerprint(directory: Path) -> str:
    """A cheap identity of a base: config.json, and each weight file's size, first and last mebibyte."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()
