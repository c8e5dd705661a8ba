"""Stepwise EM: a model that learns from one batch after another, and the statistics that it carries along.

Running statistics are taken about the model that they belong to, of (x - b - W y, y, z), and moved to every next model
exactly. Sums of squares about the origin would lose all accuracy for features whose mean is far above their spread.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_hmog.data.rows import row_shards
from flax_hmog.data.samples import check_observations, check_samples
from flax_hmog.em.initialize import random_moments
from flax_hmog.em.statistics import accumulate, residual_mean
from flax_hmog.em.step import Regularizer, compute_factors, maximize, prior_moments, within_covariance
from flax_hmog.model.conversions import moments_to_natural
from flax_hmog.model.coordinates import Moments, ResidualMoments
from flax_hmog.model.kinds import Array, Rep, Scale, matmul

NOISE_SHARE = 0.1  # of the mean variance of x, which a pseudo-sample of the noise has
JUMP = 1e3  # standard deviations of the model that a batch lies away or is wider by, or narrower
LEAST_VARIANCE = 1e-6  # of a column of the first batch, relative to the average column


def stepwise_start(moments: Moments) -> dict[str, Any]:
    """The collection `em` of `AnalyticHMoG` for a model: itself, its own statistics, and no step taken.

    Args:
        moments: the model, as `natural_to_moments(fit_em(...).natural)`.

    Returns:
        `moments`, `running` (its average statistics of (x - b - W y, y, z)) and `step`.
    """
    return {"moments": moments, "running": ResidualMoments.of(moments), "step": jnp.zeros((), jnp.int32)}


def first_moments(
    key: Array, x: Array | None, obs_dim: int, lat_dim: int, n_components: int, obs_rep: Rep, dtype: Any
) -> Moments:
    """A model to start stepwise EM from: random, with the mean and the variances of a first batch.

    Args:
        key: PRNG key.
        x: the batch (..., D); None, or a single sample, leaves mean 0 and variances 1.
        obs_dim: D.
        lat_dim: L.
        n_components: K.
        obs_rep: kind of the noise.
        dtype: of the model.

    Returns:
        `Moments`.
    """
    moments = random_moments(key, obs_dim, lat_dim, n_components, obs_rep, dtype)
    if x is None or math.prod(jnp.shape(x)[:-1]) < 2:
        return moments
    x = check_observations("AnalyticHMoG", x, obs_dim, dtype)
    rows = jax.lax.stop_gradient(x).reshape(-1, obs_dim)
    center = jnp.mean(rows, axis=0)
    variances = jnp.mean(jnp.square(rows - center[None]), axis=0)
    average = jnp.mean(variances)
    variances = jnp.where(average > 0, jnp.maximum(variances, LEAST_VARIANCE * average), 1)
    return dataclasses.replace(
        moments,
        loadings=moments.loadings * jnp.sqrt(variances)[:, None],
        bias=center,
        noise=obs_rep.project(jnp.diag(variances)),
    )


def stepwise_update(
    moments: Moments, running: ResidualMoments, x: Array, rate: Array, pseudo_share: float, axis_name: str | None = None
) -> tuple[Moments, ResidualMoments]:
    """One step of stepwise EM: running statistics (1 - rate) old + rate batch, and the model that maximises them.

    Args:
        moments: the model.
        running: its average statistics of (x - b - W y, y, z).
        x: the batch (..., D); no gradient flows through it.
        rate: step size ().
        pseudo_share: pseudo-samples per sample: spread over the components, with the mean of the whole prior and the
            pooled within-component covariance; of the noise, with a tenth of the mean variance of x in every column.
        axis_name: axis of `shard_map` or `vmap` over which the batch is spread, or None.

    Returns:
        The new model and its running statistics.

    Source: Cappe and Moulines 2009.
    """
    natural, x, weights = check_samples("stepwise_update", moments_to_natural(moments), jax.lax.stop_gradient(x), None)
    factors = compute_factors(natural)
    statistics = accumulate(factors, x, weights, shards=row_shards(x))
    if axis_name is not None:
        statistics = jax.lax.psum(statistics, axis_name)
    mixed = mix(running, residual_mean(factors, statistics), jnp.asarray(rate, x.dtype))
    new = maximize(moments.loadings, moments.bias, mixed, 1.0, _pseudo_samples(moments, pseudo_share))
    return new, mixed.about(turn=new.loadings - moments.loadings, shift=new.bias - moments.bias)


def accepted_update(
    em: dict[str, Any], x: Array, rate: Array, pseudo_share: float, axis_name: str | None = None
) -> dict[str, Any]:
    """The collection `em` after a batch, of which the model exists in any case.

    Where the batch lies farther from the model than `JUMP` of its standard deviations, or is narrower by as much, and
    where the statistics make no model, the model is moved to location and scale of the batch instead of a step, so that
    it goes on learning from there. A batch that makes no model either way leaves everything as it is.

    Args:
        em: the collection, as of `stepwise_start`.
        x: the batch (..., D).
        rate: step size ().
        pseudo_share: as in `stepwise_update`.
        axis_name: as in `stepwise_update`.

    Returns:
        The new collection.
    """
    moments, step = em["moments"], em["step"] + 1
    learnt = stepwise_update(moments, em["running"], x, rate, pseudo_share, axis_name)
    moved, is_jump = _moved_to(moments, x, axis_name)
    states = [dict(zip(em, (*state, step), strict=True)) for state in (learnt, (moved, ResidualMoments.of(moved)))]
    can_learn, can_move = (_exists(state) for state in states)
    use_moved = can_move & (is_jump | ~can_learn)
    return jax.tree.map(
        lambda old, learnt, moved: jnp.where(use_moved, moved, jnp.where(can_learn, learnt, old)), em, *states
    )


def _exists(em: dict[str, Any]) -> Array:
    """Whether all is finite and the model exists ()."""
    natural = moments_to_natural(em["moments"])
    # Cholesky factors of what is not positive definite are NaN
    obs_dim = em["moments"].bias.shape[0]
    precisions = (natural.observable_precision, natural.prior_precision)
    signs = (natural.log_weights, *(precision.log_det(obs_dim) for precision in precisions))
    leaves = (*jax.tree.leaves(em), *jax.tree.leaves(natural), *signs)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _moved_to(moments: Moments, x: Array, axis_name: str | None) -> tuple[Moments, Array]:
    """The model with mean and variances of a batch, NaN if it is not finite or does not vary; whether it is far ()."""
    rows = jax.lax.stop_gradient(x).reshape(-1, x.shape[-1]).astype(moments.bias.dtype)
    average = lambda values: values if axis_name is None else jax.lax.pmean(values, axis_name)  # noqa: E731
    unit = average(jnp.max(jnp.abs(rows)))  # so that no square overflows
    rows = rows / unit
    center = average(jnp.mean(rows, axis=0))
    variances = average(jnp.mean(jnp.square(rows - center[None]), axis=0))
    variances = jnp.maximum(variances, LEAST_VARIANCE * jnp.mean(variances))
    _, covariance = prior_moments(moments)
    signal = jnp.sum(moments.loadings * matmul(moments.loadings, covariance.entries), axis=-1)
    present = jnp.sqrt(signal + moments.noise.diagonal(moments.bias.shape[0]))
    ratio = unit * jnp.sqrt(jnp.where(variances > 0, variances, jnp.nan)) / present
    model_center = moments.bias + matmul(moments.loadings, matmul(moments.weights, moments.means))
    distance = jnp.abs(unit * center - model_center) / present
    is_jump = (jnp.max(distance) > JUMP) | (jnp.max(ratio) > JUMP) | (jnp.max(ratio) < 1 / JUMP)
    if isinstance(moments.noise, Scale):
        ratio = jnp.broadcast_to(jnp.sqrt(jnp.mean(ratio**2)), ratio.shape)
    moved = dataclasses.replace(
        moments,
        loadings=moments.loadings * ratio[:, None],
        bias=unit * center - ratio * matmul(moments.loadings, matmul(moments.weights, moments.means)),
        noise=moments.noise.scaled(ratio),
    )
    return moved, is_jump


def mix(old: ResidualMoments, new: ResidualMoments, rate: Array | float) -> ResidualMoments:
    """(1 - rate) old + rate new."""
    return jax.tree.map(lambda a, b: (1 - rate) * a + rate * b, old, new)


def _pseudo_samples(moments: Moments, share: float) -> Regularizer:
    """Pseudo-samples that follow the model: the scale of features that are being learnt is not known beforehand."""
    obs_dim, _ = moments.loadings.shape
    count = moments.weights.shape[0]
    center, covariance = prior_moments(moments)
    signal = jnp.sum(moments.loadings * matmul(moments.loadings, covariance.entries), axis=-1)
    variance = jnp.mean(signal + moments.noise.diagonal(obs_dim))
    noise = type(moments.noise).project(NOISE_SHARE * variance * jnp.eye(obs_dim, dtype=signal.dtype))
    strength = jnp.asarray(share, signal.dtype)
    return Regularizer(
        weights=strength / count,
        components=strength / count,
        noise=strength,
        component_mean=center,
        component_covariance=within_covariance(moments),
        noise_covariance=noise,
    )
