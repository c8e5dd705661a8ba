"""`fit_features` beside k-means and Gaussian mixtures, on embeddings of sentences; scored by labels, seeds 0 to 4.

    python -m experiments.benchmarks.features                 # the table of docs/features.md, extra sentences
    python -m experiments.benchmarks.features --held-out .2   # scores of new rows
    python -m experiments.benchmarks.features --sizes         # held-out log-density beside NMI, by factors and noise

Everyone gets the same rows of unit length and the number of classes. UMAP runs where `umap-learn` is installed.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import tyro
from scipy import sparse
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import kneighbors_graph

from experiments.sentences import SETS, load_sentences
from flax_hmog import AnalyticHMoG, PseudoCounts, fit_em, infer
from flax_hmog.analysis import clustering_metrics, merge_components, merged_responsibilities
from flax_hmog.recipe import fit_features, fit_neighbors
from flax_hmog.recipe.features import ROWS_PER_COMPONENT

AXES, NEIGHBORS, ROUNDS, STARTS = 50, 10, 2, 10
FACTORS = 10, 20, 40
PACKAGES = "jax", "numpy", "scipy", "scikit-learn", "sentence-transformers", "umap-learn"
Found = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]


def main(
    sets: tuple[str, ...] = tuple(SETS),
    seeds: int = 5,
    held_out: float = 0.0,
    folder: Path = Path("data"),
    only: tuple[str, ...] = (),
    sizes: bool = False,
) -> None:
    """Compare them.

    Args:
        sets: of sentences.
        seeds: of all methods, and of the rows that are held out.
        held_out: share of the rows that are put into clusters of the others, and scored.
        folder: where embeddings are kept.
        only: beginnings of the names of methods; all without it.
        sizes: compare numbers of factors and kinds of noise instead.
    """
    print(*(f"{name} {metadata.version(name)}" for name in PACKAGES if _is_there(name)), sep=", ")
    for name in sets:
        x, y, digest = load_sentences(name, folder)
        counts = f"{x.shape[0]} rows, {x.shape[1]} columns, {len(np.unique(y))} classes"
        print(f"{name}, texts {digest}: {counts}", flush=True)
        if sizes:
            compare_sizes(x, y, seeds)
        else:
            compare_methods(x, y, seeds, held_out, only)


def compare_methods(x: np.ndarray, y: np.ndarray, seeds: int, held_out: float, only: tuple[str, ...]) -> None:
    """A line for each method."""
    for method, function in methods(len(np.unique(y))):
        if only and not method.startswith(only):
            continue
        rows, start = [], time.process_time()
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(y))
            test, train = np.split(order, [int(held_out * len(y))])
            found, of_new = function(x[train], seed)
            scores = clustering_metrics(y[test], of_new(x[test])) if held_out else clustering_metrics(y[train], found)
            rows.append([scores["nmi"], scores["ari"], scores["accuracy"]])
        seconds = (time.process_time() - start) / seeds
        shown = zip(("NMI", "ARI", "ACC"), np.mean(rows, axis=0), np.std(rows, axis=0), strict=True)
        text = "  ".join(f"{score} {mean:.3f}±{spread:.3f}" for score, mean, spread in shown)
        print(f"  {method:36s} {text} {seconds:5.0f} CPU-seconds", flush=True)


def compare_sizes(x: np.ndarray, y: np.ndarray, seeds: int) -> None:
    """A line for each number of factors and kind of noise, of the rows and of their averages; a fifth is held out.

    The log-density of a row that is held out is in nats; averages are no independent draws: theirs says nothing.
    """
    n_clusters = len(np.unique(y))
    n_components = max(n_clusters, min(2 * n_clusters, (len(y) - len(y) // 5) // ROWS_PER_COMPONENT))
    options: dict[str, Any] = {"regularizer": PseudoCounts(shrinkage="auto"), "tolerance": 1e-2}
    for is_averaged, kind, lat_dim in itertools.product((False, True), ("scale", "diagonal"), FACTORS):
        found = []
        for seed in range(seeds):
            test, train = np.split(np.random.default_rng(seed).permutation(len(y)), [len(y) // 5])
            rows = averaged(x[train]).astype(np.float32) if is_averaged else x[train]
            head = AnalyticHMoG(lat_dim, n_components, obs_rep=kind)
            natural = fit_em(head, rows, jax.random.key(seed), **options).natural
            logs = infer(natural, rows).log_responsibilities
            merged = merged_responsibilities(np.exp(np.asarray(logs)), merge_components(logs, n_clusters))
            nmi = clustering_metrics(y[train], np.asarray(merged).argmax(axis=1))["nmi"]
            found.append([float(infer(natural, x[test]).log_density.mean()), nmi])
        (density, nmi), (_, spread) = np.mean(found, axis=0), np.std(found, axis=0)
        held_out = "" if is_averaged else f"  held-out log-density {density:.1f}"
        name = "averages" if is_averaged else "rows"
        print(f"  {name:9s} {kind:9s} L {lat_dim:2d}  NMI {nmi:.3f}±{spread:.3f}{held_out}", flush=True)


def _is_there(distribution: str) -> bool:
    module = {"scikit-learn": "sklearn", "umap-learn": "umap"}.get(distribution, distribution.replace("-", "_"))
    return importlib.util.find_spec(module) is not None


def methods(n_clusters: int) -> Iterator[tuple[str, Callable[[np.ndarray, int], Found]]]:
    """Name, and by rows and seed the clusters of the rows and a function that gives those of new ones."""

    def ours(x: np.ndarray, seed: int, n_neighbors: int = NEIGHBORS) -> Found:
        found = fit_features(x, n_clusters, jax.random.key(seed), n_neighbors=n_neighbors)
        return found.assignments, lambda new: found(new).argmax(axis=1)

    def encoder(x: np.ndarray, seed: int) -> Found:
        found = fit_neighbors(x, n_clusters, jax.random.key(seed))
        of = lambda rows: np.asarray(found(rows).log_responsibilities).argmax(axis=1)  # noqa: E731
        return of(x), of

    def mixture(x: np.ndarray, seed: int, kind: str) -> Found:
        axes = PCA(AXES, random_state=seed).fit(x)
        model = GaussianMixture(n_clusters, covariance_type=kind, random_state=seed).fit(axes.transform(x))
        return model.predict(axes.transform(x)), lambda new: model.predict(axes.transform(new))

    def averages(x: np.ndarray, seed: int) -> Found:
        model = KMeans(n_clusters, n_init=STARTS, random_state=seed).fit(averaged(x))
        return model.labels_, lambda new: model.predict(averaged(np.concatenate([x, new]))[len(x) :])

    def umap(x: np.ndarray, seed: int) -> Found:
        places = importlib.import_module("umap").UMAP(n_components=10, metric="cosine", random_state=seed).fit(x)
        model = KMeans(n_clusters, n_init=STARTS, random_state=seed).fit(places.embedding_)
        return model.labels_, lambda new: model.predict(places.transform(new))

    yield "fit_features", ours
    yield "fit_features(n_neighbors=0)", lambda x, seed: ours(x, seed, 0)
    yield "fit_neighbors, an encoder", encoder
    yield "spherical k-means", lambda x, seed: spherical_kmeans(x, seed, n_clusters)
    yield f"PCA ({AXES}) + GMM, full", lambda x, seed: mixture(x, seed, "full")
    yield f"PCA ({AXES}) + GMM, diagonal", lambda x, seed: mixture(x, seed, "diag")
    yield "averages over neighbours, k-means", averages
    if _is_there("umap-learn"):
        yield "UMAP (10, cosine) + k-means", umap


def spherical_kmeans(x: np.ndarray, seed: int, n_clusters: int) -> Found:
    """Clusters of unit rows by the largest cosine with centres of unit length, the best of ten starts."""
    best: tuple[float, np.ndarray] = -np.inf, x[:0]
    for start in range(STARTS):
        centres, before = kmeans_plusplus(x, n_clusters, random_state=STARTS * seed + start)[0], None
        while (clusters := (x @ centres.T).argmax(axis=1)).tolist() != before:
            sums, before = np.eye(n_clusters, dtype=x.dtype)[clusters].T @ x, clusters.tolist()
            lengths = np.linalg.norm(sums, axis=1, keepdims=True)
            centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centres)
        best = max(best, (float((x @ centres.T).max(axis=1).sum()), centres), key=lambda pair: pair[0])
    nearest = lambda rows: (rows @ best[1].T).argmax(axis=1)  # noqa: E731
    return nearest(x), nearest


def averaged(x: np.ndarray) -> np.ndarray:
    """Unit rows averaged twice over their ten neighbours by cosine and those that have them as such, hubs less."""
    near = kneighbors_graph(x, NEIGHBORS, metric="cosine")
    graph = near + near.T + sparse.eye_array(len(x))
    root = sparse.diags_array(1 / np.sqrt(np.asarray(graph.sum(axis=1)).ravel()))
    for _ in range(ROUNDS):
        x = root @ graph @ root @ x
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x


if __name__ == "__main__":
    tyro.cli(main)
