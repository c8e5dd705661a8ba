"""Shrinkage of component covariances toward the shape that they share, how much of it, and their floor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.model.algebra import inverse_lower, symmetrize
from flax_hmog.model.coordinates import Moments, outer, prior_moments
from flax_hmog.model.kinds import Array, PositiveDefinite, identity_like, inverse_and_log_det, matmul
from flax_hmog.model.typed import jit

if TYPE_CHECKING:
    from flax_hmog.em.padding import InUse

SWEEPS = 20  # over scales and shape, each exact given the other
STRENGTHS = np.geomspace(1.05, 50.0, 60)  # pseudo-samples per factor among which the evidence chooses
FIRST_STRENGTH = 2.0  # pseudo-samples per factor of the step that the choice is made from


@jit
def common_covariances(precision: Array, log_det: Array, used: InUse | None = None) -> tuple[Array, Array]:
    """The nearest covariances s_k Omega of one shape, and twice the divergences from them.

    Omega and s_k minimise sum_k KL(N(0, s_k Omega) || N(0, S_k)):  s_k = L / tr(Omega P_k),  Omega^-1 = mean_k s_k P_k.

    Args:
        precision: P_k = S_k^-1 (K, L, L).
        log_det: log|P_k| (K,).
        used: the parts of a padded model that count; None for all.

    Returns:
        s_k Omega (K, L, L), and 2 KL (K,).
    """
    n_components, n_factors = precision.shape[0], jnp.asarray(precision.shape[1])
    share, blank = jnp.full(n_components, 1 / n_components, precision.dtype), jnp.zeros_like(precision[0])
    if used is not None:
        parts = outer(used.factors, used.factors)
        share, n_factors = used.components / used.n_components, used.n_factors
        precision, blank = jnp.where(parts[None], precision, 0), jnp.where(parts, 0, identity_like(blank))

    def shape(scales: Array) -> tuple[Array, Array]:
        return inverse_and_log_det(jnp.sum((share * scales)[:, None, None] * precision, axis=0) + blank)

    def traces(common: Array) -> Array:
        return jnp.sum(precision * common[None], axis=(-1, -2))

    first = jnp.exp(-(log_det - jnp.sum(share * log_det)) / n_factors)
    scales: Any = jax.lax.fori_loop(0, SWEEPS, lambda _, scales: n_factors / traces(shape(scales)[0]), first)
    common, common_log_det = shape(scales)
    # 2 KL(N(0, s Omega) || N(0, S)) = s tr(Omega P) - L - log|s Omega| - log|P|
    divergence = scales * traces(common) - n_factors - n_factors * jnp.log(scales) + common_log_det - log_det
    return scales[:, None, None] * common[None], jnp.where(share > 0, divergence, 0)


@jit
def common_of(moments: Moments) -> Array:
    """`common_covariances` of a model (K, L, L)."""
    precision, log_det = inverse_and_log_det(moments.covariances.entries)
    return common_covariances(precision, -log_det)[0]


def shrunk(covariances: PositiveDefinite, rows: Array, shrinkage: Array, common: Array) -> PositiveDefinite:
    """Covariances of components of so many rows (K,), with pseudo-samples about their own means."""
    rows = rows[:, None, None]
    return PositiveDefinite((rows * covariances.entries + shrinkage * common) / (rows + shrinkage))


def floored(moments: Moments, floor: Array) -> Moments:
    """The model with components of at least this share of the variance of the latent space, in every direction.

    The likeliest such covariances keep their larger eigenvalues, in units of the whole; smaller ones are raised.
    """
    factor, given = prior_moments(moments)[1].cholesky().entries, moments.covariances.entries
    inverse = inverse_lower(factor)
    inner = symmetrize(matmul(matmul(inverse[None], given), inverse.T[None]))
    is_above = jnp.all(jnp.isfinite(jnp.linalg.cholesky(inner - floor * identity_like(inner))), axis=(-1, -2))

    def raised(inner: Array) -> Array:
        values, vectors = jnp.linalg.eigh(inner)
        turned = matmul(factor[None], vectors)
        lifted = matmul(turned * jnp.maximum(values, floor)[:, None, :], jnp.swapaxes(turned, -1, -2))
        return jnp.where(is_above[:, None, None], given, symmetrize(lifted))

    covariances = jax.lax.cond(jnp.all(is_above), lambda _: given, raised, inner)
    return dataclasses.replace(moments, covariances=PositiveDefinite(covariances))


def estimated_shrinkage(before: Moments, after: Moments, rows: Any, shrinkage: float) -> float:
    """The number of pseudo-samples under which the scatter of components is most likely.

    With P_k ~ Wishart of nu degrees of freedom and mean (s_k Omega)^-1, and l_ki the eigenvalues of the scatter of
    component k in units of s_k Omega, the log-evidence is, up to a constant,

        sum_k (L nu log(nu) - (n_k + nu) sum_i log(nu + l_ki)) / 2 + log Gamma_L((n_k + nu) / 2) - log Gamma_L(nu / 2)

    Args:
        before: a model.
        after: the model of an M-step from there with so many pseudo-samples.
        rows: the rows n_k of its components (K,).
        shrinkage: the pseudo-samples of that step.

    Returns:
        Pseudo-samples per component, from about one to fifty for each factor.
    """
    from scipy.linalg import eigvalsh  # fits without an estimate do not wait for scipy
    from scipy.special import gammaln

    common, n = np.asarray(common_of(before), np.float64), np.asarray(rows, np.float64)
    lat_dim = common.shape[-1]
    scatter = (n + shrinkage)[:, None, None] * np.asarray(after.covariances.entries, np.float64) - shrinkage * common
    spread = np.stack([eigvalsh(a, b) for a, b in zip(scatter, common, strict=True)]).clip(min=0)
    nu, halves = STRENGTHS * lat_dim, np.arange(lat_dim) / 2
    posterior, total = n[:, None] + nu[None], np.log(nu[None, :, None] + spread[:, None]).sum(axis=-1)
    gammas = gammaln(posterior[..., None] / 2 - halves) - gammaln(nu[:, None] / 2 - halves)[None]
    evidence = lat_dim * nu * np.log(nu) / 2 - posterior * total / 2 + gammas.sum(axis=-1)
    return float(nu[int(evidence.sum(axis=0).argmax())])
