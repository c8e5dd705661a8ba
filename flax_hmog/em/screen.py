"""Bounds of the logits of all components, at a part of the cost of the logits.

Given component k the latent coordinates t are N(mu_k, Sigma_k), and those of a few directions are Gaussian too. No
marginal is farther from its mean than the whole, in its own metric. So the distance in r directions bounds the logit
from above, at r^2 operations instead of L^2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_hmog.model.coordinates import Prepared
from flax_hmog.model.kinds import Array, einsum, inverse_and_log_det, matmul, pytree, symmetrize
from flax_hmog.model.prepared import latent_features, quadratic_coefficients

ROUNDING = 64  # units in the last place that bounds are raised by


@pytree
class Screen:
    """Bounds of logits, linear in features of t: of k they are s(t) - |E_k^1/2 (p - nu_k)|^2 / 2 + constant_k.

    Attributes:
        center: mean of t (L,).
        directions: p = directions'(t - center), in which components differ most beside their spread (L, r).
        shared: S (L, L) with s(t) = |S'(t - center)|^2 / 2 + linear . (t - center), which all components share.
        coefficients: of p and its distinct products (r + r(r+1)/2, K).
        constant: (K,).
        largest: the largest eigenvalue that any E_k may have ().
        linear: (L,).
    """

    center: Array
    directions: Array
    shared: Array
    coefficients: Array
    constant: Array
    largest: Array
    linear: Array


def make_screen(factors: Prepared, rank: int) -> Screen:
    """The bounds by marginals in so many directions, for full component matrices; O(K L^3) once per model."""
    natural, gram = factors.natural, matmul(factors.projection.T, factors.projection)
    covariances, _ = inverse_and_log_det(natural.prior.precision.entries)
    means = matmul(factors.prior_means, matmul(factors.basis.T, gram))
    turn = matmul(gram, factors.basis)
    # Sigma_k = U'U T S_k T'U'U + U'U and mu_k = U'U T m_k
    weights = jax.nn.softmax(natural.prior.log_weights)
    center = matmul(weights, means)
    gap = means - center[None]
    between = matmul((weights[:, None] * gap).T, gap)
    within = matmul(matmul(turn, einsum("k,kij->ij", weights, covariances)), turn.T) + gram
    directions = _apart(between, symmetrize(within), rank)
    turned = matmul(turn.T, directions)
    # one product with all (K L, L), as batches of small ones are slow
    half = matmul(covariances.reshape(-1, turned.shape[0]), turned).reshape(*means.shape, -1)
    marginal = einsum("kia,ib->kab", half, turned) + matmul(matmul(directions.T, gram), directions)[None]
    metric, _ = inverse_and_log_det(symmetrize(marginal))
    nu = matmul(gap, directions)
    pull = einsum("kij,kj->ki", metric, nu)
    # log p(x, z = k) = log w_k + log N(t; mu_k, Sigma_k) + what k does not change, so that with
    # s(t) = t'((U'U)^-1 - I) t / 2 the logit is logit_k(mu_k) - s(mu_k) + s(t) - |t - mu_k|^2 / 2 in Sigma_k^-1
    shared = _excess_root(gram)
    top = factors.constant + jnp.sum(factors.linear * means, axis=-1)
    top = top - jnp.sum(einsum("kij,kj->ki", factors.curvature, means) * means, axis=-1) / 2
    # about the centre c: s(t) - s(mu_k) = |S'(t-c)|^2/2 + c'SS'(t-c) less the same at mu_k
    linear = matmul(shared, matmul(center, shared))
    at_mean = jnp.sum(matmul(gap, shared) ** 2, axis=-1) / 2 + matmul(gap, linear)
    return Screen(
        center=center,
        directions=directions,
        shared=shared,
        coefficients=jnp.concatenate([pull, -quadratic_coefficients(metric) / 2], axis=1).T,
        constant=top - at_mean - jnp.sum(pull * nu, axis=-1) / 2,
        largest=jnp.max(jnp.trace(metric, axis1=-2, axis2=-1)),
        linear=linear,
    )


def _apart(between: Array, within: Array, rank: int) -> Array:
    """Directions (L, r) in which the spread between components is largest beside that within."""
    dim = within.shape[0]
    jitter = 1e3 * jnp.finfo(within.dtype).eps * jnp.trace(within) / dim
    inverse = jnp.linalg.inv(jnp.linalg.cholesky(within + jitter * jnp.eye(dim, dtype=within.dtype)))
    _, vectors = jnp.linalg.eigh(symmetrize(matmul(matmul(inverse, between), inverse.T)))
    return matmul(inverse.T, vectors[:, ::-1][:, :rank])


def _excess_root(gram: Array) -> Array:
    """S with S S' = (U'U)^-1 - I, without directions in which x tells nothing of t."""
    values, vectors = jnp.linalg.eigh(gram)
    least = 10 * gram.shape[0] * jnp.finfo(gram.dtype).eps
    excess = jnp.where(values > least, (1 - values) / jnp.where(values > least, values, 1), 0)
    root: Array = vectors * jnp.sqrt(jnp.maximum(excess, 0))[None]
    return root


def upper_bounds(screen: Screen, t: Array) -> Array:
    """Bounds (B, K) of the logits of rows with these latent coordinates (B, L)."""
    gap = t - screen.center[None]
    p = matmul(gap, screen.directions)
    s = jnp.sum(matmul(gap, screen.shared) ** 2, axis=-1) / 2 + matmul(gap, screen.linear)
    bounds = screen.constant[None] + matmul(latent_features(p), screen.coefficients)
    size = jnp.abs(s) + screen.largest * jnp.sum(p**2, axis=-1)
    return bounds + (s + ROUNDING * jnp.finfo(t.dtype).eps * size)[:, None]
