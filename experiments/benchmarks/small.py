"""Thirty small fits over K and L in a process that has compiled nothing, beside scikit-learn's PCA and mixture.

    python -m experiments.benchmarks.small
    python -m experiments.benchmarks.small --each-size    # one program for every size, as without padding

Our seconds are those of the whole process, with imports and compilation, and of its fits alone once all is compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from flax_hmog import AnalyticHMoG, fit_em
from flax_hmog.em import padding

COMPONENTS, FACTORS = (2, 4, 6, 8, 12, 16), (2, 3, 4, 5, 6)


def main(rows: int = 5000, obs_dim: int = 30, each_size: bool = False, only: str | None = None) -> None:
    """Measure, each side in a process of its own, and print a table.

    Args:
        rows: N.
        obs_dim: D.
        each_size: without padding.
        only: the side that this process measures.
    """
    if only is not None:
        measure(SIDES[only], sample(rows, obs_dim), each_size)
        return
    title = f"{len(COMPONENTS) * len(FACTORS)} fits, N, D = {(rows, obs_dim)}, load {os.getloadavg()[0]:.1f}"
    table = Table("", "CPU-seconds", "seconds", "again: CPU-seconds", "seconds", title=title)
    for side in SIDES:
        command = [sys.executable, "-m", "experiments.benchmarks.small", "--only", side]
        command += ["--rows", str(rows), "--obs-dim", str(obs_dim), *(["--each-size"] if each_size else [])]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        table.add_row(side, *told.split())
    Console(width=120).print(table)


def sample(rows: int, obs_dim: int) -> np.ndarray:
    """Rows (N, D) of five clusters, correlated by four factors."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(rows, 4)) @ rng.normal(size=(4, obs_dim)) + 0.3 * rng.normal(size=(rows, obs_dim))
    return (signal + 3 * rng.normal(size=(5, obs_dim))[rng.integers(0, 5, rows)]).astype(np.float32)


def measure(fit: Callable[[np.ndarray, int, int], object], x: np.ndarray, each_size: bool) -> None:
    """Print CPU-seconds and seconds of this process until all is fitted, and of all fits again."""
    if each_size:
        padding.MOST_WORK = 0
    # CPU-seconds from the start of the process; seconds from here
    began, spent = time.perf_counter(), 0.0
    for _ in range(2):
        for lat_dim in FACTORS:
            for n_components in COMPONENTS:
                fit(x, lat_dim, n_components)
        print(f"{time.process_time() - spent:.1f} {time.perf_counter() - began:.1f}")
        began, spent = time.perf_counter(), time.process_time()


def ours(x: np.ndarray, lat_dim: int, n_components: int) -> object:
    """A fit with all defaults."""
    return fit_em(AnalyticHMoG(lat_dim, n_components), x, jax.random.key(0)).natural


def peer(x: np.ndarray, lat_dim: int, n_components: int) -> object:
    """A fit of two stages with all defaults."""
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings(action="ignore"):
        return GaussianMixture(n_components, random_state=0).fit(PCA(lat_dim).fit_transform(x))


SIDES = {"fit_em": ours, "PCA + GaussianMixture": peer}

if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.small")
