"""`fit_neighbors` beside a linear mixture, k-means, UMAP with a mixture and Leiden, on files of rows; scored by labels.

    python -m experiments.benchmarks.neighbors --paths usps_9298.npz --scale none --seeds 3

A file holds `X`, or the parts of a CSR matrix, and `y`. Everyone gets the same rows and the number of classes; all but
`fit_neighbors` and the linear mixture get their first 50 principal components. UMAP and Leiden run where `umap-learn`,
and `leidenalg` with `igraph`, are installed. NMI, ARI and ACC of the rows, and of new ones with `--held-out .2`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import tyro
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import kneighbors_graph

from experiments.benchmarks.merging import labelled_rows
from flax_hmog import AnalyticHMoG, PseudoCounts, fit_em, infer
from flax_hmog.analysis import clustering_metrics, merge_components, merged_responsibilities
from flax_hmog.recipe.neighbors import fit_neighbors

AXES, NEIGHBORS, RESOLUTIONS = 50, 15, 14
Scale = Literal["none", "standard", "counts", "unit"]
Found = dict[str, tuple[Any, Any]]


def main(
    paths: tuple[Path, ...],
    seeds: int = 3,
    scale: Scale = "standard",
    most_rows: int = 5000,
    held_out: float = 0.0,
    only: tuple[str, ...] = ("fit_neighbors", "linear", "k-means", "UMAP", "Leiden"),
) -> None:
    """Compare them.

    Args:
        paths: .npz files.
        seeds: of all methods, and of the rows that are held out.
        scale: of rows: columns at unit variance; counts with one sum, as log(1 + x); rows of unit length; as they are.
        most_rows: of a file, drawn once.
        held_out: share of the rows.
        only: methods.
    """
    for path in paths:
        x, y = read(path, scale, most_rows)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        print(f"{path.stem} {digest}: {x.shape[0]} rows, {x.shape[1]} columns, {len(np.unique(y))} classes", flush=True)
        scores: dict[str, list[list[float]]] = {}
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(y))
            rest = len(y) - int(held_out * len(y))
            train, test = order[:rest], order[rest:]
            for name, method in methods(len(np.unique(y))):
                if name not in only:
                    continue
                start = time.process_time()
                old, new = method(x[train], x[test], seed)
                row = [*measured(y[train], old), *measured(y[test], new), time.process_time() - start]
                scores.setdefault(name, []).append(row)
        for name, rows in scores.items():
            mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
            text = " ".join(f"{m:.3f}±{s:.3f}" for m, s in zip(mean[:-1], spread[:-1], strict=True))
            print(f"  {name:14s} {text} {mean[-1]:5.0f} s", flush=True)


def read(path: Path, scale: Scale, most_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels of a file."""
    x, y = labelled_rows(path)
    if scale in ("counts", "unit"):
        keep = np.abs(x).sum(axis=1) > 0
        x, y = x[keep], y[keep]
    if len(y) > most_rows:
        chosen = np.random.default_rng(0).choice(len(y), most_rows, replace=False)
        x, y = x[chosen], y[chosen]
    x = x.astype(np.float64)
    if scale == "standard":
        x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-12)
    if scale == "counts":
        sums = x.sum(axis=1, keepdims=True)
        x = np.log1p(x * np.median(sums) / sums)
    if scale == "unit":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), y


def methods(n_clusters: int) -> Iterator[tuple[str, Callable[[np.ndarray, np.ndarray, int], tuple[Any, Any]]]]:
    """Name, and clusters of rows and of new rows by rows, new rows and seed; none of new ones by Leiden."""

    def neighbors(x: np.ndarray, new: np.ndarray, seed: int) -> tuple[Any, Any]:
        found = fit_neighbors(x, n_clusters, jax.random.key(seed))
        return tuple(np.asarray(found(rows).log_responsibilities).argmax(axis=1) for rows in (x, new))

    def linear(x: np.ndarray, new: np.ndarray, seed: int) -> tuple[Any, Any]:
        head = AnalyticHMoG(min(20, x.shape[1] - 1), 4 * n_clusters)
        counts = PseudoCounts(noise_share=0.01)
        natural = fit_em(head, x, jax.random.key(seed), regularizer=counts, max_steps=30, tolerance=0.01).natural
        clusters = merge_components(infer(natural, x).log_responsibilities, n_clusters)
        rows = (np.exp(np.asarray(infer(natural, part).log_responsibilities)) for part in (x, new) if len(part))
        old, *others = (np.asarray(merged_responsibilities(part, clusters)).argmax(axis=1) for part in rows)
        return old, others[0] if others else new

    def kmeans(x: np.ndarray, new: np.ndarray, seed: int) -> tuple[Any, Any]:
        axes, model = axes_of(x), KMeans(n_clusters, n_init=5, random_state=seed)
        return model.fit_predict(axes.transform(x)), model.predict(axes.transform(new)) if len(new) else new

    yield from {"fit_neighbors": neighbors, "linear": linear, "k-means": kmeans}.items()
    if importlib.util.find_spec("umap"):
        yield "UMAP", lambda x, new, seed: with_umap(x, new, seed, n_clusters)
    if importlib.util.find_spec("leidenalg"):
        yield "Leiden", lambda x, new, seed: (leiden(x, seed, n_clusters), new[:0])


def axes_of(x: np.ndarray) -> PCA:
    """Principal components of rows."""
    return PCA(min(AXES, *x.shape), random_state=0).fit(x)


def with_umap(x: np.ndarray, new: np.ndarray, seed: int, n_clusters: int) -> tuple[Any, Any]:
    """UMAP to ten columns, and a mixture with full covariances, the best of three starts."""
    import umap

    axes, places = axes_of(x), umap.UMAP(n_components=10, min_dist=0.0, n_neighbors=NEIGHBORS, random_state=seed)
    embedded = places.fit_transform(axes.transform(x))
    mixture = GaussianMixture(n_clusters, n_init=3, random_state=seed, reg_covar=1e-4)
    old = mixture.fit_predict(embedded)
    return old, mixture.predict(places.transform(axes.transform(new))) if len(new) else new


def leiden(x: np.ndarray, seed: int, n_clusters: int) -> np.ndarray:
    """Communities of the graph of shared neighbours, at the resolution that gives so many, or nearly so."""
    import igraph
    import leidenalg

    near = kneighbors_graph(axes_of(x).transform(x), NEIGHBORS, include_self=True)
    shared = sparse.triu(near @ near.T, k=1).tocoo()  # weights by Jaccard
    weights = shared.data / (2 * NEIGHBORS - shared.data)
    kept = weights > 1 / NEIGHBORS
    graph = igraph.Graph(len(x), list(zip(shared.row[kept].tolist(), shared.col[kept].tolist(), strict=True)))
    low, high, best = 0.01, 8.0, np.zeros(len(x), int)
    for _ in range(RESOLUTIONS):
        middle = (low * high) ** 0.5
        options = {"weights": weights[kept].tolist(), "resolution_parameter": middle, "seed": seed}
        found = leidenalg.find_partition(graph, leidenalg.RBConfigurationVertexPartition, **options)
        labels = np.array(found.membership)
        count = labels.max() + 1
        if abs(count - n_clusters) <= abs(best.max() + 1 - n_clusters):
            best = labels
        if count == n_clusters:
            break
        low, high = (middle, high) if count < n_clusters else (low, middle)
    return best


def measured(y: np.ndarray, clusters: np.ndarray) -> list[float]:
    """NMI, ARI and ACC; nothing of no rows."""
    if not len(clusters) or not len(y):
        return []
    scores = clustering_metrics(y, clusters)
    return [scores["nmi"], scores["ari"], scores["accuracy"]]


if __name__ == "__main__":
    tyro.cli(main)
