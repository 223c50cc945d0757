"""Several real processes of one run, over loopback: the same numbers, and no process waits forever."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from programs import (
    adapter_of,
    command,
    free_port,
    logged,
    losses_of,
    process_options,
    run_program,
    short_run,
    wait_for,
)
from tiny_models import make_model

pytestmark = pytest.mark.slow
STEPS = 10


def start(config, count, *overrides, devices=1, last=()):
    """Starts `python -m jlora.train` in `count` processes; the last one gets the overrides in `last`."""
    port = free_port()
    told = [f"--config.coordinator_address=127.0.0.1:{port}", f"--config.num_processes={count}"]
    processes = []
    for index in range(count):
        own = [*told, f"--config.process_id={index}"] if count > 1 else []
        more = last if index == count - 1 else ()
        processes.append(
            subprocess.Popen(
                command("jlora.train", "--config", config, *own, *overrides, *more),
                **process_options(devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return processes


def ended(processes, seconds=300):
    """Waits for all processes; returns their exit codes, outputs and errors."""
    texts = [process.communicate(timeout=seconds) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in texts], [err for _, err in texts]


def losses(run):
    return np.array(list(losses_of(run).values()))


def assert_close(one, other):
    """Asserts that the loss curves and adapters of two runs agree within 1e-5."""
    assert len(losses(one)) == len(losses(other)) == STEPS
    assert np.abs(losses(one) - losses(other)).max() < 1e-5
    a, b = adapter_of(one), adapter_of(other)
    assert a.keys() == b.keys() and max(np.abs(a[name] - b[name]).max() for name in a) < 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny, pairs):
    """A directory for runs, and a function that writes their configs."""
    directory = tmp_path_factory.mktemp("hosts")

    def write(name, **changes):
        own = {"max_steps": STEPS, "save_steps": 100, "learning_rate": 3e-3, "eval_share": 0.1, "eval_steps": 5}
        file = directory / f"{name}.yaml"
        file.write_text(json.dumps(short_run(tiny, pairs, directory / name, **{**own, **changes})))
        return file

    return directory, write


@pytest.fixture(scope="module")
def alone(place):
    """A run with one process on one device."""
    directory, write = place
    done = run_program("jlora.train", "--config", write("alone"))
    assert done.returncode == 0, done.stderr
    curve = losses(directory / "alone")
    assert curve[-1] < curve[0] - 0.1  # it learns, so the bounds are meaningful
    return directory / "alone"


# XLA's own log lines, in pieces, because its threads interleave them. Each line contains three numbers.
GLOO = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "


def test_several_processes_equal_one(place, alone):
    directory, write = place
    config = write("split", mesh={"fsdp": 2, "tensor": 2}, sample_questions=1)
    codes, outs, errs = ended(start(config, 2, devices=2))
    assert codes == [0, 0], errs
    assert_close(alone, directory / "split")
    assert (
        " in 2 processes" in outs[0]
        and "Exported the adapter from step" in outs[0]
        and outs[0].count("Question: ") == 1
    )
    said = outs[1]
    lines = said.count("[Gloo] Rank ")
    assert re.fullmatch(rf"\n{{{lines}}}\d{{{3 * lines}}}", "".join(sorted(re.sub(GLOO, "", said))))  # and nothing else
    assert not any("Traceback" in err for err in errs)


def test_a_signal_to_one_process_stops_all_at_the_same_step(place, alone):
    """Four processes go to the end of the first evaluation at least, and one goes on; the curve is that of one."""
    directory, write = place
    run, config = directory / "stopped", write("stopped", mesh={"data": 2, "fsdp": 2})
    processes = start(config, 4)
    wait_for(logged(run, 5), *processes)
    processes[1].send_signal(signal.SIGTERM)
    processes[0].send_signal(signal.SIGSTOP)  # a pause in training: JAX looks for a signal only once a second
    time.sleep(2)
    processes[0].send_signal(signal.SIGCONT)
    codes, outs, errs = ended(processes)
    assert codes == [0] * 4, errs
    assert " in 4 processes" in outs[0]
    step = int(re.search(r"Stopped after step (\d+) of", outs[0])[1])
    saved = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert 5 <= step < STEPS and saved == sorted({5, step})  # at each evaluation, and at its end
    assert len(losses(run)) == step  # no step is lost or logged twice
    done = run_program("jlora.train", "--config", write("stopped"), "--config.resume_from_checkpoint=auto")
    assert done.returncode == 0, done.stderr
    assert (
        f"from step {step}, but not bit for bit, because devices changed from 4 to 1; processes changed from 4 to 1"
        in done.stdout
    ), done.stdout
    assert_close(alone, run)


def test_an_error_in_one_process_is_raised_in_all(place, pairs, tmp_path):
    directory, write = place
    (tmp_path / "train.txt").write_text((pairs / "train.txt").read_text() + "\n\nUser: More?\nLawyer: Yes.\n")
    for other, words in [
        (f"--config.train_data_dir={tmp_path}", "Processes disagree about the run: train is"),
        ("--config.train_data_dir=/nowhere", "train_data_dir=/nowhere: No such file or directory"),
    ]:
        codes, _, errs = ended(start(write("refused"), 2, last=[other]), 120)
        assert codes == [2, 2] and all(words in err and "Traceback" not in err for err in errs), errs
        assert "error: process 1: " in errs[0]
    assert not (directory / "refused").exists()


def test_a_dead_process_ends_the_others(place):
    directory, write = place
    processes = start(write("dead", max_steps=5000, eval_share=0), 2)
    wait_for(logged(directory / "dead", 2), *processes)
    processes[1].kill()
    killed = time.monotonic()
    codes, _, errs = ended(processes, 60)
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - killed < 30
    assert "Another process of this run has died" in errs[0] and "resume_from_checkpoint=auto" in errs[0]
    assert "Traceback" not in errs[0]


def test_incomplete_process_settings_are_refused(config_file):
    told = (["--config.num_processes=2"], ["--config.process_id=0"], ["--config.coordinator_address=127.0.0.1:9"])
    codes, _, errs = ended([process for words in told for process in start(config_file(), 1, *words)])
    for code, err in zip(codes, errs, strict=True):
        assert code == 2 and "could not connect" in err and "Set num_processes=1 to run a single process." in err, err


LOAD = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jlora.distributed import processes
from jlora.distributed import sharding
from jlora.models import hf_loader
from jlora.models.compute_settings import ComputeSettings
from jlora.models.families import read_config
from jlora.adapters.spec import AdapterSpec

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

index, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
processes.connect(f"127.0.0.1:{port}", 2, index)
mesh = sharding.make_mesh(sizes={"fsdp": 2})
compute = ComputeSettings(jnp.float32, jnp.float32, mesh=mesh)
_, _, shapes = hf_loader.abstract_model(read_config(directory), AdapterSpec(1, 1.0, 0.0, ()), compute)
before = peak()
base = jax.block_until_ready(hf_loader.load_base(directory, shapes, mesh))
own = sum(shard.data.nbytes for leaf in jax.tree.leaves(base) for shard in leaf.addressable_shards)
print(json.dumps([peak() - before, own, sum(leaf.nbytes for leaf in jax.tree.leaves(base))]))
"""


def test_a_process_loads_only_its_share_of_the_base_model(tmp_path, smollm):
    """The peak memory while loading is too small for the rest of the base model."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 16384}
    directory = make_model(tmp_path / "base", smollm, **sizes, num_attention_heads=16, num_key_value_heads=16)
    largest = 4 * 16384 * 1024
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(index), str(port), directory],
            **process_options(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    codes, outs, errs = ended(processes)
    assert codes == [0, 0], errs
    for out in outs:
        grown, own, whole = json.loads(out.splitlines()[-1])
        assert own < 0.52 * whole
        assert grown < own + largest + (16 << 20) < 0.8 * whole, (grown, own, whole, largest)
