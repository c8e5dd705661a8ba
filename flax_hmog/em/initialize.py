"""Starts of EM: latent directions, and clusters along them by k-means++."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flax_hmog.data.framing import robust_frame, share_bounds
from flax_hmog.data.rows import (
    block_rows,
    check_observations,
    check_weights,
    effective_weights,
    on_host,
    sum_rows,
)
from flax_hmog.data.shards import Shards, on_auto_axes, row_shards
from flax_hmog.em.directions import LEAST_SPREAD, Directions, latent_directions, project
from flax_hmog.em.fill import filled_rows
from flax_hmog.em.k_means import cluster_sums, is_large, k_means, members
from flax_hmog.em.options import METHODS, check_options
from flax_hmog.em.padding import InUse
from flax_hmog.model.checks import check_precision, door, may_miss, public
from flax_hmog.model.conversions import reframe
from flax_hmog.model.coordinates import Moments
from flax_hmog.model.frames import Frame
from flax_hmog.model.head import HeadSizes, check_head_and_key
from flax_hmog.model.incomplete import check_noise
from flax_hmog.model.kinds import Array, PositiveDefinite, Rep, as_rep, matmul, symmetrize
from flax_hmog.model.prepared import latent_features, symmetric_matrices
from flax_hmog.model.typed import Data, Samples, Tree, jit

POOLED_SAMPLES = 10  # samples with the pooled covariance that each initial cluster covariance is shrunk by
ISOTROPIC_SHARE = 1e-2  # unit variance mixed into the pooled covariance, so that no direction is lost


@public
@on_auto_axes
def initialize_moments(
    head: HeadSizes,
    data: Data,
    key: Array,
    *,
    weights: Samples | None = None,
    method: str = "pca",
    column_units: str = "auto",
    missing: str = "refuse",
) -> Moments:
    """A model to start EM from.

    `method="pca"` takes W and Psi from the principal components, "fa" from a factor analysis of the data (some 50
    passes more; better where noise differs between columns). Then greedy k-means++ and Lloyd steps in the latent space
    give the clusters. The latent space has unit covariance. Wild entries are drawn in to 5 robust units.

    Args:
        head: unbound head; its dimensions and `obs_rep` are read (`obs_dim=None` takes that of the data).
        data: observations (N, D).
        key: PRNG key.
        weights: sample weights (N,); a common factor changes nothing.
        method: "pca" or "fa".
        column_units: as in `fit_em`.
        missing: as in `fit_em`.

    Returns:
        `Moments`, in units of the data.

    Raises:
        ValueError: for an unknown method, fewer samples than components, or unusable data.

    Example:
        >>> from flax_hmog.toy import head, x
        >>> initialize_moments(head, x, jax.random.key(0)).means.shape
        (3, 2)
    """
    check_head_and_key(head, key)
    if method not in METHODS:
        raise ValueError(f"{door()}: `method` must be one of {METHODS}; got {method!r}. Choose one of them.")
    check_options({"column_units": column_units})
    check_precision(head.param_dtype)
    x = check_observations(data, head.obs_dim, head.param_dtype, argument="data")
    check_counts(x.shape, head)
    weights = effective_weights(check_weights(weights, x.shape[:-1], x.dtype))
    rows, row_weights = on_host(x), on_host(weights)
    check_columns(head, rows, row_weights)
    frame, by_column = frame_of(head, rows, row_weights, column_units)
    first = next(starts(head, x, weights, None, frame, by_column, key, method=method))
    return reframe(first, frame, None)


def frame_of(head: HeadSizes, rows: np.ndarray, weights: np.ndarray, column_units: str) -> tuple[Frame, bool]:
    """The frame that a fit of this head to rows (N, D) on the host computes in, and whether columns have own units."""
    rep = as_rep(head.obs_rep, argument="head.obs_rep")
    is_own = column_units == "own" or (column_units == "auto" and rep.is_diagonal and not share_bounds(rows))
    by_column = is_own and not rep.is_isotropic
    return robust_frame(rows, weights, by_column, head.param_dtype), by_column


def check_columns(head: HeadSizes, rows: np.ndarray, weights: np.ndarray) -> None:
    """ValueError where entries may be missing, for full noise and for a column of rows (N, D) without any entry."""
    if not may_miss():
        return
    check_noise(as_rep(head.obs_rep, argument="head.obs_rep"))
    is_empty = np.isnan(rows[weights > 0]).all(axis=0)
    if is_empty.any():
        raise ValueError(
            f"{door()}: `data` must have an entry in every column; got none in column {int(is_empty.argmax())}. "
            "Leave out columns without entries."
        )


def starts(
    head: HeadSizes,
    x: Array,
    weights: Array,
    labels: Array | None,
    frame: Frame,
    by_column: bool,
    key: Array,
    *,
    method: str = "pca",
    used: InUse | None = None,
) -> Iterator[Moments]:
    """Models to start EM from, in a frame: clusters sought in several metrics, as none is right for all data.

    First in the latent space of `method`, where distances count as in the data; then in the same with unit covariance,
    for clusters that are long in one direction; then along directions of least kurtosis, for clusters that are apart
    where the variance is small.

    Args:
        head: unbound head.
        x: rows (N, D); what is missing is filled in first.
        weights: sample weights (N,), that sum to the number of samples.
        labels: known components (N,), -1 where unknown, or None.
        frame: map from the rows to those of the model.
        by_column: True if columns have units of their own.
        key: PRNG key.
        method: "pca" or "fa".
        used: the parts of padded models that count; None for models of the head's own size.

    Yields:
        `Moments` of x' = (x - origin) / unit.
    """
    n_components, lat_dim = head.n_components, head.lat_dim
    if used is not None:
        n_components, lat_dim = used.components.shape[0], used.factors.shape[0]
    obs_rep, shards = as_rep(head.obs_rep, argument="head.obs_rep"), row_shards(x)
    given: Any = {"lat_dim": lat_dim, "by_column": by_column, "obs_rep": obs_rep, "shards": shards}
    first_key = jax.random.fold_in(key, 1)
    if may_miss() and bool(jnp.isnan(x).any()):
        x = filled_rows(x, weights, frame, first_key, **given)
    find = partial(
        latent_directions, x, weights, frame, first_key, **given, used=None if used is None else used.factors
    )
    sizes: dict[str, Any] = {"n_components": n_components, "by_column": by_column, "shards": shards, "used": used}
    directions = find(method=method)
    for is_whitened in (False, True):
        yield _clustered(x, weights, labels, frame, key, directions, is_whitened, **sizes)
    yield _clustered(x, weights, labels, frame, key, find(method="kurtosis"), True, **sizes)


def check_counts(shape: tuple[int, ...], head: HeadSizes) -> None:
    """ValueError unless the shape is (N, D) with N >= K and D >= L."""
    if len(shape) != 2:
        raise ValueError(f"{door()}: `data` must have shape (N, D); got {shape}. Reshape it to one row per sample.")
    if shape[0] < head.n_components:
        raise ValueError(
            f"{door()}: `data` must have at least as many samples as components; got {shape[0]} samples for "
            f"n_components={head.n_components}. Lower n_components."
        )
    if shape[1] < head.lat_dim:
        raise ValueError(
            f"{door()}: `data` must have at least lat_dim columns; got {shape[1]} for lat_dim={head.lat_dim}. "
            "Lower lat_dim."
        )


@jit(static_argnames=("n_components", "by_column", "shards"))
def _clustered(
    x: Array,
    weights: Array,
    known: Array | None,
    frame: Frame,
    key: Array,
    directions: Directions,
    is_whitened: Array | bool,
    *,
    n_components: int,
    by_column: bool,
    shards: Shards,
    used: InUse | None,
) -> Moments:
    """The model with these directions, and clusters by k-means along them."""
    share = weights / jnp.sum(weights)
    loadings, noise, center = directions.loadings, directions.noise, directions.center
    # posterior mean of y under y ~ N(0, I):  (I + W'Psi^-1 W)^-1 W'Psi^-1 (x - mu)
    scaled = noise.inverse().times(loadings)
    precision = PositiveDefinite(matmul(loadings.T, scaled) + jnp.eye(loadings.shape[1], dtype=x.dtype))
    y = project(frame, by_column, center, matmul(scaled, precision.inverse().entries), x, shards)
    y, signs = _with_fixed_signs(y, share)
    loadings = loadings * signs[None]
    # distances in the latent space count as they do in the data: y scaled by the norms of the loadings
    spread = jnp.sqrt(matmul(share, y**2))
    # where fewer axes than L vary, the others hold rounding, which unit variance would make clusters of
    unit = 1 / jnp.where(spread > LEAST_SPREAD * jnp.max(spread), spread, jnp.inf)
    scale = jnp.where(is_whitened, unit, jnp.linalg.norm(loadings, axis=0))
    count = n_components if used is None else used.n_components
    labels = k_means(y * scale[None], share, key, n_components, known, shards, count)

    mass, means, covariances = cluster_moments(y, share, labels, n_components, count, jnp.sum(weights), shards)
    moments = Moments(loadings, center, noise, mass, means, PositiveDefinite(covariances))
    return moments if used is None else used.masked(moments)


def _with_fixed_signs(y: Array, share: Array) -> tuple[Array, Array]:
    """Latent coordinates (N, L) whose largest entries are positive, and the signs (L,): axes have none of their own."""
    counted = jnp.where((share > 0)[:, None], y, 0)
    signs = jnp.where(jnp.max(counted, axis=0) >= -jnp.min(counted, axis=0), 1, -1).astype(y.dtype)
    return y * signs[None], signs


def cluster_moments(
    y: Array, share: Array, labels: Array, n_clusters: int, n_sought: Array | int, count: Array, shards: Shards
) -> tuple[Array, Array, Array]:
    """Weights (K,), means (K, L) and covariances (K, L, L) of labelled rows, shrunk towards the pooled covariance."""
    lat_dim = y.shape[1]
    mass, means, within = (_sorted_sums if is_large(y.shape[0], n_clusters) else _block_sums)(
        y, share, labels, n_clusters, shards
    )
    pooled = jnp.sum(within, axis=0) + ISOTROPIC_SHARE * jnp.eye(lat_dim, dtype=y.dtype)
    shrink = POOLED_SAMPLES / count
    covariances = (within + shrink * pooled[None]) / (mass + shrink)[:, None, None]
    return (mass + 1 / count) / (1 + n_sought / count), means, covariances


def _sorted_sums(y: Array, share: Array, labels: Array, n_clusters: int, shards: Shards) -> tuple[Array, Array, Array]:
    """Share (K,) and mean (K, L) of every cluster, and sums of share times squares about it (K, L, L), row by row."""
    sums = partial(cluster_sums, points=y, share=share, labels=labels, n_clusters=n_clusters, shards=shards)
    mass, first = sums(lambda _, y, share: (jnp.sum(share), matmul(share, y)), ())
    means = first / jnp.where(mass > 0, mass, 1)[:, None]
    within = sums(lambda mean, y, share: matmul((y - mean[None]).T * share[None], y - mean[None]), means)
    return mass, means, symmetrize(within)


def _block_sums(y: Array, share: Array, labels: Array, n_clusters: int, shards: Shards) -> tuple[Array, Array, Array]:
    """The same as `_sorted_sums`, by products with all clusters."""
    limit = block_rows(4 * y.shape[1] + n_clusters)

    def first_sums(_: Tree, block: tuple[Array, ...], is_new: Array) -> tuple[Array, Array]:
        y, labels, share = block
        rows = members(labels, jnp.where(is_new, share, 0), n_clusters)
        return jnp.sum(rows, axis=0), matmul(rows.T, y)

    def second_sums(means: Array, block: tuple[Array, ...], is_new: Array) -> Array:
        y, labels, share = block
        rows = members(labels, jnp.where(is_new, share, 0), n_clusters)
        return matmul(rows.T, latent_features(y - means[labels])[:, y.shape[1] :])

    mass, first = sum_rows(first_sums, (), (y, labels, share), limit, shards)
    means = first / jnp.where(mass > 0, mass, 1)[:, None]
    return mass, means, symmetric_matrices(sum_rows(second_sums, means, (y, labels, share), limit, shards))


def random_moments(
    key: Array, obs_dim: int, lat_dim: int, n_components: int, obs_rep: Rep, dtype: DTypeLike | None = jnp.float32
) -> Moments:
    """A model drawn without data: unit noise and component covariances, random loadings and means, equal weights."""
    loadings_key, means_key = jax.random.split(key)
    return Moments(
        loadings=jax.random.normal(loadings_key, (obs_dim, lat_dim), dtype) / math.sqrt(lat_dim),
        bias=jnp.zeros(obs_dim, dtype),
        noise=obs_rep.from_diagonal(jnp.ones(obs_dim, dtype)),
        weights=jnp.full(n_components, 1 / n_components, dtype),
        means=jax.random.normal(means_key, (n_components, lat_dim), dtype),
        covariances=PositiveDefinite(jnp.broadcast_to(jnp.eye(lat_dim, dtype=dtype), (n_components, lat_dim, lat_dim))),
    )
