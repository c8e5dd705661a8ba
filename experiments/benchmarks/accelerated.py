"""Plain EM beside accelerated cycles that reach the same objective, in alternation.

    python -m experiments.benchmarks.accelerated                                           # digits
    python -m experiments.benchmarks.accelerated --path train-images-idx3-ubyte.gz --lat-dim 50 --n-components 200 1000

Times are CPU-seconds, which other work on the machine changes little, of whole calls of `fit_em` that start from one
model, the last dense pass of accelerated ones included, less what both spend before their first pass, and without
compilation; "first call" is the first accelerated fit until it has reached the objective, with compilation. "MB" is
what sparse and kept passes hold at most beside their arguments, by XLA's analysis. With --peers, an E-step and an
M-step of scikit-learn's GaussianMixture with full covariances, on rows projected to L.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import statistics
import time
from functools import partial
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
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture

from flax_hmog import AnalyticHMoG, EMState, Natural, PseudoCounts, fit_em, latent_mean, natural_to_moments
from flax_hmog.em.accelerate import find, follow
from flax_hmog.em.cycles import FEWEST_SLOTS, KEPT_PASSES, LEAST_RANK

NOISE_SHARE, IDX_HEADER = 0.01, 16


def main(
    path: Path | None = None,
    n_components: tuple[int, ...] = (64,),
    lat_dim: int = 12,
    rows: int | None = None,
    steps: int = 30,
    repeats: int = 3,
    peers: bool = False,
) -> None:
    """Measure, and print a table.

    Args:
        path: .npz file that holds `X`, or images as MNIST's .gz; None for scikit-learn's digits.
        n_components: K, one after another.
        lat_dim: L.
        rows: the first so many; None for all.
        steps: of plain EM, whose last objective is to be reached.
        repeats: pairs of fits.
        peers: scikit-learn too.
    """
    x = read(path)[:rows]
    console = Console(width=160)
    title = f"{'digits' if path is None else path.name}: N, D = {x.shape}, L = {lat_dim}; CPU-seconds"
    table = Table(
        "K", f"{steps} plain steps", "accelerated", "ratios", "steps", "objectives", "first call", "load", "MB",
        "scikit-learn, an iteration", title=title,
    )  # fmt: skip
    for size in n_components:
        head = AnalyticHMoG(lat_dim, size)
        row, start = measured(head, x, steps, repeats)
        table.add_row(*row, memory(head, start, x), of_peer(start, x) if peers else "")
    console.print(table)


def read(path: Path | None) -> np.ndarray:
    """Rows (N, D) between 0 and 1."""
    if path is None:
        values = load_digits().data
    elif path.suffix == ".gz":
        values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=IDX_HEADER).reshape(-1, 784)
    else:
        values = np.load(path)["X"]
    return (values.reshape(len(values), -1) / values.max()).astype(np.float32)


def measured(head: AnalyticHMoG, x: np.ndarray, steps: int, repeats: int) -> tuple[list[str], Natural]:
    """A row of the table, and the model that fits start from."""
    counts = PseudoCounts(noise=max(1.0, NOISE_SHARE * len(x)))
    options: dict[str, Any] = {"regularizer": counts, "tolerance": -np.inf}
    start = fit_em(head, x, jax.random.key(0), max_steps=1, accelerate=False, **options).natural

    def fit(accelerate: bool, max_steps: int, target: float = np.inf) -> tuple[np.ndarray, float, float]:
        """Objectives, up to the first no lower than `target`; CPU-seconds, and those until the first was there."""
        times, found = [time.process_time()], []

        def on_step(state: EMState) -> None:
            times.append(time.process_time())
            found.append((state.history or state.finals)[-1])
            if found[-1] >= target:
                raise StopIteration

        with contextlib.suppress(StopIteration):
            fit_em(
                head, x, jax.random.key(0), init=start, accelerate=accelerate, max_steps=max_steps, on_step=on_step,
                **options,
            )  # fmt: skip
        return np.asarray(found), times[-1] - times[0], times[1] - times[0]

    plain = fit(False, steps)
    target = plain[0][-1]
    objectives, compiled, _ = fit(True, steps, target)
    if objectives[-1] < target:
        raise SystemExit(f"accelerated: {steps} steps end at {objectives[-1]}, below {target}.")
    reached = len(objectives) - 1
    pairs = []
    _, seconds, first = fit(False, 1)
    before = 2 * first - seconds
    for number in range(repeats):
        # the first one may have compiled before its first pass
        _, seconds, first = fit(False, steps) if number else plain
        objectives, accelerated, _ = fit(True, reached)
        pairs.append(((seconds - first) * (steps + 1) / steps, accelerated - before))
    of_plain, of_fast = (statistics.median(times) for times in zip(*pairs, strict=True))
    return [
        f"{head.n_components}", f"{of_plain:.2f}", f"{of_fast:.2f}",
        " ".join(f"{one / other:.2f}" for one, other in pairs), f"{reached}",
        f"{target:.4f} {objectives[-1]:.4f}", f"{compiled:.1f}", f"{os.getloadavg()[0]:.1f}",
    ], start  # fmt: skip


def memory(head: AnalyticHMoG, start: Natural, x: np.ndarray) -> str:
    """Megabytes that sparse and kept passes hold at most beside their arguments."""
    weights = jnp.ones(len(x))
    regularizer = PseudoCounts().regularizer(natural_to_moments(start), len(x))
    rank = min(head.lat_dim, max(LEAST_RANK, head.lat_dim // 2))
    of_find: dict[str, Any] = {"rank": rank, "slots": FEWEST_SLOTS, "dense_rows": len(x)}
    found = jax.eval_shape(partial(find, **of_find), start, regularizer, x, weights)
    compiled: tuple[Any, Any] = find, follow  # typed as what they compile
    programs = (
        compiled[0].lower(start, regularizer, x, weights, **of_find),
        compiled[1].lower(found, start, regularizer, weights, passes=KEPT_PASSES),
    )
    analyses = (program.compile().memory_analysis() for program in programs)
    return " ".join(f"{(one.temp_size_in_bytes + one.output_size_in_bytes) / 1e6:.0f}" for one in analyses)


def of_peer(start: Natural, x: np.ndarray) -> str:
    """CPU-seconds of an E-step and an M-step of scikit-learn's mixture, on rows projected to L, in turn."""
    moments = natural_to_moments(start)
    rows = np.asarray(latent_mean(start, x))
    mixture = GaussianMixture(len(moments.weights), reg_covar=1e-3)
    mixture.means_, mixture.weights_ = np.asarray(moments.means), np.asarray(moments.weights)
    precisions = np.linalg.inv(np.asarray(moments.covariances.entries, np.float64))
    mixture.precisions_cholesky_ = np.linalg.cholesky(precisions).astype(rows.dtype)
    times = [time.process_time()]
    _, log_responsibilities = mixture._e_step(rows)
    times.append(time.process_time())
    mixture._m_step(rows, log_responsibilities)
    times.append(time.process_time())
    return f"{times[1] - times[0]:.1f} + {times[2] - times[1]:.1f}"


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.accelerated")
