"""`fit_em`: initialisation, restarts, passes over arrays or streams of batches, convergence, history."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flax_hmog.data.sources import Source
from flax_hmog.em.begin import (
    MAX_DISTANCE,
    evaluate,
    first_model,
    rounding,
    source_of,
    use_robust_frame,
    warn_of_wild_rows,
)
from flax_hmog.em.step import EMInfo, PseudoCounts, Regularizer, next_natural, whiten_moments, whiten_regularizer
from flax_hmog.model.checks import check_size
from flax_hmog.model.conversions import fits_units_of_x, in_units_of_x, moments_to_natural, own_moments
from flax_hmog.model.coordinates import Moments, Natural
from flax_hmog.model.kinds import Array


@dataclasses.dataclass(frozen=True)
class EMResult:
    """What `fit_em` returns.

    Attributes:
        natural: the fitted model, its prior whitened (y has mean 0 and covariance I).
        objective_history: penalised log-likelihood per sample before the first step and after each (steps + 1,), nats.
        converged: whether the last gain was below the tolerance, and no fall beyond rounding.
        info: `EMInfo` of the fitted model.
        restart_objectives: final objective of every start (n_restarts,); the best one is returned.
        regularizer: the pseudo-statistics in the latent basis of `natural`, or None.
        classes: name of component k for k < len(classes), where `labels` were names; None otherwise.
    """

    natural: Natural
    objective_history: np.ndarray
    converged: bool
    info: EMInfo
    restart_objectives: np.ndarray
    regularizer: Regularizer | None
    classes: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class EMState:
    """Where `fit_em` stands between two steps.

    Attributes:
        natural: the model of the present start, in its first latent basis; None before the start's first step.
        top: that of its models so far with the best objective.
        regularizer: its pseudo-statistics.
        history: objectives of the start's models so far.
        finals: final objectives of the starts that have ended.
        best: the best of them, or None.
    """

    natural: Any = None
    top: Any = None
    regularizer: Regularizer | None = None
    history: tuple[float, ...] = ()
    finals: tuple[float, ...] = ()
    best: EMResult | None = None


def fit_em(
    head: Any,
    data: Any,
    key: Array,
    *,
    weights: Any = None,
    labels: Any = None,
    init: str | Moments | Natural = "pca",
    regularizer: PseudoCounts | Regularizer | None = PseudoCounts(),  # noqa: B008
    n_restarts: int = 1,
    max_steps: int = 200,
    tolerance: float = 1e-3,
    column_units: str = "auto",
    max_distance: float = MAX_DISTANCE,
    progress: bool = False,
    state: EMState | None = None,
    on_step: Callable[[EMState], None] | None = None,
) -> EMResult:
    """Fit a HMoG by exact EM.

    Every step takes one pass over the data in blocks; the penalised log-likelihood never decreases (in float32, and
    with a lower `projection_dtype` of the head, up to rounding). Data are converted to `head.param_dtype`.

    Args:
        head: unbound head with full component matrices (`AnalyticHMoG`); dimensions, `obs_rep` and `param_dtype` count.
        data: observations (N, D): an array, sharded or not, or a table; a memory map, an array of h5py or zarr, a scipy
            sparse matrix or an AnnData (its `X`, in memory or backed), of which one block at a time is brought to the
            device; or a collection of batches (B, D) that can be iterated repeatedly. docs/sharp_bits.md has a table.
        key: PRNG key of the initialisation.
        weights: sample weights (N,); not for a collection of batches.
        labels: known components (N,), which clamp responsibilities: integers, -1 where unknown, or names, numbered as
            they sort (`EMResult.classes`). None, NaN, NA and "" are unknown too. Not for a collection of batches.
        init: "pca" or "fa" (see `initialize_moments`), or a model to start from; its prior is whitened first.
        regularizer: strength of pseudo-samples that look like the initial model, or the pseudo-samples themselves (in
            the latent basis of `init`); None for maximum likelihood, whose maximum need not exist.
        n_restarts: starts from different keys, each run to its end; the best objective wins.
        max_steps: steps per start at most.
        tolerance: a gain in nats per sample below which a start has converged.
        column_units: with diagonal noise, whether columns have units of their own ("own": the fit is the same in any
            units) or one for all ("common", as pixels); "auto" takes common ones if most columns share their bounds.
        max_distance: rows farther than this from the median, in typical distances, are left out with a warning; `inf`
            keeps all (docs/sharp_bits.md).
        progress: show a progress bar.
        state: what `on_step` was given: goes on from there, with all other arguments as before, to the same result.
        on_step: called after every step, for example to save its `EMState`.

    Returns:
        `EMResult`.

    Raises:
        TypeError: for a head with restricted component matrices (see `warm_start`), or data that cannot be read twice.
        ValueError: for unusable data or arguments, or if the objective stops being finite.
    """
    caller = "fit_em"
    check_size(caller, "n_restarts", n_restarts)
    check_size(caller, "max_steps", max_steps)
    source = source_of(caller, head, data, key, weights, labels, init, regularizer)
    if not isinstance(init, str) and n_restarts > 1:
        raise ValueError(
            f"{caller}: `n_restarts` must be 1 for a given `init`; got {n_restarts}. All starts would be the same."
        )
    state = EMState() if state is None else state
    keys = jax.random.split(key, n_restarts)
    frame = use_robust_frame(caller, head, source, column_units, max_distance)
    start_at = partial(first_model, caller, head, source, init=init, regularizer=regularizer, frame=frame)
    step = partial(
        _step, source=source, max_steps=max_steps, tolerance=tolerance, projection_dtype=head.projection_dtype
    )
    with ProgressBar("EM", progress, n_restarts * (max_steps + 1)) as report:
        while (start := len(state.finals)) < n_restarts:
            if state.natural is None:
                natural, strength = start_at(keys[start])
                state = dataclasses.replace(state, natural=natural, regularizer=strength)
            state, objective = step(state)
            report(start * (max_steps + 1) + max(len(state.history) - 1, 0), start + 1, objective)
            if on_step is not None:
                on_step(state)
    if state.best is None:
        raise ValueError(f"{caller}: `state` must be one of these starts; got {state.finals}. Give that of this fit.")
    warn_of_wild_rows(caller, source, max_distance)
    warn_of_fall(state.best)
    best = dataclasses.replace(state.best, restart_objectives=np.asarray(state.finals), classes=source.classes)
    return result_in_units_of_x(best)


def _step(
    state: EMState, source: Source, max_steps: int, tolerance: float, projection_dtype: str | None
) -> tuple[EMState, float]:
    """One pass: the next model of the start, or the end of the start; and the objective of the model before."""
    natural, regularizer = state.natural, state.regularizer
    # the penalty refers to the first latent basis, so that whitening waits for the end
    at = evaluate(source.blocks(), source, natural, regularizer, projection_dtype)
    info, objective = at.info, at.objective
    if not math.isfinite(objective):
        raise ValueError(
            f"fit_em: `regularizer` must keep the likelihood bounded on these data; got objective {objective} "
            f"after {len(state.history)} steps. Use PseudoCounts() or raise its counts."
        )
    history = (*state.history, objective)
    top = natural if objective >= max(history) else state.top
    small_gain = len(history) > 1 and history[-1] - history[-2] < tolerance
    if not small_gain and len(history) <= max_steps:
        natural, _ = next_natural(at.factors, at.statistics, regularizer, natural.frame)
        return dataclasses.replace(state, natural=natural, top=top, history=history), objective
    if fell(history, natural, projection_dtype):
        natural, objective = top, max(history)
        info = evaluate(source.blocks(), source, natural, regularizer, projection_dtype).info
    best = state.best
    if best is None or objective > max(state.finals):
        converged = small_gain and not fell(history, natural, projection_dtype)
        natural, info, regularizer = in_whitened_basis(natural, info, regularizer, projection_dtype)
        best = EMResult(natural, np.asarray(history), converged, info, np.asarray([objective]), regularizer)
    return EMState(best=best, finals=(*state.finals, objective)), objective


def fell(history: Sequence[float], natural: Natural, projection_dtype: str | None) -> bool:
    """Whether the last objective is below the best one by more than rounding explains."""
    return max(history) - history[-1] > rounding(history[-1], natural, projection_dtype)


def warn_of_fall(result: EMResult) -> None:
    """`ConvergenceWarning` if EM ended below the best model it saw, which rounding alone does not explain."""
    history = result.objective_history
    if fell(history.tolist(), result.natural, result.natural.projection_dtype):
        warnings.warn(
            f"fit_em: the objective fell from {history.max():.6g} to {history[-1]:.6g} nats per sample after "
            f"{len(history) - 1} steps, beyond rounding; the best model is returned, `converged` is False. Raise the "
            "counts of `regularizer`, or fit in float64.",
            ConvergenceWarning,
            stacklevel=3,
        )


class ConvergenceWarning(UserWarning):
    """EM stopped where its objective fell."""


def in_whitened_basis(
    natural: Natural, info: EMInfo, regularizer: Regularizer | None, projection_dtype: str | None
) -> tuple[Natural, EMInfo, Any]:
    """Model, diagnostics and regulariser in the latent basis in which y has mean 0 and covariance I."""
    moments = own_moments(natural)
    whitened = moments_to_natural(whiten_moments(moments))
    natural = dataclasses.replace(whitened, frame=natural.frame, projection_dtype=projection_dtype)
    smallest = 1 / jnp.max(natural.prior_precision.diagonal())
    info = dataclasses.replace(info, smallest_latent_variance=smallest)
    return natural, info, None if regularizer is None else whiten_regularizer(regularizer, moments)


def result_in_units_of_x(result: EMResult) -> EMResult:
    """The result with model and regulariser in units of x, where the dtype can hold them."""
    natural, regularizer = result.natural, result.regularizer
    if natural.frame is None or not fits_units_of_x(natural):
        return result
    if regularizer is not None:
        noise = regularizer.noise_covariance.scaled(natural.frame.unit)
        regularizer = dataclasses.replace(regularizer, noise_covariance=noise)
    return dataclasses.replace(result, natural=in_units_of_x(natural), regularizer=regularizer)


class ProgressBar:
    """A progress bar over steps, or nothing; entering gives the function to report to."""

    def __init__(self, name: str, show: bool, total: int) -> None:
        columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), disable=not show)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Any:
        self.bar.start()
        return self.report

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def report(self, step: int, start: int, objective: float) -> None:
        """Show that a step of a start (from 1) is done, and the objective there."""
        text = f"start {start}, objective {objective:.4f} nats/sample"
        self.bar.update(self.task, completed=step + 1, description=text)
