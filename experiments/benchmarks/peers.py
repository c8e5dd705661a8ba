"""Times of scikit-learn at the same size: `python -m experiments.benchmarks.peers SIZE` prints JSON.

The mixture of Gaussians runs on data already projected to L dimensions, so its iteration leaves out all that D costs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture

from experiments.benchmarks.sizes import SIZES, Size


def seconds(function: Callable) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def per_iteration(fit: Callable[[int], Any]) -> float:
    """Seconds of one iteration, from fits of one and of three."""
    return (seconds(lambda: fit(3)) - seconds(lambda: fit(1))) / 2


def measure(size: Size) -> dict[str, float]:
    """Seconds of an iteration of the mixture and of factor analysis, and of `predict_proba`."""
    rng = np.random.default_rng(0)
    means = 3 * rng.standard_normal((size.n_components, size.lat_dim))
    y = means[rng.integers(size.n_components, size=size.count)] + rng.standard_normal((size.count, size.lat_dim))
    y = y.astype(np.float32)
    start = {
        "means_init": means,
        "weights_init": np.full(size.n_components, 1 / size.n_components),
        "precisions_init": np.tile(np.eye(size.lat_dim), (size.n_components, 1, 1)),
    }
    mixture = lambda steps: GaussianMixture(size.n_components, max_iter=steps, tol=0, **start).fit(y)  # noqa: E731
    fitted = mixture(1)
    result = {"gmm_iteration": per_iteration(mixture), "predict_proba": seconds(lambda: fitted.predict_proba(y))}
    x = rng.standard_normal((size.count, size.obs_dim), dtype=np.float32)
    factors = lambda steps: FactorAnalysis(size.lat_dim, max_iter=steps, tol=0).fit(x)  # noqa: E731
    return result | {"factor_analysis_iteration": per_iteration(factors)}


if __name__ == "__main__":
    print(json.dumps(measure(SIZES[sys.argv[1]])))
