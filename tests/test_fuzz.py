"""The short form of `scripts/fuzz.py`: mutated files of every kind are read or refused with a message."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(tmp_path):
    command = [sys.executable, "scripts/fuzz.py", "--inputs", "25", "--json", tmp_path / "figures.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 21
    assert all(kind.get("refused") for kind in figures.values()), figures
    assert sum(bool(kind.get("accepted")) for kind in figures.values()) > 10, figures
