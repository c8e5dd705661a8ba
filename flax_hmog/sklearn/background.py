"""A broad background beside the clusters, which wild rows belong to instead of a cluster, and EM with both.

    p(x) = (1 - s) p_HMoG(x) + s b(x),    b(x) = prod_d 1 / (pi u_d (1 + ((x_d - c_d) / u_d)^2))

The columns of b are Cauchy and independent, about their medians c and with typical distances u from them: a wild row is
wild in some columns in no particular direction, and tails of a power outweigh Gaussian ones however far it is. c and u
stay, s is learnt. A missing entry has no factor in b.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_hmog.data.framing import robust_frame
from flax_hmog.data.rows import effective_weights
from flax_hmog.em.result import EMResult, WildRowsWarning
from flax_hmog.em.step import penalty
from flax_hmog.model.checks import allowing
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.typed import Floats

MOST_ROUNDS = 20
REFERENCE_ROWS = 2000  # whose distances tell scattered rows
LEAST_NEIGHBOURS, NEIGHBOURS = 10, 0.01  # rows that are no wild group: a number, and a share
MOST_SCATTERED, FAR = 0.05, 5.0  # share of the rows that a start leaves out, and their distance beside the typical one
LEAST_WEIGHT = 1e-9  # of a row beside the largest
SHARE_ROUNDING = 1e-9  # relative change of the share that ends its steps
STILL = 0.1  # standard deviations of its own noise that a constant column is allowed in the background


@dataclasses.dataclass(frozen=True)
class Background:
    """A background and its share.

    Attributes:
        share: prior probability of the background s.
        center: medians of the columns c (D,).
        unit: typical distances from them u (D,).
    """

    share: float
    center: Floats
    unit: Floats

    @classmethod
    def of(cls, rows: np.ndarray, weights: np.ndarray, share: float) -> Background:
        """The background of rows (N, D), NaN where an entry is missing."""
        with allowing("nan"):
            center, unit = robust_frame(rows, weights, True, np.float64).exact()
        # the model is sure of a constant column, and no row is less wild for having it
        is_constant = np.nanmin(rows, axis=0) == np.nanmax(rows, axis=0)
        return cls(share, center, np.where(is_constant, unit * STILL / math.sqrt(len(rows)), unit))

    def of_columns(self, columns: np.ndarray) -> Background:
        """That of some of the columns, which True stands for."""
        return Background(self.share, self.center[columns], self.unit[columns])

    def log_density(self, rows: np.ndarray) -> Floats:
        """Log-density of the background (N,) for rows (N, D)."""
        z = (np.asarray(rows, np.float64) - self.center) / self.unit
        densities = -np.log(np.pi * self.unit) - 2 * np.log(np.hypot(1, z))  # squares of z may overflow
        total: Floats = np.nansum(densities, axis=1)
        return total

    def log_odds(self, rows: np.ndarray, log_density: np.ndarray) -> Floats:
        """Log-odds (N,) that rows are not of the background, from the log-density of the clusters (N,)."""
        clusters = np.nan_to_num(np.asarray(log_density, np.float64), nan=-np.inf)
        return clusters + math.log1p(-self.share) - self.log_density(rows) - math.log(self.share)

    def mixed(self, rows: np.ndarray, log_density: np.ndarray) -> Floats:
        """Log-density with the background (N,), from that of the clusters (N,)."""
        odds = self.log_odds(rows, log_density)
        # log((1 - s) p + s b) = log s b + log(1 + odds)
        return self.log_density(rows) + math.log(self.share) + np.logaddexp(0, odds)


@dataclasses.dataclass(frozen=True)
class FitBeside:
    """A fit with a background.

    Attributes:
        found: the clusters.
        background: the background, its share learnt.
        objectives: penalised mean log-density of clusters and background after each fit of the clusters.
        converged: True if the last fit gained less than the tolerance.
    """

    found: EMResult
    background: Background
    objectives: Floats
    converged: bool


def fit_beside(
    rows: np.ndarray,
    weights: np.ndarray | None,
    known: np.ndarray,
    fit: Callable[[np.ndarray, EMResult | None], EMResult],
    log_density: Callable[[Natural], np.ndarray],
    tolerance: float,
) -> FitBeside:
    """EM of clusters and background together.

    With r the probabilities that rows are not of the background, the M-step of the clusters is a fit with weights r.
    Fits are run to their end, each from the one before: any number of their steps raises the bound of the E-step
    sum_i r_i log p_HMoG(x_i), so that the objective never decreases. The first fit leaves out rows that are scattered.

    Args:
        rows: (N, D), NaN where an entry is missing.
        weights: sample weights (N,) or None.
        known: True for rows whose cluster is known, which are none of the background (N,).
        fit: a fit with weights (N,), from the start of a result, or from its own.
        log_density: of the clusters for the rows (N,).
        tolerance: gain of the mean log-density below which EM has converged.
    """
    share = _effective(np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64))
    total = share.sum()
    kept = np.where(scattered(rows, share) & ~known, 0.0, 1.0)
    background = Background.of(rows, share, (share @ (1 - kept) + 1) / (total + 2))
    found: Any = None
    objectives: list[float] = []
    while True:
        weighted = share * kept
        weighted[weighted < LEAST_WEIGHT * weighted.max()] = 0
        scale = _effective(weighted).sum() / weighted.sum()  # that a fit gives its weights, and so its pseudo-samples
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WildRowsWarning)  # they are of the background
            found = _scaled(fit(weighted, found and _scaled(found, scale)), 1 / scale)
        density = log_density(found.natural)
        background, kept = _next(background, rows, density, share, known)
        mixed = np.where(known, density + math.log1p(-background.share), background.mixed(rows, density))
        prior = math.log(background.share) + math.log1p(-background.share)
        pseudo = 0.0 if found.regularizer is None else float(penalty(found.natural, found.regularizer))
        objectives.append((share @ mixed + prior + pseudo) / total)
        converged = len(objectives) > 1 and objectives[-1] - objectives[-2] < tolerance
        if converged or len(objectives) == MOST_ROUNDS:
            return FitBeside(found, background, np.asarray(objectives), converged)


def scattered(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """True for rows (N, D) that are far from their nearest neighbours, beside what is typical: few at most.

    Clusters of their own, however far away, have neighbours (Byers and Raftery 1998): ten, and one in a hundred rows.
    """
    with allowing("nan"):
        center, unit = robust_frame(rows, weights, True, np.float64).exact()
    z = np.nan_to_num(np.clip((rows - center) / unit, -1e3, 1e3)).astype(np.float32)  # what is missing is typical
    z /= np.float32(math.sqrt(z.shape[1]))
    reference = z[weights > 0]
    reference = reference[:: -(-len(reference) // REFERENCE_ROWS)]
    step = max(1, int(np.count_nonzero(weights)) // max(1, len(reference)))
    near = math.ceil(max(LEAST_NEIGHBOURS / step, NEIGHBOURS * len(reference)))
    near = min(len(reference) - 1, max(2, near))  # a row may be its own nearest
    squares, distances = np.sum(reference**2, axis=1), np.empty(len(z))
    for start in range(0, len(z), REFERENCE_ROWS):
        part = z[start : start + REFERENCE_ROWS]
        gaps = np.sum(part**2, axis=1)[:, None] - 2 * part @ reference.T + squares
        distances[start : start + REFERENCE_ROWS] = np.partition(gaps, near, axis=1)[:, near]
    distances = np.sqrt(np.maximum(distances, 0))
    most = np.quantile(distances, 1 - MOST_SCATTERED)
    found: np.ndarray = distances > max(FAR * np.median(distances), most)
    return found


def _next(
    background: Background, rows: np.ndarray, density: np.ndarray, weights: np.ndarray, known: np.ndarray
) -> tuple[Background, Floats]:
    """The background with the best share for these densities, and the probabilities that rows are not of it (N,).

    Two pseudo-samples, one on either side, keep the share from the bounds.
    """
    while True:
        odds = np.where(known, np.inf, background.log_odds(rows, density))
        kept = np.exp(-np.logaddexp(0, -odds))
        share = float((weights @ (1 - kept) + 1) / (weights.sum() + 2))
        if abs(share - background.share) < SHARE_ROUNDING * share:
            return background, kept
        background = dataclasses.replace(background, share=share)


def _effective(weights: np.ndarray) -> Floats:
    """Weights as a fit counts them: they sum to the number of samples that they stand for."""
    return np.asarray(effective_weights(jnp.asarray(weights)), np.float64)


def _scaled(found: EMResult, factor: float) -> EMResult:
    """A result whose pseudo-samples count so many times as much."""
    if found.regularizer is None:
        return found
    counts = {name: getattr(found.regularizer, name) * factor for name in ("weights", "components", "noise")}
    return dataclasses.replace(found, regularizer=dataclasses.replace(found.regularizer, **counts))
