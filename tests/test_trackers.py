"""Trackers: each library, in its offline mode, shows what metrics.jsonl has; none of them can stop a run."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from programs import logged, losses_of, run_program, short_run, terminated

from jlora.common.errors import UserError
from jlora.config.files import load_config
from jlora.config.schema import CHOICES, Config
from jlora.training import trackers
from jlora.training.metrics import Logger
from jlora.training.trackers import TRACKERS, check_trackers, start_trackers

INSTALLED = [name for name in TRACKERS if name == "tensorboard" or importlib.util.find_spec(name)]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """The working directory of these tests, to which all libraries write."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "TRACKIO_DIR"):
            patch.setenv(name, str(place / ("" if name == "WANDB_DIR" else name)))
        for name in ("WANDB_API_KEY", "NETRC", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        yield place


@pytest.fixture(scope="module")
def resumed(place, tiny, pairs):
    """A run with all trackers that was stopped and resumed: its directory, its first ids, and all that it printed."""
    run, file = place / "resumed", place / "config.yaml"
    file.write_text(json.dumps(short_run(tiny, pairs, run, eval_share=0.1, eval_steps=6, report_to=INSTALLED)))
    with terminated(logged(run, 3)):
        stopped = run_program("jlora.train", "--config", file)
    assert "Stopped after step" in stopped.stdout, stopped.stderr
    ids = (run / "trackers.json").read_text() if len(INSTALLED) > 1 else ""
    done = run_program("jlora.train", "--config", file, "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0 and "Continuing" in done.stdout, done.stderr
    assert len(losses_of(run)) == 12
    return run, ids, stopped.stdout + stopped.stderr + done.stdout + done.stderr


@pytest.fixture(scope="module")
def with_text(place):
    """A run's directory, to which a Logger wrote one loss and one text."""
    run = place / "with-text"
    run.mkdir()
    config = Config(output_dir=str(run), report_to=tuple(INSTALLED))
    with Logger(run, 0, 9, start_trackers(config, 0, print), silent=False) as logger:
        logger.log(4, loss=2.0)
        logger.log_text(3, "answer", "Yes.")  # of the best step, which is not the last one
    return run


def values_of(run, name):
    """Step -> value, of one name in metrics.jsonl."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def events_of(run):
    """TensorBoard's values, in the order in which they were written: step, name, value."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((run / "logs").iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            yield from ((event.step, value.tag, value) for value in event.summary.value)
            data = data[16 + length :]


@pytest.mark.slow
def test_tensorboard(resumed, with_text):
    run = resumed[0]
    for name in ("loss", "eval_loss"):
        want = values_of(run, name)
        assert want and {step: value.simple_value for step, tag, value in events_of(run) if tag == name} == (
            pytest.approx(want)
        )
    (text,) = [(step, value) for step, tag, value in events_of(with_text) if tag.startswith("answer")]
    assert text[0] == 3 and text[1].tensor.string_val == [b"Yes."]


def wandb_records(directory):
    """What wandb wrote into a run's file: records in blocks of 32 KiB, as in LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.glob("run-*.wandb")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # too little is left of the block for a header
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_wandb(place, resumed, with_text):
    pytest.importorskip("wandb")
    run, ids, _ = resumed
    first, second = sorted((place / "wandb").glob(f"offline-run-*-{json.loads(ids)['wandb']}"))
    got = {}
    for directory in (first, second):
        records = list(wandb_records(directory))
        (started,) = [record.run for record in records if record.HasField("run")]
        assert (started.project, started.display_name) == ("jlora", "resumed")
        settings = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert settings["lora_rank"] == 4 and settings["mesh.data"] == -1
        for record in records:
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            got |= {(values["_step"], name): value for name, value in values.items()} if values else {}
    for name in ("loss", "eval_loss"):
        assert {step: value for (step, key), value in got.items() if key == name} == values_of(run, name)
    (table,) = (place / "wandb").glob("offline-run-*/files/media/table/answer_*.json")
    assert json.loads(table.read_text())["data"] == [[3, "Yes."]]


@pytest.mark.slow
def test_mlflow(place, resumed, with_text):
    mlflow = pytest.importorskip("mlflow")
    run, ids, _ = resumed
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("jlora").experiment_id])
    by_name = {found.info.run_name: found for found in runs}
    assert len(runs) == len(by_name)  # the resumed run is one
    found = by_name["resumed"]
    assert found.info.run_id == json.loads(ids)["mlflow"] and found.info.status == "FINISHED"
    assert found.data.params["lora_rank"] == "4" and found.data.params["mesh.data"] == "-1"
    for name in ("loss", "eval_loss"):
        history = client.get_metric_history(found.info.run_id, name)
        assert {metric.step: metric.value for metric in history} == values_of(run, name)
    assert (Path(by_name["with-text"].info.artifact_uri) / "answer/3.txt").read_text() == "Yes."


def trackio_values(run, name):
    """Step -> value, as the program trackio prints it."""
    words = ["get", "metric", "--project", "jlora", "--run", run, "--metric", name, "--json"]
    done = subprocess.run([sys.executable, "-m", "trackio.cli", *words], capture_output=True, text=True, check=True)
    return {entry["step"]: entry["value"] for entry in json.loads(done.stdout)["values"]}


@pytest.mark.slow
def test_trackio(resumed, with_text):
    trackio = pytest.importorskip("trackio")
    run, ids, _ = resumed
    (found,) = [found for found in trackio.Api().runs("jlora") if found.name == "resumed"]
    assert found.id == json.loads(ids)["trackio"]
    assert found.config["lora_rank"] == 4 and found.config["mesh.data"] == -1
    for name in ("loss", "eval_loss"):
        assert trackio_values("resumed", name) == values_of(run, name)
    assert trackio_values("with-text", "answer")[3]["_value"] == "Yes."


def test_a_later_run_of_the_same_name_is_not_continued(place):
    pytest.importorskip("trackio")
    config, said = Config(output_dir=str(place / "one/same"), report_to=("trackio",)), []
    for parent in ("one", "other"):
        (place / parent / "same").mkdir(parents=True)
        made = start_trackers(Config(output_dir=str(place / parent / "same"), report_to=("trackio",)), 0, said.append)
        made["trackio"].log(1, {"loss": 1.0})
        made["trackio"].close()
    assert not start_trackers(config, 1, said.append)
    assert said == ["Warning: trackio failed, and the run continues without it: a later run has the same name, same"]


@pytest.mark.slow
def test_trackers_are_quiet_and_keep_the_id_of_a_resumed_run(resumed):
    run, ids, said = resumed
    assert not ids or (run / "trackers.json").read_text() == ids
    said = said.replace(str(run), "")
    assert not [line for line in said.splitlines() if any(name in line.lower() for name in TRACKERS)]
    assert "Warning" not in said


def test_names_are_those_of_the_config():
    assert tuple(TRACKERS) == CHOICES["report_to"]
    with pytest.raises(UserError, match="report_to='wand': Expected one of tensorboard, wandb, mlflow, trackio"):
        load_config(str(ROOT / "configs/law.py"), ["--config.report_to=wand"])


@pytest.mark.parametrize(
    ("text", "value"), [("wandb, mlflow", ("wandb", "mlflow")), ("[trackio]", ("trackio",)), ("", ()), ("()", ())]
)
def test_report_to_is_read_from_every_form(text, value):
    assert load_config(str(ROOT / "configs/law.py"), [f"--config.report_to={text}"]).report_to == value


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_library_stops_the_run_before_it_starts(config_file, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()  # as wandb writes into the working directory, which Python takes for a package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    assert importlib.util.find_spec(name)
    with pytest.raises(UserError) as error:
        check_trackers(Config(report_to=(name,)))
    said = f"report_to={name} needs the package {name}, which is not installed. Run: pip install 'jlora[{name}]'"
    assert str(error.value) == said
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run_program("jlora.train", "--config", config_file(report_to=[name]))
    assert done.returncode == 2 and done.stderr == f"error: {said}\n" and not (tmp_path / "run").exists()


def test_wandb_without_a_login_does_not_ask(place, monkeypatch):
    pytest.importorskip("wandb")
    code = "from jlora.training.trackers import *; check_trackers(Config(report_to=('wandb',)))"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))

    def error(**changes):
        """Returns the last line of an error; "" without an error."""
        environment = {**os.environ, **changes}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert not done.stdout
        return done.stderr.splitlines()[-1] if done.returncode else ""

    assert not error()  # offline
    monkeypatch.delenv("WANDB_MODE")
    said = "report_to=wandb needs a login, but no valid API key is stored here. Run: wandb login. Or set "
    for key in ("", "too short"):
        assert said in error(WANDB_API_KEY=key)
    assert not error(WANDB_API_KEY="a" * 40)


class Failing:
    """A tracker whose network is gone after some calls."""

    id, left = "", 0

    def __init__(self, *_):
        self.left = Failing.left

    def log(self, *_):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the network is gone\nand more")

    log_text = close = log


@pytest.mark.parametrize("calls", [3, 12])
def test_a_tracker_that_fails_does_not_stop_the_run(config_file, tmp_path, monkeypatch, calls):
    """In the middle of the run, and when it is closed."""
    monkeypatch.setattr(Failing, "left", calls)
    monkeypatch.setitem(TRACKERS, "trackio", Failing)
    monkeypatch.setattr("jlora.training.setup.check_trackers", lambda config: None)
    done = run_program("jlora.train", "--config", config_file(report_to=["tensorboard", "trackio"]))
    assert done.returncode == 0, done.stderr
    warning = "Warning: trackio failed, and the run continues without it: the network is gone"
    assert done.stdout.splitlines().count(warning) == 1 and "and more" not in done.stdout
    assert len(losses_of(tmp_path / "run")) == 12
    assert len([step for step, tag, _ in events_of(tmp_path / "run") if tag == "loss"]) == 12


def test_a_tracker_that_cannot_start_is_left_out(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setitem(trackers.QUIET, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    said = []
    config = Config(output_dir=str(tmp_path), report_to=("mlflow", "tensorboard"))
    started = start_trackers(config, 0, said.append)
    assert list(started) == ["tensorboard"] and len(said) == 1
    assert said[0].startswith("Warning: mlflow failed, and the run continues without it: ") and "\n" not in said[0]
    assert not (tmp_path / "trackers.json").exists()
    started["tensorboard"].close()


def test_report_to_nothing(tmp_path):
    assert start_trackers(Config(output_dir=str(tmp_path), report_to=()), 0, print) == {}
    with Logger(tmp_path, 0, 9, {}) as logger:
        logger.log(1, loss=2.0)
        logger.log_text(1, "answer", "Yes.")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
