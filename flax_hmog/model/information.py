"""Log-partition, negative entropy and Kullback-Leibler divergence, in closed form."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from flax_hmog.model.checks import public
from flax_hmog.model.conversions import in_units_of_x, mean_to_moments, natural_to_moments
from flax_hmog.model.coordinates import Mean, Natural, categorical_logits, check_natural, gaussian_log_partition
from flax_hmog.model.kinds import Array, Kind, einsum, matmul, trace_product
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import jit


@public
def log_partition(natural: Natural) -> Float[Array, ""]:
    """Psi = logsumexp_k(cat_k + psi_N(h_k, P_k)) + psi_N(Psi^-1 b, Psi^-1), without the base measure.

    Args:
        natural: the model.

    Returns:
        psi (). In the flat layout its gradient is the model's mean coordinates.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if a prior precision is not positive definite.

    Example:
        >>> from flax_hmog.toy import natural
        >>> log_partition(natural).shape
        ()
    """
    natural = check_natural(natural)
    natural = with_prior(in_units_of_x(natural))
    log_partitions, *_ = gaussian_log_partition(natural.prior.location, natural.prior.precision)
    latent = jax.nn.logsumexp(categorical_logits(natural.categorical_bias) + log_partitions)
    location, precision = natural.observable_location, natural.observable_precision
    half = precision.cholesky().lower_solve(location[:, None])[:, 0]
    return latent + (jnp.sum(half**2) - precision.log_det()) / 2


@public
def negative_entropy(mean: Mean) -> Float[Array, ""]:
    """Theta . mu - psi = E[log p(x, y, z)] without the base measure; the convex conjugate of `log_partition`.

    Args:
        mean: expected statistics with full latent second moments.

    Returns:
        The negative entropy ().

    Raises:
        TypeError: if `mean` is of another coordinate type or its latent second moments are restricted.

    Example:
        >>> from flax_hmog import natural_to_mean
        >>> from flax_hmog.toy import natural
        >>> round(float(negative_entropy(natural_to_mean(natural))), 2)
        2.17
    """
    moments = mean_to_moments(mean)
    obs_dim, lat_dim = moments.loadings.shape
    # sum_k w_k (log w_k - (log|S_k| + L) / 2) - (log|Psi| + D) / 2
    component = jnp.log(moments.weights) - (moments.covariances.log_det() + lat_dim) / 2
    return jnp.sum(moments.weights * component) - (moments.noise.log_det() + obs_dim) / 2


@public
def kl_divergence(natural_p: Natural, natural_q: Natural) -> Float[Array, ""]:
    """KL(p || q) between joints over (x, y, z), as KL of z + KL of y | z + KL of x | y.

    Not invariant to relabelling components or rotating the latent space.

    Args:
        natural_p: the model of the expectation.
        natural_q: a model of the same dimensions.

    Returns:
        The divergence () in nats.

    Raises:
        TypeError: if either is of another coordinate type.
        ValueError: if the dimensions differ.

    Example:
        >>> import dataclasses
        >>> from flax_hmog import moments_to_natural
        >>> from flax_hmog.toy import moments, natural
        >>> other = moments_to_natural(dataclasses.replace(moments, bias=moments.bias + 0.1))
        >>> round(float(kl_divergence(natural, other)), 2)  # 4 columns, 0.1^2 / (2 * 0.1) each
        0.2
    """
    natural_p = check_natural(natural_p, "natural_p")
    natural_q = check_natural(natural_q, "natural_q")
    if (natural_p.interaction.shape, natural_p.posterior_location.shape) != (
        natural_q.interaction.shape,
        natural_q.posterior_location.shape,
    ):
        raise ValueError(
            "kl_divergence: `natural_q` must have the dimensions of `natural_p`; got (D, L), (K, L) "
            f"{natural_q.interaction.shape}, {natural_q.posterior_location.shape} for {natural_p.interaction.shape}, "
            f"{natural_p.posterior_location.shape}. Compare models of one size."
        )
    p, q = in_units_of_x(natural_p), in_units_of_x(natural_q)
    return _kl_divergence(with_prior(p), with_prior(q))


@jit
def _kl_divergence(natural_p: Natural, natural_q: Natural) -> Array:
    p, q = natural_to_moments(natural_p), natural_to_moments(natural_q)
    obs_dim, lat_dim = p.loadings.shape
    # y | z: 1/2 [tr(S_q^-1 S_p) - L + log|S_q| - log|S_p| + (m_p - m_q)' S_q^-1 (m_p - m_q)]
    gap = p.means - q.means
    precision = natural_q.prior.precision.entries
    latent = (
        einsum("kij,kij->k", precision, p.covariances.entries)
        - lat_dim
        + q.covariances.log_det()
        - p.covariances.log_det()
        + einsum("ki,kij,kj->k", gap, precision, gap)
    ) / 2
    categorical = jnp.log(p.weights) - jnp.log(q.weights)
    # x | y: the same with the mean gap (W_p - W_q) y + b_p - b_q, averaged over y
    root = natural_q.observable_precision.cholesky()
    loadings_gap = _root_times(root, p.loadings - q.loadings)
    bias_gap = _root_times(root, (p.bias - q.bias)[:, None])[:, 0]
    spread = jnp.sum(p.covariances.weighted(p.weights).entries, axis=0)
    shift = matmul(loadings_gap, p.means.T) + bias_gap[:, None]
    gap_square = jnp.sum(matmul(loadings_gap, spread) * loadings_gap) + jnp.sum(shift**2 * p.weights[None])
    observable = (
        trace_product(natural_q.observable_precision, p.noise)
        - obs_dim
        + q.noise.log_det()
        - p.noise.log_det()
        + gap_square
    ) / 2
    return jnp.sum(p.weights * (categorical + latent)) + observable


def _root_times(root: Kind, columns: Array) -> Array:
    """F' columns (D, m), for a factor F that `cholesky` returned."""
    return cast(Array, root.rows_times(columns.T).T)
