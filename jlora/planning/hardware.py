"""Targets to plan for: the devices of this machine, or a TPU slice or GPUs that it may not have."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jlora.common.accelerators import quiet_without_accelerator
from jlora.common.errors import UserError

GIB = 1 << 30


class Peak(NamedTuple):
    """Peak figures of one chip, as published by its maker."""

    capacity: int  # bytes of its own memory; the compiler reserves a little of it
    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes/s to and from its own memory
    links: float  # bytes/s to other chips, over all its links


# cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "System architecture", which gives links in Gbit/s per chip.
TPUS = {
    "v4": Peak(32 * GIB, 275e12, 1228e9, 300e9),
    "v5e": Peak(16 * GIB, 197e12, 819e9, 200e9),
    "v5p": Peak(95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Peak(32 * GIB, 918e12, 1640e9, 448e9),
}
GPU_SLICES = {1: "1", 4: "2x2x1", 8: "2x2x2"}  # number of GPUs -> the TPU slice that simulates them
EXAMPLES = "here, v5e:1, v5e:2x4, v6e:2x4, v5p:4x4x4, v4:2x2x2, gpu:24GiB, gpu:8x80GiB"


class Target(NamedTuple):
    """The devices to compile for, real or simulated."""

    name: str
    devices: list[Any]
    limit: int | None  # bytes of memory per device; None if unknown
    peak: Peak | None
    simulation_note: str  # for simulated GPUs, the device that was compiled for instead; otherwise ""


def find_target(name: str, here: list[jax.Device]) -> Target:
    """Returns the target with a name: `here`, KIND:CHIPS for a TPU slice, or `gpu:MEMORY`.

    Args:
      here: the devices of this machine.

    Raises:
      UserError: the target is unknown, or its compiler is not installed.
    """
    if name == "here":
        return Target(name, here, memory_limit(here), None, "")
    kind, _, rest = name.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){0,2}", rest):
        return Target(name, _simulated_slice(kind, rest), TPUS[kind].capacity, TPUS[kind], "")
    if kind == "gpu" and (match := re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)GiB", rest)):
        return _gpu_target(name, int(match[1] or 1), int(float(match[2]) * GIB), here)
    raise UserError(f"Unknown --target {name!r}. Examples: {EXAMPLES}.")


def memory_limit(devices: list[jax.Device]) -> int | None:
    """Returns the bytes that a device may use; on a CPU, its share of the host's free memory; None if unknown."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    if stats := own[0].memory_stats():
        return stats.get("bytes_limit")
    meminfo = Path("/proc/meminfo")
    if own[0].platform != "cpu" or not meminfo.exists():
        return None
    free = int(re.findall(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[0]) * 1024
    return free // len(own)


def _simulated_slice(kind: str, chips: str) -> list[Any]:
    """Returns simulated chips of a slice, for which the TPU's own compiler can compile."""
    # With these settings, libtpu compiles on a machine without a TPU, and does not lock other processes out.
    for switch in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(switch, "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # any kind; without these two it logs complaints
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    alone = {"chips_per_host_bounds": (1, 1, 1)} if chips == "1" else {}
    shape = {"1": "1x1x1" if kind in ("v4", "v5p") else "1x1"}.get(chips, chips)
    try:
        with quiet_without_accelerator():
            found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **alone)
    except Exception as error:  # libtpu raises many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{kind}:{chips} cannot be simulated: {reason}. This needs the TPU compiler (pip install 'jax[tpu]', on "
            f"Linux) and a slice that exists, such as {EXAMPLES}."
        ) from None
    return list(found.devices)


def _gpu_target(name: str, count: int, limit: int, here: list[jax.Device]) -> Target:
    """Returns this machine's GPUs if it has enough of them; else TPU chips with as much memory, which simulate them.

    A CPU cannot simulate them, because its compiler keeps copies of bfloat16 weights in float32.
    """
    if here[0].platform == "gpu" and len(here) >= count:
        return Target(name, here[:count], limit, None, "")
    if count not in GPU_SLICES or limit > TPUS["v5p"].capacity:
        raise UserError(
            f"--target {name}: Only 1, 4 or 8 GPUs of up to 95 GiB each can be simulated. Examples: {EXAMPLES}."
        )
    note = "an estimate, compiled for TPU v5p because this machine has no such GPU"
    return Target(name, _simulated_slice("v5p", GPU_SLICES[count]), limit, None, note)
