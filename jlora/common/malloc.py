"""Tune glibc malloc: keep what a CPU step frees for the next step, and return what the compiler frees."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None  # None: another libc, which is left alone


def keep_freed() -> None:
    """Serves even the largest blocks from the main heap, and keeps them there once freed.

    The temporary memory of a step is one block of hundreds of MB. By default glibc maps such a block anew each time,
    and the kernel clears it page by page, which takes a tenth of the step time of a small model. Only the main thread
    uses the main heap, so steps must run there: `jax_cpu_enable_async_dispatch` must be off.
    """
    if GLIBC:
        GLIBC.mallopt(M_MMAP_MAX, 0)
        GLIBC.mallopt(M_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Returns all free memory of all heaps to the system."""
    if GLIBC:
        GLIBC.malloc_trim(0)
