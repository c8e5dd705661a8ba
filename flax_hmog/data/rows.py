"""Passes over rows: cut into blocks of one shape, and spread over the devices that hold the rows.

A pass needs memory for one block, whatever the number of rows. Rows that are sharded stay where they are: every
device takes its own blocks, and sums over rows are added up once, at the end of the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flax_hmog.model.kinds import Array

DATA_AXIS = "data"  # the mesh axis over which rows lie
# floats that the rows of a block may hold: on CPUs so that they stay in the cache, elsewhere so that kernels are long
BLOCK_FLOATS = {"cpu": 2**22}
LONG_BLOCK_FLOATS = 2**27
MIN_ROWS, MAX_ROWS = 256, 2**16

Shards: TypeAlias = tuple[Mesh | AbstractMesh, tuple[str, ...]] | None
"""A mesh and those of its axes over which rows are split; None for rows in one place."""


def row_shards(x: Array) -> Shards:
    """Over what a pass over the first axis of `x` is split.

    Of an array its sharding says so. That of a tracer is not known yet: its rows are taken to lie over the axis `data`
    of the mesh in scope, as `jax.set_mesh` or `make_train_step` sets it. Devices along the other axes hold the same
    rows and share the work on them.
    """
    if x.ndim < 2:
        return None
    if isinstance(x, jax.core.Tracer):
        mesh = jax.sharding.get_abstract_mesh()
        is_there = not mesh.empty and DATA_AXIS in mesh.axis_names
        return _with_free_axes(mesh, (DATA_AXIS,), x.shape[0]) if is_there else None
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    names = sharding.spec[0]
    return _with_free_axes(sharding.mesh, (names,) if isinstance(names, str) else tuple(names), x.shape[0])


def _with_free_axes(mesh: Mesh | AbstractMesh, names: tuple[str, ...], count: int) -> Shards:
    """These axes and, where they divide the rows, all others; None for axes that do not split rows."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds[name] != AxisType.Auto for name in names):
        return None
    for axes in (names + tuple(name for name in mesh.axis_names if name not in names), names):
        size = math.prod(mesh.shape[name] for name in axes)
        if size > 1 and count % size == 0 and all(kinds[name] == AxisType.Auto for name in axes):
            return mesh, axes
    return None


def on_host(rows: Any) -> np.ndarray:
    """An array as numpy's, wherever its parts lie; all processes take part where they hold different ones."""
    if not isinstance(rows, jax.Array) or rows.is_fully_addressable:
        return np.asarray(rows)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def block_rows(per_row: int) -> int:
    """Rows of a block whose rows hold `per_row` floats each."""
    floats = BLOCK_FLOATS.get(jax.default_backend(), LONG_BLOCK_FLOATS)
    return max(MIN_ROWS, min(MAX_ROWS, floats // per_row))


def sum_rows(function: Callable[[Any, Any, Array], Any], operands: Any, rows: Any, limit: int, shards: Shards) -> Any:
    """`function(operands, block, is_new)` summed over blocks of rows.

    Args:
        function: gives sums (any tree of arrays) over the rows of a block; rows with `is_new` False (B,) were in
            another block already and must not count.
        operands: its arguments besides rows.
        rows: tree of arrays (N, ...).
        limit: rows of a block at most.
        shards: shards of the rows.

    Returns:
        The sums.
    """
    if shards is None:
        return _sum_blocks(function, operands, rows, limit, ())
    mesh, names = shards

    def on_one_device(operands: Any, rows: Any) -> Any:
        return jax.lax.psum(_sum_blocks(function, operands, rows, limit, names), names)

    specs = PartitionSpec(), PartitionSpec(names)
    share = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names=frozenset(names)
    )
    return share(operands, rows)


def map_rows(function: Callable[[Any, Array], Any], operands: Any, x: Array, limit: int, shards: Shards) -> Any:
    """`function(operands, block)` of x (..., D) block by block; it takes (B, D), and returns arrays (B, ...) per row.

    Blocks are rematerialised in reverse mode: memory stays O(block) under `grad`.
    """
    flat = x.reshape(-1, x.shape[-1])
    if shards is None:
        out = _map_blocks(function, operands, flat, limit)
    else:
        mesh, names = shards
        share = jax.shard_map(
            lambda operands, rows: _map_blocks(function, operands, rows, limit),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(names)),
            out_specs=PartitionSpec(names),
            axis_names=frozenset(names),
        )
        out = share(operands, flat)
    return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-1], *leaf.shape[1:]), out)


def _blocks(count: int, limit: int) -> tuple[int, int]:
    """Rows of a block and number of blocks, all about equally long. The last one overlaps the one before it."""
    blocks = -(-count // limit)
    return -(-count // max(blocks, 1)), blocks


def _sum_blocks(function: Callable, operands: Any, rows: Any, limit: int, names: tuple[str, ...]) -> Any:
    count = jax.tree.leaves(rows)[0].shape[0]
    size, blocks = _blocks(count, limit)
    if blocks <= 1:
        return function(operands, rows, jnp.ones(count, bool))

    def block_sums(index: Array | int) -> Any:
        start = jnp.minimum(index * size, count - size)
        block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), rows)
        return function(operands, block, jnp.arange(size) + start >= index * size)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(block_sums, 0))
    if names:
        zeros = jax.lax.pcast(zeros, names, to="varying")
    add = lambda total, index: (jax.tree.map(jnp.add, total, block_sums(index)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, jnp.arange(blocks))[0]


def _map_blocks(function: Callable, operands: Any, rows: Array, limit: int) -> Any:
    count = rows.shape[0]
    # an exported program for any number of rows takes them at once
    size, blocks = _blocks(count, limit) if isinstance(count, int) else (count, 1)
    if blocks <= 1:
        return function(operands, rows)

    @jax.checkpoint
    def one_block(start: Array) -> Any:
        return function(operands, jax.lax.dynamic_slice_in_dim(rows, start, size))

    pieces = jax.lax.map(one_block, jnp.minimum(jnp.arange(blocks) * size, count - size))
    # every row once: whole blocks, then the tail of the last
    tail = count - (blocks - 1) * size
    return jax.tree.map(
        lambda piece: jnp.concatenate([piece[:-1].reshape(-1, *piece.shape[2:]), piece[-1, size - tail :]]), pieces
    )
