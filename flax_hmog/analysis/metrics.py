"""How well clusters agree with known labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from flax_hmog.analysis.inputs import as_labels, require


def contingency_table(labels: Any, assignments: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of samples by cluster and label.

    Args:
        labels: known labels (N,), of any kind that sorts.
        assignments: clusters (N,).

    Returns:
        Counts (clusters, labels), int; the clusters that occur (clusters,) and the labels that occur (labels,), sorted.

    Raises:
        ValueError: unless there is one label for each assignment.
    """
    labels = as_labels("contingency_table", "labels", labels)
    assignments = as_labels("contingency_table", "assignments", assignments, labels.size)
    columns, column = np.unique(labels, return_inverse=True)
    rows, row = np.unique(assignments, return_inverse=True)
    counts = np.bincount(row * columns.size + column, minlength=rows.size * columns.size)
    return counts.reshape(rows.size, columns.size), rows, columns


def clustering_metrics(labels: Any, assignments: Any) -> dict[str, float]:
    """Agreement of clusters with known labels; none depends on how clusters are numbered.

    Args:
        labels: known labels (N,).
        assignments: clusters (N,).

    Returns:
        "nmi", mutual information over the mean of both entropies, 0 to 1; "ari", adjusted Rand index, 1 at best, 0
        expected by chance; "accuracy", the share of samples in the right cluster when labels and clusters are matched
        one to one in the best way (clusters beyond the number of labels count as wrong).

    Raises:
        ImportError: without scikit-learn.
        ValueError: unless there is one label for each assignment.
    """
    scores = require("sklearn.metrics", "clustering_metrics", "experiments")
    counts, _, _ = contingency_table(labels, assignments)
    matched = counts[linear_sum_assignment(counts, maximize=True)].sum()
    labels, assignments = np.asarray(labels), np.asarray(assignments)
    return {
        "nmi": float(scores.normalized_mutual_info_score(labels, assignments)),
        "ari": float(scores.adjusted_rand_score(labels, assignments)),
        "accuracy": float(matched / labels.size),
    }
