"""Latent directions of a start: principal components, factor analysis, or least kurtosis."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from flax_hmog.data.rows import block_rows, map_rows, sum_rows
from flax_hmog.data.shards import Shards
from flax_hmog.model.coordinates import outer
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import (
    Array,
    Kind,
    PositiveDefinite,
    Rep,
    matmul,
    pytree,
    symmetrize,
    with_least_eigenvalue,
)
from flax_hmog.model.typed import Tree, jit

EXACT_DIM = 1024  # columns of the data up to which their covariance matrix is formed
SPARE_COLUMNS = 10  # columns of the random subspace beyond the latent dimension
SUBSPACE_STEPS = 6  # passes of subspace iteration
FA_STEPS = 50  # fixed-point steps of factor analysis
NOISE_FLOOR = 1e-3  # smallest initial noise variance, as a share of the mean variance of the data
CLIP = 5.0  # units of the frame beyond which an entry is wild: a start sees it no farther away
KURTOSIS_AXES = 50  # principal axes among which directions are sought by their kurtosis (at least 2 L)
LEAST_SPREAD = 1e-3  # of a principal axis among these, relative to the first


@pytree
class Directions:
    """A linear model of rows, before there are clusters.

    Attributes:
        center: mean of the rows (D,).
        loadings: W (D, L).
        noise: Psi, of the kind of the model.
    """

    center: Array
    loadings: Array
    noise: Kind


@jit(static_argnames=("lat_dim", "by_column", "obs_rep", "method", "shards"))
def latent_directions(
    x: Array,
    weights: Array,
    frame: Frame,
    key: Array,
    *,
    lat_dim: int,
    by_column: bool,
    obs_rep: Rep,
    method: str,
    shards: Shards,
    used: Array | None = None,
) -> Directions:
    """Mean, loadings and noise of rows in a frame, wild entries drawn in.

    Args:
        x: rows (N, D).
        weights: sample weights (N,).
        frame: map from the rows to those of the model.
        key: PRNG key; subspace iteration starts from it.
        lat_dim: L.
        by_column: wild entries are drawn in one by one; if not, whole rows.
        obs_rep: kind of the noise. Isotropic or full, a start turns with x, but for "fa", which looks at columns.
        method: "pca", "fa" or "kurtosis".
        shards: shards of the rows.
        used: True for the factors that count (L,), the first ones; the others get no loadings. None for all.

    Returns:
        `Directions` of x' = (x - origin) / unit.
    """
    share = weights / jnp.sum(weights)
    obs_dim = x.shape[1]
    tame = partial(tame_rows, frame, by_column)

    def weighted_sum(function: Callable[..., Any], operands: Tree) -> Any:
        """`function(operands, rows x', share)` summed over blocks of rows."""

        def block_sums(operands: Tree, block: tuple[Array, Array], is_new: Array) -> Any:
            return function(operands, tame(block[0]), jnp.where(is_new, block[1], 0))

        return sum_rows(block_sums, operands, (x, share), block_rows(2 * obs_dim + 2 * lat_dim), shards)

    center = weighted_sum(lambda _, x, share: matmul(share, x), ())
    variance = weighted_sum(lambda center, x, share: matmul(share, (x - center[None]) ** 2), center)
    total = jnp.mean(variance)
    floor = NOISE_FLOOR * jnp.where(total > 0, total, 1)
    covariance: Any = partial(_covariance_product, weighted_sum, center)
    if obs_dim <= EXACT_DIM or not obs_rep.is_diagonal:
        covariance = weighted_sum(
            lambda center, x, share: PositiveDefinite.second_moment(x - center[None], share).entries, center
        )

    if method == "kurtosis":
        axes = _principal_axes(covariance, variance, min(obs_dim, max(KURTOSIS_AXES, 2 * lat_dim)), key)
        points = project(frame, by_column, center, axes, x, shards)
        loadings = _counted(_invariant_loadings(points, share, axes, lat_dim), used)
        noise = jnp.maximum(variance - jnp.sum(loadings**2, axis=-1), floor)
    else:
        loadings, noise = _loadings(covariance, variance, floor, lat_dim, method, key, used)
    if obs_rep.is_diagonal or method == "fa":
        return Directions(center, loadings, obs_rep.from_diagonal(noise))
    return Directions(center, loadings, obs_rep.project(_full_residual(covariance, loadings, floor, used)))


def _counted(columns: Array, used: Array | None) -> Array:
    """Columns (D, L), those that do not count 0."""
    return columns if used is None else jnp.where(used[None], columns, 0)


def _full_residual(covariance: Array, loadings: Array, floor: Array, used: Array | None) -> Array:
    """Psi (D, D): the covariance without the loadings, and along them its average elsewhere."""
    obs_dim, lat_dim = loadings.shape
    residual = symmetrize(covariance - matmul(loadings, loadings.T))
    axes = _counted(jnp.linalg.qr(loadings)[0], used)
    rest = max(obs_dim - lat_dim, 1) if used is None else jnp.maximum(obs_dim - jnp.sum(used), 1)
    average = jnp.trace(residual) / rest
    return with_least_eigenvalue(residual + average * matmul(axes, axes.T), floor)


def project(frame: Frame, by_column: bool, center: Array, projection: Array, x: Array, shards: Shards) -> Array:
    """(x' - center) projection (N, P), wild entries of the rows x' drawn in."""
    rows = lambda operands, x: matmul(tame_rows(operands[0], by_column, x) - operands[1][None], operands[2])  # noqa: E731
    return map_rows(rows, (frame, center, projection), x, block_rows(2 * x.shape[1] + projection.shape[1]), shards)


def tame_rows(frame: Frame, by_column: bool, x: Array) -> Array:
    """Rows x' (B, D), wild entries drawn in to `CLIP` units; whole rows where columns have one unit."""
    rows = frame.inward(x)
    if by_column:
        return jnp.clip(rows, -CLIP, CLIP)
    # the largest entry first, so that no square overflows
    top = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1)
    distance = top * jnp.sqrt(jnp.mean((rows / top) ** 2, axis=-1, keepdims=True))
    return rows * jnp.minimum(1, CLIP / jnp.where(distance > 0, distance, 1))


def _covariance_product(weighted_sum: Callable[..., Array], center: Array, columns: Array) -> Array:
    """Cov(x') columns (D, P) by one pass, without the D x D matrix."""

    def block_product(operands: tuple[Array, Array], x: Array, share: Array) -> Array:
        centered = x - operands[0][None]
        return matmul(centered.T, share[:, None] * matmul(centered, operands[1]))

    return weighted_sum(block_product, (center, columns))


def _principal_axes(covariance: Array, variance: Array, count: int, key: Array) -> Array:
    """Leading eigenvectors (D, count) of the covariance."""
    leading, start = _eigen_solver(covariance, variance, count, key)
    return leading(jnp.ones_like(variance), start, SUBSPACE_STEPS)[1][:, :count]


def _eigen_solver(
    covariance: Array | Callable[[Array], Array], variance: Array, count: int, key: Array
) -> tuple[Callable[..., tuple[Array, Array]], Array]:
    """A function for leading eigenvalues and eigenvectors of scale^-1 Cov scale^-1, and columns for it to start from.

    They are exact where the covariance is given as a matrix; where it is a function that multiplies columns by it they
    come from subspace iteration on random ones (Halko, Martinsson and Tropp 2011).
    """
    obs_dim = variance.shape[0]
    columns = min(obs_dim, count + SPARE_COLUMNS)

    def leading(scale: Array, axes: Array, steps: int) -> tuple[Array, Array]:
        """Eigenvalues, descending, and axes of scale^-1 Cov scale^-1, from the axes of a matrix like it."""
        if not callable(covariance):
            values, vectors = jnp.linalg.eigh(covariance / outer(scale, scale))
            return values[::-1][:columns], vectors[:, ::-1][:, :columns]
        scaled: Callable[[Array], Array] = lambda axes: covariance(axes / scale[:, None]) / scale[:, None]  # noqa: E731
        axes = jax.lax.fori_loop(0, steps, lambda _, axes: jnp.linalg.qr(scaled(axes))[0], axes)
        values, rotation = jnp.linalg.eigh(symmetrize(matmul(axes.T, scaled(axes))))
        return values[::-1], matmul(axes, rotation[:, ::-1])

    return leading, jnp.linalg.qr(jax.random.normal(key, (obs_dim, columns), variance.dtype))[0]


def _loadings(
    covariance: Array | Callable[[Array], Array],
    variance: Array,
    floor: Array,
    lat_dim: int,
    method: str,
    key: Array,
    used: Array | None,
) -> tuple[Array, Array]:
    """W (D, L) and the diagonal of Psi (D,): principal axes, or maximum-likelihood factor analysis.

    Factor analysis alternates between the leading eigenvectors of Psi^-1/2 Cov Psi^-1/2 and the residual variances.
    """

    def residual(loadings: Array) -> Array:
        return jnp.maximum(variance - jnp.sum(loadings**2, axis=-1), floor)

    leading, start = _eigen_solver(covariance, variance, lat_dim, key)
    values, axes = leading(jnp.ones_like(variance), start, SUBSPACE_STEPS)
    loadings = _counted((axes * jnp.sqrt(jnp.maximum(values, 0))[None])[:, :lat_dim], used)
    if method == "pca":
        return loadings, residual(loadings)

    def factors(noise: Array, axes: Array) -> tuple[Array, Array]:
        """Loadings that maximise the likelihood for this noise, and the axes to go on from."""
        scale = jnp.sqrt(noise)
        values, axes = leading(scale, axes, 1)
        strength = jnp.sqrt(jnp.maximum(values[:lat_dim] - 1, 1e-6))
        return _counted(scale[:, None] * axes[:, :lat_dim] * strength[None], used), axes

    def step(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        loadings, axes = factors(*state)
        return residual(loadings), axes

    noise, axes = jax.lax.fori_loop(0, FA_STEPS, step, (variance, axes))
    return factors(noise, axes)[0], noise


def _invariant_loadings(points: Array, share: Array, axes: Array, lat_dim: int) -> Array:
    """W (D, L) along the directions of least kurtosis, in which rows lie in two heaps, whatever their variance there.

    Of whitened rows z the eigenvectors of E[|z|^2 z z'] are directions of extreme kurtosis; their eigenvalues are
    E[s^4] + P - 1 of the coordinates s along them, where a Gaussian has P + 2. (The largest are those of rare values.)

    Args:
        points: rows along their principal axes (N, P), centred.
        share: weights (N,) that sum to 1.
        axes: the principal axes (D, P).
        lat_dim: L.

    Source: Tyler, Critchley, Duembgen and Oja 2009, with the scatters of Cardoso 1989.
    """
    spread = jnp.sqrt(matmul(share, points**2))
    spread = jnp.where(spread > LEAST_SPREAD * jnp.max(spread), spread, 0)
    whitened = points / jnp.where(spread > 0, spread, jnp.inf)[None]
    square = jnp.sum(whitened**2, axis=-1) * share
    fourth = matmul((whitened * square[:, None]).T, whitened)
    # axes without spread come last
    fourth = fourth + jnp.diag(jnp.where(spread > 0, 0, 2 * jnp.trace(fourth) + 1))
    _, vectors = jnp.linalg.eigh(symmetrize(fourth))
    return matmul(axes * spread[None], vectors[:, :lat_dim])
