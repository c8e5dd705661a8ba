"""Components merged by the flow between them, without a preference for equal sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from flax_hmog.analysis.affinity import in_order, x_log_x
from flax_hmog.analysis.inputs import as_array
from flax_hmog.model.checks import check_size, door, public
from flax_hmog.model.typed import Floats, Samples

LONGER = 5  # walks of 1, 2, 4, 8 and 16 steps from which merges start
SWEEPS = 20  # over components that may move
LEAST_GAIN = 1e-12


@public
def merge_by_flow(flow: Samples, n_clusters: int) -> Int[np.ndarray, " K"]:
    """Merge components so that a walk over the samples is described in few words: it seldom leaves a cluster.

    With p_i the share of the flow in cluster i, q_i the share that leaves it, and Q their sum, a step of the walk takes

        L = Q log Q - 2 sum_i q_i log q_i + sum_i (p_i + q_i) log (p_i + q_i)

    nats, up to a constant. The two clusters are merged for which it falls most, until so many are left, components
    without any flow first; then single components move while it falls. Of such starts from walks of 1 to 16 steps the
    one with the shortest description wins. Large and small clusters are worth as much as what flows within them.

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
    table = table / table.sum()
    found = [_refined(table, _greedy(walk, n_clusters), n_clusters) for walk in _longer_walks(table)]
    best = min(found, key=lambda clusters: _description(_between(table, clusters, n_clusters)))
    return in_order(best)


def _longer_walks(table: Floats) -> Iterator[Floats]:
    """The flow of one, two, four ... steps of a walk over components."""
    share = table.sum(axis=1, keepdims=True)
    step = table / np.where(share > 0, share, 1)
    for _ in range(LONGER):
        yield table
        table, step = table @ step, step @ step


def _greedy(table: Floats, n_clusters: int) -> Int[np.ndarray, " K"]:
    """The two clusters are merged by which the description becomes shortest, until so many are left."""
    labels = np.arange(len(table))
    while len(table) > n_clusters:
        gains = _gains(table)
        gains[np.tril_indices(len(table))] = -np.inf
        left, right = np.unravel_index(int(gains.argmax()), gains.shape)
        table = table.copy()
        table[left] += table[right]
        table[:, left] += table[:, right]
        table = np.delete(np.delete(table, right, axis=0), right, axis=1)
        labels[labels == right] = left
        labels[labels > right] -= 1
    return labels


def _refined(table: Floats, labels: Int[np.ndarray, " K"], n_clusters: int) -> Int[np.ndarray, " K"]:
    """Single components move to the cluster that makes the description shortest, until none does."""
    labels, own = labels.copy(), np.diag(table)
    between = _between(table, labels, n_clusters)
    share = between.sum(axis=1)
    leaves = share - np.diag(between)
    for _ in range(SWEEPS):
        has_moved = False
        for number, here in enumerate(labels):
            if np.sum(labels == here) == 1:
                continue
            to = np.bincount(labels, table[number], n_clusters)
            size, out = to.sum(), to.sum() - own[number]
            # the cluster without it, and every other with it
            rest = share[here] - size, leaves[here] - (size - to[here]) + (to[here] - own[number])
            shares, left = share + size, leaves + out - 2 * to
            total = leaves.sum() - leaves[here] + rest[1] - leaves + left
            change = (
                x_log_x(total) - x_log_x(leaves.sum())
                + _term(*rest) - _term(share[here], leaves[here])
                + _term(shares, left) - _term(share, leaves)
            )  # fmt: skip
            change[here] = 0
            there = int(change.argmin())
            if change[there] < -LEAST_GAIN:
                labels[number], has_moved = there, True
                share[[here, there]], leaves[[here, there]] = (rest[0], shares[there]), (rest[1], left[there])
        if not has_moved:
            break
    return labels


def _between(table: Floats, labels: Int[np.ndarray, " K"], n_clusters: int) -> Floats:
    """Flow between clusters (C, C)."""
    member = np.eye(n_clusters)[labels]
    between: Floats = member.T @ table @ member
    return between


def _term(share: Any, leaves: Any) -> Any:
    """The part of a cluster in the description."""
    leaves = np.maximum(leaves, 0)  # of rounding
    return x_log_x(share + leaves) - 2 * x_log_x(leaves)


def _description(between: Floats) -> float:
    """L of `merge_by_flow`."""
    share = between.sum(axis=1)
    leaves = share - np.diag(between)
    return float(x_log_x(leaves.sum()) + _term(share, leaves).sum())


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
