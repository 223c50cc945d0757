"""Tunes glibc malloc: keeps the memory that a step frees on a CPU, and returns the memory that the compiler frees."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None  # None: another C library


def retain_freed_memory() -> None:
    """Makes malloc keep freed blocks of any size in the main heap instead of returning them to the system.

    The temporary memory of a step is one block of hundreds of MB. By default, glibc maps a new block for each step, and
    the kernel clears it page by page, which takes a tenth of a small model's step time. Only the main thread uses the
    main heap, so steps must run there, with `jax_cpu_enable_async_dispatch` off.
    """
    if GLIBC:
        GLIBC.mallopt(M_MMAP_MAX, 0)
        GLIBC.mallopt(M_TRIM_THRESHOLD, -1)


def trim() -> None:
    """Returns the free memory of all heaps to the system."""
    if GLIBC:
        GLIBC.malloc_trim(0)
