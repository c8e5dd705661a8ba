"""Online EM: a step after every batch, over large or streamed data (`fit_online_em`) and inside a network.

Both take the same step, `online_step`: statistics about the model are mixed with those of the batch, and moved to the
model that maximises them. They differ in what regularises them: a fit knows the scale of its data beforehand, a network
that learns its features does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flax_hmog.data.rows import as_rows, check_given, check_samples
from flax_hmog.data.shards import Shards, on_auto_axes, reshaped, row_shards, together
from flax_hmog.em.fit import Fit
from flax_hmog.em.initialize import random_moments
from flax_hmog.em.options import EMOptions, Regularizer, chosen_options
from flax_hmog.em.progress import progress_bar
from flax_hmog.em.result import EMResult
from flax_hmog.em.shrinkage import common_of
from flax_hmog.em.statistics import accumulate, log_likelihood, residual_mean
from flax_hmog.em.step import maximize, penalty
from flax_hmog.model.checks import public
from flax_hmog.model.conversions import moments_to_natural, own_moments
from flax_hmog.model.coordinates import Moments, ResidualMoments, prior_moments, within_covariance
from flax_hmog.model.frames import Frame
from flax_hmog.model.head import HeadSizes
from flax_hmog.model.kinds import Array, Rep, matmul, pytree
from flax_hmog.model.prepared import prepare
from flax_hmog.model.typed import Block, Data, Samples, jit

NOISE_SHARE = 0.1  # of the mean variance of x, which a pseudo-sample of the noise has inside a network
JUMP = 1e3  # standard deviations of the model that a batch lies away or is wider by, or narrower
LEAST_VARIANCE = 1e-6  # of a column of the first batch, relative to the average column


@pytree
class OnlineState:
    """A model and the running statistics that it maximises, taken about its own W and b.

    Attributes:
        moments: the model.
        running: average statistics, old samples forgotten at the rate of the steps.
        average: the mean of `running` over the last steps, or None.
    """

    moments: Moments
    running: ResidualMoments
    average: ResidualMoments | None = None


def online_step(
    state: OnlineState,
    batch: ResidualMoments,
    rate: Array | float,
    count: Array | float,
    regularizer: Regularizer | None,
    *,
    average_rate: Array | float = 0.0,
) -> OnlineState:
    """One step of online EM: running statistics (1 - rate) old + rate batch, and the model that maximises them.

    Args:
        state: the model and its statistics.
        batch: average statistics of a batch about the model.
        rate: step size ().
        count: number of samples that the statistics stand for beside the pseudo-samples.
        regularizer: pseudo-statistics or None.
        average_rate: step size of `state.average`.

    Returns:
        The new state, its statistics about the new model.

    Source: Cappe and Moulines 2009.
    """
    old = state.moments
    running = mix(state.running, batch, rate)
    average = None if state.average is None else mix(state.average, running, average_rate)
    new = maximize(old.loadings, old.bias, running, count, regularizer, common_target(old, regularizer))
    move = {"turn": new.loadings - old.loadings, "shift": new.bias - old.bias}
    return OnlineState(new, running.about(**move), None if average is None else average.about(**move))


def common_target(moments: Moments, regularizer: Regularizer | None) -> Array | None:
    """The covariances that the components of a model shrink to (K, L, L), where they do."""
    return None if regularizer is None or regularizer.shrinkage is None else common_of(moments)


def mix(old: ResidualMoments, new: ResidualMoments, rate: Array | float) -> ResidualMoments:
    """(1 - rate) old + rate new."""
    return cast(ResidualMoments, jax.tree.map(lambda a, b: (1 - rate) * a + rate * b, old, new))


@public
@on_auto_axes
def fit_online_em(
    head: HeadSizes,
    data: Data,
    key: Array,
    *,
    weights: Samples | None = None,
    labels: Samples | None = None,
    options: EMOptions = EMOptions(),
    progress: bool = False,
    missing: str = "refuse",
    **changes: object,
) -> EMResult:
    """Fit a HMoG by online (stepwise) EM: an M-step after every batch.

    Step t takes the batch's statistics with the rate max(min_rate, (t + step_delay) ** -step_decay) into the running
    ones; E-step and M-step are those of `fit_em`. The objective need not rise at every step.

    Args:
        head: unbound head with full component matrices (`AnalyticHMoG`); dimensions, `obs_rep` and `param_dtype` count.
        data: as in `fit_em`. A collection of batches is taken as it comes, other rows in an order drawn for each pass.
        key: PRNG key of the initialisation and of the order.
        weights: as in `fit_em`.
        labels: as in `fit_em`.
        options: start, regulariser, batches, rates and units: see `EMOptions`. The counts of the regulariser are
            relative to the samples of one pass (over a collection of batches, in the first pass, to those seen so far).
        progress: show a progress bar.
        missing: as in `fit_em`.
        changes: single options by name, in place of those of `options`: init, regularizer, batch_size, passes, average,
            step_delay, step_decay, min_rate, column_units, max_distance.

    Returns:
        `EMResult`. `objective_history` (passes + 1,) holds for each pass the objective averaged over its batches, each
        before the step it serves for, and at the end that of the returned model on all data; `converged` is False.

    Raises:
        TypeError: for a head with restricted component matrices (see `warm_start`), data that cannot be read twice, or
            an option that is not of this function.
        ValueError: for unusable data or arguments, or if the objective stops being finite.

    Source: Cappe and Moulines 2009; averaging: Polyak and Juditsky 1992.

    Example:
        >>> from flax_hmog.toy import head, natural, x
        >>> fit_online_em(head, x, jax.random.key(0), batch_size=12, passes=1, init=natural).objective_history.shape
        (2,)
    """
    options = chosen_options("fit_online_em", options, changes)
    if not options.step_decay > 0.5:
        raise ValueError(
            f"fit_online_em: `step_decay` must be above 0.5, for steps to converge; got {options.step_decay!r}. Use "
            f"{EMOptions.step_decay}."
        )
    fit = Fit(head, data, key, weights, labels, options)
    init_key, order_key = jax.random.split(key)
    natural, regularizer = fit.start(init_key)
    moments = own_moments(natural)
    statistics = ResidualMoments.of(moments)
    with progress_bar("online EM", progress, options.passes + 1) as report:
        state = OnlineState(moments, statistics, statistics)
        state, history, total = _passes(fit, state, regularizer, order_key, report)
        moments = state.moments
        if options.average:
            average: Any = state.average
            common = common_target(moments, regularizer)
            moments = maximize(moments.loadings, moments.bias, average, total, regularizer, common)
        _check_objective(moments.means, options.passes)
        natural = moments_to_natural(moments).in_frame(fit.frame)
        _, info, objective = fit.evaluate(natural, regularizer)
        history.append(objective)
        report(options.passes, 1, history[-1])
    return fit.finished(fit.result(natural, info, objective, regularizer, history, converged=False))


def _passes(
    fit: Fit, state: OnlineState, regularizer: Regularizer | None, key: Array, report: Callable[..., None]
) -> tuple[OnlineState, list[float], float]:
    """All passes: the last state, the mean objective of each pass and the samples of a pass."""
    source, options = fit.source, fit.options
    total, steps, history = source.total_weight, 0, []
    batch_size = min(options.batch_size, source.count or options.batch_size)
    for number in range(options.passes):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, number), source.count or 0))
        values, seen = [], 0.0
        for step, block in enumerate(source.batches(order, batch_size)):
            x, weights, _ = block
            seen += float(jnp.sum(weights))
            total = max(total, seen)  # grows in the first pass over a stream only
            mean_weight = 1 if source.count is None else total / source.count
            rates = options.rate(steps + step) / (x.shape[0] * mean_weight), 1 / (step + 1)
            given: Any = {"shards": row_shards(x), "projection_dtype": fit.dtype, "missing": fit.missing}
            state, value = one_batch(state, block, rates, total, regularizer, source.framing.frame, **given)
            values.append(value)
        steps += len(values)
        sums: Any = np.sum(np.asarray(jax.device_get(values), np.float64), axis=0)
        history.append(float(sums[0] + sums[1] / total) / seen)
        report(number, 1, history[-1])
        _check_objective(history[-1], number + 1)
    return state, history, total


def _check_objective(value: ArrayLike, number: int) -> None:
    if not np.isfinite(np.asarray(value)).all():
        raise ValueError(
            f"fit_online_em: `regularizer` must keep the likelihood bounded on these data; got a model or an objective "
            f"that is not finite in pass {number}. Use PseudoCounts() or raise its counts."
        )


@jit(static_argnames=("shards", "projection_dtype", "missing"))
def one_batch(
    state: OnlineState, block: Block, rates: tuple[float, float], total: Array | float, regularizer: Regularizer | None,
    frame: Frame, *, shards: Shards, projection_dtype: str | None, missing: bool,
) -> tuple[OnlineState, Array]:  # fmt: skip
    """The state after a batch; and before it the batch's log-likelihood, and the penalty times its samples (2,).

    Rates are those of the running statistics per sample of the batch, and of their average; `total` is the number of
    samples that the regulariser is relative to.
    """
    x, weights, labels = block
    factors = prepare(moments_to_natural(state.moments).in_frame(frame), projection_dtype)
    statistics = accumulate(factors, x, weights, labels, shards=shards, missing=missing)
    value = log_likelihood(factors, statistics)
    penalties = jnp.zeros_like(value) if regularizer is None else penalty(factors, regularizer) * statistics.count
    rate = jnp.minimum(rates[0] * statistics.count, 1)
    # a batch of weight 0 has sums of 0 and a rate of 0
    batch = residual_mean(
        factors, dataclasses.replace(statistics, count=jnp.where(statistics.count > 0, statistics.count, 1))
    )
    state = online_step(state, batch, rate, total, regularizer, average_rate=rates[1])
    return state, jnp.stack([value, penalties])


def stepwise_start(moments: Moments) -> dict[str, Any]:
    """The collection `em` of `AnalyticHMoG` for a model: itself, its own statistics, and no step taken."""
    return {"model": moments, "running": ResidualMoments.of(moments), "step": jnp.zeros((), jnp.int32)}


def first_moments(
    key: Array, x: Array | None, obs_dim: int, lat_dim: int, n_components: int, obs_rep: Rep, dtype: DTypeLike
) -> Moments:
    """A model to start stepwise EM from: random, with the mean and the variances of a first batch.

    Without a batch x (..., D), or with a single sample, it has mean 0 and variances 1.
    """
    moments = random_moments(key, obs_dim, lat_dim, n_components, obs_rep, dtype)
    if x is None or math.prod(jnp.shape(x)[:-1]) < 2:
        return moments
    x = as_rows(check_given(x, obs_dim), dtype, keeps_axes=True)
    moments, x, _ = together(moments, x)
    rows = reshaped(jax.lax.stop_gradient(x), (-1, obs_dim))
    center = jnp.mean(rows, axis=0)
    variances = jnp.mean(jnp.square(rows - center[None]), axis=0)
    average = jnp.mean(variances)
    variances = jnp.where(average > 0, jnp.maximum(variances, LEAST_VARIANCE * average), 1)
    return dataclasses.replace(
        moments,
        loadings=moments.loadings * jnp.sqrt(variances)[:, None],
        bias=center,
        noise=obs_rep.from_diagonal(variances),
    )


def stepwise_update(
    moments: Moments, running: ResidualMoments, x: Array, rate: Array, pseudo_share: float, axis_name: str | None = None
) -> tuple[Moments, ResidualMoments]:
    """`online_step` inside a network, with pseudo-samples that follow the model.

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
    """
    natural, x, weights = check_samples(moments_to_natural(moments), jax.lax.stop_gradient(x), None)
    factors = prepare(natural)
    statistics = accumulate(factors, x, weights, shards=row_shards(x))
    if axis_name is not None:
        statistics = jax.lax.psum(statistics, axis_name)
    rate, pseudo_samples = jnp.asarray(rate, x.dtype), _pseudo_samples(moments, pseudo_share)
    batch = residual_mean(factors, statistics)
    state = online_step(OnlineState(moments, running), batch, rate, 1.0, pseudo_samples)
    return state.moments, state.running


def accepted_update(em: dict[str, Any], x: Array, options: EMOptions, axis_name: str | None = None) -> dict[str, Any]:
    """The collection `em` after a batch, of which the model exists in any case.

    Where the batch lies farther from the model than `JUMP` of its standard deviations, or is narrower by as much, and
    where the statistics make no model, the model is moved to location and scale of the batch instead of a step, so that
    it goes on learning from there. A batch that makes no model either way leaves everything as it is.

    Args:
        em: the collection, as of `stepwise_start`.
        x: the batch (..., D).
        options: rates and `pseudo_share`.
        axis_name: as in `stepwise_update`.

    Returns:
        The new collection.
    """
    moments, step = em["model"], em["step"] + 1
    learnt = stepwise_update(moments, em["running"], x, options.rate(em["step"]), options.pseudo_share, axis_name)
    moved, is_jump = _moved_to(moments, x, axis_name)
    states = [dict(zip(em, (*state, step), strict=True)) for state in (learnt, (moved, ResidualMoments.of(moved)))]
    can_learn, can_move = (_exists(state) for state in states)
    use_moved = can_move & (is_jump | ~can_learn)
    chosen = lambda old, learnt, moved: jnp.where(use_moved, moved, jnp.where(can_learn, learnt, old))  # noqa: E731
    return cast(dict[str, Any], jax.tree.map(chosen, em, *states))


def _exists(em: dict[str, Any]) -> Array:
    """True if all is finite and the model exists ()."""
    natural = moments_to_natural(em["model"])
    # Cholesky factors of what is not positive definite are NaN
    precisions = (natural.observable_precision, natural.prior.precision)
    signs = (natural.prior.log_weights, *(precision.log_det() for precision in precisions))
    leaves = (*jax.tree.leaves(em), *jax.tree.leaves(natural), *signs)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _moved_to(moments: Moments, x: Array, axis_name: str | None) -> tuple[Moments, Array]:
    """The model with mean and variances of a batch, NaN if it is not finite or does not vary; whether it is far ()."""
    rows = reshaped(jax.lax.stop_gradient(x), (-1, x.shape[-1])).astype(moments.bias.dtype)
    average: Callable[[Array], Array] = lambda values: values if axis_name is None else jax.lax.pmean(values, axis_name)  # noqa: E731
    unit = average(jnp.max(jnp.abs(rows)))  # so that no square overflows
    rows = rows / unit
    center = average(jnp.mean(rows, axis=0))
    variances = average(jnp.mean(jnp.square(rows - center[None]), axis=0))
    variances = jnp.maximum(variances, LEAST_VARIANCE * jnp.mean(variances))
    present = jnp.sqrt(_variances(moments))
    ratio = unit * jnp.sqrt(jnp.where(variances > 0, variances, jnp.nan)) / present
    model_center = moments.bias + matmul(moments.loadings, matmul(moments.weights, moments.means))
    distance = jnp.abs(unit * center - model_center) / present
    is_jump = (jnp.max(distance) > JUMP) | (jnp.max(ratio) > JUMP) | (jnp.max(ratio) < 1 / JUMP)
    if moments.noise.is_isotropic:
        ratio = jnp.broadcast_to(jnp.sqrt(jnp.mean(ratio**2)), ratio.shape)
    moved = dataclasses.replace(
        moments,
        loadings=moments.loadings * ratio[:, None],
        bias=unit * center - ratio * matmul(moments.loadings, matmul(moments.weights, moments.means)),
        noise=moments.noise.scaled(ratio),
    )
    return moved, is_jump


def _pseudo_samples(moments: Moments, share: float) -> Regularizer:
    """Pseudo-samples that follow the model: the scale of features that are being learnt is not known beforehand."""
    variance = jnp.mean(_variances(moments))
    strength = jnp.asarray(share, variance.dtype)
    return Regularizer(
        weights=strength / moments.weights.shape[0],
        components=strength / moments.weights.shape[0],
        noise=strength,
        component_mean=prior_moments(moments)[0],
        component_covariance=within_covariance(moments),
        noise_covariance=moments.noise.from_diagonal(jnp.broadcast_to(NOISE_SHARE * variance, moments.bias.shape)),
    )


def _variances(moments: Moments) -> Array:
    """Variances of the columns of x (D,)."""
    _, covariance = prior_moments(moments)
    signal = jnp.sum(moments.loadings * matmul(moments.loadings, covariance.entries), axis=-1)
    return cast(Array, signal + moments.noise.diagonal())
