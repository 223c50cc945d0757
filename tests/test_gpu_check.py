"""scripts/gpu_check.py runs on a CPU with tiny shapes, and survives a part that fails."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jlora.steps import compilation


def script(name):
    """Returns a module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_check_writes_figures_and_a_table(tmp_path):
    command = [sys.executable, ROOT / "scripts/gpu_check.py", "--shape", "tiny", "--tokens", "64", "--output", tmp_path]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    parts = ["versions", "jlora_lora", "peft_lora"]
    done = subprocess.run([*command, "--only", *parts], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert list(results) == parts and not [part for part in results.values() if "error" in part], results
    assert results["versions"]["platform"] == "cpu" and results["versions"]["driver"]
    ours, theirs = results["jlora_lora"], results["peft_lora"]
    assert ours["losses"][-1] < ours["losses"][0] and ours["planned_bytes"] > 0  # the same row again and again
    assert ours["flops"] / ours["tokens_per_second"] == pytest.approx(theirs["flops"] / theirs["tokens_per_second"])
    table = (tmp_path / "gpu-cpu.md").read_text()
    assert "| jlora_lora |" in table and "| peft_lora |" in table


@pytest.mark.slow
def test_the_other_parts_run_too(monkeypatch):
    """Except `peak`, `law` and `generation`, which use what has tests of its own."""
    monkeypatch.setattr(compilation, "OPTIONS", compilation.OPTIONS)  # which a part changes, in its own process
    parts = script("gpu_parts").PARTS
    assert parts["attention"]("tiny", 64)["8 examples behind a prefix"] == "xla"
    assert parts["jlora_qlora"]("tiny", 64)["remat"] == "full"
    assert parts["compiler_options"]("tiny", 64)["largest_loss_difference"] < 1e-4
    assert parts.keys() == {part.removesuffix(" again") for part in script("gpu_check").PARTS}


def test_failing_and_slow_parts_leave_the_rest(tmp_path, monkeypatch):
    check = script("gpu_check")
    monkeypatch.setitem(check.PARTS, "attention", 0.01)
    options = ["--output", str(tmp_path), "--shape", "no-such-shape", "--only", "attention", "jlora_lora"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
    check.main()
    results = json.loads((tmp_path / "gpu-unknown.json").read_text())
    assert results["attention"]["error"] == "not done after 0.01 s"
    assert "no-such-shape" in results["jlora_lora"]["error"]
