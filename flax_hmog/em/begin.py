"""What a fit begins with: its samples, the frame that it computes in, the model that it starts from; and one pass."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.data.framing import Framing
from flax_hmog.data.rows import row_shards
from flax_hmog.data.sources import Block, Source, as_source
from flax_hmog.em.initialize import METHODS, check_counts, frame_of, starts
from flax_hmog.em.statistics import Statistics, accumulate
from flax_hmog.em.step import (
    EMInfo,
    PseudoCounts,
    Regularizer,
    compute_factors,
    em_info,
    next_natural,
    whiten_moments,
    whiten_regularizer,
)
from flax_hmog.model.checks import check_outside_transformations, check_type
from flax_hmog.model.conversions import moments_to_natural, own_moments, reframe
from flax_hmog.model.coordinates import Moments, Natural, check_full
from flax_hmog.model.frames import Frame, has_more_digits
from flax_hmog.model.head import check_head_and_key
from flax_hmog.model.kinds import Array, as_rep
from flax_hmog.model.prepared import Factors

MAX_DISTANCE = 1e3  # of a row from the median, in typical distances
FOLLOWED_STEPS = 2  # of EM, after which starts are compared
ROUNDING = 100  # units in the last place of objective and dimension that objectives of one model may differ by


def expectations(blocks: Iterable[Block], factors: Factors) -> Statistics:
    """Statistics of one pass."""
    total: Any = None
    for x, weights, labels in blocks:
        part = accumulate(factors, x, weights, labels, shards=row_shards(x))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def use_robust_frame(caller: str, head: Any, source: Source, column_units: str, max_distance: float) -> Frame:
    """The frame of the samples, in which the fit computes; from now on the source gives rows that go with it."""
    if not max_distance > 1:
        raise ValueError(
            f"{caller}: `max_distance` must be above 1; got {max_distance!r}. Use {MAX_DISTANCE:g}, or inf to keep all "
            "rows."
        )
    rows, weights = source.host_sample()
    frame, by_column = frame_of(caller, head, rows, weights, column_units)
    exact = has_more_digits(rows, head.param_dtype)
    source.use_frame(Framing(frame, head.param_dtype, max_distance, by_column, exact))
    return frame


def warn_of_wild_rows(caller: str, source: Source, max_distance: float) -> None:
    """`WildRowsWarning` if rows were left out."""
    wild = source.framing.wild
    if wild:
        warnings.warn(
            f"{caller}: {len(wild)} rows are left out, as an entry is more than `max_distance` = {max_distance:g} "
            f"typical distances from the median; the first is row {min(wild)}. Check them, or raise max_distance.",
            WildRowsWarning,
            stacklevel=3,
        )


class WildRowsWarning(UserWarning):
    """Rows far from all others took no part in a fit."""


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
    caller: str, head: Any, source: Source, key: Array, init: Any, regularizer: Any, frame: Frame
) -> tuple[Natural, Regularizer | None]:
    """The model that EM starts from, in the frame, and the regulariser in its latent basis.

    Of starts that measure distances in several metrics, each followed for some steps on the sample that starts are made
    from, the one with the best objective, the first of those that are equal to rounding.
    """
    if not isinstance(init, str):
        natural = _given_model(caller, head, source, init)
        moments = reframe(own_moments(natural, caller), natural.frame, frame)
        strength = _strength(regularizer, moments, natural.frame, frame)
        return dataclasses.replace(moments_to_natural(whiten_moments(moments)), frame=frame), strength
    x, weights, labels = block = source.sample()
    best: Any = None
    framing = source.framing
    for moments in starts(head, x, weights, labels, framing.frame, framing.by_column, key, method=init):
        strength = _strength(regularizer, moments, None, frame)
        natural = dataclasses.replace(moments_to_natural(whiten_moments(moments)), frame=frame)
        for step in range(FOLLOWED_STEPS + 1):
            at = evaluate([block], source, natural, strength, head.projection_dtype)
            objective = at.objective
            if step < FOLLOWED_STEPS:
                natural, _ = next_natural(at.factors, at.statistics, strength, frame)
        # starts that end at one optimum differ by rounding, which must not choose how components are numbered
        least = 0.0 if best is None else best[0] + rounding(best[0], natural, head.projection_dtype)
        if math.isfinite(objective) and (best is None or objective > least):
            best = objective, natural, strength
    if best is None:
        raise ValueError(
            f"{caller}: `regularizer` must keep the likelihood bounded on these data; got no start whose objective is "
            "finite. Use PseudoCounts(), raise its counts, or leave `max_distance` finite."
        )
    return best[1], best[2]


def rounding(objective: float, natural: Natural, projection_dtype: str | None) -> float:
    """What rounding explains of a difference of objectives, in nats per sample; the same in any units of x."""
    obs_dim, dtype = natural.interaction.shape[0], natural.interaction.dtype
    volume = 0.0 if natural.frame is None else float(natural.frame.log_volume)
    explained = ROUNDING * float(jnp.finfo(dtype).eps) * (abs(objective + volume) + obs_dim)
    if projection_dtype is not None:
        explained += float(jnp.finfo(projection_dtype).eps) * obs_dim
    return explained


def _strength(regularizer: Any, moments: Moments, own: Frame | None, frame: Frame) -> Regularizer | None:
    """The regulariser for EM that starts from `moments`, in its latent basis once that is whitened.

    Args:
        regularizer: as `fit_em` takes it.
        moments: the model in the frame of the fit, before its prior is whitened.
        own: the frame in whose units a given `Regularizer` holds its noise; None for units of x.
        frame: that of the fit.
    """
    if regularizer is None:
        return None
    if isinstance(regularizer, PseudoCounts):
        return regularizer.regularizer(whiten_moments(moments))
    ratio = (1 if own is None else own.unit) / frame.unit
    noise = regularizer.noise_covariance.scaled(ratio)
    return whiten_regularizer(dataclasses.replace(regularizer, noise_covariance=noise), moments)


def _given_model(caller: str, head: Any, source: Source, init: Moments | Natural) -> Natural:
    """The model to start from, once its size is that of head and data."""
    if isinstance(init, Moments):
        init = moments_to_natural(init)
    check_type(caller, "init", init, Natural, 'Give "pca", "fa", Moments or Natural.')
    got = (*init.interaction.shape, init.posterior_location.shape[0], init.observable_precision.name)
    obs_rep = as_rep(head.obs_rep, caller=caller, argument="head.obs_rep").name
    wanted = (source.obs_dim, head.lat_dim, head.n_components, obs_rep)
    if got != wanted:
        raise ValueError(
            f"{caller}: `init` must have (D, L, K, obs_rep) {wanted}; got {got}. Start from a model of one size."
        )
    return init


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass says of a model.

    Attributes:
        factors: of the model.
        statistics: sums over the rows.
        info: diagnostics; densities are those of x.
        objective: penalised log-likelihood per sample of x, in nats.
    """

    factors: Factors
    statistics: Statistics
    info: EMInfo
    objective: float


def evaluate(
    blocks: Iterable[Block], source: Source, natural: Natural, regularizer: Regularizer | None, dtype: str | None
) -> Evaluation:
    """One pass over blocks of a source, with a model in the frame of the fit."""
    frame: Any = natural.frame
    # the log-volume is added in float64 at the end: gains do not hang on the units of x
    inner = dataclasses.replace(source.framing.frame, log_volume=jnp.zeros_like(frame.log_volume))
    factors = compute_factors(dataclasses.replace(natural, frame=inner, projection_dtype=dtype))
    statistics = expectations(blocks, factors)
    same_units = dataclasses.replace(frame, log_volume=inner.log_volume)
    info = em_info(dataclasses.replace(natural, frame=same_units), factors, statistics, regularizer)
    volume = float(np.log(np.asarray(frame.unit, np.float64)).sum())
    penalised = 0.0 if regularizer is None else float(regularizer.noise) / float(statistics.count)
    objective = float(info.objective) - volume * (1 + penalised)
    of_x = {"log_likelihood": info.log_likelihood - volume, "objective": jnp.asarray(objective, info.objective.dtype)}
    return Evaluation(factors, statistics, dataclasses.replace(info, **of_x), objective)
