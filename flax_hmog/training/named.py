"""Leaves of a checkpoint by their names: what both its writer and its reader know of them."""

from __future__ import annotations

import hashlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np

FORMAT = 5  # of checkpoints; a reader takes this one and the one before it


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, as "variables/params/means"; in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def describe_array(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array on the host."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": hashlib.sha256(data).hexdigest()}


def split_variables(arrays: dict[str, Any], has_encoder: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of the head and of the encoder, each by name "collection/..."."""
    if not has_encoder:
        return arrays, {}
    parts: dict[str, dict[str, Any]] = {"head": {}, "encoder": {}}
    for name, array in arrays.items():
        collection, part, rest = name.split("/", 2)
        parts[part][f"{collection}/{rest}"] = array
    return parts["head"], parts["encoder"]


def abstract_variables(head: Any, arrays: dict[str, Any]) -> Any:
    """Variables of a head without values, D taken from those that were saved."""
    bias = next(a for name, a in arrays.items() if name in ("params/bias", "em/moments/bias"))
    x = jax.ShapeDtypeStruct((1, bias.shape[0]), head.param_dtype)
    return nn.unbox(jax.eval_shape(head.init, jax.random.key(0), x))
