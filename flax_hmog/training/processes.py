"""Several processes of one program: their connection, work that is done once, and a common stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

STOPPED = 75
"""Exit status of a run that was asked to stop and has saved: run the same command again (sysexits' EX_TEMPFAIL)."""


class Stopped(Exception):  # noqa: N818  it is no error
    """The run was asked to stop, and has saved."""


def connect(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    heartbeat_seconds: int = 60,
) -> None:
    """Connect this process with the others of the run; before anything else of jax is used.

    Args:
        coordinator: address HOST:PORT of the first process; "auto" asks the cluster; None: one process.
        count: number of processes, with an address.
        index: number of this process from 0, with an address.
        heartbeat_seconds: silence after which a process counts as lost and the others stop.

    Raises:
        ValueError: for addresses and numbers that do not belong together.
    """
    if coordinator is None and (count, index) != (None, None):
        raise ValueError(
            "connect: `processes.coordinator` must be given with the number of processes; got None. Give "
            "--processes.coordinator HOST:PORT, or auto on a cluster."
        )
    if coordinator not in (None, "auto") and (count is None or index is None):
        raise ValueError(
            "connect: `processes.count` and `processes.index` must be given with a coordinator's address; got "
            f"{count} and {index}. Give both, or --processes.coordinator auto on a cluster."
        )
    if coordinator == "auto":
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
    elif coordinator is not None:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=heartbeat_seconds)
    if jax.process_count() > 1:
        # the first collective sets up the connections, and fails if one process is much later than the others
        multihost_utils.sync_global_devices("connected")


def is_first() -> bool:
    """True on the process that writes what is written once."""
    return jax.process_index() == 0


def gather(array: np.ndarray) -> np.ndarray:
    """An array of every process (P, ...), bit for bit whatever the precision of the devices."""
    if jax.process_count() == 1:
        return array[None]
    array = np.ascontiguousarray(array)
    parts = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
    return np.stack([np.frombuffer(part.tobytes(), array.dtype).reshape(array.shape) for part in np.asarray(parts)])


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """A global array as numpy, on every process."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class StopRequest:
    """Requests to stop the run: by SIGTERM or Ctrl-C on one process; by SIGTERM on any of several.

    A second Ctrl-C stops at once, without a checkpoint.

    Args:
        listens: one process takes over these signals; otherwise their handlers stay.
    """

    def __init__(self, *, listens: bool = True) -> None:
        self.received, self.step = False, 0
        if listens and jax.process_count() == 1:  # several have a handler of jax's coordination service
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def is_made(self) -> bool:
        """Asked once after every step; the same answer on all processes at the same step, and from then on."""
        self.step += 1
        if jax.process_count() > 1:
            self.received |= multihost_utils.reached_preemption_sync_point(self.step)
        return self.received


def on_first_process(function: Callable[[], Any]) -> Any:
    """Call a function on the first process while the others wait; if it fails there, all of them stop.

    Returns:
        What it returns; None on the other processes.

    Raises:
        ValueError: on the other processes, if the function raises on the first.
    """
    if jax.process_count() == 1:
        return function()
    problem: Exception | None = None
    result: Any = None
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as error:  # raised again below, on all processes
            problem = error
    has_failed = np.asarray(multihost_utils.process_allgather(np.array(problem is not None))).any()
    if problem is not None:
        raise problem
    if has_failed:
        raise ValueError("on_first_process: the first process must succeed; it has not. Read its message.")
    return result
