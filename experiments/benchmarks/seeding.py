"""Other ways to start EM beside that of `fit_em`, at equal time: seeds of k-means, and starts made from several.

    python -m experiments.benchmarks.seeding --folder FOLDER [--names digits usps] [--steps 20]

FOLDER is that of `objectives`. Every start is followed by steps of plain EM for as long as that of `fit_em` and so many
steps take, in processor seconds without compilation; the objective is that of the model which is reached then,
between steps by interpolation. Of a start the least time over seeds counts, of a step the median.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.objectives import PROBLEMS, Problem
from flax_hmog import Moments, Natural, infer, moments_to_natural
from flax_hmog.em import initialize, k_means
from flax_hmog.em.fit import Fit
from flax_hmog.em.options import EMOptions, Regularizer
from flax_hmog.model.conversions import own_moments
from flax_hmog.model.kinds import Array, PositiveDefinite

SPARE_STEPS = 10  # for starts that take less time
FEW_STEPS = 3  # of Lloyd, before seeds are pooled
greedy = k_means._seeds
Seeds = Callable[..., Array]
Start = tuple[Natural, Regularizer | None]


def main(folder: Path = Path(), names: tuple[str, ...] = tuple(PROBLEMS), seeds: int = 3, steps: int = 20) -> None:
    """Measure, and print a table.

    Args:
        folder: where the files are.
        names: data sets.
        seeds: starts of each kind.
        steps: of EM after the start of `fit_em`.
    """
    title = f"means of objectives, and ranges over {seeds} seeds"
    table = Table("data", "start", "CPU-seconds", "steps", "in equal time", "after equal steps", title=title)
    for name in names:
        x, _ = PROBLEMS[name].read(folder)
        budget = 0.0
        for kind in KINDS:
            start, step, histories = measured(PROBLEMS[name], x, kind, seeds, steps + SPARE_STEPS)
            budget = budget or start + steps * step
            taken, cells = (budget - start) / step, []
            for count in (taken, steps):
                if count < 0:
                    cells.append("still at its start")
                    continue
                reached = [np.interp(count, np.arange(len(history)), history) for history in histories]
                cells.append(f"{np.mean(reached):.3f} ({min(reached):.3f} to {max(reached):.3f})")
            table.add_row(name, kind, f"{start:.2f}", f"{taken:.1f}", *cells)
    Console(width=160).print(table)


def measured(problem: Problem, x: np.ndarray, kind: str, seeds: int, steps: int) -> tuple[float, float, Any]:
    """Seconds of a start and of a step, and objectives of each seed before every step."""
    seeding, begin, more = KINDS[kind]
    with replaced(seeding):
        fit = fit_of(problem, x, 1)
        wide = fit if more == 1 else fit_of(problem, x, more)
        starts, times, histories = [], [], []
        for seed in range(seeds):
            before = time.process_time()
            natural, regularizer = jax.block_until_ready(begin(fit, wide, jax.random.key(seed)))
            starts.append(time.process_time() - before)
            history = []
            for _ in range(steps):
                before = time.process_time()
                natural, _, objective = fit.evaluate(natural, regularizer)
                times.append(time.process_time() - before)
                history.append(objective)
            histories.append(np.asarray(history))
    return min(starts), float(np.median(times)), histories


def fit_of(problem: Problem, x: np.ndarray, more: float) -> Fit:
    """The fit of a mixture with so many times the components of the problem's."""
    head = dataclasses.replace(problem.head, n_components=int(more * problem.head.n_components))
    options = EMOptions(regularizer=problem.counts, accelerate=False)
    return Fit(head, x, jax.random.key(0), None, None, options)


@contextlib.contextmanager
def replaced(seeds: Seeds) -> Iterator[None]:
    """Within it, k-means takes these seeds."""
    compiled: Any = initialize._clustered
    with mock.patch.object(k_means, "_seeds", seeds):
        compiled.clear_cache()
        yield
    compiled.clear_cache()


def drawn(points: Array, mass: Array, key: Array, count: int) -> Array:
    """Points (count, L), drawn in proportion to their mass (N,)."""
    below = jnp.cumsum(mass)
    level = jax.random.uniform(key, (count,), points.dtype) * below[-1]
    return points[jnp.minimum(jnp.searchsorted(below, level, side="right"), below.size - 1)]


def uniform(points: Array, share: Array, direction: Array, key: Array, _: Any, centers: Array, *given: Any) -> Array:
    """Seeds drawn by share alone."""
    return drawn(points, share, key, len(centers))


def lookahead(points: Array, share: Array, direction: Array, key: Array, _: Any, centers: Array, *given: Any) -> Array:
    """The candidate whose clusters have the least squares about their means; then each seed once more, backwards.

    Source: Cazals and Carrière 2025, arXiv 2506.21291.
    """
    n_clusters = len(centers)
    trials = 2 + int(math.log(n_clusters))

    def pick(number: Array, index: Array, centers: Array, nearest: Array, labels: Array) -> tuple[Array, Array, Array]:
        mass = share * jnp.where(jnp.isinf(nearest), 1, nearest)
        candidates = drawn(points, mass, jax.random.fold_in(key, number), trials)
        distances = k_means._distances(candidates, points)

        def explained(distances: Array) -> Array:
            moved = jnp.where(distances < nearest, index, labels)
            mass = jax.ops.segment_sum(share, moved, n_clusters)
            total = jax.ops.segment_sum(share[:, None] * points, moved, n_clusters)
            return jnp.sum(jnp.sum(total**2, axis=1) / jnp.where(mass > 0, mass, 1))

        best = jnp.argmax(jax.lax.map(explained, distances.T))
        is_nearer = distances[:, best] < nearest
        nearest = jnp.where(is_nearer, distances[:, best], nearest)
        return centers.at[index].set(candidates[best]), nearest, jnp.where(is_nearer, index, labels)

    def again(number: Array, centers: Array) -> Array:
        index = n_clusters - 1 - number
        others = jnp.where(jnp.arange(n_clusters)[None] == index, jnp.inf, k_means._distances(centers, points))
        labels = jnp.argmin(others, axis=1).astype(jnp.int32)
        return pick(n_clusters + number, index, centers, jnp.min(others, axis=1), labels)[0]

    nearest, labels = jnp.full(share.shape, jnp.inf, points.dtype), jnp.zeros(share.shape, jnp.int32)
    first = jax.lax.fori_loop(
        0, n_clusters, lambda index, state: pick(index, index, *state), (centers, nearest, labels)
    )
    return jax.lax.fori_loop(0, n_clusters, again, first[0])


def two_nearest(distances: Array) -> tuple[Array, Array, Array]:
    """Number of the nearest centre, and distances of it and of the next (N,), from those of all (N, K)."""
    labels, nearest = jnp.argmin(distances, axis=1), jnp.min(distances, axis=1)
    is_nearest = jnp.arange(distances.shape[1])[None] == labels[:, None]
    return labels, nearest, jnp.min(jnp.where(is_nearest, jnp.inf, distances), axis=1)


def local_search(points: Array, share: Array, direction: Array, key: Array, known: Any, *given: Any) -> Array:
    """Greedy seeds, and K exchanges of one for a point drawn by its distance where that lowers the squares.

    Source: Lattanzi and Sohler 2019.
    """
    centers = greedy(points, share, direction, key, known, *given)

    def exchange(number: Array, centers: Array) -> Array:
        labels, nearest, second = two_nearest(k_means._distances(centers, points))
        added = drawn(points, share * nearest, jax.random.fold_in(key, len(centers) + number), 1)
        distance = k_means._distances(added, points)[:, 0]
        kept = jnp.minimum(distance, nearest)
        lost = share * (jnp.minimum(distance, second) - kept)
        cost = jnp.sum(share * kept) + jax.ops.segment_sum(lost, labels, len(centers))
        least = jnp.argmin(cost)
        return jnp.where(cost[least] < jnp.sum(share * nearest), centers.at[least].set(added[0]), centers)

    return jax.lax.fori_loop(0, len(centers), exchange, centers)


def pooled(points: Array, share: Array, direction: Array, key: Array, known: Any, *given: Any) -> Array:
    """Of the centres of two short runs of k-means those that are left when the least useful go, one after another."""
    runs = [
        k_means._moved(points, share, greedy(points, share, direction, own, known, *given), known, FEW_STEPS, None)
        for own in jax.random.split(key)
    ]
    both, count = jnp.concatenate(runs), len(runs[0])
    distances = k_means._distances(both, points)

    def drop(_: int, is_kept: Array) -> Array:
        labels, nearest, second = two_nearest(jnp.where(is_kept[None], distances, jnp.inf))
        cost = jax.ops.segment_sum(share * (second - nearest), labels, 2 * count)
        return is_kept.at[jnp.argmin(jnp.where(is_kept, cost, jnp.inf))].set(False)

    is_kept = jax.lax.fori_loop(0, count, drop, jnp.ones(2 * count, bool))
    return both[jnp.nonzero(is_kept, size=count)[0]]


def plain(fit: Fit, wide: Fit, key: Array) -> Start:
    """The start of `fit_em`."""
    return fit.start(key)


def pruned(fit: Fit, wide: Fit, key: Array) -> Start:
    """That of a mixture with more components, without the least useful ones."""
    natural, regularizer = wide.start(key)
    return without_least(fit, own_moments(natural)), regularizer


def united(fit: Fit, wide: Fit, key: Array) -> Start:
    """The components of two starts, in the latent space of the first, without the least useful ones."""
    (natural, regularizer), (other, _) = (fit.start(own) for own in jax.random.split(key))
    one, two = own_moments(natural), own_moments(other)
    scaled = one.noise.inverse().times(one.loadings)
    into = jnp.linalg.solve(one.loadings.T @ scaled, scaled.T)
    turn = into @ two.loadings
    means = two.means @ turn.T + (into @ (two.bias - one.bias))[None]
    covariances = jnp.concatenate([one.covariances.entries, turn @ two.covariances.entries @ turn.T])
    both = dataclasses.replace(
        one,
        weights=jnp.concatenate([one.weights, two.weights]) / 2,
        means=jnp.concatenate([one.means, means]),
        covariances=PositiveDefinite((covariances + jnp.swapaxes(covariances, 1, 2)) / 2),
    )
    return without_least(fit, both), regularizer


def without_least(fit: Fit, moments: Moments) -> Natural:
    """The model of the fit's K components that are left when those go whose loss costs least likelihood."""
    natural = moments_to_natural(moments).in_frame(fit.row_frame)
    shares = np.array(jnp.exp(infer(natural, fit.source.sample()[0]).log_responsibilities))
    is_kept = np.ones(shares.shape[1], bool)

    def costs(shares: np.ndarray) -> np.ndarray:
        return -np.log1p(-np.minimum(shares, 1 - 1e-6)).sum(axis=0)

    cost = costs(shares)
    while is_kept.sum() > fit.head.n_components:
        least = np.where(is_kept, cost, np.inf).argmin()
        rows = shares[:, least] > 1e-4
        before = costs(shares[rows])
        is_kept[least], shares[:, least] = False, 0
        shares[rows] /= np.maximum(shares[rows].sum(axis=1, keepdims=True), 1e-12)
        cost += costs(shares[rows]) - before
    kept = np.flatnonzero(is_kept)
    weights = moments.weights[kept]
    moments = dataclasses.replace(
        moments, weights=weights / weights.sum(), means=moments.means[kept],
        covariances=PositiveDefinite(moments.covariances.entries[kept]),
    )  # fmt: skip
    return moments_to_natural(moments).in_frame(fit.frame)


KINDS: dict[str, tuple[Seeds, Callable[[Fit, Fit, Array], Start], float]] = {
    "as it is": (greedy, plain, 1),
    "uniform seeds": (uniform, plain, 1),
    "lookahead, second pass": (lookahead, plain, 1),
    "local search": (local_search, plain, 1),
    "two runs of k-means, pooled": (pooled, plain, 1),
    "half as many again, pruned": (greedy, pruned, 1.5),
    "two starts, united": (greedy, united, 1),
}
"""Seeds, function that starts, and how many times K components its second fit has."""


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.seeding")
