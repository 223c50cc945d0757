"""The processes of one run: how they connect, exchange values, and fail together.

There is one process per host, or one per GPU. All run the same program on their share of the devices; only the first
one prints and writes files. Every process must call the communicating functions, in the same order. With a single
process they cost nothing.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora.common.errors import UserError

T = TypeVar("T")
# JAX's errors contain one of these when another process is lost.
LOST_PROCESS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
# SLURM and Open MPI set these to the number of processes; JAX reads them too.
PROCESS_COUNT_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# JAX's errors without a cluster, or if JAX is already in use, as in a notebook: the process then runs alone.
UNCONNECTED = ("coordinator_address should be defined", "must be called before any JAX")
ERROR_BYTES = 4096  # longest error text that is sent to the other processes
HEARTBEAT_TIMEOUT = 60  # seconds without a heartbeat after which a process counts as dead
SHUTDOWN_TIMEOUT = 30  # seconds that a finished process waits for the others


class SharedError(UserError):
    """A UserError that every process of the run raises."""


def connect(coordinator: str, count: int, index: int) -> None:
    """Connects this process to the others of its run, if there are any; call it before JAX is first used.

    Args:
      coordinator: HOST:PORT of the first process; "": detected by JAX on Cloud TPU, GKE, SLURM and Open MPI.
      count: number of processes; 0: detected by JAX; 1: a single process, without connecting.
      index: index of this process; -1: detected by JAX.

    Raises:
      UserError: the processes could not connect.
    """
    if count == 1 or (not (coordinator or count) and any(os.environ.get(v) == "1" for v in PROCESS_COUNT_VARIABLES)):
        return  # for a single SLURM task, JAX would use only one device
    if jax.distributed.is_initialized():
        return  # this process is connected already
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator or None,
            num_processes=count or None,
            process_id=None if index < 0 else index,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except Exception as error:  # JAX's cluster detection may raise anything
        configured = coordinator or count or index >= 0 or any(map(os.environ.get, PROCESS_COUNT_VARIABLES))
        if not configured and any(text in str(error) for text in UNCONNECTED):
            return
        raise UserError(
            f"The processes of this run could not connect ({_first_line(error)}). Found "
            f"coordinator_address={coordinator!r}, num_processes={count}, process_id={index}. Start all processes with "
            "the same coordinator_address and num_processes, each with its own process_id. On Cloud TPU, GKE, SLURM "
            "and Open MPI, set none of the three. Set num_processes=1 to run a single process."
        ) from None


def mute_all_but_first() -> None:
    """Discards the standard output of every process but the first; errors still go to standard error."""
    if not is_first():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (stays open)


def is_first() -> bool:
    """Returns whether this is the process that prints and writes files."""
    return jax.process_index() == 0


@contextmanager
def fail_together() -> Iterator[None]:
    """Raises a UserError of any one process in all of them."""
    try:
        yield
    except SharedError:
        raise
    except UserError as error:
        _exchange_errors(str(error))
        raise SharedError(str(error)) from error
    _exchange_errors()


def _exchange_errors(error: str = "") -> None:
    """Raises another process's error, if there is one."""
    if jax.process_count() == 1:
        return
    text = np.frombuffer(error.encode()[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0"), np.uint8)
    for index, other in enumerate(multihost_utils.process_allgather(text)):
        message = other.tobytes().rstrip(b"\0").decode(errors="replace")
        if message and not error:
            raise SharedError(f"process {index}: {message}")


def first_then_others(make: Callable[[], T]) -> T:
    """Calls `make` in the first process, then in the others, which find the files that the first left on a shared disk.

    Returns:
      This process's own result.
    """
    for first in (True, False):
        with fail_together():
            if is_first() == first:
                made = make()
    return made


def broadcast_from_first(make: Callable[[], T]) -> T:
    """Calls `make` in the first process only and returns its result, which must be JSON, in every process."""
    with fail_together():
        text = json.dumps(make() if is_first() else None).encode()
    if jax.process_count() == 1:
        return json.loads(text)
    size = multihost_utils.broadcast_one_to_all(np.int32(len(text)))
    return json.loads(_broadcast(np.frombuffer(text.ljust(size)[:size], np.uint8)).tobytes())


def broadcast_arrays_from_first(make: Callable[[], Any], shapes: Any) -> Any:
    """Calls `make` in the first process only and returns its arrays in the host memory of every process.

    Args:
      shapes: a tree with the shapes and dtypes of those arrays.
    """
    with fail_together():
        made = make() if is_first() else jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return made if jax.process_count() == 1 else jax.tree.map(_broadcast, made)


def _broadcast(values: np.ndarray) -> np.ndarray:
    """Sends an array as bytes: the broadcast adds up all processes' arrays, and adding zeros to bytes is exact."""
    sent = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return received.view(values.dtype).reshape(values.shape)


def check_agreement(values: dict[str, Any]) -> None:
    """Raises a UserError that lists the values in which another process differs from the first."""
    firsts = broadcast_from_first(lambda: values)
    with fail_together():
        own = json.loads(json.dumps(values))
        other = [f"{key} is {own[key]!r}, but {firsts[key]!r} in process 0" for key in own if own[key] != firsts[key]]
        if other:
            raise UserError(
                f"Processes disagree about the run: {'; '.join(other)}. Give every process the same settings, data, "
                "base model and package versions."
            )


def minimum(value: int | None) -> int | None:
    """Returns the smallest value of all processes; None if any process has None."""
    if jax.process_count() == 1:
        return value
    high, low = np.divmod(-1 if value is None else value, 1 << 31)  # JAX's integers have 32 bits
    pairs = multihost_utils.process_allgather(np.array([high, low], np.int32))
    smallest = min((int(high) << 31) + int(low) for high, low in pairs)
    return None if smallest < 0 else smallest


def gather_to_host(tree: Any) -> Any:
    """Copies sharded arrays to host memory, complete in every process; the next step may reuse the device memory."""

    def leaf(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.array(array, copy=True)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(leaf, tree)


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """Exits at once, with a message, if this process fails alone or another process is lost.

    JAX's own shutdown would wait for the other processes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, SharedError) or jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        elif any(sign in str(error) for sign in LOST_PROCESS):
            print(
                f"error: Another process of this run has died or cannot be reached ({_first_line(error)}). Look at the "
                "last lines that it printed. The saved checkpoints are intact: start all processes again with the "
                "same command and --config.resume_from_checkpoint=auto.",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
