"""Rows as they enter a model, checked, in its dtype and frame; and passes over them, block by block on their devices.

A pass needs memory for one block, whatever the number of rows. Rows that are sharded stay where they are: every
device takes its own blocks, and sums over rows are added up once, at the end of the pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from flax_hmog.data.containers import in_memory
from flax_hmog.data.shards import Shards, beside, on_shards, reshaped, together, with_auto_axes, zeros_for
from flax_hmog.model.checks import check_finite, check_shape, door, is_concrete, may_miss
from flax_hmog.model.coordinates import Natural, Prepared, check_natural
from flax_hmog.model.frames import has_more_digits
from flax_hmog.model.incomplete import check_noise
from flax_hmog.model.kinds import (
    Array,
)
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import Data, R, Rows, Samples, Tree, jit

# floats that the rows of a block may hold: on CPUs so that they stay in the cache, elsewhere so that kernels are long
BLOCK_FLOATS = {"cpu": 2**22}
LONG_BLOCK_FLOATS = 2**27
MIN_ROWS, MAX_ROWS = 256, 2**16
MOST_REPEATS, WHOLE = 1000, 1e-3  # of weights that are counts: the largest, and how far from a whole number


def on_host(rows: Array) -> np.ndarray:
    """An array as numpy's, wherever its parts lie; all processes take part where they hold different ones."""
    if not isinstance(rows, jax.Array) or rows.is_fully_addressable:
        return np.asarray(rows)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def block_rows(per_row: int) -> int:
    """Rows of a block whose rows hold `per_row` floats each."""
    floats = BLOCK_FLOATS.get(jax.default_backend(), LONG_BLOCK_FLOATS)
    return max(MIN_ROWS, min(MAX_ROWS, floats // per_row))


def sum_rows(function: Callable[[Any, Any, Array], R], operands: Tree, rows: Tree, limit: int, shards: Shards) -> R:
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
        return _sum_blocks(function, operands, rows, limit)

    def on_one_device(operands: Tree, rows: Tree) -> R:
        return cast(R, jax.lax.psum(_sum_blocks(function, operands, rows, limit), shards[1]))

    return on_shards(on_one_device, operands, rows, shards, PartitionSpec())


def map_rows(function: Callable[[Any, Array], R], operands: Tree, x: Array, limit: int, shards: Shards) -> R:
    """`function(operands, block)` of x (..., D) block by block; it takes (B, D), and returns arrays (B, ...) per row.

    Blocks are rematerialised in reverse mode: memory stays O(block) under `grad`.
    """
    rows = x if x.ndim == 2 else reshaped(x, (-1, x.shape[-1]))
    # an exported program for any number of rows takes them at once
    count = rows.shape[0]
    blocks = -(-count // limit) if isinstance(count, int) else 1
    if shards is not None:
        local: Callable[..., R] = lambda operands, rows: map_rows(function, operands, rows, limit, None)  # noqa: E731
        out = on_shards(local, operands, rows, shards, PartitionSpec(shards[1]))
    elif blocks <= 1:
        out = function(operands, rows)
    else:
        size = -(-count // blocks)
        one_block = jax.checkpoint(
            lambda start: function(operands, jax.lax.dynamic_slice_in_dim(rows, start, size)),
        )
        pieces = jax.lax.map(one_block, jnp.minimum(jnp.arange(blocks) * size, count - size))
        # every row once: whole blocks, then the tail of the last
        tail = size - (count - (blocks - 1) * size)
        out = jax.tree.map(
            lambda piece: jnp.concatenate([piece[:-1].reshape(-1, *piece.shape[2:]), piece[-1, tail:]]), pieces
        )
    if x.ndim == 2:
        return out
    return cast(R, jax.tree.map(lambda leaf: reshaped(leaf, (*x.shape[:-1], *leaf.shape[1:])), out))


def _sum_blocks(function: Callable[[Any, Any, Array], R], operands: Tree, rows: Tree, limit: int) -> R:
    count = jax.tree.leaves(rows)[0].shape[0]
    blocks = -(-count // limit) if isinstance(count, int) else 1
    if blocks <= 1:
        return function(operands, rows, jnp.ones(count, bool))
    size = -(-count // blocks)  # all about equally long; the last block overlaps the one before it

    def block_sums(index: Array | int) -> R:
        start = jnp.minimum(index * size, count - size)
        block = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), rows)
        return function(operands, block, jnp.arange(size) + start >= index * size)

    zeros: R = zeros_for(jax.eval_shape(block_sums, 0), operands, rows)
    add = lambda total, index: (jax.tree.map(jnp.add, total, block_sums(index)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, jnp.arange(blocks))[0]


def check_samples(natural: object, x: Data, weights: Samples | None) -> tuple[Natural | Prepared, Array, Array]:
    """The model with its prior, samples as rows (N, D) and their weights (N,)."""
    model, x, _ = enter(natural, x)
    if x.size == 0:
        raise ValueError(f"{door()}: `x` must hold at least one sample (N, D); got shape {x.shape}. Give more samples.")
    if weights is not None:
        weights = beside(check_weights(weights, x.shape[:-1], x.dtype), x)
    else:
        weights = jnp.ones(x.shape[:-1], x.dtype)
    return (model, x, weights) if x.ndim == 2 else (model, reshaped(x, (-1, x.shape[-1])), reshaped(weights, (-1,)))


def check_weights(weights: Samples | None, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Sample weights as an array of this shape; ones if None.

    Raises:
        ValueError: for another shape, entries that are negative or not finite, or a sum of 0.
    """
    if weights is None:
        return jnp.ones(shape, dtype)
    given = in_memory("weights", weights)
    check_shape("weights", given, shape)
    given = given.copy() if isinstance(given, np.ndarray) else given  # as in `as_rows`
    if not is_concrete(given):
        return jnp.asarray(given, dtype)
    with jax.ensure_compile_time_eval():
        weights = jnp.asarray(given, dtype)
        # on the devices, since the rows may be spread over processes, all of which must raise
        has_nan = jnp.any(jnp.isnan(weights))  # which least and largest entry of a sharded array leave out
        smallest, largest = (float(jnp.where(has_nan, jnp.nan, end(weights))) for end in (jnp.min, jnp.max))
    if not (smallest >= 0 and 0 < largest < math.inf):
        raise ValueError(
            f"{door()}: `weights` must be finite, at least 0 and not all 0; got weights from {smallest:.3g} to "
            f"{largest:.3g}. Use 0 to leave a sample out."
        )
    return weights


def effective_weights(weights: Array) -> Array:
    """Weights (N,) that sum to the number of samples that they stand for: a common factor changes nothing.

    Weights that are all whole multiples of the smallest one (up to `MOST_REPEATS`) are counts of equal samples. Others
    stand for (sum v)^2 / sum v^2 samples (Kish 1965). Rows of weight 0 are none. Tracers are left as they are.
    """
    if not is_concrete(weights):
        return weights
    with jax.ensure_compile_time_eval():
        return _effective_weights(weights)


@jit
def _effective_weights(weights: Array) -> Array:
    weights = weights / jnp.max(weights)
    repeats = weights / jnp.min(jnp.where(weights > 0, weights, 1))
    is_whole = jnp.max(jnp.abs(repeats - jnp.round(repeats))) <= WHOLE
    total = jnp.sum(weights)
    kish = total**2 / jnp.sum(weights**2)
    count = jnp.where(is_whole & (jnp.max(repeats) <= MOST_REPEATS), jnp.sum(jnp.round(repeats)), kish)
    return weights * (count / total)


def enter(
    natural: object, x: Data, argument: str = "x", row_numbers: np.ndarray | None = None
) -> tuple[Natural | Prepared, Array, Shards]:
    """Checked arguments of a function of (natural, x): the model with its prior, observations (..., D) in its dtype,
    and their shards.

    Rows on the host with more digits than the dtype has are moved to the model's frame before any is lost. Errors name
    rows by `row_numbers`, if given.
    """
    model: Any = natural if isinstance(natural, Prepared) else with_prior(check_natural(natural))
    parameters = check_natural(model)
    if may_miss():
        check_noise(parameters.observable_precision)
    interaction, frame = parameters.interaction, parameters.frame
    given = check_given(x, interaction.shape[0], argument=argument)
    rows = as_rows(given, interaction.dtype, argument=argument, row_numbers=row_numbers, keeps_axes=True)
    shards: Shards = None
    is_in_one_place = is_concrete(rows) and isinstance(rows.sharding, SingleDeviceSharding)
    if not (is_in_one_place and jax.sharding.get_abstract_mesh().empty):
        model, rows, shards = together(model, rows)
    if frame is not None and is_concrete(frame) and has_more_digits(given, interaction.dtype):
        to_units = not may_miss()
        rows = jnp.asarray(frame.inward_on_host(given, to_units=to_units), interaction.dtype)
        applied = parameters.in_frame(frame.applied(to_units=to_units))
        model = dataclasses.replace(model, natural=applied) if isinstance(model, Prepared) else applied
    return model, rows, shards


def check_observations(
    x: Data, obs_dim: int | None, dtype: DTypeLike, *, argument: str = "x", row_numbers: np.ndarray | None = None
) -> Array:
    """Observations (..., D) as an array of the working dtype; errors name rows by `row_numbers` (N,), if given.

    Raises:
        TypeError: for something that is no array of real numbers.
        ValueError: for no dimension, a wrong last dimension, missing entries, or such that are not finite once
            converted.
    """
    return as_rows(check_given(x, obs_dim, argument=argument), dtype, argument=argument, row_numbers=row_numbers)


def check_given(x: Any, obs_dim: int | None, *, argument: str = "x") -> Any:
    """Observations (..., D) as an array in the dtype they have, on the host if they are there; values are not seen.

    Raises:
        TypeError: for something that is no array of real numbers.
        ValueError: for no dimension, a wrong last dimension, or missing entries.
    """
    if type(x) is not np.ndarray or x.dtype == object:
        x = in_memory(argument, x)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
        raise TypeError(f"{door()}: `{argument}` must hold real numbers; got dtype {x.dtype}. Convert it first.")
    if x.ndim == 0 or (obs_dim is not None and x.shape[-1] != obs_dim):
        wanted = "D" if obs_dim is None else obs_dim
        raise ValueError(
            f"{door()}: `{argument}` must have shape (..., {wanted}); got {x.shape}. Put the observed dimensions last."
        )
    return x


def as_rows(
    x: Rows,
    dtype: DTypeLike,
    *,
    argument: str = "x",
    row_numbers: np.ndarray | None = None,
    is_finite: bool = False,
    keeps_axes: bool = False,
    in_place: bool = False,
) -> Array:
    """Observations of `check_given` in the working dtype: the one place where they are converted.

    Those that were seen to be finite before are not looked at again (`is_finite`). NaN is a missing entry where there
    may be such (`may_miss`). Explicit axes become Auto, but where `keeps_axes`. Rows on the host are copied, since
    programs read them after the caller has them back and may write to them; not `in_place`, where the caller waits.

    Raises:
        ValueError: for entries that are not finite in this dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if isinstance(x, np.ndarray):  # looked at where it is, without a program
            x = np.array(x, dtype, copy=None if in_place else True)
            is_finite = is_finite or bool(np.isfinite(x.sum()))
        rows = jnp.asarray(x, dtype)
    rows = rows if keeps_axes else with_auto_axes(rows)
    if not is_finite:
        check_finite(argument, rows, row_numbers=row_numbers, or_nan=may_miss())
    return rows
