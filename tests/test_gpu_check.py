"""scripts/gpu_check.py runs to its end on a CPU, with tiny shapes, and survives a part that fails."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_check_runs_to_its_end(tmp_path):
    command = [sys.executable, ROOT / "scripts/gpu_check.py", "--shape", "tiny", "--tokens", "64", "--output", tmp_path]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([*command, "--only", *PARTS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert list(results) == PARTS and not [part for part in results.values() if "error" in part], results
    assert results["versions"]["platform"] == "cpu" and results["versions"]["driver"]
    assert results["attention"]["8 examples"] == "xla"
    trained = results["jlora_lora"]
    assert trained["tokens_per_second"] > 0 and trained["planned_bytes"] > 0
    assert trained["losses"][-1] < trained["losses"][0]  # the same row again and again
    assert results["peft_lora"]["flops"] / results["peft_lora"]["tokens_per_second"] == pytest.approx(
        trained["flops"] / trained["tokens_per_second"]
    )  # both count the same work
    assert results["compiler_options"]["largest_loss_difference"] == 0
    table = (tmp_path / "gpu-cpu.md").read_text()
    assert "| jlora_lora |" in table and "| peft_lora |" in table


PARTS = ["versions", "attention", "jlora_lora", "peft_lora", "jlora_qlora", "compiler_options", "generation"]


def test_failing_and_slow_parts_leave_the_rest(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    monkeypatch.setitem(check.PARTS, "attention", 0.01)
    arguments = [
        "gpu_check.py",
        "--output",
        str(tmp_path),
        "--shape",
        "no-such-shape",
        "--only",
        "attention",
        "jlora_lora",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    check.main()
    results = json.loads((tmp_path / "gpu-unknown.json").read_text())
    assert results["attention"]["error"] == "not done after 0.01 s"
    assert "no-such-shape" in results["jlora_lora"]["error"]
