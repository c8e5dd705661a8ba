"""Parts of what a fit does beside its steps, with many components: k-means, moments of clusters, starts, merging.

    python -m experiments.benchmarks.starts                                                # digits
    python -m experiments.benchmarks.starts --path train-images-idx3-ubyte.gz --lat-dim 50 --n-components 200 1000

Seconds of processor time, of a second call, without compilation; merging is of a mixture with the centres of k-means.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.accelerated import NOISE_SHARE, read
from flax_hmog import AnalyticHMoG, PseudoCounts
from flax_hmog.analysis import merge_components
from flax_hmog.em.fit import Fit
from flax_hmog.em.initialize import cluster_moments
from flax_hmog.em.k_means import k_means
from flax_hmog.em.options import EMOptions


def main(
    path: Path | None = None,
    n_components: tuple[int, ...] = (64,),
    lat_dim: int = 12,
    rows: int | None = None,
    n_clusters: int = 10,
) -> None:
    """Measure, and print a table.

    Args:
        path: .npz file that holds `X`, or images as MNIST's .gz; None for scikit-learn's digits.
        n_components: K, one after another.
        lat_dim: L.
        rows: the first so many; None for all.
        n_clusters: clusters that components are merged to.
    """
    x = read(path)[:rows]
    title = f"{'digits' if path is None else path.name}: N, D = {x.shape}, L = {lat_dim}; processor seconds"
    table = Table("K", "k-means", "distortion", "moments", "start", "accelerated", "merging", "load", title=title)
    for size in n_components:
        table.add_row(f"{size}", *measured(x, lat_dim, size, n_clusters), f"{os.getloadavg()[0]:.1f}")
    Console(width=160).print(table)


def measured(x: np.ndarray, lat_dim: int, n_components: int, n_clusters: int) -> list[str]:
    """A row of the table but for K and load."""
    centred = x - x.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :lat_dim]
    y, share = jnp.asarray(centred @ axes), jnp.full(len(x), 1 / len(x), jnp.float32)
    find = jax.jit(lambda y, share: k_means(y, share, jax.random.key(0), n_components))
    labels, of_clusters = timed(lambda: find(y, share))
    sums = jax.jit(
        lambda y, share, labels: cluster_moments(y, share, labels, n_components, n_components, jnp.sum(share), None)
    )
    (_, means, _), of_moments = timed(lambda: sums(y, share, labels))
    distortion = float(jnp.mean(jnp.sum((y - means[labels]) ** 2, axis=1)))
    logits = 2 * y @ means.T - jnp.sum(means**2, axis=1)[None]
    rows = np.asarray(jax.nn.log_softmax(logits / distortion * lat_dim, axis=1))
    _, of_merging = timed(lambda: merge_components(rows, n_clusters))
    return [
        f"{of_clusters:.2f}", f"{distortion:.4f}", f"{of_moments:.2f}",
        *(f"{of_start(x, AnalyticHMoG(lat_dim, n_components), is_fast):.2f}" for is_fast in (False, True)),
        f"{of_merging:.2f}",
    ]  # fmt: skip


def of_start(x: np.ndarray, head: AnalyticHMoG, accelerate: bool) -> float:
    """Seconds until a fit takes its first step."""
    counts = PseudoCounts(noise=max(1.0, NOISE_SHARE * len(x)))
    fit = Fit(head, x, jax.random.key(0), None, None, EMOptions(regularizer=counts, accelerate=accelerate))
    return timed(lambda: fit.start(jax.random.key(0))[0])[1]


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a second call, and its processor seconds."""
    jax.block_until_ready(function())
    begin = time.process_time()
    result = jax.block_until_ready(function())
    return result, time.process_time() - begin


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.starts")
