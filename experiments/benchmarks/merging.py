"""Methods to merge the components of an over-clustered linear HMoG, over steps of EM and data sets; scored by labels.

    python -m experiments.benchmarks.merging [--paths usps_9298.npz optdigits.npz pendigits.npz]

scikit-learn's digits always; files hold `X` and `y`. Ten clusters; mean NMI and ACC over seeds on the fitted rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from sklearn.datasets import load_digits

from flax_hmog import AnalyticHMoG, EMState, Natural, PseudoCounts, fit_em, infer
from flax_hmog.analysis import (
    cluster_hierarchy,
    clustering_metrics,
    co_assignment,
    component_affinity,
    information_hierarchy,
    merge_clusters,
    merge_components,
    merged_responsibilities,
)
from flax_hmog.analysis.merging import normalized_cut

N_CLUSTERS, NOISE_SHARE = 10, 0.01
SIZES = {16: (10, 60), 64: (20, 80)}  # L and K by the number of columns
LARGE = 30, 100


def main(paths: tuple[Path, ...] = (), seeds: int = 3, steps: tuple[int, ...] = (5, 15, 40)) -> None:
    """Compare ways to merge components.

    Args:
        paths: .npz files beside scikit-learn's digits.
        seeds: initialisations.
        steps: after which steps of EM components are merged.
    """
    digits = load_digits(return_X_y=True)
    data = {"digits": digits} | {path.stem: tuple(np.load(path)[name] for name in ("X", "y")) for path in paths}
    console = Console(width=160)
    for name, (rows, labels) in data.items():
        x = (rows.reshape(len(rows), -1) / rows.max()).astype(np.float32)
        scores: dict[str, dict[int, list[tuple[float, float]]]] = {}
        for seed in range(seeds):
            for step, natural in fits(x, seed, steps):
                output = infer(natural, x)
                for method, clusters in merges(np.asarray(output.log_responsibilities), natural):
                    assigned = merged_responsibilities(np.exp(output.log_responsibilities), clusters).argmax(axis=1)
                    found = clustering_metrics(labels, assigned)
                    pair = found["nmi"], found["accuracy"]
                    scores.setdefault(method, {}).setdefault(step, []).append(pair)
        title = f"{name}: NMI / ACC after steps of EM, mean over {seeds} seeds"
        table = Table("method", *map(str, steps), "mean", title=title)
        for method, by_step in scores.items():
            means = [np.mean(by_step[step], axis=0) for step in steps]
            table.add_row(method, *("{:.3f} / {:.3f}".format(*pair) for pair in [*means, np.mean(means, axis=0)]))
        console.print(table)


def fits(x: np.ndarray, seed: int, steps: tuple[int, ...]) -> Iterator[tuple[int, Natural]]:
    """Models after so many steps of EM; the last one where it has converged before."""
    found: dict[int, Natural] = {}

    def on_step(state: EMState) -> None:
        if state.natural is not None:
            found.update({step: state.natural for step in steps if step >= len(state.history)})

    head = AnalyticHMoG(*SIZES.get(x.shape[1], LARGE))
    counts = PseudoCounts(noise=max(1.0, NOISE_SHARE * len(x)))
    fit_em(head, x, jax.random.key(seed), regularizer=counts, max_steps=max(steps), tolerance=1e-9, on_step=on_step)
    yield from found.items()


def merges(log_responsibilities: np.ndarray, natural: Natural) -> Iterator[tuple[str, np.ndarray]]:
    """The cluster of each component, by each method."""
    responsibilities = np.exp(log_responsibilities)
    cosine = co_assignment(responsibilities, normalize="cosine")
    yield "average linkage of co-assignment", merge_clusters(cluster_hierarchy(responsibilities), N_CLUSTERS)
    yield "Ward on -log co-assignment", merge_clusters(ward(-np.log(np.maximum(cosine, 1e-12))), N_CLUSTERS)
    for measure in ("kl", "bhattacharyya"):
        linkage = cluster_hierarchy(natural, measure=measure)
        yield f"average linkage of {measure}", merge_clusters(linkage, N_CLUSTERS)
    yield "cut of co-assignment", normalized_cut(responsibilities.T @ responsibilities, N_CLUSTERS)
    affinity = component_affinity(log_responsibilities)
    yield "cut of affinity", normalized_cut(affinity, N_CLUSTERS)
    root = np.sqrt(np.diag(affinity))
    distances = 1 - affinity / root[:, None] / root
    yield "average linkage of affinity", merge_clusters(linked(distances, "average"), N_CLUSTERS)
    yield "information of affinity, greedy", merge_clusters(information_hierarchy(affinity), N_CLUSTERS)
    for temperature in (1.0, 4.0, 8.0, 16.0, 32.0):
        merged = merge_components(log_responsibilities, N_CLUSTERS, temperature=temperature)
        yield f"information of affinity, refined, temperature {temperature:g}", merged


def ward(distances: np.ndarray) -> np.ndarray:
    """Ward's linkage, as if the distances were Euclidean."""
    return linked(distances, "ward")


def linked(distances: np.ndarray, method: str) -> np.ndarray:
    """Linkage of symmetric distances (K, K)."""
    np.fill_diagonal(distances, 0)
    return hierarchy.linkage(squareform(np.maximum(distances, 0), checks=False), method)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.merging")
