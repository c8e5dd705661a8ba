"""Methods to merge the components of an over-clustered linear HMoG, over steps of EM and data sets; scored by labels.

    python -m experiments.benchmarks.merging [--paths usps_9298.npz optdigits.npz] [--unbalanced] [--counts]

scikit-learn's digits always; files hold `X`, or the parts of a CSR matrix (`data`, `indices`, `indptr`, `shape`), and
`y`. As many clusters as classes; mean NMI, ARI and ACC over seeds on the fitted rows.
"""

from __future__ import annotations

import dataclasses
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
from scipy.sparse import csr_matrix
from scipy.spatial.distance import squareform
from sklearn.datasets import load_digits

from flax_hmog import AnalyticHMoG, EMState, Natural, PseudoCounts, fit_em, infer_blocks
from flax_hmog.analysis import (
    cluster_hierarchy,
    clustering_metrics,
    co_assignment,
    component_affinity,
    information_hierarchy,
    merge_clusters,
    merge_components,
    merged_responsibilities,
    refine_modularity,
)
from flax_hmog.analysis.affinity import joint_table
from flax_hmog.analysis.coherence import join_by_links
from flax_hmog.analysis.merging import most_informative, normalized_cut

NOISE_SHARE, CELL_COUNTS = 0.01, 10.0  # pseudo-samples: of noise, over rows; of each component of single cells
SIZES = {16: (10, 60), 64: (20, 80)}  # L and K by the number of columns
LARGE = 30, 100
SHARES = 1, 3, 10, 30  # of classes of unbalanced subsets
SMALLEST_CLASS = 20  # rows
METRICS = "nmi", "ari", "accuracy"


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare ways to merge components.

    Args:
        paths: .npz files beside scikit-learn's digits.
        seeds: initialisations, and draws of subsets.
        steps: after which steps of EM components are merged.
        lat_dim: number of factors; None for 10, 20 or 30, by the number of columns.
        n_components: number of components; None for 60, 80 or 100.
        unbalanced: draw subsets whose classes have sizes 1 : 3 : 10 : 30, in turn in a random order.
        counts: rows are counts of single cells: divided by their sums, times the median sum, and log(1 + x).
        short: today's merge, the two that it chooses from, and the majority class of each component alone.
    """

    paths: tuple[Path, ...] = ()
    seeds: int = 3
    steps: tuple[int, ...] = (5, 15, 40)
    lat_dim: int | None = None
    n_components: int | None = None
    unbalanced: bool = False
    counts: bool = False
    short: bool = False


def main(args: Args) -> None:
    """Print one table for each data set."""
    digits = load_digits(return_X_y=True)
    console = Console(width=170)
    for name, rows, labels in [("digits", *digits), *((path.stem, *labelled_rows(path)) for path in args.paths)]:
        scores: dict[str, dict[int, list[list[float]]]] = {}
        for seed in range(args.seeds):
            kept = unbalanced(labels, seed) if args.unbalanced else np.arange(len(labels))
            x, classes = prepared(rows[kept], counts=args.counts), labels[kept]
            for step, natural in fits(x, seed, args):
                output = infer_blocks(natural, x)
                logs = np.asarray(output.log_responsibilities)
                for method, clusters in merges(logs, natural, classes, short=args.short):
                    assigned = merged_responsibilities(np.exp(logs), clusters).argmax(axis=1)
                    found = clustering_metrics(classes, assigned)
                    scores.setdefault(method, {}).setdefault(step, []).append([found[key] for key in METRICS])
        title = f"{name}: NMI / ARI / ACC after steps of EM, mean over {args.seeds} seeds"
        table = Table("method", *map(str, args.steps), "mean", title=title)
        for method, by_step in scores.items():
            means = [np.mean(by_step[step], axis=0) for step in args.steps]
            shown = [*means, np.mean(means, axis=0)]
            table.add_row(method, *("{:.3f} / {:.3f} / {:.3f}".format(*three) for three in shown))
        console.print(table)


def labelled_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D) and classes (N,), numbered from 0."""
    with np.load(path) as file:
        labels = np.unique(file["y"], return_inverse=True)[1]
        if "X" in file:
            return file["X"].reshape(len(labels), -1), labels
        parts = file["data"], file["indices"].astype("i4"), file["indptr"]
        return csr_matrix(parts, shape=tuple(file["shape"])).toarray(), labels


def unbalanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows of a subset whose classes have sizes 1 : 3 : 10 : 30."""
    rng = np.random.default_rng(seed)
    sizes = np.bincount(labels)
    shares = np.array(SHARES)[rng.permutation(len(sizes)) % len(SHARES)] / max(SHARES)
    wanted = np.maximum(SMALLEST_CLASS, (sizes.max() * shares).astype(int))
    classes = enumerate(np.minimum(sizes, wanted))
    return np.concatenate([rng.choice(np.flatnonzero(labels == k), size, replace=False) for k, size in classes])


def prepared(rows: np.ndarray, *, counts: bool) -> np.ndarray:
    """Rows as they are fitted: over their largest value, or logarithms of counts at the median depth."""
    if not counts:
        return (rows / np.abs(rows).max()).astype(np.float32)
    depth = rows.sum(axis=1, keepdims=True)
    return np.log1p(rows * (np.median(depth) / np.maximum(depth, 1))).astype(np.float32)


def fits(x: np.ndarray, seed: int, args: Args) -> Iterator[tuple[int, Natural]]:
    """Models after so many steps of EM; the last one where it has converged before."""
    found: dict[int, Natural] = {}

    def on_step(state: EMState) -> None:
        if state.natural is not None:
            found.update({step: state.natural for step in args.steps if step >= len(state.history)})

    lat_dim, n_components = SIZES.get(x.shape[1], LARGE)
    lat_dim = min(args.lat_dim or lat_dim, x.shape[1] - 1)
    counts = PseudoCounts(noise=max(1.0, NOISE_SHARE * len(x)))
    if args.counts:
        counts = dataclasses.replace(counts, components=CELL_COUNTS)
    head = AnalyticHMoG(lat_dim, args.n_components or n_components)
    steps = max(args.steps)
    fit_em(head, x, jax.random.key(seed), regularizer=counts, max_steps=steps, tolerance=1e-9, on_step=on_step)
    yield from found.items()


def merges(
    log_responsibilities: np.ndarray, natural: Natural, classes: np.ndarray, *, short: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """The cluster of each component, by each method."""
    n_clusters, affinity = int(classes.max()) + 1, component_affinity(log_responsibilities)
    if not short:
        yield from others(log_responsibilities, natural, affinity, n_clusters)
    yield "information", most_informative(affinity, n_clusters)
    yield "links", join_by_links(joint_table(affinity), n_clusters)
    yield "merge_components", merge_components(log_responsibilities, n_clusters)
    chosen = log_responsibilities.argmax(axis=1)
    counts = np.zeros((log_responsibilities.shape[1], n_clusters))
    np.add.at(counts, (chosen, classes), 1)
    yield "majority class, by labels", np.unique(counts.argmax(axis=1), return_inverse=True)[1]


def others(
    log_responsibilities: np.ndarray, natural: Natural, affinity: np.ndarray, n_clusters: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Linkages, cuts and other temperatures."""
    responsibilities = np.exp(log_responsibilities)
    cosine = co_assignment(responsibilities, normalize="cosine")
    yield "average linkage of co-assignment", merge_clusters(cluster_hierarchy(responsibilities), n_clusters)
    yield "Ward on -log co-assignment", merge_clusters(ward(-np.log(np.maximum(cosine, 1e-12))), n_clusters)
    for measure in ("kl", "bhattacharyya"):
        linkage = cluster_hierarchy(natural, measure=measure)
        yield f"average linkage of {measure}", merge_clusters(linkage, n_clusters)
    yield "cut of co-assignment", normalized_cut(responsibilities.T @ responsibilities, n_clusters)
    yield "cut of affinity", normalized_cut(affinity, n_clusters)
    root = np.sqrt(np.maximum(np.diag(affinity), 1e-12))
    yield (
        "average linkage of affinity",
        merge_clusters(linked(1 - affinity / root[:, None] / root, "average"), n_clusters),
    )
    table = joint_table(affinity)
    yield "links over the smaller degree", join_by_links(table, n_clusters, np.minimum)
    yield "links over the product of degrees", join_by_links(table, n_clusters, np.multiply)
    for resolution in (0.3, 0.5, 1.0):
        starts = join_by_links(table, n_clusters), most_informative(affinity, n_clusters)
        refined = [refine_modularity(affinity, start, resolution=resolution) for start in starts]
        yield f"modularity, resolution {resolution:g}", max(refined, key=lambda found: found[1])[0]
    yield "information, greedy", merge_clusters(information_hierarchy(affinity), n_clusters)
    for temperature in (1.0, 4.0, 8.0, 32.0):
        warm = component_affinity(log_responsibilities, temperature=temperature)
        yield f"information, temperature {temperature:g}", most_informative(warm, n_clusters)


def ward(distances: np.ndarray) -> np.ndarray:
    """Ward's linkage, as if the distances were Euclidean."""
    return linked(distances, "ward")


def linked(distances: np.ndarray, method: str) -> np.ndarray:
    """Linkage of symmetric distances (K, K)."""
    np.fill_diagonal(distances, 0)
    return hierarchy.linkage(squareform(np.maximum(distances, 0), checks=False), method)


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.benchmarks.merging"))
