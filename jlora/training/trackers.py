"""Trackers: the programs that show a run's metrics, chosen by `report_to`.

A new one is a class with the methods of `Tracker`, a line in TRACKERS, its name in CHOICES, and an extra in setup.cfg.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import posixpath
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from jlora.common.atomic_io import replace_text
from jlora.common.errors import UserError
from jlora.config.schema import Config

IDS = "trackers.json"  # in the run's directory: name of each tracker -> its id of the run
PROJECT = "jlora"
# No telemetry and no banners; and a server that is gone holds up training for seconds, not for minutes.
QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
UPLOAD_SECONDS = 60  # that wandb may take at the end of a run; `wandb sync` uploads the rest


class Tracker(Protocol):
    """A run in one tracker, new or continued."""

    id: str  # the tracker's name of the run, by which a resumed run continues it; "": the run's directory is enough

    def __init__(self, run: Path, known: str, first: int, settings: Mapping[str, Any]) -> None:
        """Starts the tracker's run.

        Args:
          run: the run's directory, whose name the tracker shows.
          known: the `id` to continue; "": a new run.
          first: the number of steps done before; later ones that an interrupted run logged are logged again.
          settings: the config.
        """

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Logs the values of a step. A step may be logged in several parts."""

    def log_text(self, step: int, name: str, text: str) -> None:
        """Logs a text, such as an answer of the adapter at this step, which may be an earlier one."""

    def close(self) -> None:
        """Ends the run, and waits until all that was logged is written."""


class TensorBoard:
    """Event files in `logs/`."""

    id = ""

    def __init__(self, run: Path, known: str, first: int, settings: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter  # a slow import: it loads PyTorch if installed

        self._events = SummaryWriter(str(run / "logs"), purge_step=first + 1)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._events.add_text(name, text, step)

    def close(self) -> None:
        self._events.close()


class Wandb:
    """Weights & Biases. It ignores values of steps before the last one that it has, which a resumed run repeats."""

    def __init__(self, run: Path, known: str, first: int, settings: Mapping[str, Any]) -> None:
        self._wandb = _library("wandb")
        quiet = {"silent": True, "console": "off"}
        limit = {"finish_timeout": UPLOAD_SECONDS, "finish_timeout_raises": True}
        self._run = self._wandb.init(
            project=PROJECT,
            name=run.name,
            config=dict(settings),
            id=known or None,
            resume="allow",
            reinit="create_new",  # beside a run that the user's own program may have started
            settings=self._wandb.Settings(**quiet, **limit),
        )
        self.id: str = self._run.id

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        self._run.log(dict(values), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({name: table}, step=max(step, self._run.step))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow server, or a local database: MLFLOW_TRACKING_URI decides."""

    def __init__(self, run: Path, known: str, first: int, settings: Mapping[str, Any]) -> None:
        self._mlflow, self.id = _library("mlflow"), known
        self._client = self._mlflow.MlflowClient()
        if known:
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(PROJECT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        self.id = self._client.create_run(place, run_name=run.name).info.run_id
        parameters = [self._mlflow.entities.Param(key, str(value)) for key, value in settings.items()]
        self._client.log_batch(self.id, params=parameters)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        now = int(time.time() * 1000)
        entries = [self._mlflow.entities.Metric(_plain(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=entries)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self.id, text, f"{_plain(name)}/{step}.txt")

    def close(self) -> None:
        self._client.set_terminated(self.id)


class Trackio:
    """Trackio: a local database, or a Space if TRACKIO_SPACE_ID is set."""

    def __init__(self, run: Path, known: str, first: int, settings: Mapping[str, Any]) -> None:
        self._trackio, resume = _library("trackio"), "must" if known else "never"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = self._trackio.init(PROJECT, run.name, config=dict(settings), resume=resume, embed=False)
        self.id: str = self._run.id
        if known not in ("", self.id):  # trackio finds a run by its name only
            self.close()
            raise ValueError(f"a later run has the same name, {run.name}")

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        self._run.log(dict(values), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._trackio.Markdown(text)}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(config: Config) -> None:
    """Raises a UserError if a tracker of `report_to` is not installed, or wandb would ask for a login."""
    for name in config.report_to:
        # tensorboardX is always installed; a directory wandb/, which wandb writes, is a spec without an origin
        if name != "tensorboard" and not getattr(importlib.util.find_spec(name), "origin", None):
            raise UserError(
                f"report_to={name} needs the package {name}, which is not installed. Run: pip install 'jlora[{name}]'"
            )
    if "wandb" in config.report_to and not _wandb_can_start():
        raise UserError(
            "report_to=wandb needs a login, but no valid API key is stored here. Run: wandb login. Or set the "
            "environment variable WANDB_MODE=offline, and upload the run later with wandb sync."
        )


def start_trackers(config: Config, first: int, print_line: Callable[[str], None]) -> dict[str, Tracker]:
    """Starts the trackers of `report_to`, and returns them by name, without those that fail.

    Args:
      config: the run; its output_dir exists, and keeps the trackers' ids of the run.
      first: the number of steps done before.
      print_line: prints a warning.
    """
    run, started = Path(config.output_dir).resolve(), {}
    ids = json.loads((run / IDS).read_text(encoding="utf-8")) if (run / IDS).exists() else {}
    for name in dict.fromkeys(config.report_to):
        try:
            started[name] = TRACKERS[name](run, ids.get(name, ""), first, _flat(dataclasses.asdict(config)))
        except Exception as error:  # of any kind, from the network or a library
            print_line(failure(name, error))
    if found := {name: tracker.id for name, tracker in started.items() if tracker.id}:
        replace_text(run / IDS, json.dumps(ids | found))
    return started


def failure(name: str, error: Exception) -> str:
    """Returns the warning that a tracker failed, in one line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"Warning: {name} failed, and the run continues without it: {reason}"


def _library(name: str) -> Any:
    """Imports a tracker's package, which takes a second, without telemetry and banners unless the user wants them."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    return importlib.import_module(name)


def _wandb_can_start() -> bool:
    """Returns whether wandb needs no login, or has one; it never asks for one."""
    wandb = _library("wandb")
    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return True
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError:  # a key of another form
        return False


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings whose mappings, such as mesh, are replaced by their entries, such as mesh.data."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        entries = {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, Mapping) else None
        flat |= {key: value} if entries is None else entries
    return flat


def _plain(name: str) -> str:
    """Returns a name that MLflow accepts, which is a relative path without most special characters."""
    return re.sub(r"[^\w.\- :/]", "_", posixpath.normpath(name))
