"""What a run is planned for: the devices here, a TPU slice that need not be here, or a GPU of a given memory."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jlora.common.errors import UserError

GIB = 1 << 30


class Peak(NamedTuple):
    """Of one chip, as its maker states it."""

    capacity: int  # bytes of its own memory; a compiler keeps a little for itself
    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes/s to and from its own memory
    links: float  # bytes/s to other chips, over all its links


# cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, "System architecture"; links there in Gbit/s a chip.
TPUS = {
    "v4": Peak(32 * GIB, 275e12, 1228e9, 300e9),
    "v5e": Peak(16 * GIB, 197e12, 819e9, 200e9),
    "v5p": Peak(95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Peak(32 * GIB, 918e12, 1640e9, 448e9),
}
GPUS = {1: "1", 4: "2x2x1", 8: "2x2x2"}  # how many -> the slice that stands in for them
EXAMPLES = "here, v5e:1, v5e:2x4, v6e:2x4, v5p:4x4x4, v4:2x2x2, gpu:24GiB, gpu:8x80GiB"


class Target(NamedTuple):
    """Devices, or stand-ins for them that programs can be compiled for."""

    name: str
    devices: list[Any]
    limit: int | None  # bytes of memory a device; None where that is not known
    peak: Peak | None
    stands_in: str  # "" where the devices are the target's own; else a sentence on what was compiled for instead


def find_target(name: str, here: list[jax.Device]) -> Target:
    """The target of a name: `here`, KIND:CHIPS of a TPU slice, or `gpu:MEMORY`.

    Args:
      here: this machine's devices.

    Raises:
      UserError: there is no such target, or its compiler is not installed.
    """
    if name == "here":
        return Target(name, here, memory_limit(here), None, "")
    kind, _, rest = name.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){0,2}", rest):
        return Target(name, _slice(kind, rest), TPUS[kind].capacity, TPUS[kind], "")
    if kind == "gpu" and (match := re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?)GiB", rest)):
        return _gpu(name, int(match[1] or 1), int(float(match[2]) * GIB), here)
    raise UserError(f"--target {name}: there is no such target; known are {EXAMPLES}")


def memory_limit(devices: list[jax.Device]) -> int | None:
    """Bytes that a device may use; on a CPU its share of the memory that is free on the host."""
    own = [device for device in devices if device.process_index == jax.process_index()]
    if stats := own[0].memory_stats():
        return stats.get("bytes_limit")
    meminfo = Path("/proc/meminfo")
    if own[0].platform != "cpu" or not meminfo.exists():
        return None
    free = int(re.findall(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[0]) * 1024
    return free // len(own)


def _slice(kind: str, chips: str) -> list[Any]:
    """Stand-ins for the chips of a slice, from the TPU's own compiler."""
    # libtpu's own switches: this machine need not be a TPU's host, and what only compiles locks nobody out.
    for switch in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(switch, "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # of any kind: without them it complains, and goes on
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    alone = {"chips_per_host_bounds": (1, 1, 1)} if chips == "1" else {}
    shape = {"1": "1x1x1" if kind in ("v4", "v5p") else "1x1"}.get(chips, chips)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **alone)
    except Exception as error:  # libtpu raises what it likes
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"no stand-ins for {kind}:{chips}: {reason}. They need the TPU's compiler (pip install 'jax[tpu]', on any "
            f"Linux machine) and a slice that exists, as {EXAMPLES}"
        ) from None
    return list(found.devices)


def _gpu(name: str, count: int, limit: int, here: list[jax.Device]) -> Target:
    """Where this machine has such GPUs, they themselves; else TPU chips with as much memory.

    A CPU cannot stand in: its compiler keeps copies of bfloat16 weights in float32.
    """
    if here[0].platform == "gpu" and len(here) >= count:
        return Target(name, here[:count], limit, None, "")
    if count not in GPUS or limit > TPUS["v5p"].capacity:
        counts = ", ".join(map(str, GPUS))
        raise UserError(f"--target {name}: stand-ins there are for {counts} GPUs of up to 95 GiB; known are {EXAMPLES}")
    words = "an estimate: the same program compiled for TPU v5p, as no such GPU is here"
    return Target(name, _slice("v5p", GPUS[count]), limit, None, words)
