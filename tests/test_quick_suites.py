"""scripts/quick_suites.py names interpreters that cannot run jlora, and counts the tests. Its installs take minutes."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from quick_suites import counts

SCRIPT = ROOT / "scripts/quick_suites.py"


@pytest.fixture
def old(tmp_path):
    """A program that calls itself Python 3.10."""
    file = tmp_path / "python3.10"
    file.write_text("#!/bin/sh\necho 3.10.4 $0\n")
    file.chmod(0o755)
    return file


def test_a_missing_or_old_interpreter_gives_one_line(tmp_path, old):
    missing = "python3.999 is not a Python that runs here. Install it, or name another one, 3.11 or newer.\n"
    too_old = f"{old} is Python 3.10.4, and jlora needs 3.11 or newer. Name a newer one.\n"
    for name, message in {"python3.999": missing, old: too_old}.items():
        command = [sys.executable, SCRIPT, sys.executable, name, "--work", tmp_path / "work"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert not (tmp_path / "work").exists()  # all interpreters are checked before the first one is used


def test_errors_count_as_failed_and_skipped_tests_do_not_count(tmp_path):
    assert counts(tmp_path / "missing.xml") == ["-", "-"]
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(3))\ndef test_passes(i): pass\n"
        "def test_fails(): assert 0\n"
        "def test_lacks_a_fixture(nothing): pass\n"
        "@pytest.mark.skip\ndef test_is_skipped(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "no:xdist", "--junitxml=it.xml", "test_it.py"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    assert counts(tmp_path / "it.xml") == ["3", "2"]
