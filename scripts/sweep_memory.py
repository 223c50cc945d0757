"""Compares the memory that a sweep's step takes with its forecast, for teams of several sizes.

    python scripts/sweep_memory.py --config configs/law.py --together 1 2 4 8

Each size trains two steps in a process of its own (Linux, CPU). The base model, the adapters and their optimizer states
are counted from their arrays; the rest is by how much the process grows in the steps.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora.common import malloc
from jlora.config.files import load_config
from jlora.distributed.platforms import find_devices
from jlora.planning.forecast import bytes_per_device, forecast, make_run_programs
from jlora.sweep import run
from jlora.training.run import load, make_run_job
from jlora.training.setup import configure_jax

MIB = 1 << 20


def memory(field: str) -> int:
    """Returns a field of this process's status, such as VmRSS, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure(config_file: str, together: int) -> None:
    """Prints a row of the table."""
    with tempfile.TemporaryDirectory() as directory:
        rates = ",".join(f"{i + 1}e-4" for i in range(together))
        words = [f"--config.output_dir={directory}/sweep", "--config.remat=dots"]
        sweep = {"learning_rate": rates, "together": together}
        config = load_config(config_file, [*words, f"--config.sweep={sweep}"])
        configure_jax(config)
        find_devices(config.device)
        with run.prepared(config) as ready:
            first = ready.trials[0]
            setup = ready.setup._replace(batches=first.batches, held_out=first.held_out, steps=ready.steps)
            programs = load(setup, 0, team=together)
            job = make_run_job(setup, together).with_remat("dots")
            _, shapes = make_run_programs(job, ready.steps)
            state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), shapes)
            held = bytes_per_device(programs.base) + bytes_per_device(state)
            batch = dataclasses.replace(first.batches, shapes=first.batches.shapes[-1:])[
                0
            ]  # padded to the largest shape
            batch = batch._replace(weights=np.stack([batch.weights] * together))
            keys = jax.vmap(jax.random.key)(np.arange(together))
            malloc.trim()
            loaded = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            for _ in range(2):
                state, metrics = programs.train_step(state, batch, print, keys)
            jax.block_until_ready(metrics)
            grown, planned = memory("VmHWM") - loaded, forecast(job).needed
    measured = held + grown
    print(
        f"| {together} | {held / MIB:.0f} | {grown / MIB:.0f} | {measured / MIB:.0f} | {planned / MIB:.0f} | "
        f"{measured / planned:.2f} |",
        flush=True,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/law.py")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    if len(arguments.together) == 1:
        measure(arguments.config, arguments.together[0])
        return
    print(
        "| adapters in a step | arrays | grown | measured (MiB) | planned (MiB) | ratio |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    for together in arguments.together:
        words = [sys.executable, __file__, "--config", arguments.config, "--together", str(together)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        print(done.stdout.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
