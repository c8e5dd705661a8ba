"""k-means whose result depends neither on the order of rows nor on how they are blocked, weighted or padded."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from flax_hmog.data.rows import Shards, block_rows, map_rows, sum_rows
from flax_hmog.model.kinds import Array, matmul
from flax_hmog.model.typed import Block

LLOYD_STEPS = 20  # after seeding
FAR = 1e15  # from all points, whose square float32 holds


def k_means(
    points: Array, share: Array, key: Array, n_clusters: int, known: Array | None = None, shards: Shards = None,
    n_sought: Array | int | None = None,
) -> Array:  # fmt: skip
    """Labels (N,) of weighted k-means: greedy k-means++ seeds, then Lloyd steps; empty clusters keep their centre.

    Seeds are drawn along a random direction of space, where a row lies wherever it stands among the others: neither
    their order nor rows of weight 0 nor repeated rows in place of weights change what is drawn.

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
    trials, n_sought = 2 + int(math.log(n_clusters)), n_clusters if n_sought is None else n_sought
    is_tried = jnp.arange(trials) < 2 + jnp.floor(jnp.log(jnp.asarray(n_sought, points.dtype)))
    direction_key, key = jax.random.split(key)
    order = jnp.argsort(matmul(points, jax.random.normal(direction_key, points.shape[1:], points.dtype)))
    limit = block_rows(points.shape[1] + 3 * n_clusters)

    def draw(key: Array, mass: Array) -> Array:
        """Numbers (T,) of points, drawn in proportion to their mass (N,)."""
        below = jnp.cumsum(mass[order])
        level = jax.random.uniform(key, (trials,), points.dtype) * below[-1]
        return order[jnp.minimum(jnp.searchsorted(below, level, side="right"), below.size - 1)]

    def add_center(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """One more centre, unless it is known, and the squared distances to the nearest one."""
        centers, nearest, is_known = state
        mass = share * jnp.where(jnp.isinf(nearest), 1, nearest)
        # where every point is a centre already, any point will do
        mass = jnp.where(jnp.any(mass > 0), mass, share)
        # by its place among the unknown ones: how the known ones are numbered changes nothing
        place = jnp.sum(~is_known & (jnp.arange(n_clusters) < index))
        candidates = points[draw(jax.random.fold_in(key, place), mass)]
        shrunk = jnp.minimum(nearest[:, None], _distances(candidates, points))
        best = jnp.argmin(jnp.where(is_tried, matmul(share, shrunk), jnp.inf))
        added = centers.at[index].set(candidates[best]), shrunk[:, best]
        centers, nearest = (
            jnp.where(is_known[index], old, new) for old, new in zip((centers, nearest), added, strict=True)
        )
        return centers, nearest, is_known

    def cluster_sums(centers: Array, block: Block, is_new: Array) -> tuple[Array, Array]:
        """Weight and weighted sum of the points of a block that are nearest to each centre."""
        points, share, known = block
        member = members(_nearest_center(centers, points, known), jnp.where(is_new, share, 0), n_clusters)
        return jnp.sum(member, axis=0), matmul(member.T, points)

    def lloyd(_: int, centers: Array) -> Array:
        mass, total = sum_rows(cluster_sums, centers, (points, share, known), limit, shards)
        mass = mass[:, None]
        return jnp.where(mass > 0, total / jnp.where(mass > 0, mass, 1), centers)

    centers = jnp.zeros((n_clusters, points.shape[1]), points.dtype)
    nearest, is_known = jnp.full(share.shape, jnp.inf, points.dtype), jnp.zeros(n_clusters, bool)
    if known is not None:
        member = members(known, share, n_clusters)  # one_hot of -1 is 0
        mass = jnp.sum(member, axis=0)[:, None]
        centers, is_known = matmul(member.T, points) / jnp.where(mass > 0, mass, 1), mass[:, 0] > 0
        nearest = jnp.min(jnp.where(is_known[None], _distances(centers, points), jnp.inf), axis=-1)
    # those that are not sought lie where no point is near
    centers = jnp.where(jnp.arange(n_clusters)[:, None] < n_sought, centers, FAR)
    centers, *_ = jax.lax.fori_loop(0, n_sought, add_center, (centers, nearest, is_known))
    centers = jax.lax.fori_loop(0, LLOYD_STEPS, lloyd, centers)
    labels = map_rows(lambda centers, points: _nearest_center(centers, points, None), centers, points, limit, shards)
    return labels if known is None else jnp.where(known >= 0, known, labels)


def _nearest_center(centers: Array, points: Array, known: Array | None) -> Array:
    labels = jnp.argmin(_distances(centers, points), axis=-1)
    return labels if known is None else jnp.where(known >= 0, known, labels)


def _distances(centers: Array, points: Array) -> Array:
    """Squared distances (N, K) of points (N, L) from centres (K, L)."""
    cross = matmul(points, centers.T)
    squares = jnp.sum(points**2, axis=-1)[:, None] + jnp.sum(centers**2, axis=-1)[None]
    return jnp.maximum(squares - 2 * cross, 0)


def members(labels: Array, share: Array, n_clusters: int) -> Array:
    """The share of each row in the column of its cluster (B, K)."""
    return jax.nn.one_hot(labels, n_clusters, dtype=share.dtype) * share[:, None]
