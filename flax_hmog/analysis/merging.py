"""Components merged to clusters by the samples that lie between them."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Float, Int

from flax_hmog.analysis.affinity import (
    TEMPERATURE,
    affinity_of,
    as_log_responsibilities,
    in_order,
    joint_table,
    x_log_x,
)
from flax_hmog.analysis.clusters import as_membership, merge_clusters
from flax_hmog.analysis.coherence import ISOLATED, cluster_links, join_by_links, refine_modularity
from flax_hmog.model.checks import check_size, public
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Floats, Samples

SMALLEST_GAIN = 1e-12  # nats
SPLIT, MORE_COHERENT = 0.05, 3.0  # a link between clusters, and a ratio, from which clusters by links are taken


@public
def merge_components(
    log_responsibilities: Samples, n_clusters: int, *, temperature: float = TEMPERATURE
) -> Int[np.ndarray, " K"]:
    """Merge the components of a mixture to clusters of any size, by the samples between them. Deterministic.

    Two components that neighbour each other (`component_affinity`) mostly belong to one cluster. First that way to
    merge is sought for which the cluster of one of two neighbours has the most information on that of the other:
    clusters that lie apart, and are of similar size where the data leave it open. `refine_information` improves two
    starts, a normalised cut and the first merges of `information_hierarchy`.

    Where one class is much larger than the others, this splits it, and puts together small ones that have little in
    common. `cluster_links` shows it. So where a cluster holds more than a twentieth of another one's neighbours,
    clusters of any size are made by the strongest links and improved by `refine_modularity`, and taken where they are
    more than three times as coherent. docs/results.md compares this with other ways.

    Args:
        log_responsibilities: log p(z = k | x) (..., K), of the samples that the model was fitted to.
        n_clusters: from 1 to K.
        temperature: as in `component_affinity`.

    Returns:
        The cluster of each component (K,), int, numbered in the order of their first components; for
        `merged_responsibilities` and `cluster_prototypes`.

    Raises:
        ImportError: without scikit-learn.
        TypeError: if `log_responsibilities` holds no real numbers.
        ValueError: for a number of clusters that is out of bounds, or as in `component_affinity`.

    Source: Slonim and Tishby 1999 (information); Shi and Malik 2000 (cut); Reichardt and Bornholdt 2006 (modularity).

    Example:
        >>> responsibilities = np.array([[0.6, 0.39, 0.01], [0.39, 0.6, 0.01], [0.01, 0.02, 0.97]])
        >>> merge_components(np.log(responsibilities), 2).tolist()
        [0, 0, 1]
    """
    rows = as_log_responsibilities(log_responsibilities)
    count = rows.shape[1]
    check_size("n_clusters", n_clusters, at_most=count)
    if n_clusters in (1, count):
        return np.arange(count) if n_clusters > 1 else np.zeros(count, int)
    affinity = affinity_of(rows, temperature)
    informative = most_informative(affinity, n_clusters)
    links = cluster_links(affinity, informative)
    if links.between <= SPLIT:
        return informative
    linked, _ = refine_modularity(affinity, join_by_links(joint_table(affinity), n_clusters))
    return linked if cluster_links(affinity, linked).coherence > MORE_COHERENT * links.coherence else informative


@public
def normalized_cut(affinity: np.ndarray, n_clusters: int) -> Int[np.ndarray, " K"]:
    """Clusters of the nodes of a graph that cut little of the affinity of each, by scikit-learn.

    Args:
        affinity: (K, K), symmetric, at least 0.
        n_clusters: from 2 to K - 1.

    Returns:
        The cluster of each node (K,), int, numbered in the order of their first nodes.

    Raises:
        ImportError: without scikit-learn.

    Source: Shi and Malik 2000; Damle, Minden and Ying 2019 (clusters from its eigenvectors).
    """
    cluster = require("sklearn.cluster", "cluster")
    # a node without any neighbour would leave the graph in pieces, of which eigenvectors say nothing
    connected = affinity + ISOLATED * affinity.mean()
    cut = cluster.SpectralClustering(n_clusters, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    return in_order(cut.fit_predict(connected))


@public
def information_hierarchy(affinity: Samples, *, labels: Samples | None = None) -> Float[np.ndarray, "K-1 4"]:
    """Hierarchy in which each merge loses the least information that one of two linked samples has on the other.

    The affinities, divided by their sum, are a joint distribution P of two components. Two are merged by adding up
    their rows and columns; the pair is taken for which

        I = sum_jk P_jk log P_jk - 2 sum_j P_j log P_j

    falls least.

    Args:
        affinity: (K, K), symmetric, at least 0: from `component_affinity`, or T + T' of the table T = sum_n r_n r'_n of
            the responsibilities of samples and of their augmentations.
        labels: the cluster of each component (K,), from `merge_components`: components of one cluster are merged before
            any clusters are, so that these are branches of the hierarchy. None for the best merge at every step.

    Returns:
        Linkage matrix (K - 1, 4) as `cluster_hierarchy` gives it; its distances are the information lost so far, nats.

    Raises:
        TypeError: if `affinity` holds no real numbers.
        ValueError: if it is not symmetric, or has negative entries or only zeros.

    Source: Slonim and Tishby 1999.

    Example:
        >>> from flax_hmog.analysis import component_affinity
        >>> responsibilities = np.array([[0.6, 0.39, 0.01], [0.39, 0.6, 0.01], [0.01, 0.02, 0.97]])
        >>> information_hierarchy(component_affinity(np.log(responsibilities))).shape
        (2, 4)
    """
    table = joint_table(affinity)
    count = len(table)
    # gain_ij: what merging rows i and j adds to sum_jk P_jk log P_jk, with all columns as they are
    gain, alive = np.zeros((count, count)), np.arange(count)
    for column in range(count):
        _add_row_gain(gain, table, column, 1)
    marginal = table.sum(axis=0)
    loss = _information_loss(table, marginal, gain, alive, alive)
    numbers, sizes, lost = alive.copy(), np.ones(count), 0.0
    linkage, between = np.empty((count - 1, 4)), np.zeros((count, count))
    clusters = alive if labels is None else as_membership(labels, count).argmax(axis=1)
    if labels is not None:
        between[clusters[:, None] != clusters] = np.inf
    for merge in range(count - 1):
        if len(alive) == clusters.max() + 1:
            between[:] = 0
        left, right = divmod(int(np.argmin(loss + between)), count)
        lost += max(float(loss[left, right]), 0.0)
        linkage[merge] = *sorted((numbers[left], numbers[right])), lost, sizes[left] + sizes[right]
        numbers[left], sizes[left] = count + merge, sizes[left] + sizes[right]
        alive = alive[alive != right]
        loss[right] = loss[:, right] = np.inf
        _add_row_gain(gain, table, left, -1)
        _add_row_gain(gain, table, right, -1)
        table[:, left] += table[:, right]
        table[:, right] = 0
        _add_row_gain(gain, table, left, 1)
        table[left] += table[right]
        table[right] = 0
        marginal[left] += marginal[right]
        linked = np.flatnonzero(table[left])
        own, others = table[left, linked], table[np.ix_(alive, linked)]
        gain[left, alive] = gain[alive, left] = np.sum(x_log_x(others + own) - x_log_x(others) - x_log_x(own), axis=1)
        # other losses than those of the merged one change between two that it is linked with
        loss[np.ix_(linked, linked)] = _information_loss(table, marginal, gain, linked, linked)
        merged = _information_loss(table, marginal, gain, alive[alive == left], alive)
        loss[left, alive] = loss[alive, left] = merged[0]
    return linkage


@public
def refine_information(affinity: Samples, labels: Samples) -> tuple[Int[np.ndarray, " K"], float]:
    """Clusters after moves of single components that raise the information, until no move does.

    Moves raise the information of `information_hierarchy` on the merged table; no cluster loses its last component.

    Args:
        affinity: (K, K), as `information_hierarchy` takes it.
        labels: the cluster of each component (K,), integers from 0, before the moves.

    Returns:
        The cluster of each component (K,), numbered in the order of their first components, and the information
        that is left, in nats.

    Raises:
        TypeError: if an argument holds no real numbers.
        ValueError: as `information_hierarchy`, or unless `labels` number the clusters of K components from 0.

    Source: Slonim, Friedman and Tishby 2002.

    Example:
        >>> affinity = np.array([[2.0, 2.0, 0.1], [2.0, 2.0, 0.1], [0.1, 0.1, 4.0]])
        >>> labels, information = refine_information(affinity, [0, 1, 1])
        >>> labels.tolist(), round(information, 2)
        ([0, 0, 1], 0.5)
    """
    table = joint_table(affinity)
    membership = as_membership(labels, len(table))
    moved, each = membership.argmax(axis=1), np.arange(membership.shape[1])
    linked = table @ membership  # of components with clusters (K, C)
    merged = membership.T @ linked
    has_moved = True
    while has_moved:
        has_moved = False
        for component, old in enumerate(moved):
            if np.sum(moved == old) == 1:
                continue
            own = table[component, component]
            others = linked[component] - own * (each == old)
            rest = _with_component(merged, old, -others, -own)
            gains = _gains(rest, others, own)
            new = int(np.argmax(gains))
            if gains[new] > gains[old] + SMALLEST_GAIN:
                merged, has_moved, moved[component] = _with_component(rest, new, others, own), True, new
                linked[:, old] -= table[:, component]
                linked[:, new] += table[:, component]
    return in_order(moved), float(x_log_x(merged).sum() - 2 * x_log_x(merged.sum(axis=0)).sum())


def most_informative(affinity: Floats, n_clusters: int) -> Int[np.ndarray, " K"]:
    """The better of two clusterings, refined by moves that raise the information."""
    starts = normalized_cut(affinity, n_clusters), merge_clusters(information_hierarchy(affinity), n_clusters)
    # a cut may leave a cluster without nodes, greedy merges never do
    refined = [refine_information(affinity, start) for start in starts if start.max() + 1 == n_clusters]
    return max(refined, key=lambda found: found[1])[0]


def _with_component(merged: Floats, cluster: int, others: Floats, own: float) -> Floats:
    """A table of clusters (C, C) with a component in one more: `others` links it to clusters (C,), `own` to itself."""
    merged = merged.copy()
    merged[cluster] += others
    merged[:, cluster] += others
    merged[cluster, cluster] += own
    return merged


def _gains(rest: Floats, others: Floats, own: float) -> Floats:
    """Information gained by a component in each of the clusters (C,), up to a constant; its row and column change."""
    row = x_log_x(rest + others) - x_log_x(rest)
    corner, linked = np.diag(rest), rest.sum(axis=1) + others
    joint = 2 * (row.sum(axis=1) - np.diag(row)) + x_log_x(corner + 2 * others + own) - x_log_x(corner)
    return cast(Floats, joint - 2 * (x_log_x(linked + others.sum() + own) - x_log_x(linked)))


def _add_row_gain(gain: Floats, table: Floats, column: int, sign: int) -> None:
    """Add the gain in P log P of one column from merging two rows to `gain` (K, K): none where an entry is 0."""
    linked = np.flatnonzero(table[:, column])
    entries = table[linked, column]
    own = x_log_x(entries)
    gain[np.ix_(linked, linked)] += sign * (x_log_x(entries[:, None] + entries) - own[:, None] - own)


def _information_loss(table: Floats, marginal: Floats, gain: Floats, left: np.ndarray, right: np.ndarray) -> Floats:
    """Information lost by merging two components, rows and columns: for all pairs of `left` (P,) and `right` (Q,);
    infinite for one with itself.
    """
    pairs, own = table[np.ix_(left, right)], np.diag(table)
    both, weights, alone = x_log_x(pairs), x_log_x(marginal), x_log_x(own)
    one, other = own[left, None], own[right]
    # rows and columns of the pair itself come together in one entry, P_ii + 2 P_ij + P_jj
    crossing = x_log_x(one + pairs) + x_log_x(other + pairs) - alone[left, None] - alone[right] - 2 * both
    corner = x_log_x(one + 2 * pairs + other) - alone[left, None] - alone[right] - 2 * both
    pair = x_log_x(marginal[left, None] + marginal[right]) - weights[left, None] - weights[right]
    lost = 2 * pair - 2 * (gain[np.ix_(left, right)] - crossing) - corner
    return np.where(left[:, None] == right, np.inf, lost)
