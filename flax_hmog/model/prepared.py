"""Quantities of a model that inference needs, and the matrix products of inference for a block of rows.

All that does not depend on x is computed once per parameter value (`prepare`); what does is a few matrix products
per block of rows. Everything is evaluated in coordinates u of the latent space in which the posterior of an average
component has unit precision, because in float32 the plain formulas cancel (docs/derivations.md):

    Qbar = G + R,   G = W'Psi^-1 W,   R = mean_k P_k,   Qbar = T'T,   u = T y,   t = T^-T W'Psi^-1 (x - b)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flax_hmog.model.algebra import orthonormalize
from flax_hmog.model.checks import check_float_dtype, public
from flax_hmog.model.coordinates import Natural, Prepared, check_natural, observable_bias
from flax_hmog.model.kinds import (
    Array,
    diagonal,
    einsum,
    inverse_and_log_det,
    inverse_lower,
    matmul,
    symmetrize,
)
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import jit


@public
def prepare(natural: Natural | Prepared, projection_dtype: DTypeLike | None = None) -> Prepared:
    """The part of inference that does not depend on x, computed once, at a cost of O(D L^2 + K L^3).

    Every function that takes a `Natural` takes the result in its place.

    Args:
        natural: the model; one that is prepared is returned as it is, unless for another dtype.
        projection_dtype: dtype in which x is multiplied by the D x L projection, as "bfloat16"; None for that of the
            parameters, or that of a model which is prepared.

    Returns:
        `Prepared`.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if a prior precision is not positive definite, or for a dtype that is no float.

    Example:
        >>> from flax_hmog import infer
        >>> from flax_hmog.toy import natural, x
        >>> infer(prepare(natural), x).log_density.shape
        (12,)
    """
    prepared = natural if isinstance(natural, Prepared) else _prepare(with_prior(check_natural(natural)))
    if projection_dtype is None:
        return prepared
    dtype = check_float_dtype("projection_dtype", projection_dtype)
    return dataclasses.replace(prepared, projector=prepared.root.times(prepared.projection).astype(dtype))


@jit
def _prepare(natural: Natural) -> Prepared:
    obs_dim = natural.observable_location.shape[0]
    root = natural.observable_precision.cholesky()
    whitened = root.lower_solve(natural.interaction)  # A = F^-1 Theta = F' W
    prior = natural.prior
    pooled_root = jnp.linalg.cholesky(jnp.mean(prior.precision.entries, axis=0)).T
    basis = _diagonal_basis if natural.posterior_precision.is_diagonal else _full_basis
    (t, t_inverse, projection, prior_root), (curvature, covariance, log_det), (prior_covariances, prior_log_det) = (
        basis(natural, whitened, pooled_root)
    )
    means = einsum("kij,kj->ki", prior_covariances, prior.location)
    frame = natural.frame
    offset = natural.observable_precision.log_det() / 2 - obs_dim * math.log(2 * math.pi) / 2
    location = matmul(prior.location, t_inverse)
    linear = component_product(covariance, location)
    # Q_k = P_k + G, so  h'C h - h'P^-1 h = -h' C G P^-1 h
    gram_means = matmul(matmul(matmul(means, t.T), projection.T), projection)
    constant = prior.log_weights + (prior_log_det - log_det - jnp.sum(linear * gram_means, axis=-1)) / 2
    return Prepared(
        natural=natural,
        bias=observable_bias(natural),
        root=root,
        projection=projection,
        projector=root.times(projection),
        prior_root=prior_root,
        basis=t,
        inverse_basis=t_inverse,
        constant=constant,
        linear=linear,
        curvature=curvature,
        coefficients=jnp.concatenate([linear, distinct_entries(curvature)], axis=-1),
        covariance=covariance,
        location=location,
        prior_means=means,
        prior_log_det=prior_log_det,
        offset=offset if frame is None else offset - jax.lax.stop_gradient(frame.log_volume),
    )


def _full_basis(natural: Natural, whitened: Array, pooled_root: Array) -> tuple[Any, ...]:
    """T from the QR factors of [R^1/2; A], so that the small prior is not lost beside A'A; C_k = Q~_k^-1 in full."""
    precisions, lat_dim = natural.prior.precision.entries, pooled_root.shape[0]
    orthonormal, t = orthonormalize(jnp.concatenate([pooled_root, whitened]))
    prior_root, projection = orthonormal[:lat_dim], orthonormal[lat_dim:]
    t_inverse = inverse_lower(t.T).T
    prior = matmul(matmul(t_inverse.T[None], precisions), t_inverse[None])
    # Q~_k = T^-T P_k T^-1 + U'U, and Q~_k - I = T^-T P_k T^-1 - V'V
    precision = symmetrize(prior + matmul(projection.T, projection)[None])
    # those of the prior at once
    inverses, log_dets = inverse_and_log_det(jnp.concatenate([precision, precisions]))
    covariance, log_det = inverses[: len(prior)], log_dets[: len(prior)]
    curvature = matmul(prior - matmul(prior_root.T, prior_root)[None], covariance)
    log_det = log_det + 2 * jnp.sum(jnp.log(jnp.abs(diagonal(t))))
    of_prior = inverses[len(prior) :], log_dets[len(prior) :]
    return (t, t_inverse, projection, prior_root), (symmetrize(curvature), covariance, log_det), of_prior


def _diagonal_basis(natural: Natural, whitened: Array, pooled_root: Array) -> tuple[Any, ...]:
    """T = diag(mean_k Q_k)^1/2, in which all Q~_k are diagonal."""
    precision = natural.posterior_precision.diagonal()  # type: ignore[union-attr]
    pooled = jnp.mean(precision, axis=0)
    scale = jnp.sqrt(pooled)
    covariance = pooled[None] / precision
    curvature = (precision - pooled[None]) / precision
    log_det = jnp.sum(jnp.log(precision), axis=-1)
    t, t_inverse = jnp.diag(scale), jnp.diag(1 / scale)
    bases = t, t_inverse, whitened / scale[None], pooled_root / scale[None]
    return bases, (curvature, covariance, log_det), inverse_and_log_det(natural.prior.precision.entries)


def component_product(matrices: Array, vectors: Array) -> Array:
    """M_k v_k (K, L) for component matrices (K, L, L), or (K, L) if diagonal."""
    return matrices * vectors if matrices.ndim == 2 else einsum("kij,kj->ki", matrices, vectors)


def latent_features(t: Array, *, squares_only: bool = False) -> Array:
    """[t, its products t_i t_j] (B, L + L2), of which logits are linear: L2 = L(L+1)/2, or L squares."""
    if squares_only:
        return jnp.concatenate([t, t * t], axis=-1)
    i, j = np.triu_indices(t.shape[-1])
    return jnp.concatenate([t, t[:, i] * t[:, j]], axis=-1)


def distinct_entries(matrices: Array) -> Array:
    """The distinct entries of symmetric matrices (K, L(L+1)/2); diagonals (K, L) as they are."""
    if matrices.ndim == 2:
        return matrices
    i, j = np.triu_indices(matrices.shape[-1])
    return matrices[:, i, j]


def quadratic_coefficients(matrices: Array) -> Array:
    """Coefficients (K, L2) of the products t_i t_j in t' M_k t."""
    if matrices.ndim == 2:
        return matrices
    i, j = np.triu_indices(matrices.shape[-1])
    return distinct_entries(matrices) * jnp.asarray(np.where(i == j, 1, 2), matrices.dtype)[None]


def symmetric_matrices(entries: Array) -> Array:
    """Symmetric matrices (B, L, L) from their distinct entries (B, L(L+1)/2)."""
    return entries[:, entry_index(math.isqrt(2 * entries.shape[-1]))]


def entry_index(dim: int) -> np.ndarray:
    """Indices of the entries of a symmetric matrix among its distinct ones (n, n)."""
    i, j = np.triu_indices(dim)
    index = np.zeros((dim, dim), np.int32)
    index[i, j] = index[j, i] = np.arange(i.size)
    return index


def center_rows(factors: Prepared, x: Array) -> Array:
    """Rows x - b (B, D), in the frame of the model."""
    rows = x if factors.frame is None else factors.frame.inward(x)
    return rows - factors.bias[None]


def project_rows(factors: Prepared, centered: Array) -> Array:
    """Latent coordinates t = (F U)'(x - b) (B, L) of rows x - b (B, D)."""
    projector = factors.projector
    return matmul(centered.astype(projector.dtype), projector, preferred_element_type=centered.dtype)


def component_logits(factors: Prepared, features: Array) -> Array:
    """Log p(x, z = k) (B, K) up to a term that all components share: linear in the latent features."""
    lat_dim, entries = factors.linear.shape[-1], factors.coefficients.shape[-1]
    # t'M t / 2 has every distinct entry of M off the diagonal twice
    scale = np.where(np.arange(entries) < lat_dim, 1, -0.5)
    if not factors.is_diagonal:
        i, j = np.triu_indices(lat_dim)
        scale[lat_dim:] = np.where(i == j, -0.5, -1)
    coefficients = factors.coefficients * jnp.asarray(scale, features.dtype)[None]
    return factors.constant[None] + matmul(features, coefficients.T)


def normalize_logits(logits: Array) -> tuple[Array, Array, Array]:
    """Normalised logits (B, K): their log sum_k exp (B,), the logits less it (B, K), and the exponentials of these.

    The largest is subtracted first: the logits of rows far from the model are so large that what is lost in
    rounding their logsumexp would show in the responsibilities, which sum to 1 here.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    shifted = logits - top
    exponentials = jnp.exp(shifted)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_total = jnp.log(total)
    return (top + log_total)[:, 0], shifted - log_total, exponentials / total


def shared_log_density(factors: Prepared, centered: Array, t: Array) -> Array:
    """The term of log p(x, z = k) that all components share (B,): offset - (|r - U t|^2 + |V t|^2) / 2."""
    unexplained = factors.root.rows_times(centered) - matmul(t, factors.projection.T)
    shrunk = matmul(t, factors.prior_root.T)
    return factors.offset - (jnp.sum(unexplained**2, axis=-1) + jnp.sum(shrunk**2, axis=-1)) / 2


def posterior_gain(factors: Prepared, responsibilities: Array, t: Array) -> Array:
    """E[u | x] - t = sum_k gamma_k (linear_k - curvature_k t) (B, L), which the prior adds to the projection."""
    lat_dim = t.shape[-1]
    if factors.is_diagonal:
        mixed = matmul(responsibilities, factors.coefficients)
        return mixed[:, :lat_dim] - mixed[:, lat_dim:] * t
    # column by column of the mixed matrices, rows along the last axis: no (B, L, L), and long vectors
    mixed = matmul(factors.coefficients.T, responsibilities.T)
    index, columns = jnp.asarray(entry_index(lat_dim)), t.T

    def less_column(column: Array, gain: Array) -> Array:
        return gain - mixed[lat_dim + index[column]] * columns[column][None]

    return cast(Array, jax.lax.fori_loop(0, lat_dim, less_column, mixed[:lat_dim]).T)


def floats_per_row(factors: Prepared) -> int:
    """Floats that a pass holds per row of a block."""
    (obs_dim, lat_dim), n_components = factors.projection.shape, factors.constant.shape[0]
    features = 2 * (lat_dim if factors.is_diagonal else lat_dim * (lat_dim + 1) // 2)
    return 2 * obs_dim + features + 4 * lat_dim + 2 * n_components
