"""Where EM starts: principal components or factor analysis for W and Psi, k-means++ in the latent space."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flax_hmog.checks import check_observations
from flax_hmog.coordinates import Moments, outer, symmetrize
from flax_hmog.covariances import Array, Covariance, Diagonal, PositiveDefinite, Rep, Scale, as_rep, diagonal, matmul
from flax_hmog.statistics import check_weights

METHODS = ("pca", "fa")
FA_STEPS = 50  # fixed-point steps of factor analysis
LLOYD_STEPS = 20  # k-means steps after seeding
NOISE_FLOOR = 1e-3  # smallest initial noise variance, as a share of the mean variance of the data
POOLED_SAMPLES = 10  # samples with the pooled covariance that each initial cluster covariance is shrunk by
ISOTROPIC_SHARE = 1e-2  # unit variance mixed into the pooled covariance, so that no direction is lost


def initialize_moments(head: Any, data: Any, key: Array, *, weights: Any = None, method: str = "pca") -> Moments:
    """A model to start EM from.

    `method="pca"` takes W and Psi from the principal components, "fa" from a factor analysis of the data (D x D
    covariance; better where noise differs between columns). Then greedy k-means++ and Lloyd steps in the latent space
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
    if method not in METHODS:
        raise ValueError(f"{caller}: `method` must be one of {METHODS}; got {method!r}. Choose one of them.")
    x = check_observations(caller, data, head.obs_dim, head.param_dtype, argument="data")
    weights = check_weights(caller, weights, x.shape[:-1], x.dtype)
    check_counts(caller, x, head)
    obs_rep = as_rep(head.obs_rep, caller=caller, argument="head.obs_rep")
    return _initialize(x, weights, key, head.lat_dim, head.n_components, obs_rep, method)


def check_counts(caller: str, x: Array, head: Any) -> None:
    """ValueError unless x is (N, D) with N >= K and D >= L."""
    if x.ndim != 2:
        raise ValueError(f"{caller}: `data` must have shape (N, D); got {x.shape}. Reshape it to one row per sample.")
    if x.shape[0] < head.n_components:
        raise ValueError(
            f"{caller}: `data` must have at least as many samples as components; got {x.shape[0]} samples for "
            f"n_components={head.n_components}. Lower n_components."
        )
    if x.shape[1] < head.lat_dim:
        raise ValueError(
            f"{caller}: `data` must have at least lat_dim columns; got {x.shape[1]} for lat_dim={head.lat_dim}. "
            "Lower lat_dim."
        )


@partial(jax.jit, static_argnames=("lat_dim", "n_components", "obs_rep", "method"))
def _initialize(
    x: Array, weights: Array, key: Array, lat_dim: int, n_components: int, obs_rep: Rep, method: str
) -> Moments:
    share = weights / jnp.sum(weights)
    center = matmul(share, x)
    centered = x - center[None]
    variance = matmul(share, centered**2)
    total = jnp.mean(variance)
    floor = NOISE_FLOOR * jnp.where(total > 0, total, 1)
    loadings = _principal_loadings(centered, share, lat_dim)
    noise = jnp.maximum(variance - jnp.sum(loadings**2, axis=-1), floor)
    if method == "fa":
        loadings, noise = _factor_analysis(centered, share, loadings, noise, floor)
    # posterior mean of y under y ~ N(0, I):  (I + W'Psi^-1 W)^-1 W'Psi^-1 (x - mu)
    scaled = loadings / noise[:, None]
    precision = PositiveDefinite(matmul(loadings.T, scaled) + jnp.eye(lat_dim, dtype=x.dtype))
    y = matmul(matmul(centered, scaled), precision.inverse().entries)
    # distances in the latent space count as they do in the data: y scaled by the norms of the loadings
    norms = jnp.linalg.norm(loadings, axis=0)
    labels = k_means(y * norms[None], share, key, n_components)
    weights, means, covariances = _cluster_moments(y, share, labels, n_components)
    noises: dict[Rep, Covariance] = {
        Scale: Scale(jnp.mean(noise)),
        Diagonal: Diagonal(noise),
        PositiveDefinite: PositiveDefinite(jnp.diag(noise)),
    }
    return Moments(loadings, center, noises[obs_rep], weights, means, PositiveDefinite(covariances))


def _principal_loadings(centered: Array, share: Array, lat_dim: int) -> Array:
    """W (D, L): the leading principal axes, each times the standard deviation along it."""
    rows = centered * jnp.sqrt(share)[:, None]
    if rows.shape[0] < rows.shape[1]:
        values, left = jnp.linalg.eigh(matmul(rows, rows.T))
        return matmul(rows.T, left[:, -lat_dim:][:, ::-1])
    values, axes = jnp.linalg.eigh(matmul(rows.T, rows))
    return (axes * jnp.sqrt(jnp.maximum(values, 0))[None])[:, -lat_dim:][:, ::-1]


def _factor_analysis(centered: Array, share: Array, loadings: Array, noise: Array, floor: Array) -> tuple[Array, Array]:
    """Maximum-likelihood factor analysis by alternating principal axes of Psi^-1/2 Cov Psi^-1/2 and its residuals."""
    lat_dim = loadings.shape[1]
    covariance = matmul((centered * share[:, None]).T, centered)

    def step(_: int, noise: Array) -> Array:
        return jnp.maximum(diagonal(covariance) - jnp.sum(axes_of(noise) ** 2, axis=-1), floor)

    def axes_of(noise: Array) -> Array:
        root = jnp.sqrt(noise)
        values, axes = jnp.linalg.eigh(covariance / outer(root, root))
        strength = jnp.sqrt(jnp.maximum(values[-lat_dim:] - 1, 1e-6))
        return root[:, None] * (axes[:, -lat_dim:] * strength[None])[:, ::-1]

    noise = jax.lax.fori_loop(0, FA_STEPS, step, noise)
    return axes_of(noise), noise


def k_means(points: Array, share: Array, key: Array, n_clusters: int) -> Array:
    """Labels (N,) of weighted k-means: greedy k-means++ seeds, then Lloyd steps; empty clusters keep their centre.

    Source: Arthur and Vassilvitskii 2007, with the best of 2 + log K candidates at each seed.
    """
    trials = 2 + int(math.log(n_clusters))
    first_key, key = jax.random.split(key)
    log_share = jnp.log(share)
    squares = jnp.sum(points**2, axis=-1)

    def distances(centers: Array) -> Array:
        cross = matmul(points, centers.T)
        return jnp.maximum(squares[:, None] - 2 * cross + jnp.sum(centers**2, axis=-1)[None], 0)

    def add_center(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centers, nearest = state
        # where every point is a centre already, any point will do
        log_odds = jnp.where(jnp.any(nearest > 0), jnp.log(nearest), 0) + log_share
        draws = jax.random.categorical(jax.random.fold_in(key, index), log_odds, shape=(trials,))
        candidates = points[draws]
        shrunk = jnp.minimum(nearest[:, None], distances(candidates))
        best = jnp.argmin(matmul(share, shrunk))
        return centers.at[index].set(candidates[best]), shrunk[:, best]

    def lloyd(_: int, centers: Array) -> Array:
        member = jax.nn.one_hot(jnp.argmin(distances(centers), axis=-1), n_clusters, dtype=points.dtype)
        member = member * share[:, None]
        mass = jnp.sum(member, axis=0)[:, None]
        return jnp.where(mass > 0, matmul(member.T, points) / jnp.where(mass > 0, mass, 1), centers)

    first = points[jax.random.categorical(first_key, log_share)][None]
    centers = jnp.zeros((n_clusters, points.shape[1]), points.dtype).at[0].set(first[0])
    centers, _ = jax.lax.fori_loop(1, n_clusters, add_center, (centers, distances(first)[:, 0]))
    return jnp.argmin(distances(jax.lax.fori_loop(0, LLOYD_STEPS, lloyd, centers)), axis=-1)


def _cluster_moments(y: Array, share: Array, labels: Array, n_components: int) -> tuple[Array, Array, Array]:
    """Weights (K,), means (K, L) and covariances (K, L, L) of labelled points, shrunk towards the pooled covariance."""
    count, lat_dim = y.shape
    member = jax.nn.one_hot(labels, n_components, dtype=y.dtype) * share[:, None]
    mass = jnp.sum(member, axis=0)
    means = matmul(member.T, y) / jnp.maximum(mass, 1 / count)[:, None]
    residual = y - means[labels]
    pooled = symmetrize(matmul((residual * share[:, None]).T, residual)) + ISOTROPIC_SHARE * jnp.eye(
        lat_dim, dtype=y.dtype
    )
    within = jax.lax.map(lambda column: matmul((residual * column[:, None]).T, residual), member.T)
    shrink = POOLED_SAMPLES / count
    covariances = (within + shrink * pooled[None]) / (mass + shrink)[:, None, None]
    return (mass + 1 / count) / (1 + n_components / count), means, symmetrize(covariances)


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
