"""NVIDIA GPUs that XLA's CUDA compiler can compile for on a machine without one: their sizes and peak speeds."""

from typing import Any, NamedTuple

from jax.experimental import topologies

MIB = 1 << 20


class Card(NamedTuple):
    """What the compiler has to know about a GPU, and its peak speeds as published by NVIDIA."""

    name: str
    capability: str  # CUDA compute capability
    cores: int  # streaming multiprocessors
    memory: int  # bytes, as the driver reports them
    bandwidth: float  # bytes/s to and from its memory
    flops: float  # dense FLOP/s of bfloat16, or float16 before Ampere, with sums in float32
    links: float  # bytes/s to the other GPUs of its machine in one direction: NVLink, or PCIe x16
    cache: int  # bytes of L2
    clock: float  # GHz, boosted


# Sources: NVIDIA's data sheets and architecture white papers of each GPU; AWS's page of g5 instances for the A10G; for
# A100, H100, B200 and V100 also the device descriptions of XLA (xla/backends/gpu/target_config/specs).
CARDS = {
    "rtx4060": Card("RTX 4060", "8.9", 24, 8188 * MIB, 272e9, 30e12, 16e9, 24 * MIB, 2.46),
    "t4": Card("T4", "7.5", 40, 15360 * MIB, 320e9, 65e12, 16e9, 4 * MIB, 1.59),
    "v100": Card("V100 16 GB", "7.0", 80, 16935682048, 898e9, 125e12, 150e9, 6 * MIB, 1.53),
    "a10g": Card("A10G", "8.6", 80, 23028 * MIB, 600e9, 70e12, 32e9, 6 * MIB, 1.71),
    "l4": Card("L4", "8.9", 58, 23034 * MIB, 300e9, 121e12, 32e9, 48 * MIB, 2.04),
    "rtx4090": Card("RTX 4090", "8.9", 128, 24564 * MIB, 1008e9, 165e12, 32e9, 72 * MIB, 2.52),
    "rtx3090": Card("RTX 3090", "8.6", 82, 24576 * MIB, 936e9, 71e12, 32e9, 6 * MIB, 1.70),
    "rtx5090": Card("RTX 5090", "12.0", 170, 32607 * MIB, 1792e9, 209e12, 64e9, 96 * MIB, 2.41),
    "a100-40": Card("A100 40 GB", "8.0", 108, 42405855232, 1555e9, 312e12, 300e9, 40 * MIB, 1.41),
    "l40s": Card("L40S", "8.9", 142, 46068 * MIB, 864e9, 362e12, 32e9, 96 * MIB, 2.52),
    "h100": Card("H100 SXM", "9.0", 132, 84942979072, 3352e9, 989e12, 450e9, 50 * MIB, 1.98),
    "a100-80": Card("A100 80 GB", "8.0", 108, 85100068864, 2039e9, 312e12, 300e9, 40 * MIB, 1.41),
    "b200": Card("B200", "10.0", 148, 191514411008, 7672e9, 2250e12, 900e9, 126 * MIB, 1.97),
}
# Compute capability -> bytes of shared memory of a multiprocessor, the part that one block can use, resident threads,
# and float32 lanes; from the CUDA programming guide, "Compute capabilities".
LIMITS = {
    "7.0": (96 << 10, 96 << 10, 2048, 64),
    "7.5": (64 << 10, 64 << 10, 1024, 64),
    "8.0": (164 << 10, 163 << 10, 2048, 64),
    "8.6": (100 << 10, 99 << 10, 1536, 128),
    "8.9": (100 << 10, 99 << 10, 1536, 128),
    "9.0": (228 << 10, 227 << 10, 2048, 128),
    "10.0": (228 << 10, 227 << 10, 2048, 128),
    "12.0": (128 << 10, 99 << 10, 1536, 128),
}
MACHINE = 8  # GPUs of one machine in a larger target
LIBRARIES = 'runtime_version: "12.8.0" driver_version: "12.8.0" compile_time_toolkit_version: "12.8.0"'


def describe_card(card: Card) -> str:
    """Returns the description that XLA's compiler takes: a GpuTargetConfig message as text."""
    major, minor = card.capability.split(".")
    shared, of_block, threads, lanes = LIMITS[card.capability]
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {card.cores} fpus_per_core: {lanes} clock_rate_ghz: {card.clock}
          device_memory_size: {card.memory} memory_bandwidth: {card.bandwidth:.0f} l2_cache_size: {card.cache}
          shared_memory_per_core: {shared} shared_memory_per_block_optin: {of_block} shared_memory_per_block: 49152
          threads_per_core_limit: {threads} threads_per_block_limit: 1024 threads_per_warp: 32
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          {LIBRARIES} dnn_version: "9.10.0"
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "NVIDIA {card.name}"
    """


def simulated_cards(card: Card, count: int) -> list[Any]:
    """Returns simulated GPUs, for which XLA's CUDA compiler can compile; machines have MACHINE of them.

    Raises:
      RuntimeError: the compiler is not installed.
    """
    machines, each = (count // MACHINE, MACHINE) if count % MACHINE == 0 else (1, count)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=describe_card(card), topology=f"1x{machines}x{each}"
    )
    return list(topology.devices)
