"""Work of one of several processes, for which the others wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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
