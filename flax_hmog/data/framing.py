"""The robust frame of a data set, and the rows that are too far from all others."""

from __future__ import annotations

from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flax_hmog.data.rows import on_host
from flax_hmog.model.checks import may_miss
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import Floats, Rows, jit

UNIT_QUANTILE = 0.75  # of the distances from the median; entries that equal it do not count, as in sparse data


MOST = 0.5  # of the columns that vary


COLUMNS_AT_ONCE = 32  # that are sorted together


MEDIAN_STEPS, MEDIAN_ROWS, MEDIAN_FLOATS = 50, 1000, 2**24  # of the geometric median; more floats are taken in float32


MEDIAN_TOLERANCE = {np.float64: 1e-9, np.float32: 1e-5}  # of a step, in typical distances


EQUAL = {np.float64: 1e-14, np.float32: 1e-6}  # part of two squares that their difference is rounded to


def share_bounds(x: np.ndarray) -> bool:
    """True if columns visibly share a unit, as pixels do: most reach the same least and the same largest value.

    Args:
        x: rows (N, D), on the host.
    """
    least, largest = (np.nanmin, np.nanmax) if may_miss() else (np.min, np.max)
    lower, upper = least(x, axis=0), largest(x, axis=0)
    varies = lower < upper
    if varies.sum() < 2:
        return False
    shares = (np.mean(bound[varies] == end) for bound, end in ((lower, lower.min()), (upper, upper.max())))
    return all(share > MOST for share in shares)


def robust_frame(x: np.ndarray, weights: np.ndarray, by_column: bool, dtype: DTypeLike) -> Frame:
    """The frame of rows: medians, and typical distances from them.

    Args:
        x: rows (N, D), on the host.
        weights: sample weights (N,); only their ratios count.
        by_column: a unit for each column, which diagonal noise allows; else one for all, which with origin the
            geometric median follows every rotation.
        dtype: of the frame.

    Returns:
        `Frame`. The unit of a column that does not vary is the typical one of the others, or 1. Missing entries do not
        count.
    """
    kept = weights > 0
    rows, share = (x, weights) if kept.all() else (x[kept], weights[kept])
    share = np.asarray(share, np.float64)
    uniform = share.size == 0 or bool((share == share[0]).all())
    origin, unit = np.empty(x.shape[1]), np.empty(x.shape[1])
    is_missing = np.isnan(rows) if may_miss() else np.zeros((0, x.shape[1]), bool)
    if is_missing.any():
        rows, seen = np.where(is_missing, np.nan_to_num(np.nanmedian(rows, axis=0)), rows), ~is_missing
    if by_column and is_missing.any():
        for column in range(x.shape[1]):
            entries, part = rows[seen[:, column], column][None].astype(np.float64), share[seen[:, column]]
            origin[column] = _quantiles(entries, part, uniform, 0.5)[0]
            unit[column] = _typical(np.abs(entries - origin[column]), part, uniform)[0]
    elif by_column:
        for start in range(0, x.shape[1], COLUMNS_AT_ONCE):
            part = slice(start, start + COLUMNS_AT_ONCE)
            columns = np.ascontiguousarray(rows[:, part].T, np.float64)
            origin[part] = _quantiles(columns, share, uniform, 0.5)
            unit[part] = _typical(np.abs(columns - origin[part, None]), share, uniform)
    else:
        origin, distance = _geometric_median(rows, share)
        if is_missing.any():  # entries that are filled in lie at no distance
            distance = distance * np.sqrt(x.shape[1] / np.maximum(seen.sum(axis=1), 1))
        unit[:] = _typical(distance[None] / np.sqrt(x.shape[1]), share, uniform)
    varies = unit > 0
    unit[~varies] = np.exp(np.log(unit[varies]).mean()) if varies.any() else 1
    return Frame.of(origin, unit, dtype)


def _typical(distances: Floats, share: Floats, uniform: bool) -> Floats:
    """`UNIT_QUANTILE` of those distances (C, N) that are not 0; 0 where all are."""
    missing = np.array([share[row == 0].sum() for row in distances]) / share.sum()
    return _quantiles(distances, share, uniform, missing + UNIT_QUANTILE * (1 - missing))


def _quantiles(columns: Floats, share: Floats, uniform: bool, level: float | np.ndarray) -> Floats:
    """The smallest entry of each row (C, N) up to which `level` of the weights lie."""
    count = columns.shape[1]
    levels = np.broadcast_to(level, columns.shape[:1]) - 1e-9  # what adds up to a level reaches it, whatever is rounded
    if uniform:
        index = np.clip(np.ceil(levels * count).astype(int) - 1, 0, count - 1)
        return cast(Floats, np.sort(columns, axis=1)[np.arange(len(columns)), index])
    order = np.argsort(columns, axis=1, kind="stable")
    mass = np.cumsum(share[order], axis=1)
    index = np.argmax(mass >= levels[:, None] * mass[:, -1:], axis=1)
    return cast(Floats, columns[np.arange(len(columns)), order[np.arange(len(columns)), index]])


def _geometric_median(rows: Floats, share: Floats) -> tuple[Floats, Floats]:
    """The point (D,) with the least mean distance from the rows (N, D), and their distances from it (N,).

    Weiszfeld's steps, two products with the rows each, from the medians of some of them.
    """
    start = np.median(rows[:: max(1, len(rows) // MEDIAN_ROWS)], axis=0).astype(np.float64)
    dtype = np.float64 if rows.size <= MEDIAN_FLOATS else np.float32
    z: Any = np.asarray(rows - start.astype(rows.dtype if rows.dtype.kind == "f" else np.float64), dtype)
    squares = np.einsum("ij,ij->i", z, z)
    if not np.isfinite(squares).all():  # wild rows
        dtype, z = np.float64, z.astype(np.float64)
        squares = np.einsum("ij,ij->i", z, z)

    def distances(point: Floats) -> Floats:
        square = squares - 2 * (z @ point.astype(dtype)) + point @ point
        # what is left of equal numbers is rounding
        return np.sqrt(np.where(square > EQUAL[dtype] * (squares + point @ point), square, 0).astype(np.float64))

    point = np.zeros(z.shape[1])
    for _ in range(MEDIAN_STEPS):
        distance = distances(point)
        pull = np.divide(share, distance, out=np.zeros_like(distance), where=distance > 0)
        if not pull.sum() > 0:
            break
        moved = (pull.astype(dtype) @ z).astype(np.float64) / pull.sum()
        done = np.abs(moved - point).max() <= MEDIAN_TOLERANCE[dtype] * np.median(distance)
        point = moved
        if done:
            break
    # the nearest row itself, if it is the median (Kuhn 1973): steps only approach it
    nearest = z[np.argmin(distances(point))].astype(np.float64)
    distance = distances(nearest)
    pull = np.divide(share, distance, out=np.zeros_like(distance), where=distance > 0)
    force = (pull.astype(dtype) @ z).astype(np.float64) - pull.sum() * nearest
    if np.linalg.norm(force) <= share[distance == 0].sum():
        point = nearest
    return start + point, distances(point)


class Framing:
    """Conversion of rows for a fit: into the frame that it computes in, without those that are far from all others.

    Attributes:
        frame: frame of a model that takes the rows for rows of x.
        wild: numbers of the rows left out so far.
    """

    def __init__(self, frame: Frame, dtype: DTypeLike, max_distance: float, by_column: bool, exact: bool) -> None:
        self.full, self.exact, self.to_units = frame, exact, not may_miss()
        self.frame = frame.applied(to_units=self.to_units) if exact else frame
        self.dtype, self.max_distance, self.by_column = dtype, max_distance, by_column
        self.wild: set[int] = set()

    def rows(self, raw: Rows, x: Array, weights: Array, numbers: np.ndarray) -> tuple[Array, Array]:
        """Rows (B, D) and their weights (B,), those of wild rows 0.

        Args:
            raw: the rows as they came.
            x: the rows in the working dtype.
            weights: their weights.
            numbers: their numbers among all rows (B,).
        """
        if self.exact:
            x = jnp.asarray(self.full.inward_on_host(raw, to_units=self.to_units), self.dtype)
        wild = _wild_rows(self.frame, x, weights, self.max_distance, self.by_column)
        if bool(jnp.any(wild)):
            self.wild.update(numbers[on_host(wild)].tolist())
            x, weights = _without_rows(self.frame, x, weights, wild)
        return x, weights


@jit(static_argnames="by_column")
def _wild_rows(frame: Frame, x: Array, weights: Array, max_distance: Array | float, by_column: bool) -> Array:
    """True for rows (B, D) that count and have an entry (with one unit, are as a whole) too far from the origin."""
    is_missing = jnp.isnan(x)
    rows = jnp.where(is_missing, 0, jnp.abs(frame.inward(x)))
    distance = jnp.max(rows, axis=-1)
    if not by_column:
        top = jnp.maximum(distance, 1)
        count = jnp.maximum(x.shape[1] - jnp.sum(is_missing, axis=-1), 1)
        distance = top * jnp.sqrt(jnp.sum((rows / top[:, None]) ** 2, axis=-1) / count)
    return (distance > max_distance) & (weights > 0)


@jit
def _without_rows(frame: Frame, x: Array, weights: Array, wild: Array) -> tuple[Array, Array]:
    """The rows that are left out lie at the origin, as a weight of 0 alone would not hide a square that overflows."""
    return jnp.where(wild[:, None], frame.origin[None], x), jnp.where(wild, 0, weights)
