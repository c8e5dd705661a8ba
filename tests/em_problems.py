"""Small problems for EM, and what every fit must satisfy."""

from __future__ import annotations

import jax
import numpy as np
from cases import Case, random_moments
from dense import Dense, assert_close

from flax_hmog import AnalyticHMoG, EMResult, fit_em, natural_to_moments

SMALL = Case(AnalyticHMoG, "diagonal", "full", 4, 2, 3)
CROWDED = Case(AnalyticHMoG, "diagonal", "full", 4, 2, 8)


def problem(case, count, seed):
    """A start, and data of another random model."""
    x, _, z = Dense.of_moments(random_moments(case, seed + 1000)).sample(np.random.default_rng(seed), count)
    return random_moments(case, seed), x, z


def fit(case, data, *, key=None, dtype="float64", **options) -> EMResult:
    options = {"max_steps": 10, "tolerance": -np.inf} | options
    return fit_em(case.head(dtype), data, jax.random.key(0) if key is None else key, **options)


def assert_never_decreases(history, rounding=1e-10):
    history = np.asarray(history)
    assert np.isfinite(history).all()
    assert np.all(np.diff(history) >= -rounding * (1 + np.abs(history[1:])))


def assert_whitened(natural, tolerance):
    dense = Dense.of_moments(natural_to_moments(natural))
    second = dense.mean_statistics()["weighted_second_moments"].sum(0)
    assert_close(dense.w @ dense.m, np.zeros(dense.m.shape[1]), tolerance)
    assert_close(second, np.eye(dense.m.shape[1]), tolerance)
