"""Online EM over data: a step after every batch, for data that are large or read from a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.data.rows import Shards, row_shards
from flax_hmog.data.sources import Source
from flax_hmog.em.begin import MAX_DISTANCE, evaluate, first_model, source_of, use_robust_frame, warn_of_wild_rows
from flax_hmog.em.fit import EMResult, ProgressBar, in_whitened_basis, result_in_units_of_x
from flax_hmog.em.statistics import accumulate, log_likelihood, residual_mean
from flax_hmog.em.step import PseudoCounts, Regularizer, maximize, penalty
from flax_hmog.em.stepwise import mix
from flax_hmog.model.checks import check_size
from flax_hmog.model.conversions import moments_to_natural, own_moments
from flax_hmog.model.coordinates import Moments, ResidualMoments
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import Array, pytree
from flax_hmog.model.prepared import factorise


@pytree
class OnlineState:
    """A model and the running statistics that it maximises, taken about its own W and b.

    Attributes:
        moments: the model.
        running: average statistics of (x - b - W y, y, z), old samples forgotten at the rate of the steps.
        average: the mean of `running` over the last steps.
    """

    moments: Moments
    running: ResidualMoments
    average: ResidualMoments


def fit_online_em(
    head: Any,
    data: Any,
    key: Array,
    *,
    batch_size: int = 512,
    passes: int = 3,
    step_delay: float = 2.0,
    step_decay: float = 0.75,
    average: bool = False,
    weights: Any = None,
    labels: Any = None,
    init: str | Moments | Any = "pca",
    regularizer: PseudoCounts | Regularizer | None = PseudoCounts(),  # noqa: B008
    column_units: str = "auto",
    max_distance: float = MAX_DISTANCE,
    progress: bool = False,
) -> EMResult:
    """Fit a HMoG by online (stepwise) EM: an M-step after every batch.

    Step t takes the batch's statistics with the rate (t + step_delay) ** -step_decay into the running ones; E-step and
    M-step are those of `fit_em`. The objective need not rise at every step.

    Args:
        head: unbound head with full component matrices (`AnalyticHMoG`); dimensions, `obs_rep` and `param_dtype` count.
        data: as in `fit_em`. A collection of batches is taken as it comes, other rows in an order drawn for each pass.
        key: PRNG key of the initialisation and of the order.
        batch_size: samples per step, where the data are no batches.
        passes: passes over the data.
        step_delay: delay of the rate, at least 1.
        step_decay: exponent of the rate, in (0.5, 1] for convergence.
        average: average the statistics over the last pass; for small batches or a slow decay.
        weights: as in `fit_em`.
        labels: as in `fit_em`.
        init: as in `fit_em`.
        regularizer: as in `fit_em`; its counts are relative to the samples of one pass (over a collection of batches,
            in the first pass, to those seen so far).
        column_units: as in `fit_em`.
        max_distance: as in `fit_em`.
        progress: show a progress bar.

    Returns:
        `EMResult`. `objective_history` (passes + 1,) holds for each pass the objective averaged over its batches, each
        before the step it serves for, and at the end that of the returned model on all data; `converged` is False.

    Raises:
        TypeError: for a head with restricted component matrices (see `warm_start`), or data that cannot be read twice.
        ValueError: for unusable data or arguments, or if the objective stops being finite.

    Source: Cappe and Moulines 2009; averaging: Polyak and Juditsky 1992.
    """
    caller = "fit_online_em"
    check_size(caller, "batch_size", batch_size)
    check_size(caller, "passes", passes)
    rate = _rate(step_delay, step_decay)
    source = source_of(caller, head, data, key, weights, labels, init, regularizer)
    init_key, order_key = jax.random.split(key)
    frame = use_robust_frame(caller, head, source, column_units, max_distance)
    natural, strength = first_model(caller, head, source, init_key, init, regularizer, frame)
    moments = own_moments(natural)
    state = OnlineState(moments, ResidualMoments.of(moments), ResidualMoments.of(moments))
    with ProgressBar("online EM", progress, passes + 1) as report:
        step = partial(_step, regularizer=strength, frame=source.framing.frame, projection_dtype=head.projection_dtype)
        state, history, total = _passes(state, source, batch_size, passes, rate, order_key, step, report)
        if average:
            moments = maximize(state.moments.loadings, state.moments.bias, state.average, total, strength)
        else:
            moments = state.moments
        _check_objective(moments.means, passes)
        natural = dataclasses.replace(moments_to_natural(moments), frame=frame)
        at = evaluate(source.blocks(), source, natural, strength, head.projection_dtype)
        history.append(at.objective)
        report(passes, 1, history[-1])
    warn_of_wild_rows(caller, source, max_distance)
    natural, info, whitened = in_whitened_basis(natural, at.info, strength, head.projection_dtype)
    final = np.asarray(history[-1:])
    return result_in_units_of_x(EMResult(natural, np.asarray(history), False, info, final, whitened, source.classes))


def _rate(delay: float, decay: float) -> Callable[[int], float]:
    """The rate of a step from its number."""
    if not delay >= 1 or not 0.5 < decay <= 1:
        raise ValueError(
            f"fit_online_em: `step_delay` must be at least 1 and `step_decay` in (0.5, 1]; got {delay!r} and "
            f"{decay!r}. Use 2.0 and 0.75."
        )
    return lambda step: (step + delay) ** -decay


def _passes(
    state: OnlineState,
    source: Source,
    batch_size: int,
    passes: int,
    rate: Callable[[int], float],
    key: Array,
    step_of: Callable,
    report: Callable,
) -> tuple[OnlineState, list[float], float]:
    """All passes: the last state, the mean objective of each pass and the samples of a pass."""
    total, steps, history = source.total_weight, 0, []
    batch_size = min(batch_size, source.count or batch_size)
    for number in range(passes):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, number), source.count or 0))
        values, seen = [], 0.0
        for step, (x, weights, labels) in enumerate(source.batches(order, batch_size)):
            seen += float(jnp.sum(weights))
            total = max(total, seen)  # grows in the first pass over a stream only
            mean_weight = 1 if source.count is None else total / source.count
            rates = rate(steps + step) / (x.shape[0] * mean_weight), 1 / (step + 1)
            state, value = step_of(state, x, weights, labels, rates, total, shards=row_shards(x))
            values.append(value)
        steps += len(values)
        sums: Any = np.sum(np.asarray(jax.device_get(values), np.float64), axis=0)
        history.append(float(sums[0] + sums[1] / total) / seen)
        report(number, 1, history[-1])
        _check_objective(history[-1], number + 1)
    return state, history, total


def _check_objective(value: Any, number: int) -> None:
    if not np.isfinite(np.asarray(value)).all():
        raise ValueError(
            f"fit_online_em: `regularizer` must keep the likelihood bounded on these data; got a model or an objective "
            f"that is not finite in pass {number}. Use PseudoCounts() or raise its counts."
        )


@partial(jax.jit, static_argnames=("shards", "projection_dtype"))
def _step(
    state: OnlineState,
    x: Array,
    weights: Array,
    labels: Array | None,
    rates: tuple[float, float],
    total: Array | float,
    *,
    regularizer: Regularizer | None,
    frame: Frame,
    shards: Shards,
    projection_dtype: str | None,
) -> tuple[OnlineState, Array]:
    """The state after a batch; and before it the batch's log-likelihood, and the penalty times its samples (2,).

    Args:
        state: the state.
        x: rows (B, D).
        weights: their weights (B,).
        labels: their known components or None.
        rates: of the running statistics per sample of the batch, and of their average.
        total: number of samples of one pass, to which the regulariser is relative.
        regularizer: pseudo-statistics or None.
        frame: what turns x into the rows of the model.
        shards: where the rows lie.
        projection_dtype: as in a head.
    """
    old = state.moments
    natural = dataclasses.replace(moments_to_natural(old), frame=frame)
    factors = factorise(dataclasses.replace(natural, projection_dtype=projection_dtype))
    statistics = accumulate(factors, x, weights, labels, shards=shards)
    value = log_likelihood(factors, statistics)
    penalties = jnp.zeros_like(value) if regularizer is None else penalty(natural, regularizer) * statistics.count
    rate = jnp.minimum(rates[0] * statistics.count, 1)
    # a batch of weight 0 has sums of 0 and a rate of 0
    batch = residual_mean(
        factors, dataclasses.replace(statistics, count=jnp.where(statistics.count > 0, statistics.count, 1))
    )
    running = mix(state.running, batch, rate)
    average = mix(state.average, running, rates[1])
    moments = maximize(old.loadings, old.bias, running, total, regularizer)
    move = {"turn": moments.loadings - old.loadings, "shift": moments.bias - old.bias}
    return OnlineState(moments, running.about(**move), average.about(**move)), jnp.stack([value, penalties])
