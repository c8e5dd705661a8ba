"""What inference needs of a model, and the matrix products it takes over blocks of rows.

All that does not depend on x is computed once per parameter value (`factorise`); what does is a few matrix products
per block of rows. Everything is evaluated in coordinates u of the latent space in which the posterior of an average
component has unit precision, because in float32 the plain formulas cancel (docs/derivations.md):

    Qbar = G + R,   G = W'Psi^-1 W,   R = mean_k P_k,   Qbar = T'T,   u = T y,   t = T^-T W'Psi^-1 (x - b)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.conversions import with_prior
from flax_hmog.coordinates import Natural, SharedBase, observable_bias, symmetrize
from flax_hmog.covariances import (
    Array,
    Covariance,
    PositiveDefinite,
    diagonal,
    einsum,
    inverse_and_log_det,
    inverse_lower,
    matmul,
    pytree,
)

BLOCK_FLOATS = 2**23  # floats that the rows of one block may hold at once (32 MB in float32)


@pytree
class Factors:
    """What inference needs of a model, computed once per parameter value.

    With r = F'(x - b) and t = U'r, and C_k the posterior covariance of u = T y given component k:

        log p(x) = offset - (|r - U t|^2 + |V t|^2) / 2 + logsumexp_k(constant_k + linear_k . t - t' curvature_k t / 2)

    Component matrices are (K, L, L), or (K, L) where the posterior precisions are diagonal.

    Attributes:
        bias: b (D,).
        root: F with F F' = Psi^-1.
        projection: U = F'W T^-1 (D, L).
        prior_root: V (L, L) with V'V + U'U = I.
        inverse_basis: T^-1 (L, L).
        constant: terms of the logits free of x (K,).
        linear: C_k h~_k (K, L).
        curvature: I - C_k, the part of the quadratic that components do not share.
        covariance: C_k.
        location: h~_k = T^-T h_k (K, L).
        offset: log|Psi^-1| / 2 - D log(2 pi) / 2 ().
    """

    bias: Array
    root: Covariance
    projection: Array
    prior_root: Array
    inverse_basis: Array
    constant: Array
    linear: Array
    curvature: Array
    covariance: Array
    location: Array
    offset: Array


def factorise(natural: Natural) -> Factors:
    """Everything inference needs that does not depend on x. Cost O(D L^2 + K L^3)."""
    natural = with_prior(natural)
    obs_dim = natural.observable_location.shape[0]
    root = natural.observable_precision.cholesky()
    whitened = root.lower_solve(natural.interaction)  # A = F^-1 Theta = F' W
    prior_covariances, prior_log_det = inverse_and_log_det(natural.prior_precision.entries)
    means = einsum("kij,kj->ki", prior_covariances, natural.prior_location)
    pooled_root = jnp.linalg.cholesky(jnp.mean(natural.prior_precision.entries, axis=0)).T
    basis = _full_basis if isinstance(natural.posterior_precision, PositiveDefinite | SharedBase) else _diagonal_basis
    t, t_inverse, projection, prior_root, curvature, covariance, log_det = basis(natural, whitened, pooled_root)
    location = matmul(natural.prior_location, t_inverse)
    linear = component_product(covariance, location)
    # Q_k = P_k + G, so  h'C h - h'P^-1 h = -h' C G P^-1 h
    gram_means = matmul(matmul(matmul(means, t.T), projection.T), projection)
    constant = natural.log_weights + (prior_log_det - log_det - jnp.sum(linear * gram_means, axis=-1)) / 2
    return Factors(
        bias=observable_bias(natural),
        root=root,
        projection=projection,
        prior_root=prior_root,
        inverse_basis=t_inverse,
        constant=constant,
        linear=linear,
        curvature=curvature,
        covariance=covariance,
        location=location,
        offset=natural.observable_precision.log_det(obs_dim) / 2 - obs_dim * math.log(2 * math.pi) / 2,
    )


def _full_basis(natural: Natural, whitened: Array, pooled_root: Array) -> tuple:
    """T from the QR factors of [R^1/2; A], so that the small prior is not lost beside A'A; C_k = Q~_k^-1 in full."""
    lat_dim = pooled_root.shape[0]
    orthonormal, t = jnp.linalg.qr(jnp.concatenate([pooled_root, whitened]))
    prior_root, projection = orthonormal[:lat_dim], orthonormal[lat_dim:]
    t_inverse = inverse_lower(t.T).T
    prior = matmul(matmul(t_inverse.T[None], natural.prior_precision.entries), t_inverse[None])
    # Q~_k = T^-T P_k T^-1 + U'U, and Q~_k - I = T^-T P_k T^-1 - V'V
    precision = symmetrize(prior + matmul(projection.T, projection)[None])
    covariance, log_det = inverse_and_log_det(precision)
    curvature = matmul(prior - matmul(prior_root.T, prior_root)[None], covariance)
    log_det = log_det + 2 * jnp.sum(jnp.log(jnp.abs(diagonal(t))))
    return t, t_inverse, projection, prior_root, symmetrize(curvature), covariance, log_det


def _diagonal_basis(natural: Natural, whitened: Array, pooled_root: Array) -> tuple:
    """T = diag(mean_k Q_k)^1/2, in which all Q~_k are diagonal."""
    precision = natural.posterior_precision.diagonal(  # type: ignore[union-attr]
        pooled_root.shape[0]
    )
    pooled = jnp.mean(precision, axis=0)
    scale = jnp.sqrt(pooled)
    covariance = pooled[None] / precision
    curvature = (precision - pooled[None]) / precision
    log_det = jnp.sum(jnp.log(precision), axis=-1)
    t, t_inverse = jnp.diag(scale), jnp.diag(1 / scale)
    return t, t_inverse, whitened / scale[None], pooled_root / scale[None], curvature, covariance, log_det


def component_product(matrices: Array, vectors: Array) -> Array:
    """M_k v_k (K, L) for component matrices (K, L, L), or (K, L) if diagonal."""
    return matrices * vectors if matrices.ndim == 2 else einsum("kij,kj->ki", matrices, vectors)


def quadratic_features(rows: Array, matrices: Array) -> Array:
    """The products t_i t_j that quadratic forms in `matrices` need: (B, L) squares, or all distinct (B, L(L+1)/2)."""
    if matrices.ndim == 2:
        return rows * rows
    i, j = np.triu_indices(rows.shape[-1])
    return rows[:, i] * rows[:, j]


def quadratic_coefficients(matrices: Array) -> Array:
    """Coefficients (K, F) with coefficients . quadratic_features(t) = t' M_k t."""
    if matrices.ndim == 2:
        return matrices
    i, j = np.triu_indices(matrices.shape[-1])
    return matrices[:, i, j] * jnp.asarray(np.where(i == j, 1, 2), matrices.dtype)[None]


def unpack_quadratic(packed: Array) -> Array:
    """Symmetric matrices (K, L, L) from sums of the distinct products (K, L(L+1)/2)."""
    lat_dim = math.isqrt(2 * packed.shape[-1])
    i, j = np.triu_indices(lat_dim)
    index = np.zeros((lat_dim, lat_dim), int)
    index[i, j] = index[j, i] = np.arange(i.size)
    return packed[:, index]


def project_rows(factors: Factors, x: Array) -> tuple[Array, Array]:
    """Noise-whitened residuals r = F'(x - b) (B, D) and latent coordinates t = U'r (B, L)."""
    residual = factors.root.rows_times(x - factors.bias[None])
    return residual, matmul(residual, factors.projection)


def component_logits(factors: Factors, t: Array) -> Array:
    """Log p(x, z = k) (B, K) up to a term that all components share."""
    features = quadratic_features(t, factors.curvature)
    quadratic = matmul(features, quadratic_coefficients(factors.curvature).T)
    return factors.constant[None] + matmul(t, factors.linear.T) - quadratic / 2


def shared_log_density(factors: Factors, residual: Array, t: Array) -> Array:
    """The term of log p(x, z = k) that all components share (B,): offset - (|r - U t|^2 + |V t|^2) / 2."""
    unexplained = residual - matmul(t, factors.projection.T)
    shrunk = matmul(t, factors.prior_root.T)
    return factors.offset - (jnp.sum(unexplained**2, axis=-1) + jnp.sum(shrunk**2, axis=-1)) / 2


def posterior_rows(factors: Factors, responsibilities: Array, t: Array) -> Array:
    """sum_k r_k E[u | x, k] (B, L) = sum_k r_k C_k (h~_k + t), for weights r (B, K)."""
    if factors.covariance.ndim == 2:
        spread = matmul(responsibilities, factors.covariance) * t
    else:
        lat_dim = t.shape[-1]
        mixed = matmul(responsibilities, factors.covariance.reshape(-1, lat_dim * lat_dim))
        spread = einsum("bij,bj->bi", mixed.reshape(-1, lat_dim, lat_dim), t)
    return matmul(responsibilities, factors.linear) + spread


def block_rows(factors: Factors) -> int:
    """Rows of a block: as many as fit in `BLOCK_FLOATS`, between 64 and 8192."""
    obs_dim, lat_dim = factors.projection.shape
    per_row = 2 * obs_dim + 2 * lat_dim * lat_dim + 4 * factors.constant.shape[0]
    return max(64, min(8192, BLOCK_FLOATS // per_row))


def map_rows(function: Callable[[Array], Any], x: Array, rows: int) -> Any:
    """`function` of x (..., D), block by block; it takes (B, D) and returns arrays (B, ...) of results per row.

    The last block overlaps the one before it, so that no row is padded and one compiled body serves all blocks.
    Blocks are rematerialised in reverse mode: memory stays O(block) under `grad`.
    """
    flat = x.reshape(-1, x.shape[-1])
    count = flat.shape[0]
    if count <= rows:
        out = function(flat)
    else:
        blocks = -(-count // rows)
        starts = jnp.minimum(jnp.arange(blocks) * rows, count - rows)

        @jax.checkpoint
        def one_block(start: Array) -> Any:
            return function(jax.lax.dynamic_slice_in_dim(flat, start, rows))

        pieces = jax.lax.map(one_block, starts)
        # every row once: whole blocks, then the tail of the last
        tail = count - (blocks - 1) * rows
        out = jax.tree.map(
            lambda piece: jnp.concatenate([piece[:-1].reshape(-1, *piece.shape[2:]), piece[-1, rows - tail :]]), pieces
        )
    return jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-1], *leaf.shape[1:]), out)
