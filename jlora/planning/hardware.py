"""Targets to plan for: the devices of this machine, or a TPU slice or GPUs that it may not have.

XLA's compilers for TPUs and for NVIDIA GPUs run on machines without them.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jlora.common.accelerators import quiet_without_accelerator
from jlora.common.errors import UserError
from jlora.distributed.platforms import GPU_MEMORY_SHARE
from jlora.planning.gpu_cards import CARDS, simulated_cards

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
# Memory of a GPU that a process cannot use: the driver's context and the libraries. An assumption, not measured.
GPU_CONTEXT = GIB // 2
REPORTED = 0.93  # least share of a card's nominal memory that its driver reports
EXAMPLES = "here, v5e:1, v5e:2x4, v6e:2x4, v5p:4x4x4, v4:2x2x2, gpu:h100, gpu:8xa100-80, gpu:24GiB"


class Target(NamedTuple):
    """The devices to compile for, real or simulated."""

    name: str
    devices: list[Any]
    limit: int | None  # bytes of memory per device; None if unknown
    peak: Peak | None


def find_target(name: str, here: list[jax.Device]) -> Target:
    """Returns the target with a name: `here`, KIND:CHIPS for a TPU slice, `gpu:CARD` or `gpu:MEMORY`.

    Args:
      here: the devices of this machine.

    Raises:
      UserError: the target is unknown, or its compiler is not installed.
    """
    if name == "here":
        return Target(name, here, memory_limit(here), None)
    kind, _, rest = name.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+){0,2}", rest):
        return Target(name, _simulated_slice(kind, rest), TPUS[kind].capacity, TPUS[kind])
    if kind == "gpu" and (match := re.fullmatch(r"(?:(\d+)x)?(.+)", rest)) and int(match[1] or 1):
        return _gpus(name, int(match[1] or 1), match[2])
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


def _gpus(name: str, count: int, wanted: str) -> Target:
    """Returns simulated GPUs: of a listed card, or of the smallest listed card with at least this memory."""
    capacity = None
    if memory := re.fullmatch(r"(\d+(?:\.\d+)?)GiB", wanted):
        capacity = int(float(memory[1]) * GIB)
        wanted = min((card for card in CARDS if CARDS[card].memory >= REPORTED * capacity), key=_memory, default="")
        if not wanted:
            largest = max(CARDS.values(), key=lambda card: card.memory)
            raise UserError(
                f"--target {name}: No GPU that jlora knows has that much memory. The largest, {largest.name}, has "
                f"{largest.memory / GIB:.0f} GiB."
            )
    if wanted not in CARDS:
        raise UserError(f"Unknown --target {name!r}. GPUs: {', '.join(CARDS)}; or their memory, such as gpu:24GiB.")
    card = CARDS[wanted]
    try:
        if not importlib.util.find_spec("nvidia.cudnn"):
            raise ModuleNotFoundError("nvidia-cudnn is not installed")
        with quiet_without_accelerator():
            devices = simulated_cards(card, count)
    except Exception as error:  # the plugin raises many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{name} cannot be simulated: {reason}. This needs XLA's CUDA compiler and cuDNN, on Linux: "
            "pip install 'jlora[cuda-compiler]'. The GPU itself is not needed."
        ) from None
    capacity = min(card.memory, capacity or card.memory)
    usable = int((capacity - GPU_CONTEXT) * GPU_MEMORY_SHARE)
    return Target(name, devices, usable, Peak(capacity, card.flops, card.bandwidth, card.links))


def _memory(card: str) -> int:
    return CARDS[card].memory
