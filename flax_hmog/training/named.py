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


def describe_array(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array on the host."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": hashlib.sha256(data).hexdigest()}
