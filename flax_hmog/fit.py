"""`fit_em`: initialisation, restarts, passes over arrays or streams of batches, convergence, history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flax_hmog.checks import check_head_and_key, check_outside_transformations, check_size, check_type
from flax_hmog.conversions import moments_to_natural, natural_to_moments, with_prior
from flax_hmog.coordinates import Moments, Natural, check_full
from flax_hmog.covariances import Array, as_rep, rep_name
from flax_hmog.em import (
    EMInfo,
    PseudoCounts,
    Regularizer,
    compute_factors,
    em_info,
    next_natural,
    whiten_moments,
    whiten_regularizer,
)
from flax_hmog.factors import Factors
from flax_hmog.initialize import METHODS, check_counts, initialize_moments
from flax_hmog.rows import row_shards
from flax_hmog.sources import Source, as_source
from flax_hmog.statistics import Statistics, accumulate


@dataclasses.dataclass(frozen=True)
class EMResult:
    """What `fit_em` returns.

    Attributes:
        natural: the fitted model, its prior whitened (y has mean 0 and covariance I).
        objective_history: penalised log-likelihood per sample before the first step and after each (steps + 1,), nats.
        converged: whether the last gain was below the tolerance.
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
        regularizer: its pseudo-statistics.
        history: objectives of the start's models so far.
        finals: final objectives of the starts that have ended.
        best: the best of them, or None.
    """

    natural: Any = None
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
    with ProgressBar("EM", progress, n_restarts * (max_steps + 1)) as report:
        while (start := len(state.finals)) < n_restarts:
            if state.natural is None:
                moments, strength = first_model(caller, head, source, keys[start], init, regularizer)
                state = dataclasses.replace(state, natural=moments_to_natural(moments), regularizer=strength)
            state, objective = _step(state, source, max_steps, tolerance, head.projection_dtype)
            report(start * (max_steps + 1) + max(len(state.history) - 1, 0), start + 1, objective)
            if on_step is not None:
                on_step(state)
    if state.best is None:
        raise ValueError(f"{caller}: `state` must be one of these starts; got {state.finals}. Give that of this fit.")
    return dataclasses.replace(state.best, restart_objectives=np.asarray(state.finals), classes=source.classes)


def _step(
    state: EMState, source: Source, max_steps: int, tolerance: float, projection_dtype: str | None
) -> tuple[EMState, float]:
    """One pass: the next model of the start, or the end of the start; and the objective of the model before."""
    natural, regularizer = state.natural, state.regularizer
    # the penalty refers to the first latent basis, so that whitening waits for the end
    factors = compute_factors(dataclasses.replace(natural, projection_dtype=projection_dtype))
    statistics = expectations(source, factors)
    info = em_info(natural, factors, statistics, regularizer)
    objective = float(info.objective)
    if not math.isfinite(objective):
        raise ValueError(
            f"fit_em: `regularizer` must keep the likelihood bounded on these data; got objective {objective} "
            f"after {len(state.history)} steps. Use PseudoCounts() or raise its counts."
        )
    history = (*state.history, objective)
    converged = len(history) > 1 and history[-1] - history[-2] < tolerance
    if not converged and len(history) <= max_steps:
        natural, _ = next_natural(factors, statistics, regularizer)
        return dataclasses.replace(state, natural=natural, history=history), objective
    best = state.best
    if best is None or objective > max(state.finals):
        natural, info, regularizer = in_whitened_basis(natural, info, regularizer, projection_dtype)
        best = EMResult(natural, np.asarray(history), converged, info, np.asarray(history[-1:]), regularizer)
    return EMState(best=best, finals=(*state.finals, objective)), objective


def in_whitened_basis(
    natural: Natural, info: EMInfo, regularizer: Regularizer | None, projection_dtype: str | None
) -> tuple[Natural, EMInfo, Any]:
    """Model, diagnostics and regulariser in the latent basis in which y has mean 0 and covariance I."""
    moments = natural_to_moments(natural)
    natural = moments_to_natural(whiten_moments(moments))
    natural = dataclasses.replace(natural, projection_dtype=projection_dtype)
    smallest = 1 / jnp.max(natural.prior_precision.diagonal(natural.interaction.shape[-1]))
    info = dataclasses.replace(info, smallest_latent_variance=smallest)
    return natural, info, None if regularizer is None else whiten_regularizer(regularizer, moments)


def expectations(source: Source, factors: Factors) -> Statistics:
    """Statistics of one pass."""
    total: Any = None
    for x, weights, labels in source.blocks():
        part = accumulate(factors, x, weights, labels, shards=row_shards(x))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def source_of(
    caller: str, head: Any, data: Any, key: Any, weights: Any, labels: Any, init: Any, regularizer: Any
) -> Source:
    """The samples of a fit, once its arguments are checked.

    Raises:
        TypeError, ValueError: for what `fit_em` says.
    """
    check_head_and_key(caller, head, key)
    check_outside_transformations(caller, data=data, key=key, weights=weights, labels=labels, init=init)
    check_full(caller, "head", head.component_structure[0]())
    source = as_source(caller, head, data, weights, labels)
    if source.count is not None:
        check_counts(caller, (source.count, source.obs_dim), head)
    if not isinstance(regularizer, PseudoCounts | None):
        check_type(caller, "regularizer", regularizer, Regularizer, "Give PseudoCounts(), a Regularizer or None.")
    if isinstance(init, str) and init not in METHODS:
        raise ValueError(f"{caller}: `init` must be a model or one of {METHODS}; got {init!r}. Choose one of them.")
    return source


def first_model(
    caller: str, head: Any, source: Source, key: Array, init: Any, regularizer: Any
) -> tuple[Moments, Regularizer | None]:
    """The initial model, its prior whitened, and the regulariser in its latent basis."""
    start = _first_moments(caller, head, source, key, init)
    moments = whiten_moments(start)
    if isinstance(regularizer, PseudoCounts):
        return moments, regularizer.regularizer(moments)
    return moments, regularizer and whiten_regularizer(regularizer, start)


def _first_moments(caller: str, head: Any, source: Source, key: Array, init: str | Moments | Natural) -> Moments:
    if isinstance(init, str):
        rows, weights = source.sample()
        return initialize_moments(head, rows, key, weights=weights, method=init)
    if isinstance(init, Moments):
        init = moments_to_natural(init)
    check_type(caller, "init", init, Natural, 'Give "pca", "fa", Moments or Natural.')
    kind = type(init.observable_precision)
    got = (*init.interaction.shape, init.posterior_location.shape[0], rep_name(kind))
    obs_rep = rep_name(as_rep(head.obs_rep, caller=caller, argument="head.obs_rep"))
    wanted = (source.obs_dim, head.lat_dim, head.n_components, obs_rep)
    if got != wanted:
        raise ValueError(
            f"{caller}: `init` must have (D, L, K, obs_rep) {wanted}; got {got}. Start from a model of one size."
        )
    return natural_to_moments(with_prior(init, caller))


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
