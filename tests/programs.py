"""Runs jlora's programs, in this process or in new ones, and reads what they wrote."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

from jlora.cli.program import run_command
from jlora.common import malloc
from jlora.training import setup


def short_run(tiny: Path, pairs: Path, output: Path, **changes) -> dict:
    """The settings of 12 steps on the tiny model, saved twice, every step logged."""
    return {
        "base_model": str(tiny),
        "train_data_dir": str(pairs),
        "output_dir": str(output),
        "batch_size": 4,
        "max_steps": 12,
        "save_steps": 6,
        "logging_steps": 1,
        "lora_rank": 4,
        "sample_questions": 0,
        **changes,
    }


class Trains:
    """Trains with the `state`, `programs` and `batches` of a subclass."""

    def losses(self, count, first=0):
        """Trains from a batch on, by default the first, and returns the loss of each step."""
        losses = []
        for step in range(first, first + count):
            self.state, metrics = self.programs.train_step(self.state, self.batches[step], print)
            losses.append(float(metrics.loss))
        return np.array(losses)


def run_program(name: str, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    """Does what run_module does in this process, which saves a start of 5 s."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(setup, "find_devices", lambda device: jax.devices()[:devices])
        patch.setattr(malloc, "retain_freed_memory", lambda: None)  # it would last for all further tests
        try:
            run_command(name.removeprefix("jlora."), list(map(str, arguments)))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess([name, *arguments], code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def terminated(condition):
    """Sends SIGTERM to this process once a condition holds, unless the body ends before."""
    ended = threading.Event()

    def send() -> None:
        while not condition():
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # it may come just after the body
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def run_module(name: str, *arguments, devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs `python -m NAME ARGUMENTS` as a user would, with this many fake CPU devices."""
    return subprocess.run(command(name, *arguments), **process_options(devices), capture_output=True, **options)


def start_module(name: str, *arguments, devices: int = 1) -> subprocess.Popen:
    """Starts the same program without waiting for it."""
    return subprocess.Popen(
        command(name, *arguments), **process_options(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def command(name: str, *arguments) -> list[str]:
    """The command line of one of jlora's programs."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def process_options(devices: int) -> dict:
    """Text output, jlora's own directory, no PyTorch, fake devices, and one store of compiled programs for all."""
    return {
        "cwd": ROOT,
        "text": True,
        "env": {
            **os.environ,
            "PYTHONPATH": str(ROOT / "tests/without_torch"),
            "JAX_NUM_CPU_DEVICES": str(devices),
        },
    }


def wait_for(condition, *processes, seconds=240) -> None:
    """Waits until a condition holds, but only while a process lives, and for this many seconds at most."""
    until = time.monotonic() + seconds
    while not condition():
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes if p.poll() is not None]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def logged(run: Path, step: int):
    """Whether a run has logged a step, as a condition."""
    return lambda: (run / "metrics.jsonl").exists() and f'{{"step": {step},' in (run / "metrics.jsonl").read_text()


def losses_of(run: Path, name: str = "loss") -> dict[int, float]:
    """Step -> loss, as logged: in order, each step once; or "eval_loss"."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line[name]) for line in lines if name in line]
    assert [step for step, _ in steps] == sorted({step for step, _ in steps}), "a step is logged twice"
    return dict(steps)


def adapter_of(run: Path) -> dict[str, np.ndarray]:
    """The tensors that a run exported."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
