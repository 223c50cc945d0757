"""The Python API: the five lines of its docstring on a tiny model, a stopped run, and errors."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from programs import short_run
from safetensors.numpy import load_file, save_file

import jlora
from jlora import api
from jlora.cli import generate
from jlora.export import verify
from jlora.training import setup
from jlora.training.metrics import Logger

pytestmark = pytest.mark.slow  # it trains a run


@pytest.fixture(scope="module")
def one_device():
    """Runs train on one of the 8 fake devices, as on a laptop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "find_devices", lambda device: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, tiny, pairs):
    """A config of 6 steps with a held-out set."""
    directory = tmp_path_factory.mktemp("api")
    own = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "eval_share": 0.1, "learning_rate": 1e-2}
    (directory / "run.yaml").write_text(json.dumps(short_run(tiny, pairs, directory / "run", **own)))
    return directory / "run.yaml"


@pytest.fixture(scope="module")
def result(config_path, one_device):
    """A finished run."""
    return jlora.finetune(jlora.load_config(config_path, lora_rank=2, target_modules=("q_proj", "up_proj")))


def test_every_name_is_an_attribute_of_jlora_and_of_its_api():
    assert set(jlora.__all__) == set(api.__all__)
    for name in api.__all__:
        assert getattr(jlora, name) is getattr(api, name)
        assert getattr(api, name).__doc__
    with pytest.raises(AttributeError, match="module 'jlora' has no attribute 'tune'"):
        _ = jlora.tune


def test_a_result_describes_the_run(result):
    record = json.loads((result.run / "config.json").read_text())
    assert (record["config"]["lora_rank"], record["config"]["target_modules"]) == (2, ["q_proj", "up_proj"])
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert (result.base_loss, result.best_loss) == (losses[0], min(losses[3], losses[6]))
    assert losses[result.step] == result.best_loss < result.base_loss and result.steps == 6
    assert result.adapter == result.run / "adapter" and result.stopped is None


def test_answers_equal_those_of_the_program(result, capsys):
    model = jlora.load_model(adapters={"law": result.adapter})
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    question = "Must a labor contract be in writing?"
    for use in ("law", "law=0.5"):
        generate.main(["--adapter", f"law={result.adapter}", "--use", use, "--prompt", question, *words])
        assert model.answer(question, adapter=use, **options) == capsys.readouterr().out.strip() != ""
    assert model.answer(question, **options) != model.answer(question, adapter="law", **options)
    assert model.answer(question, system="Be brief.", **options) != model.answer(question, **options)
    with pytest.raises(jlora.UserError, match="lore"):
        model.answer(question, adapter="lore")


def test_an_export_is_verified(result, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "PROMPTS", 2)
    monkeypatch.setattr(verify, "NEW_TOKENS", 2)
    assert jlora.export_adapter(result.run, tmp_path / "last", "latest") == tmp_path / "last"
    parity = jlora.verify_adapter(result.run)
    assert parity.sentence.startswith("Verified with PEFT ") and parity.largest_logit_difference < 1e-3
    broken = shutil.copytree(tmp_path / "last", tmp_path / "broken") / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(broken).items()}, broken, metadata={"format": "pt"})
    with pytest.raises(jlora.VerificationError, match="does not compute what was trained"):
        jlora.verify_adapter(result.run, tmp_path / "broken", "latest")
    with pytest.raises(jlora.UserError, match=r"run/adapter exists, and jlora never overwrites"):
        jlora.export_adapter(result.run)


def test_a_stopped_run_continues(config_path, one_device, result, tmp_path, monkeypatch):
    settings = {"lora_rank": 2, "target_modules": ("q_proj", "up_proj"), "output_dir": tmp_path / "run"}
    count = Logger.step

    def interrupt(self, tokens):
        count(self, tokens)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Logger, "step", interrupt)
        stopped = jlora.finetune(jlora.load_config(config_path, **settings))
    assert (stopped.run, stopped.step, stopped.steps) == (tmp_path / "run", 1, 6)
    assert (stopped.adapter, stopped.stopped) == (None, signal.SIGTERM)
    assert (stopped.base_loss, stopped.best_loss) == (result.base_loss, None)
    done = jlora.finetune(jlora.load_config(config_path, **settings, resume_from_checkpoint="auto"))
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (done, result))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_wrong_settings_are_reported(config_path, result):
    with pytest.raises(jlora.UserError, match=r"lora_rnk.*lora_rank"):
        jlora.load_config(config_path, lora_rnk=8)
    with pytest.raises(jlora.UserError, match=r"batch_size=0.*\n.*learning_rate=-1"):
        jlora.load_config(config_path, ["--config.learning_rate=-1"], batch_size=0)
    with pytest.raises(jlora.UserError, match=r"The config is not valid:\n  train_data_dir is not set"):
        jlora.finetune(jlora.Config())
    with pytest.raises(jlora.UserError, match="already contains a run"):
        jlora.finetune(jlora.load_config(config_path))
    with pytest.raises(jlora.UserError, match="got neither a base model nor adapters"):
        jlora.load_model()
