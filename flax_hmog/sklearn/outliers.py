"""Scores that say how unlikely rows are, alike for rows that show all columns and for rows with gaps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax.typing import DTypeLike
from scipy.special import gammaincc

from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.coordinates import Moments
from flax_hmog.model.typed import Floats

MOST_FLOATS = 2**24  # of the rows of one call
DRAWS = 10_000  # of the model, whose scores are uniform


def tail_probabilities(
    rows: np.ndarray, weights: np.ndarray, means: np.ndarray, infer: Callable[[np.ndarray], HMoGOutput]
) -> Floats:
    """The probability that a draw of the model is less likely than each row (N,), as if components did not overlap.

    Of d columns a row of component k has log p(x, k) = m_k - q / 2, with m_k that of the mean of k, and q chi-squared
    of d degrees of freedom. So P(log p < t) = sum_k w_k P(q > 2 (m_k - t)). Rows with the same gaps share m_k.

    Args:
        rows: (N, D), NaN where an entry is missing.
        weights: of the components (K,).
        means: of the components (K, D).
        infer: inference with the model.
    """
    patterns, numbers = np.unique(np.isnan(rows), axis=0, return_inverse=True)
    numbers = numbers.reshape(-1)
    freedom = np.maximum((~patterns).sum(axis=1), 1)[numbers]
    densities, total = np.empty(0), np.zeros(len(rows))
    at_once = max(1, MOST_FLOATS // patterns.size)
    for start in range(0, len(weights), at_once):
        part = means[start : start + at_once]
        shown = np.where(patterns, np.nan, part[:, None]).reshape(-1, rows.shape[1]).astype(rows.dtype)
        first = len(rows) if start == 0 else 0  # in one call, which compiles one size
        output = infer(np.concatenate([rows[:first], shown]))
        log_density, log_r = (
            np.asarray(leaf, np.float64) for leaf in (output.log_density, output.log_responsibilities)
        )
        densities = log_density[:first] if first else densities
        for k in range(len(part)):
            here = first + k * len(patterns) + np.arange(len(patterns))
            top = log_density[here] + log_r[here, start + k]
            distance = np.nan_to_num(top[numbers] - densities, nan=np.inf)
            # above the largest density of one component the value goes on, for the order of rows
            tail = gammaincc(freedom / 2, np.maximum(distance, 0)) + np.maximum(-distance, 0)
            total += weights[start + k] * tail
    return total


def draws(moments: Moments, dtype: DTypeLike) -> np.ndarray:
    """`DRAWS` rows (DRAWS, D) of a model, always the same, without a program."""
    rng, (obs_dim, lat_dim) = np.random.default_rng(0), moments.loadings.shape
    weights = np.asarray(moments.weights, np.float64)
    z = rng.choice(len(weights), DRAWS, p=weights / weights.sum())
    roots = np.linalg.cholesky(np.asarray(moments.covariances.entries, np.float64))
    y = np.asarray(moments.means)[z] + np.einsum("nij,nj->ni", roots[z], rng.normal(size=(DRAWS, lat_dim)))
    noise, errors = moments.noise, rng.normal(size=(DRAWS, obs_dim))
    if noise.is_diagonal:
        errors *= np.sqrt(np.asarray(noise.diagonal(), np.float64))
    else:
        errors = errors @ np.linalg.cholesky(np.asarray(noise.dense(), np.float64)).T
    rows: np.ndarray = y @ np.asarray(moments.loadings).T + np.asarray(moments.bias) + errors
    return rows.astype(np.dtype(dtype), copy=False)


def ranks(values: Floats, drawn: Floats) -> Floats:
    """The share of draws whose value is at most each of these values (N,), in (0, 1); `drawn` is sorted.

    Below all draws it falls on as the value does, so that of two wild rows the wilder one is lower.
    """
    shares = (1 + np.searchsorted(drawn, values, side="right")) / (1 + len(drawn))
    return np.where(values < drawn[0], shares * values / drawn[0], shares)
