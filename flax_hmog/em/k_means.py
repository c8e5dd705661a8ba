"""k-means whose result depends neither on the order of rows nor on how they are blocked, weighted or padded."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_hmog.data.rows import block_rows, map_rows, sum_rows
from flax_hmog.data.shards import Shards, on_shards
from flax_hmog.em.pairs import sorted_pairs
from flax_hmog.model.kinds import Array, matmul
from flax_hmog.model.typed import Block, Tree

LLOYD_STEPS = 20  # with all rows, after seeding
FEWEST_CLUSTERS = 33  # with fewer, or fewer rows than in a sample, sums over clusters are products with all of them
# with more, seeds are sought among so many rows, and moved with these before they are with all
SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER = 8192, 16
SAMPLE_STEPS = 5
FAR = 1e15  # from all points, whose square float32 holds
TILE_ROWS = 256  # rows of one cluster that are summed at a time


def k_means(
    points: Array,
    share: Array,
    key: Array,
    n_clusters: int,
    known: Array | None = None,
    shards: Shards = None,
    n_sought: Array | int | None = None,
) -> Array:
    """Labels (N,) of weighted k-means: greedy k-means++ seeds, then Lloyd steps; empty clusters keep their centre.

    Seeds are drawn along a random direction of space, where a row lies wherever it stands among the others: neither
    their order nor rows of weight 0 nor repeated rows in place of weights change what is drawn. With many clusters, and
    rows for each, they are drawn from a sample, which is taken in the same way.

    Args:
        points: (N, L).
        share: weights (N,) that sum to 1.
        key: PRNG key.
        n_clusters: K.
        known: clusters that are known (N,), -1 where not, or None: the first seeds are their means, and they stay.
        shards: shards of the rows.
        n_sought: number of clusters that are sought, the others staying empty; None for all.

    Returns:
        Labels (N,).

    Source: Arthur and Vassilvitskii 2007, with the best of 2 + log K candidates at each seed.
    """
    n_sought = n_clusters if n_sought is None else n_sought
    direction_key, key = jax.random.split(key)
    direction = jax.random.normal(direction_key, points.shape[1:], points.dtype)
    centers, is_known = jnp.zeros((n_clusters, points.shape[1]), points.dtype), jnp.zeros(n_clusters, bool)
    if known is not None:
        member = members(known, share, n_clusters)  # one_hot of -1 is 0
        mass = jnp.sum(member, axis=0)[:, None]
        centers, is_known = matmul(member.T, points) / jnp.where(mass > 0, mass, 1), mass[:, 0] > 0
    centers = jnp.where((jnp.arange(n_clusters) < n_sought)[:, None], centers, FAR)
    if is_large(points.shape[0], n_clusters):
        sample = _sample_rows(n_clusters)
        chosen = _spread_rows(points, share, direction, jax.random.fold_in(key, n_clusters), sample)
        few, equal = points[chosen], jnp.full(sample, 1 / sample, share.dtype)
        labels = None if known is None else known[chosen]
        centers = _seeds(few, equal, direction, key, labels, centers, is_known, n_sought)
        centers = _moved(few, equal, centers, labels, SAMPLE_STEPS, None)
    else:
        centers = _seeds(points, share, direction, key, known, centers, is_known, n_sought)
    return _labels(points, _moved(points, share, centers, known, LLOYD_STEPS, shards), known, shards)


def is_large(n_rows: int, n_clusters: int) -> bool:
    """True for many clusters with many rows for each."""
    return n_clusters >= FEWEST_CLUSTERS and n_rows > _sample_rows(n_clusters)


def _sample_rows(n_clusters: int) -> int:
    return max(SAMPLE_ROWS, SAMPLE_ROWS_PER_CLUSTER * n_clusters)


def _spread_rows(points: Array, share: Array, direction: Array, key: Array, count: int) -> Array:
    """Numbers of rows (count,) at even distances of the cumulated share along a direction (L,)."""
    order = jnp.argsort(matmul(points, direction))
    below = jnp.cumsum(share[order])
    level = (jnp.arange(count) + jax.random.uniform(key, (), points.dtype)) / count * below[-1]
    return order[jnp.minimum(jnp.searchsorted(below, level, side="right"), below.size - 1)]


def _seeds(
    points: Array,
    share: Array,
    direction: Array,
    key: Array,
    known: Array | None,
    centers: Array,
    is_known: Array,
    n_sought: Array | int,
) -> Array:
    """Centres (K, L): those that `is_known` (K,) stay, one after the other is added."""
    n_clusters = centers.shape[0]
    trials = 2 + int(math.log(n_clusters))
    is_tried = jnp.arange(trials) < 2 + jnp.floor(jnp.log(jnp.asarray(n_sought, points.dtype)))
    order = jnp.argsort(matmul(points, direction))

    def draw(key: Array, mass: Array) -> Array:
        """Numbers (T,) of points, drawn in proportion to their mass (N,)."""
        below = jnp.cumsum(mass[order])
        level = jax.random.uniform(key, (trials,), points.dtype) * below[-1]
        return order[jnp.minimum(jnp.searchsorted(below, level, side="right"), below.size - 1)]

    def add_center(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """One more centre, unless it is known, and the squared distances to the nearest one."""
        centers, nearest = state
        mass = share * jnp.where(jnp.isinf(nearest), 1, nearest)
        # where every point is a centre already, any point will do
        mass = jnp.where(jnp.any(mass > 0), mass, share)
        # by its place among the unknown ones: how the known ones are numbered changes nothing
        place = jnp.sum(~is_known & (jnp.arange(n_clusters) < index))
        candidates = points[draw(jax.random.fold_in(key, place), mass)]
        shrunk = jnp.minimum(nearest[:, None], _distances(candidates, points))
        best = jnp.argmin(jnp.where(is_tried, matmul(share, shrunk), jnp.inf))
        added = centers.at[index].set(candidates[best]), shrunk[:, best]
        kept = jax.tree.map(partial(jnp.where, is_known[index]), state, added)
        return cast(tuple[Array, Array], kept)

    nearest = jnp.full(share.shape, jnp.inf, points.dtype)
    if known is not None:
        nearest = jnp.min(jnp.where(is_known[None], _distances(centers, points), jnp.inf), axis=-1)
    return cast(Array, jax.lax.fori_loop(0, n_sought, add_center, (centers, nearest))[0])


def _moved(points: Array, share: Array, centers: Array, known: Array | None, steps: int, shards: Shards) -> Array:
    """Centres (K, L) after Lloyd steps."""
    n_clusters = centers.shape[0]

    def block_sums(centers: Array, block: Block, is_new: Array) -> tuple[Array, Array]:
        points, share, known = block
        member = members(_nearest(centers, points, known), jnp.where(is_new, share, 0), n_clusters)
        return jnp.sum(member, axis=0), matmul(member.T, points)

    def tile_sums(_: Tree, points: Array, share: Array) -> tuple[Array, Array]:
        return jnp.sum(share), matmul(share, points)

    def lloyd(_: int, centers: Array) -> Array:
        if is_large(points.shape[0], n_clusters):
            labels = _labels(points, centers, known, shards)
            mass, total = cluster_sums(tile_sums, (), points, share, labels, n_clusters, shards)
        else:
            limit = block_rows(points.shape[1] + 3 * n_clusters)
            mass, total = sum_rows(block_sums, centers, (points, share, known), limit, shards)
        mass = mass[:, None]
        return jnp.where(mass > 0, total / jnp.where(mass > 0, mass, 1), centers)

    return cast(Array, jax.lax.fori_loop(0, steps, lloyd, centers))


def _labels(points: Array, centers: Array, known: Array | None, shards: Shards) -> Array:
    """The number of the nearest centre of all points (N,), or of the one that is known."""
    limit = block_rows(points.shape[1] + 3 * centers.shape[0])
    labels = map_rows(lambda centers, points: _nearest(centers, points, None), centers, points, limit, shards)
    return labels if known is None else jnp.where(known >= 0, known, labels)


def _nearest(centers: Array, points: Array, known: Array | None) -> Array:
    """`_labels` of a block of points."""
    # half the squared distances, up to a number for each point, by one product: so that both looks at it see one value.
    # argmin takes several times as long
    ones, half = jnp.ones_like(points[:, :1]), jnp.sum(centers**2, axis=-1, keepdims=True) / 2
    far = matmul(jnp.concatenate([points, ones], axis=1), jnp.concatenate([-centers, half], axis=1).T)
    numbers = jnp.arange(centers.shape[0], dtype=jnp.int32)[None]
    labels = jnp.min(jnp.where(far <= jnp.min(far, axis=-1, keepdims=True), numbers, centers.shape[0] - 1), axis=-1)
    return labels if known is None else jnp.where(known >= 0, known, labels)


def _distances(centers: Array, points: Array) -> Array:
    """Squared distances (N, K) of points (N, L) from centres (K, L)."""
    cross = matmul(points, centers.T)
    squares = jnp.sum(points**2, axis=-1)[:, None] + jnp.sum(centers**2, axis=-1)[None]
    return jnp.maximum(squares - 2 * cross, 0)


def members(labels: Array, share: Array, n_clusters: int) -> Array:
    """The share of each row in the column of its cluster (B, K)."""
    return jax.nn.one_hot(labels, n_clusters, dtype=share.dtype) * share[:, None]


def cluster_sums(
    function: Callable[[Any, Array, Array], Any],
    operands: Tree,
    points: Array,
    share: Array,
    labels: Array,
    n_clusters: int,
    shards: Shards,
) -> Any:
    """`function(operands_k, points (T, L), share (T,))` summed over the tiles of the points of every cluster (K, ...).

    Points are sorted by their cluster, so that work does not grow with the number of clusters.

    Args:
        function: gives sums (any tree of arrays) over points of one cluster; those of share 0 must not count.
        operands: tree of arrays (K, ...).
        points: (N, L).
        share: weights (N,).
        labels: the cluster of each point (N,).
        n_clusters: K.
        shards: shards of the rows.
    """

    def local_sums(operands: Tree, rows: tuple[Array, Array, Array]) -> Any:
        points, share, labels = rows
        pairs = sorted_pairs(labels[:, None], n_clusters)
        order = jnp.concatenate([pairs.order, jnp.zeros(TILE_ROWS, pairs.order.dtype)])

        def tile(cluster: Array, number: Array) -> Any:
            start = pairs.starts[cluster] + number * TILE_ROWS
            here = jax.lax.dynamic_slice_in_dim(order, start, TILE_ROWS)
            is_own = jnp.arange(TILE_ROWS) + start < pairs.starts[cluster + 1]
            own = jax.tree.map(lambda a: a[cluster], operands)
            return function(own, points[here], jnp.where(is_own, share[here], 0))

        shapes = jax.eval_shape(tile, jnp.int32(0), jnp.int32(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def one_cluster(cluster: Array) -> Any:
            tiles = -((pairs.starts[cluster] - pairs.starts[cluster + 1]) // TILE_ROWS)
            add = lambda number, total: jax.tree.map(jnp.add, total, tile(cluster, number))  # noqa: E731
            return jax.lax.fori_loop(0, tiles, add, zeros)

        return jax.lax.map(one_cluster, jnp.arange(n_clusters, dtype=jnp.int32))

    rows = points, share, labels
    if shards is None:
        return local_sums(operands, rows)
    summed: Callable[..., Any] = lambda operands, rows: jax.lax.psum(local_sums(operands, rows), shards[1])  # noqa: E731
    return on_shards(summed, operands, rows, shards, PartitionSpec(), check_vma=False)
