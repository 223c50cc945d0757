"""`jlora export --live`: a real server's answers are compared with those of the checkpoint."""

import json

import pytest
from programs import run_program, short_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny, pairs):
    """A run whose answers differ between its checkpoints, of steps 6 and 12."""
    directory = tmp_path_factory.mktemp("live")
    values = short_run(
        tiny, pairs, directory / "run", learning_rate=5e-2, rank_pattern={"layers.1.self_attn.v_proj": 2}
    )
    (directory / "config.yaml").write_text(json.dumps(values))
    done = run_program("jlora.train", "--config", directory / "config.yaml")
    assert done.returncode == 0, done.stderr
    return directory / "run"


def export(run, *options):
    return run_program("jlora.export", "--run", run, "--for", "jlora", "--live", "spawn", *options)


def test_equal_answers_are_written_into_parity_json(run):
    done = export(run)
    assert done.returncode == 0, done.stderr
    assert "Compared with jlora serve at http://127.0.0.1:" in done.stdout
    parity = json.loads((run / "adapter-jlora/parity.json").read_text())
    live = parity["live"]["jlora"]
    assert live["server"] == "jlora serve" and live["dtype"] == "float32"
    assert live["equal_greedy_answers"] == live["questions"] == 40 and live["largest_logprob_difference"] < 1e-3
    assert parity["largest_logit_difference"] < 1e-3  # PEFT's verification is still there


def test_an_adapter_that_was_not_trained_so_is_caught(run):
    """The server has the adapter of step 6; its answers are compared with those of step 12."""
    assert run_program("jlora.export", "--run", run, "--step", "6", "--output", run / "other").returncode == 0
    done = export(run, "--step", "12", "--output", run / "other")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "does not answer as the adapter was trained to" in done.stderr and "greedy answers" in done.stderr
    assert not (run / "other/parity.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--for", "vllm", "--live", "http://127.0.0.1:9", "--live_name", "a"], "cannot be asked as model 'a'"),
        (["--for", "vllm", "--live", "http://127.0.0.1:9"], "--live URL requires --live_name"),
        (["--for", "lorax", "--live", "spawn"], "cannot start lorax. Start it yourself"),
        (["--for", "llama.cpp", "--live", "spawn"], "needs --base_gguf"),
        (["--live", "spawn"], "--live requires --run, and --for with the server"),
    ],
)
def test_what_is_missing_is_named(run, tmp_path, options, said):
    done = run_program("jlora.export", "--run", run, "--output", tmp_path / "made", *options)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
