"""How SIGINT and SIGTERM stop the training loop: the first one after the current step, a second one at once."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils

STOPPING = (signal.SIGINT, signal.SIGTERM)
TWIN = 1.0  # seconds within which another signal is a copy of the first: `timeout` sends two, for example


class StopSignal:
    """A context manager in which the first SIGINT or SIGTERM asks the training loop to stop; a second one exits.

    Python runs a handler between two instructions of the main thread, and so a step or a compilation may delay it for
    minutes. A thread therefore receives the number of each signal at once, over a socket.

    In several processes, JAX tells all of them and picks a step that none of them has passed. Python allows handlers in
    the main thread only; in any other, the signals keep their effect.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the signal that stops the loop
        self._own: signal.Signals | None = None  # the last one that this process got
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            arriving, sender = socket.socketpair()
            sender.setblocking(False)
            self._undo.callback(sender.close)  # which ends the thread
            before = signal.set_wakeup_fd(sender.fileno())
            self._undo.callback(signal.set_wakeup_fd, before)
            jax_handler = self._take_jax_handler() if jax.distributed.is_initialized() else None
            for number in STOPPING:
                self._undo.callback(signal.signal, number, signal.signal(number, self._on_signal))
            threading.Thread(target=_answer, args=(arriving, jax_handler), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def requested(self, step: int) -> bool:
        """Returns whether to stop before this step; every process must ask before every step."""
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            self.received = self._own or signal.SIGTERM
        return self.received is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._own = signal.Signals(number)
        if not jax.distributed.is_initialized():
            self.received = self._own

    def _take_jax_handler(self) -> int | None:
        """Returns the address of JAX's handler of SIGTERM, which is not Python's, until `_undo` installs it again."""
        libc = ctypes.CDLL(None)
        libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        address = libc.signal(signal.SIGTERM, None)
        self._undo.callback(libc.signal, signal.SIGTERM, address)
        return address


def _answer(arriving: socket.socket, jax_handler: int | None) -> None:
    """Announces the first signal and tells JAX, which tells the other processes; exits at the second one."""
    first = None
    with arriving:
        while number := arriving.recv(1):
            if number[0] not in STOPPING:
                continue
            if first is None:
                first = time.monotonic()
                if jax_handler:
                    ctypes.CFUNCTYPE(None, ctypes.c_int)(jax_handler)(signal.SIGTERM)
                repeat = "press Ctrl-C" if number[0] == signal.SIGINT else "send SIGTERM"
                line = f"Stopping after this step; {repeat} again to stop at once, without a checkpoint of this step"
                with contextlib.suppress(OSError, ValueError):  # nobody reads it
                    print(f"\n{line}", file=sys.stderr, flush=True)
            elif time.monotonic() > first + TWIN:
                os._exit(128 + number[0])
