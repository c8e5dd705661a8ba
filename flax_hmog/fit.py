"""`fit_em`: initialisation, restarts, passes over arrays or streams of batches, convergence, history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flax_hmog.checks import check_observations, check_shape, check_size, check_type
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
from flax_hmog.statistics import Statistics, accumulate, check_weights

INIT_ROWS = 20_000  # rows of a stream of batches that the initialisation looks at


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
    """

    natural: Natural
    objective_history: np.ndarray
    converged: bool
    info: EMInfo
    restart_objectives: np.ndarray
    regularizer: Regularizer


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
) -> EMResult:
    """Fit a HMoG by exact EM.

    Every step takes one pass over the data in blocks; the penalised log-likelihood never decreases (in float32 up to
    rounding). Data are converted to `head.param_dtype`.

    Args:
        head: unbound head with full component matrices (`AnalyticHMoG`); dimensions, `obs_rep` and `param_dtype` count.
        data: observations (N, D), sharded or not; or a collection of batches (B, D) that can be iterated repeatedly.
        key: PRNG key of the initialisation.
        weights: sample weights (N,); arrays only.
        labels: known components (N,), integers, -1 where unknown: their responsibilities are clamped; arrays only.
        init: "pca" or "fa" (see `initialize_moments`), or a model to start from; its prior is whitened first.
        regularizer: strength of pseudo-samples that look like the initial model, or the pseudo-samples themselves (in
            the latent basis of `init`); None for maximum likelihood, whose maximum need not exist.
        n_restarts: starts from different keys, each run to its end; the best objective wins.
        max_steps: steps per start at most.
        tolerance: a gain in nats per sample below which a start has converged.
        progress: show a progress bar.

    Returns:
        `EMResult`.

    Raises:
        TypeError: for a head with restricted component matrices (see `warm_start`), or data that cannot be read twice.
        ValueError: for unusable data or arguments, or if the objective stops being finite.
    """
    caller = "fit_em"
    check_full(caller, "head", head.component_structure[0]())
    check_size(caller, "n_restarts", n_restarts)
    check_size(caller, "max_steps", max_steps)
    source = _Source.of(head, data, weights, labels)
    if not isinstance(regularizer, PseudoCounts | None):
        check_type(caller, "regularizer", regularizer, Regularizer, "Give PseudoCounts(), a Regularizer or None.")
    if isinstance(init, str) and init not in METHODS:
        raise ValueError(f"{caller}: `init` must be a model or one of {METHODS}; got {init!r}. Choose one of them.")
    if not isinstance(init, str) and n_restarts > 1:
        raise ValueError(
            f"{caller}: `n_restarts` must be 1 for a given `init`; got {n_restarts}. All starts would be the same."
        )
    best: Any = None
    finals: list[float] = []
    with _ProgressBar(progress, n_restarts, max_steps) as report:
        for restart, restart_key in enumerate(jax.random.split(key, n_restarts)):
            start = _first_moments(head, source, restart_key, init)
            moments = whiten_moments(start)
            if isinstance(regularizer, PseudoCounts):
                strength: Regularizer | None = regularizer.regularizer(moments)
            else:
                strength = regularizer and whiten_regularizer(regularizer, start)
            result = _run(moments, source, strength, max_steps, tolerance, lambda *args: report(restart, *args))  # noqa: B023
            finals.append(result.objective_history[-1])
            if best is None or finals[-1] > best.objective_history[-1]:
                best = result
    return dataclasses.replace(best, restart_objectives=np.asarray(finals))


def _run(
    moments: Moments, source: _Source, regularizer: Regularizer | None, max_steps: int, tolerance: float, report: Any
) -> EMResult:
    """EM from one start. The penalty refers to the first latent basis, so whitening waits for the end."""
    natural, history, converged = moments_to_natural(moments), [], False
    for step in range(max_steps + 1):
        factors = compute_factors(natural)
        statistics = source.expectations(factors)
        info = em_info(natural, factors, statistics, regularizer)
        history.append(float(info.objective))
        report(step, history[-1])
        if not math.isfinite(history[-1]):
            raise ValueError(
                f"fit_em: `regularizer` must keep the likelihood bounded on these data; got objective {history[-1]} "
                f"after {step} steps. Use PseudoCounts() or raise its counts."
            )
        converged = step > 0 and history[-1] - history[-2] < tolerance
        if converged or step == max_steps:
            break
        natural, _ = next_natural(factors, statistics, regularizer)
    moments = natural_to_moments(natural)
    natural = moments_to_natural(whiten_moments(moments))
    smallest = 1 / jnp.max(natural.prior_precision.diagonal(natural.interaction.shape[-1]))
    info = dataclasses.replace(info, smallest_latent_variance=smallest)
    whitened: Any = None if regularizer is None else whiten_regularizer(regularizer, moments)
    return EMResult(natural, np.asarray(history), converged, info, np.asarray(history[-1:]), whitened)


def _first_moments(head: Any, source: _Source, key: Array, init: str | Moments | Natural) -> Moments:
    """The initial model."""
    if isinstance(init, str):
        rows, weights = source.head_rows()
        return initialize_moments(head, rows, key, weights=weights, method=init)
    if isinstance(init, Moments):
        init = moments_to_natural(init)
    check_type("fit_em", "init", init, Natural, 'Give "pca", "fa", Moments or Natural.')
    kind = type(init.observable_precision)
    got = (*init.interaction.shape, init.posterior_location.shape[0], rep_name(kind))
    obs_rep = rep_name(as_rep(head.obs_rep, caller="fit_em", argument="head.obs_rep"))
    wanted = (source.width(), head.lat_dim, head.n_components, obs_rep)
    if got != wanted:
        raise ValueError(
            f"fit_em: `init` must have (D, L, K, obs_rep) {wanted}; got {got}. Start from a model of one size."
        )
    return natural_to_moments(with_prior(init, "fit_em"))


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where the samples come from: blocks (x, weights, labels), the same at every pass."""

    batches: Any
    is_stream: bool
    dtype: Any
    obs_dim: int | None

    @classmethod
    def of(cls, head: Any, data: Any, weights: Any, labels: Any) -> _Source:
        caller = "fit_em"
        if hasattr(data, "shape"):
            x = check_observations(caller, data, head.obs_dim, head.param_dtype, argument="data")
            check_counts(caller, x, head)
            weights = check_weights(caller, weights, x.shape[:1], x.dtype)
            labels = None if labels is None else _check_labels(labels, x.shape[:1], head.n_components)
            return cls([(x, weights, labels)], False, x.dtype, x.shape[1])
        if isinstance(data, Iterator) or not isinstance(data, Iterable):
            raise TypeError(
                f"{caller}: `data` must be an array or a collection of batches that can be iterated repeatedly; got "
                f"{type(data).__name__}. EM reads the data once per step: give a list or an object with __iter__."
            )
        if weights is not None or labels is not None:
            raise ValueError(
                f"{caller}: `weights` and `labels` must come with an array; got a stream of batches. Give one array."
            )
        return cls(data, True, head.param_dtype, head.obs_dim)

    def blocks(self) -> Iterator[tuple[Array, Array, Array | None]]:
        """The blocks of one pass; partial batches are padded with weight 0, so that nothing is compiled again."""
        if not self.is_stream:
            yield from self.batches
            return
        rows, width = 0, self.obs_dim
        for batch in self.batches:
            x = check_observations("fit_em", batch, width, self.dtype, argument="data")
            if x.ndim != 2 or not x.shape[0]:
                raise ValueError(f"fit_em: `data` must hold batches (B, D); got {x.shape}. Give whole batches of rows.")
            width = x.shape[1]
            rows = max(rows, x.shape[0])
            missing = rows - x.shape[0]
            yield jnp.pad(x, ((0, missing), (0, 0))), jnp.pad(jnp.ones(x.shape[0], x.dtype), (0, missing)), None

    def width(self) -> int:
        """D of the data."""
        return self.obs_dim or self.head_rows()[0].shape[1]

    def head_rows(self) -> tuple[Array, Array]:
        """Rows and weights that the initialisation looks at."""
        if not self.is_stream:
            x, weights, _ = self.batches[0]
            return x, weights
        parts, count = [], 0
        for x, weights, _ in self.blocks():
            parts.append((x, weights))
            count += x.shape[0]
            if count >= INIT_ROWS:
                break
        if not parts:
            raise ValueError("fit_em: `data` must hold at least one batch; got none. Check the collection.")
        return jnp.concatenate([x for x, _ in parts]), jnp.concatenate([w for _, w in parts])

    def expectations(self, factors: Factors) -> Statistics:
        """Statistics of one pass."""
        total: Any = None
        for x, weights, labels in self.blocks():
            part = accumulate(factors, x, weights, labels, shards=row_shards(x))
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return total


def _check_labels(labels: Any, shape: tuple[int, ...], n_components: int) -> Array:
    check_shape("fit_em", "labels", labels, shape)
    values = np.asarray(labels)
    if values.dtype.kind not in "iu" or values.min() < -1 or values.max() >= n_components:
        raise ValueError(
            f"fit_em: `labels` must be integers from -1 (unknown) to {n_components - 1}; got {values.dtype} from "
            f"{values.min()} to {values.max()}. Number the known components from 0."
        )
    return jnp.asarray(values, jnp.int32)


class _ProgressBar:
    """A progress bar over restarts and steps, or nothing; entering gives the function to report to."""

    def __init__(self, show: bool, n_restarts: int, max_steps: int) -> None:
        columns = (TextColumn("EM"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), disable=not show)
        self.task = self.bar.add_task("", total=n_restarts * (max_steps + 1))
        self.steps = max_steps + 1

    def __enter__(self) -> Any:
        self.bar.start()
        return self.report

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def report(self, restart: int, step: int, objective: float) -> None:
        text = f"start {restart + 1}, objective {objective:.4f} nats/sample"
        self.bar.update(self.task, completed=restart * self.steps + step + 1, description=text)
