"""Exact expectation-maximisation: the M-step, its penalty, and one whole step. The fit around them: fit.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float

from flax_hmog.data.rows import check_samples
from flax_hmog.data.shards import Shards, row_shards
from flax_hmog.em.missing import IncompleteStatistics
from flax_hmog.em.options import Regularizer
from flax_hmog.em.padding import InUse
from flax_hmog.em.shrinkage import common_covariances, floored, shrunk
from flax_hmog.em.statistics import (
    Densities,
    Statistics,
    accumulate,
    basis_loadings,
    log_likelihood,
    measure,
    residual_mean,
)
from flax_hmog.model.checks import check_type, is_concrete, may_miss, public
from flax_hmog.model.conversions import component_moments, moments_to_natural, regress_observed
from flax_hmog.model.coordinates import (
    Moments,
    Natural,
    Prepared,
    ResidualMoments,
    check_full,
    check_natural,
    outer,
    prior_moments,
)
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import (
    Array,
    PositiveDefinite,
    einsum,
    inverse_and_log_det,
    inverse_lower,
    matmul,
    pytree,
    symmetrize,
    trace_product,
)
from flax_hmog.model.prepared import prepare
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import Block, Samples, jit

Sums: TypeAlias = Statistics | IncompleteStatistics
"""What a pass over rows gives."""


@pytree
class EMInfo:
    """Diagnostics of a model on the data of an EM step; the step returns those of the model it started from.

    Attributes:
        log_likelihood: weighted mean of log p(x) in nats (); log p(x, z) where the component is known.
        objective: log_likelihood plus the penalty divided by the sum of weights ().
        occupancy: expected number of samples in each component (K,).
        smallest_noise: smallest noise variance ().
        smallest_latent_variance: smallest variance of a latent axis given the others, over components ().

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> _, info = em_step(natural, x)
        >>> info.occupancy.shape, info.objective.shape
        ((3,), ())
    """

    log_likelihood: Float[Array, ""]
    objective: Float[Array, ""]
    occupancy: Float[Array, " K"]
    smallest_noise: Float[Array, ""]
    smallest_latent_variance: Float[Array, ""]


@public
def em_step(
    natural: Natural | Prepared,
    x: Samples,
    weights: Samples | None = None,
    regularizer: Regularizer | None = None,
    *,
    missing: str = "refuse",
) -> tuple[Natural, EMInfo]:
    """One step of exact EM: expected statistics of the data, then the model that maximises with them.

    Without a regularizer this is maximum likelihood, and the new model's prior is whitened. With one the latent basis
    is left as it is, since the penalty refers to it.

    Args:
        natural: the model, with full component covariances.
        x: observations (N, D).
        weights: sample weights (N,), as numbers of samples: beside a regularizer their scale matters.
        regularizer: pseudo-statistics, for example `PseudoCounts().regularizer(moments)`.
        missing: "nan" takes NaN for missing entries; "refuse" refuses them.

    Returns:
        The new model and `EMInfo` of the old.

    Raises:
        TypeError: if `natural` is of another coordinate type or its component matrices are restricted.
        ValueError: for unusable data, or if the likelihood has no maximum (a component or a column without spread).

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> better, info = em_step(natural, x)
        >>> print(info.occupancy.round())
        [4. 4. 4.]
    """
    parameters = check_natural(natural)
    check_full("natural", parameters.posterior_precision)
    if regularizer is not None:
        remedy = "Take one from PseudoCounts.regularizer(moments)."
        check_type("regularizer", regularizer, Regularizer, remedy)
    entered, x, weights = check_samples(natural, x, weights)
    block, shards = (x, weights, None), row_shards(x)
    given: Any = {"shards": shards, "missing": may_miss()}
    updated, info, exists, _ = one_step(entered, block, regularizer, parameters.frame, **given)
    if is_concrete(exists) and not exists:
        factors = prepare(entered)
        statistics = accumulate(factors, *block, **given)
        moments_to_natural(next_moments(factors, statistics, regularizer))  # says what is wrong
    return updated, info


@jit(static_argnames=("shards", "projection_dtype", "missing"))
def one_step(
    natural: Natural | Prepared, block: Block, regularizer: Regularizer | None, frame: Frame | None = None, *,
    shards: Shards, projection_dtype: str | None = None, missing: bool = False, used: InUse | None = None,
) -> tuple[Natural, EMInfo, Array, Array]:  # fmt: skip
    """`finish_step` after a pass over one block (x, weights, labels or None), all as one program."""
    if used is not None:
        natural = used.completed(check_natural(natural))
    # barriers: what compiles in one program rounds as the same functions do one by one, over several blocks
    factors = jax.lax.optimization_barrier(prepare(natural, projection_dtype))
    statistics = jax.lax.optimization_barrier(accumulate(factors, *block, shards=shards, missing=missing))
    return finish_step(factors, statistics, regularizer, frame, used)


@jit
def finish_step(
    factors: Prepared, statistics: Sums, regularizer: Regularizer | None, frame: Frame | None,
    used: InUse | None = None,
) -> tuple[Natural, EMInfo, Array, Array]:  # fmt: skip
    """The model after a pass with these statistics, `EMInfo` of the model before, True if the first exists (), and for
    the host to read at once the objective and the number of samples (2,).

    Args:
        factors: of the model before, its frame that of the rows.
        statistics: of the pass.
        regularizer: pseudo-statistics or None.
        frame: of the parameters of both models.
        used: the parts of the models that count; None for all.
    """
    info = em_info(factors, statistics, regularizer, frame, used)
    natural = moments_to_natural(next_moments(factors, statistics, regularizer, used))
    log_weights = natural.prior.log_weights
    log_weights = log_weights if used is None else jnp.where(used.components, log_weights, 0)
    # Cholesky factors of what is not positive definite are NaN
    signs = (natural.observable_precision.log_det(), natural.prior.precision.entries, log_weights)
    exists = jnp.all(jnp.stack([jnp.all(jnp.isfinite(values)) for values in signs]))
    return natural.in_frame(frame), info, exists, jnp.stack([info.objective, statistics.count])


@jit(static_argnames=("shards", "projection_dtype"))
def diagnose(
    natural: Natural, block: Block, regularizer: Regularizer | None, frame: Frame | None, *,
    shards: Shards, projection_dtype: str | None = None,
) -> EMInfo:  # fmt: skip
    """Diagnostics of a model after which no step is taken, by a pass over one block."""
    factors = prepare(natural, projection_dtype)
    return em_info(factors, measure(factors, *block, shards=shards), regularizer, frame)


@jit
def next_moments(
    factors: Prepared, statistics: Sums, regularizer: Regularizer | None, used: InUse | None = None
) -> Moments:
    """M-step: the model that maximises the expected (penalised) log-likelihood; its prior whitened if unpenalised."""
    loadings = matmul(basis_loadings(factors), factors.basis)
    mean = residual_mean(factors, statistics)
    common = None
    if regularizer is not None and regularizer.shrinkage is not None:
        common = common_covariances(factors.natural.prior.precision.entries, factors.prior_log_det, used)[0]
    moments = maximize(loadings, factors.bias, mean, statistics.count, regularizer, common, used)
    return whiten_moments(moments) if regularizer is None else moments


def maximize(
    loadings: Array, bias: Array, mean: ResidualMoments, count: Array | float, regularizer: Regularizer | None,
    common: Array | None = None, used: InUse | None = None,
) -> Moments:  # fmt: skip
    """The model with these average statistics of (x - b - W y, y, z), and with pseudo-samples.

    The regression of the residual on y is what W and b change by.

    Args:
        loadings: W (D, L) that the statistics are about.
        bias: b (D,) that the statistics are about.
        mean: of `residual_mean`.
        count: number of samples that the averages stand for.
        regularizer: pseudo-statistics or None.
        common: `common_covariances` that components shrink to (K, L, L), where the regulariser has such pseudo-samples.
        used: the parts of the models that count; None for all.

    Returns:
        `Moments`, in the latent basis of the statistics.
    """
    turn, shift, noise = regress_observed(mean)
    weights, first, second = mean.weights, mean.weighted_means, mean.weighted_second_moments.entries
    mass = weights
    if regularizer is not None:
        r = regularizer
        noise = jax.tree.map(
            lambda data, pseudo: (count * data + r.noise * pseudo) / (count + r.noise), noise, r.noise_covariance
        )
        pulled = (1.0 if r.mean_share is None else r.mean_share) * r.components / count
        mass = weights + pulled
        first = first + pulled * r.component_mean[None]
        pseudo_square = r.component_covariance.entries + outer(r.component_mean, r.component_mean)
        second = second + pulled * pseudo_square[None]
        n_components = weights.shape[0] if used is None else used.n_components
        weights = (weights + r.weights / count) / (1 + n_components * r.weights / count)
    means, covariances = component_moments(mass, first, second)
    if regularizer is not None and regularizer.mean_share is not None:
        own = (1 - regularizer.mean_share) * regularizer.components / count
        covariances = shrunk(covariances, mass, own, regularizer.component_covariance.entries[None])
        mass = mass + own
    if common is not None and regularizer is not None:
        covariances = shrunk(covariances, count * mass, regularizer.shrinkage, common)  # type: ignore[arg-type]
    moments = Moments(loadings + turn, bias + shift, noise, weights, means, covariances)
    if used is not None:
        moments = used.masked(moments)
    floor = None if regularizer is None else regularizer.component_floor
    return moments if floor is None else floored(moments, floor)


@public
def penalty(natural: Natural | Prepared, regularizer: Regularizer) -> Float[Array, ""]:
    """Log-density of the pseudo-samples of a `Regularizer`, which EM adds to the sum of log-densities.

    Args:
        natural: the model.
        regularizer: the pseudo-statistics, in the latent basis of the model.

    Returns:
        The penalty () in nats.

    Example:
        >>> from flax_hmog import PseudoCounts
        >>> from flax_hmog.toy import moments, natural
        >>> penalty(natural, PseudoCounts().regularizer(moments)).shape
        ()
    """
    model = with_prior(check_natural(natural))
    if isinstance(natural, Prepared):
        return _penalty(model, natural.prior_means, natural.prior_log_det, regularizer)
    covariances, log_det = inverse_and_log_det(model.prior.precision.entries)
    return _penalty(model, einsum("kij,kj->ki", covariances, model.prior.location), log_det, regularizer)


def _penalty(
    natural: Natural, means: Array, log_det: Array, regularizer: Regularizer, used: InUse | None = None
) -> Array:
    """`penalty` of a model whose prior has these means (K, L) and log|P_k| (K,)."""
    r, precision = regularizer, natural.observable_precision
    obs_dim, log_weights = natural.interaction.shape[0], natural.prior.log_weights
    lat_dim = natural.interaction.shape[1] if used is None else used.n_factors
    gap = means - r.component_mean[None]
    share = 1.0 if r.mean_share is None else r.mean_share
    spread = r.component_covariance.entries[None] + share * outer(gap, gap)
    if used is not None:
        spread = jnp.where(outer(used.factors, used.factors)[None], spread, 0)
    log_2pi = math.log(2 * math.pi)
    # E[log N(y; m, S)] = -1/2 (L log 2 pi + log|S| + tr S^-1 E[(y - m)(y - m)'])
    component = lat_dim * log_2pi - log_det + jnp.sum(natural.prior.precision.entries * spread, axis=(-1, -2))
    noise = obs_dim * log_2pi - precision.log_det() + trace_product(precision, r.noise_covariance)
    if natural.frame is not None:
        noise = noise + 2 * natural.frame.log_volume
    if used is not None:
        component, log_weights = (jnp.where(used.components, term, 0) for term in (component, log_weights))
    weights = r.weights * jnp.sum(log_weights)
    if r.shrinkage is not None:
        divergence = common_covariances(natural.prior.precision.entries, log_det, used)[1]
        weights = weights - r.shrinkage * jnp.sum(divergence) / 2
    return weights - (r.components * jnp.sum(component) + r.noise * noise) / 2


@jit
def whiten_moments(moments: Moments) -> Moments:
    """The same p(x) in the latent basis H^-1 (y - E[y]), H H' = Cov(y), in which y has mean 0 and covariance I."""
    center, factor = whitening(moments)
    means, covariances = _change_basis(center, factor, moments.means, moments.covariances)
    return dataclasses.replace(
        moments,
        loadings=matmul(moments.loadings, factor),
        bias=moments.bias + matmul(moments.loadings, center),
        means=means,
        covariances=covariances,
    )


@jit
def whiten_regularizer(regularizer: Regularizer, moments: Moments) -> Regularizer:
    """The same penalty, up to a constant, in the latent basis to which `whiten_moments` carries `moments`."""
    mean, covariance = regularizer.component_mean[None], regularizer.component_covariance.entries[None]
    mean, spread = _change_basis(*whitening(moments), mean, PositiveDefinite(covariance))
    return dataclasses.replace(
        regularizer, component_mean=mean[0], component_covariance=PositiveDefinite(spread.entries[0])
    )


def whitening(moments: Moments) -> tuple[Array, Array]:
    """E[y] (L,) and the lower factor H (L, L) of Cov(y)."""
    center, covariance = prior_moments(moments)
    return center, covariance.cholesky().entries


def _change_basis(
    center: Array, factor: Array, means: Array, covariances: PositiveDefinite
) -> tuple[Array, PositiveDefinite]:
    """Means (K, L) and covariances of H^-1 (y - center)."""
    inverse = inverse_lower(factor)
    spread = matmul(matmul(inverse[None], covariances.entries), inverse.T[None])
    return matmul(means - center[None], inverse.T), PositiveDefinite(symmetrize(spread))


@jit
def em_info(
    factors: Prepared, statistics: Sums | Densities, regularizer: Regularizer | None, frame: Frame | None,
    used: InUse | None = None,
) -> EMInfo:  # fmt: skip
    """Diagnostics of a model in this frame, whose pass over the data gave these statistics."""
    natural = factors.natural
    objective = value = log_likelihood(factors, statistics)
    if regularizer is not None:
        objective = value + _penalty(natural, factors.prior_means, factors.prior_log_det, regularizer, used)
    noise = natural.observable_precision.inverse().diagonal()
    if frame is not None:
        noise = noise * frame.unit**2
    precision = natural.prior.precision.diagonal()
    precision = precision if used is None else jnp.where(used.factors[None], precision, 0)
    return EMInfo(
        log_likelihood=value / statistics.count,
        objective=objective / statistics.count,
        occupancy=statistics.responsibilities,
        smallest_noise=jnp.min(noise),
        smallest_latent_variance=1 / jnp.max(precision),
    )
