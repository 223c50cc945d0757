"""SIGINT and SIGTERM during training, also while the main thread is inside XLA: real processes, real signals."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from programs import free_port, logged, losses_of, process_options, run_program, short_run, start_module, wait_for
from test_faults import state_of

from jlora.distributed.stop_signal import STOPPING, TWIN, StopSignal
from jlora.training.checkpoint import Checkpoints, Progress

ANSWER = r"Stopping after this step; .* again to stop at once, without a checkpoint of this step"


def read_until(stream, words):
    """Reads lines of a process until one of them contains these words."""
    return next(line for line in stream if re.search(words, line))


def write_run(tiny, place, tokens):
    """Writes the config of a run that trains on a row of so many tokens in each step; returns it and its directory."""
    (place / "rows.txt").write_text("\n\n".join("law " * count for count in tokens))
    changes = {"task_type": "plain-text", "max_seq_length": max(tokens) + 2, "batch_size": 1, "save_steps": 1}
    config = place / "long.yaml"
    config.write_text(json.dumps(short_run(tiny, place / "rows.txt", place / "run", **changes)))
    return config, place / "run"


def intact_steps(run):
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        steps, damaged = checkpoints.intact_steps()
    assert not damaged
    return steps


@pytest.mark.slow
def test_a_second_signal_ends_a_step_that_takes_minutes(tiny, tmp_path):
    """The second step is one call of XLA, in which Python cannot run a handler."""
    config, run = write_run(tiny, tmp_path, [8, 16000])
    process = start_module("jlora.train", "--config", config)
    wait_for(lambda: (run / "checkpoints/1").exists(), process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert "press Ctrl-C again" in read_until(process.stderr, ANSWER)
    time.sleep(TWIN + 0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert list(losses_of(run)) == intact_steps(run) == [1]
    done = run_program(
        "jlora.train", "--config", config, "--config.resume_from_checkpoint=auto", "--config.max_steps=2"
    )
    assert done.returncode == 2 and "max_steps changed from 12 to 2" in done.stderr  # it read the run


@pytest.mark.slow
def test_one_signal_saves_a_long_step(tiny, tmp_path):
    config, run = write_run(tiny, tmp_path, [1500])
    process = start_module("jlora.train", "--config", config)
    wait_for(lambda: any((run / "logs").glob("*")), process)
    time.sleep(1.5)  # from the first log file to the step
    for _ in range(2):  # as `timeout` does
        process.send_signal(signal.SIGTERM)
    assert "send SIGTERM again" in read_until(process.stderr, ANSWER)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    step = int(re.search(r"Stopped after step (\d+) of 12 and saved", out)[1])
    assert intact_steps(run)[-1] == max(losses_of(run)) == step


SAVING = """
import sys, time
from pathlib import Path
import numpy as np
from jlora.distributed.stop_signal import StopSignal
from jlora.steps.train_step import TrainState
from jlora.training.checkpoint import Checkpoints, Progress
checkpoints = Checkpoints(Path(sys.argv[1]))
write = checkpoints._orbax.save
checkpoints._orbax.save = lambda *a, **k: (write(*a, **k), print("writing", flush=True), time.sleep(60))
with StopSignal():
    checkpoints.save(TrainState({"B": np.zeros(3)}, {"mu": np.zeros(3)}, np.array(2, np.int32)), Progress(), None)
    checkpoints.wait()
"""


def test_a_second_signal_during_a_save_leaves_the_checkpoint_before(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state_of(1), Progress(), None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SAVING, tmp_path], **process_options(1), **pipes)
    read_until(process.stdout, "writing")
    process.send_signal(signal.SIGTERM)
    read_until(process.stderr, ANSWER)
    time.sleep(TWIN + 0.2)
    process.send_signal(signal.SIGINT)  # either of them counts as the second one
    assert process.wait(10) == 130
    assert list((tmp_path / "checkpoints").glob(".unfinished-*")) and intact_steps(tmp_path) == [1]
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert not checkpoints.clean_up(keep_intact=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_waits_for_another(tiny, pairs, tmp_path):
    """The other process is paused, so that the step does not end and the processes cannot agree to stop."""
    config, run = tmp_path / "two.yaml", tmp_path / "run"
    config.write_text(json.dumps(short_run(tiny, pairs, run, max_steps=5000)))
    told = [f"--config.coordinator_address=127.0.0.1:{free_port()}", "--config.num_processes=2"]
    processes = [
        start_module("jlora.train", "--config", config, *told, f"--config.process_id={index}") for index in range(2)
    ]
    wait_for(logged(run, 2), *processes)
    processes[0].send_signal(signal.SIGSTOP)
    processes[1].send_signal(signal.SIGTERM)
    read_until(processes[1].stderr, ANSWER)
    time.sleep(TWIN + 0.2)
    processes[1].send_signal(signal.SIGTERM)
    assert processes[1].wait(10) == 143
    processes[0].send_signal(signal.SIGCONT)
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1 and "Another process of this run has died" in err, err


def test_handlers_are_restored_and_other_threads_have_none():
    before, within = [signal.getsignal(number) for number in STOPPING], []

    def enter():
        with StopSignal() as stop:
            within.append([signal.getsignal(number) for number in STOPPING])
            assert not stop.requested(1)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    enter()
    assert within[0] == before and not set(within[1]) & set(before)
    assert [signal.getsignal(number) for number in STOPPING] == before and signal.set_wakeup_fd(-1) == -1
