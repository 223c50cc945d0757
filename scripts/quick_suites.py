"""Installs jlora for several versions of Python, and runs the quick tests with each.

    python scripts/quick_suites.py python3.11 python3.13
    python scripts/quick_suites.py python3.11 --work ~/suites   # keeps the environments for the next time

An environment takes up to 9 GB (compilers, PyTorch and its CUDA), and is deleted at the end unless --work is given.
Ends with a table, and exits with 1 if an install or a test failed.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT, OLDEST = Path(__file__).parent.parent, (3, 11)
INSTALL = ["-m", "pip", "install", "--quiet", "-e", ".[test]"]
TESTS = ["-m", "pytest", "-m", "not slow", "--max-worker-restart=0"]  # the others may wait for ever for a new worker
PYTHON = "import platform, sys; print(platform.python_version(), sys.executable)"
PACKAGES = "from importlib.metadata import version; print(*map(version, ('jax', 'numpy', 'transformers')))"
HEADER = ("python", "jax", "install seconds", "passed", "failed", "seconds")


def find_interpreter(name: str) -> tuple[str, str]:
    """Returns the version and the path of an interpreter, or ends the program if it cannot run jlora."""
    oldest = ".".join(map(str, OLDEST))
    try:
        done = subprocess.run([name, "-c", PYTHON], capture_output=True, text=True)
    except OSError:
        done = None
    if done is None or done.returncode:
        sys.exit(f"{name} is not a Python that runs here. Install it, or name another one, {oldest} or newer.")
    version, path = done.stdout.rstrip("\n").split(" ", 1)
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        sys.exit(f"{name} is Python {version}, and jlora needs {oldest} or newer. Name a newer one.")
    return version, path


def run(*command: str | Path) -> tuple[bool, float]:
    """Runs a command in the repository; returns whether it succeeded, and its seconds."""
    print(f"\n$ {shlex.join(map(str, command))}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT)
    return done.returncode == 0, time.perf_counter() - start


def counts(report: Path) -> list[str]:
    """Returns how many tests passed and failed, from pytest's report; dashes if pytest wrote none."""
    if not report.exists():
        return ["-", "-"]
    (suite,) = ElementTree.parse(report).getroot()
    total, *others = (int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors"))
    return [str(total - sum(others)), str(sum(others[1:]))]


def run_suite(version: str, path: str, work: Path) -> tuple[bool, list[str]]:
    """Installs jlora and runs the quick tests; returns whether all passed, and the row of the table."""
    place, report = work / f"python-{version}", work / f"python-{version}.xml"
    python = place / "bin/python"
    if not (place / "bin/pip").exists() and not run(path, "-m", "venv", place)[0]:
        return False, [version, "no environment", "-", "-", "-", "-"]
    installed, install_seconds = run(python, *INSTALL)
    print(f"install: {install_seconds:.0f} s", flush=True)
    if not installed:
        return False, [version, "not installed", f"{install_seconds:.0f}", "-", "-", "-"]
    found = subprocess.run([python, "-c", PACKAGES], capture_output=True, text=True, check=True, cwd=ROOT)
    jax, numpy, transformers = found.stdout.split()
    print(f"Python {version}, jax {jax}, numpy {numpy}, transformers {transformers}", flush=True)
    report.unlink(missing_ok=True)
    succeeded, seconds = run(python, *TESTS, f"--junitxml={report}")
    return succeeded, [version, jax, f"{install_seconds:.0f}", *counts(report), f"{seconds:.0f}"]


def main() -> int:
    """Runs the suite of each interpreter, one after another, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("interpreters", nargs="+", metavar="python", help="the command or path of an interpreter")
    parser.add_argument("--work", type=Path, metavar="DIR", help="the folder of the environments; by default temporary")
    arguments = parser.parse_args()
    found = [find_interpreter(name) for name in arguments.interpreters]
    with tempfile.TemporaryDirectory(prefix="jlora-suites-") as scratch:
        work = (arguments.work or Path(scratch)).absolute()
        results = [run_suite(version, path, work) for version, path in found]
    print()
    for row in (HEADER, ["---"] * len(HEADER), *(row for _, row in results)):
        print(f"| {' | '.join(row)} |")
    return not all(succeeded for succeeded, _ in results)


if __name__ == "__main__":
    sys.exit(main())
