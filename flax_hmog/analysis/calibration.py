"""Temperature of responsibilities: as certain as independent fits agree, without labels."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment, minimize_scalar

from flax_hmog.analysis.affinity import as_log_responsibilities
from flax_hmog.model.checks import check_positive, door, public
from flax_hmog.model.typed import Floats, Samples

LEAST = float(np.log(np.finfo(np.float32).tiny))  # of a probability that is not 0
IMPOSSIBLE = -1e29
COLDEST, HOTTEST = 0.125, 1000.0


@public
def fit_temperature(log_responsibilities: Samples, *others: Samples) -> float:
    """The temperature at which the probability of a row's cluster is how often independent fits agree with it.

    Encoders that are trained by information make nearly all assignments certain, and a model of another shape than the
    data is too sure in many columns. How often fits with other seeds put a row elsewhere is, on average, close to how
    often one of them is wrong. Their clusters, matched one to one, take the place of labels: T makes the mean logarithm
    of r ** (1 / T), normalised, largest for them.

    Args:
        log_responsibilities: log p(z = k | x) (..., K) of one fit, best of rows that no fit has seen; -inf is allowed.
        others: those of the same rows (..., K) from fits with other seeds; one is enough, two are steadier.

    Returns:
        T, from 1/8 to 1000: above 1 where the fit is too sure. For `scale_temperature`.

    Raises:
        TypeError: if an argument holds no real numbers.
        ValueError: unless all are logarithms of probabilities, of one shape; without others.

    Source: Guo et al. 2017 (temperature); Jiang et al. 2022 (disagreement of fits).

    Example:
        >>> certain = np.log([[0.999, 0.001], [0.999, 0.001], [0.001, 0.999], [0.001, 0.999]])
        >>> another = np.log([[0.2, 0.8], [0.2, 0.8], [0.7, 0.3], [0.3, 0.7]])  # numbered otherwise; agrees on 3 of 4
        >>> temperature = fit_temperature(certain, another)
        >>> scaled = scale_temperature(certain, temperature)
        >>> round(float(np.exp(scaled).max(axis=1).mean()), 3)
        0.75
    """
    rows = _floored(log_responsibilities)
    if not others:
        raise ValueError(f"{door()}: `others` must be one fit at least; got none. Fit again with another key.")
    taken = []
    for number, other in enumerate(others):
        table = as_log_responsibilities(other)
        if table.shape != rows.shape:
            raise ValueError(
                f"{door()}: `others` must have the shape of `log_responsibilities`, {rows.shape}; got {table.shape} "
                f"for number {number}. Use the same rows, and fits with as many clusters."
            )
        taken.append(_matched(table.argmax(axis=1), rows.argmax(axis=1), rows.shape[1]))
    each = np.arange(len(rows))

    def loss(log_temperature: float) -> float:
        scaled = _scaled(rows, np.exp(log_temperature))
        return -float(np.mean([scaled[each, clusters].mean() for clusters in taken]))

    found = minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded")
    return float(np.exp(found.x))


@public
def scale_temperature(log_responsibilities: Samples, temperature: float) -> Float[np.ndarray, "*batch K"]:
    """Logarithms of r ** (1 / T), normalised: less certain where T is above 1, with the same order of clusters.

    Args:
        log_responsibilities: log p(z = k | x) (..., K).
        temperature: T, positive, from `fit_temperature`.

    Returns:
        Log-probabilities (..., K), float64.

    Raises:
        TypeError: if `log_responsibilities` holds no real numbers.
        ValueError: unless they are logarithms of probabilities, or for a temperature that is not positive.

    Source: Guo et al. 2017.

    Example:
        >>> np.exp(scale_temperature(np.log([[0.9, 0.1]]), 2.0)).round(2).tolist()
        [[0.75, 0.25]]
    """
    check_positive("temperature", temperature, "Use that of fit_temperature.")
    return _scaled(_floored(log_responsibilities), temperature).reshape(np.asarray(log_responsibilities).shape)


def _floored(log_responsibilities: Samples) -> Floats:
    """Log-responsibilities (N, K); probabilities of 0 are those that float32 cannot hold."""
    rows = as_log_responsibilities(log_responsibilities)
    return cast(Floats, np.where(rows > IMPOSSIBLE, rows, LEAST))


def _scaled(rows: Floats, temperature: float) -> Floats:
    scaled = rows / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    return cast(Floats, scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)))


def _matched(clusters: np.ndarray, of: np.ndarray, count: int) -> np.ndarray:
    """Clusters (N,) by the numbers of those `of` the same rows that they share most with, matched one to one."""
    shared = np.bincount(clusters * count + of, minlength=count**2).reshape(count, count)
    return cast(np.ndarray, linear_sum_assignment(shared, maximize=True)[1][clusters])
