"""Numbers of numpy and JAX as Python's, which JSON and orbax's metrics take."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def plain(value: Any) -> Any:
    """A tree of dicts, lists and tuples, its scalars and arrays without a dimension as Python numbers.

    Anything else stays as it is, for JSON to refuse.
    """
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    is_number = isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 0)
    return value.item() if is_number and value.dtype.kind in "biuf" else value
