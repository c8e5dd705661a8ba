"""Components merged by the flow between them, without a preference for equal sizes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from flax_hmog.analysis.affinity import x_log_x
from flax_hmog.analysis.inputs import as_array
from flax_hmog.model.checks import check_size, door, public
from flax_hmog.model.typed import Floats, Samples


@public
def merge_by_flow(flow: Samples, n_clusters: int) -> Int[np.ndarray, " K"]:
    """Merge components so that a walk over the samples is described in few words: it seldom leaves a cluster.

    With p_i the share of the flow in cluster i, q_i the share that leaves it, and Q their sum, a step of the walk takes

        L = Q log Q - 2 sum_i q_i log q_i + sum_i (p_i + q_i) log (p_i + q_i)

    nats, up to a constant. The two clusters are merged for which it falls most, until so many are left; components
    without any flow first. Large and small clusters are worth as much as what flows within them.

    Args:
        flow: from one component to the other (K, K), symmetric, at least 0.
        n_clusters: from 1 to K.

    Returns:
        The cluster of each component (K,), int, numbered in the order of their first components.

    Raises:
        TypeError: if `flow` holds no real numbers.
        ValueError: if it is not symmetric, or has negative entries or only zeros; for a number of clusters that is out
            of bounds.

    Source: Rosvall and Bergstrom 2008.

    Example:
        >>> merge_by_flow([[2.0, 1.0, 0.1], [1.0, 2.0, 0.0], [0.1, 0.0, 4.0]], 2).tolist()
        [0, 0, 1]
    """
    table = as_array("flow", flow, 2, "(K, K)").astype(np.float64)
    is_square = table.shape == table.shape[::-1]
    if not is_square or not np.allclose(table, table.T, atol=1e-9 * table.max()) or table.min() < 0 or not table.any():
        raise ValueError(
            f"{door()}: `flow` must be symmetric, (K, K), at least 0 and not all 0; got shape {table.shape}. Add its "
            "transpose."
        )
    check_size("n_clusters", n_clusters, at_most=len(table))
    labels, table = np.arange(len(table)), table / table.sum()
    while len(table) > n_clusters:
        gains = _gains(table)
        gains[np.tril_indices(len(table))] = -np.inf
        left, right = np.unravel_index(int(gains.argmax()), gains.shape)
        table[left] += table[right]
        table[:, left] += table[:, right]
        table = np.delete(np.delete(table, right, axis=0), right, axis=1)
        labels[labels == right] = left
        labels[labels > right] -= 1
    return labels


def _gains(table: Floats) -> Floats:
    """Nats by which the description becomes shorter if two clusters are merged (K, K)."""
    share = table.sum(axis=1)
    leaves = share - np.diag(table)
    apart = leaves[:, None] + leaves
    joint = np.maximum(apart - 2 * table, 0)  # leaves both of them
    left = np.maximum(leaves.sum() - apart + joint, 0)
    own = x_log_x(share + leaves) - 2 * x_log_x(leaves)
    before = x_log_x(leaves.sum()) + own[:, None] + own
    gains: Floats = before - x_log_x(left) + 2 * x_log_x(joint) - x_log_x(joint + share[:, None] + share)
    empty = share == 0
    gains[empty] = gains[:, empty] = np.inf
    return gains
