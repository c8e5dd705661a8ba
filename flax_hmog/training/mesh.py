"""The device mesh and where things lie on it: leaves by the rule table, batches over the other axes."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from flax_hmog.model.checks import check_size, public

RULES = (("component", "model"), ("observed", "model"), ("latent", None))
"""Logical axis of a leaf to mesh axis; None replicates. An axis that a mesh lacks splits nothing."""
LEAF_AXES = tuple({axis for _, axis in RULES if axis is not None})
MIN_SHARDED = 2**14  # entries of a leaf below which it is replicated

logger = logging.getLogger(__name__)


@public
def make_mesh(*, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A data x model mesh over all devices.

    Args:
        model: devices along the axis that splits components; the rest split the batch.
        devices: the devices; None takes all there are.

    Returns:
        Mesh with axes `data` and `model`.

    Raises:
        ValueError: if `model` does not divide the number of devices.

    Example:
        >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else devices
    check_size("model", model)
    if len(devices) % model:
        raise ValueError(
            f"make_mesh: `model` must divide the number of devices, {len(devices)}; got {model}. Choose a divisor."
        )
    return jax.make_mesh(
        (len(devices) // model, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes of a mesh that split no leaves, as `data` of `make_mesh`.

    Example:
        >>> tuple(batch_sharding(make_mesh()).spec)
        ('data',)
    """
    return NamedSharding(mesh, PartitionSpec(tuple(name for name in mesh.axis_names if name not in LEAF_AXES)))


def rows_multiple(mesh: Mesh) -> int:
    """The number of rows must be a multiple of this for all devices to share the work on them."""
    return math.prod(mesh.shape.values())


def global_rows(mesh: Mesh, shape: tuple[int, ...], read: Callable[[slice], Any]) -> jax.Array:
    """Rows spread as `batch_sharding` says over a mesh that may span processes, of which each reads only its own.

    Args:
        mesh: the mesh.
        shape: of all rows (N, ...); the data axis must divide N.
        read: `read(rows)` gives the rows of a slice, as numpy.

    Returns:
        The array (N, ...), the same one on all processes.

    Example:
        >>> mesh, rows = make_mesh(devices=jax.devices()[:1]), np.arange(8.0).reshape(4, 2)
        >>> global_rows(mesh, rows.shape, lambda part: rows[part]).shape
        (4, 2)
    """

    @functools.cache  # devices along the other axes hold the same rows
    def share(start: int, stop: int) -> Any:
        return read(slice(start, stop))

    def rows_of_a_device(index: Any) -> Any:
        return share(*index[0].indices(shape[0])[:2])

    return jax.make_array_from_callback(shape, batch_sharding(mesh), rows_of_a_device)


def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that is the same on all processes, laid out over the devices of all of them."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def tree_shardings(abstract: object, mesh: Mesh, rules: Any = RULES, min_size: int = MIN_SHARDED) -> Any:
    """Shardings for a tree whose leaves may carry logical axis names.

    Args:
        abstract: result of `jax.eval_shape` of an init, linen's boxes included.
        mesh: the mesh.
        rules: logical to mesh axes.
        min_size: entries of a leaf below which it is replicated.

    Returns:
        The tree of `NamedSharding`, unboxed. A leaf that its mesh axes do not divide is replicated, and logged.

    Example:
        >>> tree_shardings({"bias": jax.ShapeDtypeStruct((4,), np.float32)}, make_mesh())["bias"].is_fully_replicated
        True
    """
    rules = [(name, axis if axis in mesh.axis_names else None) for name, axis in rules]
    shardings = spmd.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules)

    def of_leaf(path: Any, leaf: Any, sharding: NamedSharding) -> NamedSharding:
        """The sharding of the rules; replicated if the leaf is small or cannot be divided."""
        sizes = [
            math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))
            for axes in sharding.spec
        ]
        if leaf.size < min_size or all(size == 1 for size in sizes):
            return NamedSharding(mesh, PartitionSpec())
        if all(dim % size == 0 for dim, size in zip(leaf.shape, sizes, strict=False)):
            return sharding
        logger.warning(
            "%s %s is replicated: %s does not divide it", jax.tree_util.keystr(path), leaf.shape, sharding.spec
        )
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of_leaf, nn.unbox(abstract), shardings)
