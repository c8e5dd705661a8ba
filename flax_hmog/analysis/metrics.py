"""Agreement of clusters with known labels, and with those of other fits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from flax_hmog.analysis.inputs import as_labels
from flax_hmog.data.labels import as_vector, is_known, of_one_kind
from flax_hmog.model.checks import door, public
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Samples


@public
def contingency_table(labels: Samples, assignments: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of samples by cluster and label.

    Samples without a label (None, NaN, NA of pandas, empty text, masked) do not count; integers such as -1 are labels.

    Args:
        labels: known labels (N,), of any kind that sorts.
        assignments: clusters (N,).

    Returns:
        Counts (clusters, labels), int; the clusters that occur (clusters,) and the labels that occur (labels,), sorted.

    Raises:
        ValueError: unless there is one label for each assignment, and one that is known.

    Example:
        >>> counts, clusters, names = contingency_table(["a", "a", "b"], [1, 1, 0])
        >>> counts.tolist(), names.tolist()
        ([[0, 1], [2, 0]], ['a', 'b'])
    """
    labels, assignments = _labelled(labels, assignments)
    columns, column = np.unique(labels, return_inverse=True)
    rows, row = np.unique(assignments, return_inverse=True)
    counts = np.bincount(row * columns.size + column, minlength=rows.size * columns.size)
    return counts.reshape(rows.size, columns.size), rows, columns


@public
def clustering_metrics(labels: Samples, assignments: Samples) -> dict[str, float]:
    """Agreement of clusters with known labels; none depends on how clusters are numbered.

    Samples without a label (None, NaN, NA of pandas, empty text, masked) do not count; integers such as -1 are labels.

    Args:
        labels: known labels (N,).
        assignments: clusters (N,).

    Returns:
        "nmi", mutual information over the mean of both entropies, 0 to 1; "ari", adjusted Rand index, 1 at best, 0
        expected by chance; "accuracy", the share of samples in the right cluster when labels and clusters are matched
        one to one in the best way (clusters beyond the number of labels count as wrong). Where labels are missing also
        "labelled", the number of samples that have one.

    Raises:
        ImportError: without scikit-learn.
        ValueError: unless there is one label for each assignment, and one that is known.

    Example:
        >>> clustering_metrics(["a", "a", "b"], [1, 1, 0])["accuracy"]
        1.0
    """
    scores = require("sklearn.metrics", "cluster")
    count = len(as_labels("assignments", assignments))
    labels, assignments = _labelled(labels, assignments)
    counts, _, _ = contingency_table(labels, assignments)
    matched = counts[linear_sum_assignment(counts, maximize=True)].sum()
    metrics = {
        "nmi": float(scores.normalized_mutual_info_score(labels, assignments)),
        "ari": float(scores.adjusted_rand_score(labels, assignments)),
        "accuracy": float(matched / labels.size),
    }
    return metrics if labels.size == count else metrics | {"labelled": int(labels.size)}


@public
def fit_agreement(assignments: Sequence[Samples]) -> Float[np.ndarray, "S S"]:
    """The adjusted Rand index between every two of several clusterings of the same rows, without labels.

    Clusters that fits with other seeds find again are no chance of the start. Of several fits, that which agrees most
    with the others, the largest row sum, is mostly better than the average one, where log-densities say nothing of
    clusters (docs/results.md). Two clusterings that put all rows into one cluster agree on nothing: 0.

    Args:
        assignments: clusters (N,) of each of S fits, numbered in any way.

    Returns:
        Agreement (S, S), symmetric, from -0.5 to 1; 1 on its diagonal.

    Raises:
        ImportError: without scikit-learn.
        ValueError: unless all are of the same rows, and there is one at least.

    Source: Hubert and Arabie 1985; Ben-Hur, Elisseeff and Guyon 2002 (what is found again).

    Example:
        >>> agreement = fit_agreement([[0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 2, 2], [0, 1, 0, 1, 0, 1]])
        >>> agreement.round(2).tolist()[0], int(agreement.sum(axis=1).argmax())
        ([1.0, 1.0, -0.36], 0)
    """
    scores = require("sklearn.metrics", "cluster")
    if not len(assignments):
        raise ValueError(f"{door()}: `assignments` must hold one clustering at least; got none. Fit first.")
    rows = len(as_labels("assignments[0]", assignments[0]))
    clusters = [as_labels(f"assignments[{s}]", found, rows) for s, found in enumerate(assignments)]
    is_one = [bool((found == found[0]).all()) for found in clusters]
    agreement = np.eye(len(clusters))
    for one, other in combinations(range(len(clusters)), 2):
        if not (is_one[one] and is_one[other]):
            score = scores.adjusted_rand_score(clusters[one], clusters[other])
            agreement[one, other] = agreement[other, one] = score
    return agreement


def _labelled(labels: Samples, assignments: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Labels and clusters of the samples whose label is known."""
    vector = as_labels("labels", as_vector(labels))
    assignments = as_labels("assignments", assignments, vector.size)
    known = is_known(vector)
    if not known.any():
        raise ValueError(
            f"{door()}: `labels` must have one that is known; got {vector.size} that are missing. "
            "Leave the comparison out."
        )
    return of_one_kind("labels", vector[known]), assignments[known]
