"""The processes of one run: how they find each other, agree, fail together, and are stopped at the same step.

One process a host, or one a GPU; all run the same program on their share of the devices. The first alone writes. Where
there is one process, all of this is free. Who communicates here comes through with all processes, in the same order.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora.common.errors import UserError

T = TypeVar("T")
# What stands in JAX's errors where a process is lost.
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
# SLURM's and Open MPI's number of processes, where JAX looks for it too.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
MESSAGE = 4096  # bytes of an error's text that reach the other processes
SILENCE = 60  # seconds without a sign of life after which a process counts as dead
FAREWELL = 30  # seconds that a process waits at its end for the others to end


class AgreedError(UserError):
    """An error that every process has."""


def join(coordinator: str, count: int, index: int) -> None:
    """Makes this process one of a run's, before JAX is first used.

    Args:
      coordinator: HOST:PORT of the first process; "" where JAX finds out: on Cloud TPU, GKE, SLURM and Open MPI.
      count: processes; 0 is what JAX finds, 1 is this one alone.
      index: of this process; -1 is what JAX finds.

    Raises:
      UserError: there are to be several, and they did not find each other.
    """
    if count == 1 or (not (coordinator or count) and any(os.environ.get(name) == "1" for name in TASKS)):
        return  # of one task JAX would use one device alone
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator or None,
            num_processes=count or None,
            process_id=None if index < 0 else index,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=FAREWELL,
        )
    except Exception as error:  # a cluster that JAX takes this for may raise what it likes
        told = coordinator or count or index >= 0
        if not told and "coordinator_address should be defined" in str(error):
            return  # no cluster at all
        raise UserError(
            f"coordinator_address={coordinator!r}, num_processes={count}, process_id={index}: the processes of this "
            f"run did not find each other ({_reason(error)}). All of them must run, with the same coordinator_address "
            "and num_processes and each with its own process_id; or with none of the three where JAX finds them: on "
            "Cloud TPU, GKE, SLURM and Open MPI. num_processes=1 runs this one alone"
        ) from None


def hush() -> None:
    """From now on only the first process prints; the others say why they end."""
    if not is_first():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (it is to stay open)


def is_first() -> bool:
    """Is this the process that prints and writes?"""
    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """What fails within for one process fails for all: an error that a user can mend is raised in each of them."""
    try:
        yield
    except AgreedError:
        raise
    except UserError as error:
        _meet(str(error))
        raise AgreedError(str(error)) from error
    _meet()


def _meet(error: str = "") -> None:
    """Raises another process's error; returns where there is none."""
    if jax.process_count() == 1:
        return
    text = np.frombuffer(error.encode()[:MESSAGE].ljust(MESSAGE, b"\0"), np.uint8)
    for index, other in enumerate(multihost_utils.process_allgather(text)):
        said = other.tobytes().rstrip(b"\0").decode(errors="replace")
        if said and not error:
            raise AgreedError(f"process {index}: {said}")


def in_turn(make: Callable[[], T]) -> T:
    """What each process makes, the first of them first: what it left on a disk they share, the others find."""
    for first in (True, False):
        with together():
            if is_first() == first:
                made = make()
    return made


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, of JSON's kinds, in every process."""
    with together():
        text = json.dumps(make() if is_first() else None).encode()
    if jax.process_count() == 1:
        return json.loads(text)
    size = multihost_utils.broadcast_one_to_all(np.int32(len(text)))
    return json.loads(_broadcast(np.frombuffer(text.ljust(size)[:size], np.uint8)).tobytes())


def arrays_of_first(make: Callable[[], Any], shapes: Any) -> Any:
    """Arrays that the first process makes, as arrays of the host in every process; `shapes` says of which form."""
    with together():
        made = make() if is_first() else jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return made if jax.process_count() == 1 else jax.tree.map(_broadcast, made)


def _broadcast(values: np.ndarray) -> np.ndarray:
    """As bytes, whose sum with the others' zeros is exact."""
    sent = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    got = np.asarray(multihost_utils.broadcast_one_to_all(sent))
    return got.view(values.dtype).reshape(values.shape)


def agree(values: dict[str, Any]) -> None:
    """Raises UserError where another process has other values than the first; names them."""
    firsts = of_first(lambda: values)
    with together():
        own = json.loads(json.dumps(values))
        other = [f"{key} is {own[key]!r}, and {firsts[key]!r} in process 0" for key in own if own[key] != firsts[key]]
        if other:
            raise UserError(f"all processes of a run must have the same before them: {'; '.join(other)}")


def least(value: int | None) -> int | None:
    """The least of all processes' values; None where one has None."""
    if jax.process_count() == 1:
        return value
    high, low = np.divmod(-1 if value is None else value, 1 << 31)  # JAX's integers have 32 bits
    pairs = multihost_utils.process_allgather(np.array([high, low], np.int32))
    smallest = min((int(high) << 31) + int(low) for high, low in pairs)
    return None if smallest < 0 else smallest


def whole(tree: Any) -> Any:
    """Arrays of the mesh as whole ones of the host: copies, so that the next step may use the memory again."""

    def leaf(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.array(array, copy=True)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(leaf, tree)


@contextmanager
def surviving() -> Iterator[None]:
    """Ends this process at once, with a message, where it cannot go on and the others do not know, or are gone.

    JAX's own end would wait for them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AgreedError) or jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        elif any(sign in str(error) for sign in LOST):
            print(
                f"error: another process of this run is gone, or cannot be reached ({_reason(error)}). What it said "
                "last tells why. The checkpoints are safe: start all processes again with the same command, and "
                "--config.resume_from_checkpoint=auto",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


class Stop:
    """Within its `with`, the first SIGINT or SIGTERM is a request that the loop answers; a second one kills.

    In a cluster JAX's own handler takes SIGTERM, tells all processes, and finds a step that none of them has passed.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # that the loop is stopped by
        self._by_hand = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        handlers = {signal.SIGINT: self._ask, signal.SIGTERM: self._ask}
        if jax.distributed.is_initialized():
            handlers = {signal.SIGINT: self._pass_on}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether to stop before this step; to be asked before every one, by all processes."""
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGINT if self._by_hand else signal.SIGTERM
        return self.signal is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._say(number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._by_hand = True
        self._say(number)
        os.kill(os.getpid(), signal.SIGTERM)

    def _say(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after this step, saved; once more stops at once", file=sys.stderr)
