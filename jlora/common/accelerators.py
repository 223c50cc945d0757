"""Whether this machine has an accelerator, and quiet where it has none.

Plugins of JAX for accelerators (jax[tpu], jax[cuda12]) print screens of errors on machines without one, both when JAX
is imported and when it looks for devices.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Files in /dev of the drivers that JAX has plugins for: NVIDIA's (on a PC, Jetson, WSL), AMD's, Google's.
DEVICE_FILES = ("nvidia[0-9]*", "nvidiactl", "nvmap", "dxg", "kfd", "accel*", "vfio/[0-9]*")


def has_accelerator(directory: Path = Path("/dev")) -> bool:
    """Returns whether a driver has made a device file; True on systems without such files."""
    return not directory.is_dir() or any(next(directory.glob(name), None) for name in DEVICE_FILES)


def quiet_without_accelerator() -> contextlib.AbstractContextManager[None]:
    """Returns a context that discards what native code writes to standard error, if there is no accelerator."""
    return contextlib.nullcontext() if has_accelerator() else unprinted()


@contextlib.contextmanager
def unprinted() -> Iterator[None]:
    """Discards what native code writes to standard error. Exceptions pass."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
