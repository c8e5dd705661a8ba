"""Leaves of a checkpoint by their names, as both its writer and its reader see them."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

FORMAT = 6  # of checkpoints; a reader takes this one and the two before it


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, as "variables/params/means"; in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def current_names(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays under the names of today: three leaves of a `Natural` were not yet those of its `prior` once."""
    moved = {"prior_location": "location", "prior_precision": "precision", "log_weights": "log_weights"}

    def today(name: str) -> str:
        owner, _, field = name.removesuffix("/entries").rpartition("/")
        if field not in moved or f"{owner}/prior_location" not in arrays:
            return name
        return name.replace(f"{owner}/{field}", f"{owner}/prior/{moved[field]}", 1)

    return {today(name): array for name, array in arrays.items()}


def describe_array(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array on the host."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": hashlib.sha256(data).hexdigest()}
