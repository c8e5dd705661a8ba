"""Peers: scikit-learn at the same size, and v-MFA beside ours on images; both print JSON.

    python -m experiments.benchmarks.peers SIZE
    python -m experiments.benchmarks.peers on-images IMAGES.gz TEST.gz K L STEPS vamm
    python -m experiments.benchmarks.peers on-images IMAGES.gz TEST.gz K L STEPS flax_hmog

scikit-learn's mixture runs on data already projected to L dimensions, so its iteration leaves out all that D costs.
v-MFA (https://github.com/variational-sublinear-clustering/vamm) has loadings and noise of its own for every component,
in float64. Both see pixels between 0 and 1 with noise of standard deviation 0.1, so that no density depends on a floor
of the noise. OMP_NUM_THREADS=1 is for its CPU-seconds.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import numpy as np
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture

from experiments.benchmarks.sizes import SIZES, Size

NOISE = 0.1  # standard deviation of what is added to pixels
TEST_ROWS = 2000  # as v-MFA takes 9 ms for the density of one


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


def noisy_images(*paths: str) -> list[np.ndarray]:
    """Rows (N, 784) of each .gz of MNIST, between 0 and 1, with noise."""
    rng, found = np.random.default_rng(0), []
    for path in paths:
        rows = np.frombuffer(gzip.decompress(Path(path).read_bytes()), np.uint8, offset=16).reshape(-1, 784) / 255
        found.append(rows + NOISE * rng.standard_normal(rows.shape))
    return found


def of_vamm(x: np.ndarray, test: np.ndarray, n_components: int, lat_dim: int, steps: int) -> dict[str, Any]:
    """CPU-seconds of a pass of v-MFA with its defaults, after two that find responsibilities only; where it ends."""
    from vamm import Gaussian

    model = Gaussian(C=n_components, D=x.shape[1], H=lat_dim, covariance_type="mfa")
    times = [time.process_time()]
    for _ in model._fit(X=np.ascontiguousarray(x), limit=[2, steps], rng=0, eps=0.0):
        times.append(time.process_time())
    found = {"bound_per_row": -float(model.objective), "evaluations_per_row": int(model._log[-1]["eval"]) / len(x)}
    return passes(times, 3) | found | {"test": -float(np.mean(model.nll(np.ascontiguousarray(test))))}


def of_ours(x: np.ndarray, test: np.ndarray, n_components: int, lat_dim: int, steps: int) -> dict[str, Any]:
    """CPU-seconds of a step of plain EM, and where it ends."""
    import jax

    from flax_hmog import AnalyticHMoG, fit_em, log_observable_density

    times = [time.process_time()]
    fit = fit_em(
        AnalyticHMoG(lat_dim, n_components),
        x.astype(np.float32),
        jax.random.key(0),
        max_steps=steps,
        tolerance=-np.inf,
        on_step=lambda _: times.append(time.process_time()),
    )
    density = np.asarray(log_observable_density(fit.natural, test.astype(np.float32)), float)
    return passes(times, 1) | {"log_likelihood": float(fit.info.log_likelihood), "test": float(density.mean())}


def passes(times: list[float], first: int) -> dict[str, float]:
    """Median CPU-seconds of a pass, those before pass `first` left out, and all of them."""
    return {"cpu_seconds": float(np.median(np.diff(times)[first:])), "cpu_seconds_in_all": times[-1] - times[0]}


def on_images(path: str, test_path: str, *options: str) -> dict[str, Any]:
    """One of both on images."""
    *numbers, name = options
    x, test = noisy_images(path, test_path)
    return {"vamm": of_vamm, "flax_hmog": of_ours}[name](x, test[:TEST_ROWS], *map(int, numbers))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps(on_images(*arguments) if what == "on-images" else measure(SIZES[what])))
