"""The C library's heap: what a step frees on a CPU stays for the next one, what a compiler frees goes back."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
GLIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None  # another library is left to itself


def keep_freed() -> None:
    """Lets the main heap serve and keep even the largest blocks.

    A step's temporary memory is one block of hundreds of MB. glibc maps such a block anew each time, and the system
    clears it and hands it out page by page: a tenth of the time of a step of a small model. The main heap is the main
    thread's, so it is for steps that run there: `jax_cpu_enable_async_dispatch` is to be off.
    """
    if GLIBC:
        GLIBC.mallopt(M_MMAP_MAX, 0)
        GLIBC.mallopt(M_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Returns to the system what is free now, in all heaps and wherever it lies."""
    if GLIBC:
        GLIBC.malloc_trim(0)
