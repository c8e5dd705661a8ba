"""Where EM starts: principal components or factor analysis for W and Psi, k-means++ in the latent space."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flax_hmog.checks import check_head_and_key, check_observations, check_precision
from flax_hmog.coordinates import Moments, outer
from flax_hmog.covariances import Array, Covariance, Diagonal, PositiveDefinite, Rep, Scale, as_rep, matmul, symmetrize
from flax_hmog.factors import latent_features, symmetric_matrices
from flax_hmog.rows import Shards, block_rows, map_rows, row_shards, sum_rows
from flax_hmog.statistics import check_weights

METHODS = ("pca", "fa")
EXACT_DIM = 1024  # columns of the data up to which their covariance matrix is formed
SPARE_COLUMNS = 10  # columns of the random subspace beyond the latent dimension
SUBSPACE_STEPS = 6  # passes of subspace iteration
FA_STEPS = 50  # fixed-point steps of factor analysis
LLOYD_STEPS = 20  # k-means steps after seeding
NOISE_FLOOR = 1e-3  # smallest initial noise variance, as a share of the mean variance of the data
POOLED_SAMPLES = 10  # samples with the pooled covariance that each initial cluster covariance is shrunk by
ISOTROPIC_SHARE = 1e-2  # unit variance mixed into the pooled covariance, so that no direction is lost


def initialize_moments(head: Any, data: Any, key: Array, *, weights: Any = None, method: str = "pca") -> Moments:
    """A model to start EM from.

    `method="pca"` takes W and Psi from the principal components, "fa" from a factor analysis of the data (some 50
    passes more; better where noise differs between columns). Then greedy k-means++ and Lloyd steps in the latent space
    give the clusters. The latent space has unit covariance.

    Args:
        head: unbound head; its dimensions and `obs_rep` are read (`obs_dim=None` takes that of the data).
        data: observations (N, D).
        key: PRNG key.
        weights: sample weights (N,).
        method: "pca" or "fa".

    Returns:
        `Moments`.

    Raises:
        ValueError: for an unknown method, fewer samples than components, or unusable data.
    """
    caller = "initialize_moments"
    check_head_and_key(caller, head, key)
    if method not in METHODS:
        raise ValueError(f"{caller}: `method` must be one of {METHODS}; got {method!r}. Choose one of them.")
    check_precision(caller, head.param_dtype)
    x = check_observations(caller, data, head.obs_dim, head.param_dtype, argument="data")
    check_counts(caller, x.shape, head)
    weights = check_weights(caller, weights, x.shape[:-1], x.dtype)
    obs_rep = as_rep(head.obs_rep, caller=caller, argument="head.obs_rep")
    return _initialize(x, weights, key, head.lat_dim, head.n_components, obs_rep, method, row_shards(x))


def check_counts(caller: str, shape: tuple[int, ...], head: Any) -> None:
    """ValueError unless the shape is (N, D) with N >= K and D >= L."""
    if len(shape) != 2:
        raise ValueError(f"{caller}: `data` must have shape (N, D); got {shape}. Reshape it to one row per sample.")
    if shape[0] < head.n_components:
        raise ValueError(
            f"{caller}: `data` must have at least as many samples as components; got {shape[0]} samples for "
            f"n_components={head.n_components}. Lower n_components."
        )
    if shape[1] < head.lat_dim:
        raise ValueError(
            f"{caller}: `data` must have at least lat_dim columns; got {shape[1]} for lat_dim={head.lat_dim}. "
            "Lower lat_dim."
        )


@partial(jax.jit, static_argnames=("lat_dim", "n_components", "obs_rep", "method", "shards"))
def _initialize(
    x: Array, weights: Array, key: Array, lat_dim: int, n_components: int, obs_rep: Rep, method: str, shards: Shards
) -> Moments:
    share = weights / jnp.sum(weights)
    obs_dim = x.shape[1]
    limit = block_rows(2 * obs_dim + 2 * lat_dim)

    def weighted_sum(function: Callable[..., Any], operands: Any, *rows: Array) -> Any:
        """`function(operands, *rows, share)` summed over blocks of rows."""

        def block_sums(operands: Any, block: Any, is_new: Array) -> Any:
            return function(operands, *block[:-1], jnp.where(is_new, block[-1], 0))

        return sum_rows(block_sums, operands, (*rows, share), limit, shards)

    center = weighted_sum(lambda _, x, share: matmul(share, x), (), x)
    variance = weighted_sum(lambda center, x, share: matmul(share, (x - center[None]) ** 2), center, x)
    total = jnp.mean(variance)
    floor = NOISE_FLOOR * jnp.where(total > 0, total, 1)
    covariance: Any = partial(_covariance_product, weighted_sum, x, center)
    if obs_dim <= EXACT_DIM:
        covariance = weighted_sum(
            lambda center, x, share: PositiveDefinite.second_moment(x - center[None], share).entries, center, x
        )
    loadings, noise = _loadings(covariance, variance, floor, lat_dim, method, jax.random.fold_in(key, 1))
    # posterior mean of y under y ~ N(0, I):  (I + W'Psi^-1 W)^-1 W'Psi^-1 (x - mu)
    scaled = loadings / noise[:, None]
    precision = PositiveDefinite(matmul(loadings.T, scaled) + jnp.eye(lat_dim, dtype=x.dtype))
    projection = matmul(scaled, precision.inverse().entries)
    y = map_rows(lambda operands, x: matmul(x - operands[0][None], operands[1]), (center, projection), x, limit, shards)
    # distances in the latent space count as they do in the data: y scaled by the norms of the loadings
    norms = jnp.linalg.norm(loadings, axis=0)
    labels = k_means(y * norms[None], share, key, n_components, shards)
    count = jnp.sum(weights > 0).astype(x.dtype)  # rows of weight 0 are none
    weights, means, covariances = _cluster_moments(weighted_sum, y, labels, n_components, count)
    noises: dict[Rep, Covariance] = {
        Scale: Scale(jnp.mean(noise)),
        Diagonal: Diagonal(noise),
        PositiveDefinite: PositiveDefinite(jnp.diag(noise)),
    }
    return Moments(loadings, center, noises[obs_rep], weights, means, PositiveDefinite(covariances))


def _covariance_product(weighted_sum: Callable, x: Array, center: Array, columns: Array) -> Array:
    """Cov(x) columns (D, P) by one pass, without the D x D matrix."""

    def block_product(operands: tuple[Array, Array], x: Array, share: Array) -> Array:
        centered = x - operands[0][None]
        return matmul(centered.T, share[:, None] * matmul(centered, operands[1]))

    return weighted_sum(block_product, (center, columns), x)


def _loadings(
    covariance: Array | Callable[[Array], Array], variance: Array, floor: Array, lat_dim: int, method: str, key: Array
) -> tuple[Array, Array]:
    """W (D, L) and the diagonal of Psi (D,): principal axes, or maximum-likelihood factor analysis.

    The leading eigenvectors of Psi^-1/2 Cov Psi^-1/2 are exact where the covariance is given as a matrix; where it is a
    function that multiplies columns by it they come from subspace iteration on random ones (Halko, Martinsson and Tropp
    2011). Factor analysis alternates between them and the residual variances.
    """
    obs_dim = variance.shape[0]
    columns = min(obs_dim, lat_dim + SPARE_COLUMNS)

    def leading(scale: Array, axes: Array, steps: int) -> tuple[Array, Array]:
        """Eigenvalues, descending, and axes of scale^-1 Cov scale^-1, from the axes of a matrix like it."""
        if not callable(covariance):
            values, vectors = jnp.linalg.eigh(covariance / outer(scale, scale))
            return values[::-1][:columns], vectors[:, ::-1][:, :columns]
        scaled = lambda axes: covariance(axes / scale[:, None]) / scale[:, None]  # noqa: E731
        axes = jax.lax.fori_loop(0, steps, lambda _, axes: jnp.linalg.qr(scaled(axes))[0], axes)
        values, rotation = jnp.linalg.eigh(symmetrize(matmul(axes.T, scaled(axes))))
        return values[::-1], matmul(axes, rotation[:, ::-1])

    def residual(loadings: Array) -> Array:
        return jnp.maximum(variance - jnp.sum(loadings**2, axis=-1), floor)

    start = jnp.linalg.qr(jax.random.normal(key, (obs_dim, columns), variance.dtype))[0]
    values, axes = leading(jnp.ones_like(variance), start, SUBSPACE_STEPS)
    loadings = (axes * jnp.sqrt(jnp.maximum(values, 0))[None])[:, :lat_dim]
    if method == "pca":
        return loadings, residual(loadings)

    def factors(noise: Array, axes: Array) -> tuple[Array, Array]:
        """Loadings that maximise the likelihood for this noise, and the axes to go on from."""
        scale = jnp.sqrt(noise)
        values, axes = leading(scale, axes, 1)
        strength = jnp.sqrt(jnp.maximum(values[:lat_dim] - 1, 1e-6))
        return scale[:, None] * axes[:, :lat_dim] * strength[None], axes

    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        loadings, axes = factors(*state)
        return residual(loadings), axes

    noise, axes = jax.lax.fori_loop(0, FA_STEPS, step, (residual(loadings), axes))
    return factors(noise, axes)[0], noise


def k_means(points: Array, share: Array, key: Array, n_clusters: int, shards: Shards = None) -> Array:
    """Labels (N,) of weighted k-means: greedy k-means++ seeds, then Lloyd steps; empty clusters keep their centre.

    Source: Arthur and Vassilvitskii 2007, with the best of 2 + log K candidates at each seed.
    """
    trials = 2 + int(math.log(n_clusters))
    first_key, key = jax.random.split(key)
    log_share = jnp.log(share)
    limit = block_rows(points.shape[1] + 3 * n_clusters)

    def add_center(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """One more centre, and the squared distances to the nearest one."""
        centers, nearest = state
        # where every point is a centre already, any point will do
        log_odds = jnp.where(jnp.any(nearest > 0), jnp.log(nearest), 0) + log_share
        # one key for each draw: what is drawn then does not change with rows of weight 0 at the end
        keys = jax.random.split(jax.random.fold_in(key, index), trials)
        draws = jax.vmap(jax.random.categorical, in_axes=(0, None))(keys, log_odds)
        candidates = points[draws]
        shrunk = jnp.minimum(nearest[:, None], _distances(candidates, points))
        best = jnp.argmin(matmul(share, shrunk))
        return centers.at[index].set(candidates[best]), shrunk[:, best]

    def cluster_sums(centers: Array, block: tuple[Array, Array], is_new: Array) -> tuple[Array, Array]:
        """Weight and weighted sum of the points of a block that are nearest to each centre."""
        points, share = block
        member = jax.nn.one_hot(jnp.argmin(_distances(centers, points), axis=-1), n_clusters, dtype=points.dtype)
        member = member * jnp.where(is_new, share, 0)[:, None]
        return jnp.sum(member, axis=0), matmul(member.T, points)

    def lloyd(_: int, centers: Array) -> Array:
        mass, total = sum_rows(cluster_sums, centers, (points, share), limit, shards)
        mass = mass[:, None]
        return jnp.where(mass > 0, total / jnp.where(mass > 0, mass, 1), centers)

    first = points[jax.random.categorical(first_key, log_share)][None]
    centers = jnp.zeros((n_clusters, points.shape[1]), points.dtype).at[0].set(first[0])
    centers, _ = jax.lax.fori_loop(1, n_clusters, add_center, (centers, _distances(first, points)[:, 0]))
    centers = jax.lax.fori_loop(0, LLOYD_STEPS, lloyd, centers)
    nearest = lambda centers, points: jnp.argmin(_distances(centers, points), axis=-1)  # noqa: E731
    return map_rows(nearest, centers, points, limit, shards)


def _distances(centers: Array, points: Array) -> Array:
    """Squared distances (N, K) of points (N, L) from centres (K, L)."""
    cross = matmul(points, centers.T)
    squares = jnp.sum(points**2, axis=-1)[:, None] + jnp.sum(centers**2, axis=-1)[None]
    return jnp.maximum(squares - 2 * cross, 0)


def _cluster_moments(
    weighted_sum: Callable, y: Array, labels: Array, n_clusters: int, count: Array
) -> tuple[Array, Array, Array]:
    """Weights (K,), means (K, L) and covariances (K, L, L) of labelled rows, shrunk towards the pooled covariance."""
    lat_dim = y.shape[1]

    def member(labels: Array, share: Array) -> Array:
        return jax.nn.one_hot(labels, n_clusters, dtype=y.dtype) * share[:, None]

    def first_sums(_: Any, y: Array, labels: Array, share: Array) -> tuple[Array, Array]:
        rows = member(labels, share)
        return jnp.sum(rows, axis=0), matmul(rows.T, y)

    def second_sums(means: Array, y: Array, labels: Array, share: Array) -> Array:
        return matmul(member(labels, share).T, latent_features(y - means[labels])[:, lat_dim:])

    mass, first = weighted_sum(first_sums, (), y, labels)
    means = first / jnp.where(mass > 0, mass, 1)[:, None]
    within = symmetric_matrices(weighted_sum(second_sums, means, y, labels))
    pooled = jnp.sum(within, axis=0) + ISOTROPIC_SHARE * jnp.eye(lat_dim, dtype=y.dtype)
    shrink = POOLED_SAMPLES / count
    covariances = (within + shrink * pooled[None]) / (mass + shrink)[:, None, None]
    return (mass + 1 / count) / (1 + n_clusters / count), means, covariances


def random_moments(
    key: Array, obs_dim: int, lat_dim: int, n_components: int, obs_rep: Rep, dtype: Any = jnp.float32
) -> Moments:
    """A model drawn without data: unit noise and component covariances, random loadings and means, equal weights."""
    loadings_key, means_key = jax.random.split(key)
    return Moments(
        loadings=jax.random.normal(loadings_key, (obs_dim, lat_dim), dtype) / math.sqrt(lat_dim),
        bias=jnp.zeros(obs_dim, dtype),
        noise=obs_rep.project(jnp.eye(obs_dim, dtype=dtype)),
        weights=jnp.full(n_components, 1 / n_components, dtype),
        means=jax.random.normal(means_key, (n_components, lat_dim), dtype),
        covariances=PositiveDefinite(jnp.broadcast_to(jnp.eye(lat_dim, dtype=dtype), (n_components, lat_dim, lat_dim))),
    )
