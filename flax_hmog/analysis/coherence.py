"""Clusters of any size: merges by links and by modularity, and the links within and between clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from flax_hmog.analysis.affinity import in_order, joint_table
from flax_hmog.analysis.clusters import as_membership
from flax_hmog.model.checks import check_positive, public
from flax_hmog.model.typed import Floats, Samples

RESOLUTION = 0.5
SMALLEST, PART = 0.05, 0.1  # of an average cluster: what is smaller is a splinter, and no part of a cluster that counts
ISOLATED = 1e-9  # affinity of components without a common sample, relative to the average
SMALLEST_GAIN, TINY = 1e-12, 1e-300


@public
def refine_modularity(
    affinity: Samples, labels: Samples, *, resolution: float = RESOLUTION
) -> tuple[Int[np.ndarray, " K"], float]:
    """Clusters after moves of single components that raise the modularity, until no move does.

    With P the affinities divided by their sum, and P_C the share of cluster C,

        Q = sum_CC P_CC - resolution sum_C P_C^2.

    Below a resolution of 1 little is gained by splitting what holds together, however large it is. No cluster loses its
    last component, nor falls below a twentieth of the average share by a move.

    Args:
        affinity: (K, K), symmetric, at least 0, as `component_affinity` gives it.
        labels: the cluster of each component (K,), integers from 0, before the moves.
        resolution: positive; 1 is the modularity of Newman and Girvan, which prefers clusters of similar size.

    Returns:
        The cluster of each component (K,), numbered in the order of their first components, and Q.

    Raises:
        TypeError: if an argument holds no real numbers.
        ValueError: for another `affinity`, `labels` that do not number clusters from 0, or a resolution that is not
            positive.

    Source: Newman and Girvan 2004; Reichardt and Bornholdt 2006 (resolution).

    Example:
        >>> affinity = np.array([[2.0, 2.0, 0.1], [2.0, 2.0, 0.1], [0.1, 0.1, 4.0]])
        >>> labels, modularity = refine_modularity(affinity, [0, 1, 1])
        >>> labels.tolist(), round(modularity, 2)
        ([0, 0, 1], 0.69)
    """
    check_positive("resolution", resolution, f"Use {RESOLUTION}.")
    table = joint_table(affinity)
    membership = as_membership(labels, len(table))
    moved, degree = membership.argmax(axis=1), table.sum(axis=1)
    linked, share, members = table @ membership, degree @ membership, membership.sum(axis=0)
    smallest, has_moved = SMALLEST / len(share), True
    while has_moved:
        has_moved = False
        for component, old in enumerate(moved):
            own = degree[component]
            if members[old] == 1 or share[old] - own < smallest:
                continue
            gains = linked[component] - resolution * own * share
            gains[old] += resolution * own**2 - table[component, component]
            new = int(np.argmax(gains))
            if gains[new] > gains[old] + SMALLEST_GAIN:
                moved[component], has_moved = new, True
                for cluster, sign in ((old, -1), (new, 1)):
                    linked[:, cluster] += sign * table[:, component]
                    share[cluster] += sign * own
                    members[cluster] += sign
    within = linked[np.arange(len(moved)), moved].sum()
    return in_order(moved), float(within - resolution * np.sum(share**2))


class ClusterLinks(NamedTuple):
    """Links within and between clusters, each the share of a group's neighbours that another one holds.

    Attributes:
        within: the weakest one that holds a cluster together; infinite where all are of one component.
        between: the strongest one between two clusters; 0 for a single cluster.

    Example:
        >>> ClusterLinks(within=0.4, between=0.1).coherence
        4.0
    """

    within: float
    between: float

    @property
    def coherence(self) -> float:
        """The first over the second: above 1, every cluster holds together better than any two do."""
        return self.within / max(self.between, ISOLATED)


@public
def cluster_links(affinity: Samples, labels: Samples) -> ClusterLinks:
    """The weakest link that holds a cluster together, and the strongest one between clusters; no labels are needed.

    The link of two groups of components is the affinity between them over all affinity of the smaller one: the share of
    its samples' neighbours that the other one holds. Within a cluster, components are joined by their strongest links,
    and the weakest one that joins two parts counts; parts below a tenth of an average cluster are left out.

    Args:
        affinity: (K, K), symmetric, at least 0, as `component_affinity` gives it.
        labels: the cluster of each component (K,), integers from 0.

    Returns:
        `within` near 0: a cluster holds parts that have nothing in common. `between` above some hundredths: something
        that holds together may have been split.

    Raises:
        TypeError: if an argument holds no real numbers.
        ValueError: for another `affinity`, or `labels` that do not number clusters from 0.

    Example:
        >>> affinity = np.array([[4.0, 2.0, 0.1], [2.0, 4.0, 0.1], [0.1, 0.1, 4.0]])
        >>> right, wrong = cluster_links(affinity, [0, 0, 1]), cluster_links(affinity, [0, 1, 1])
        >>> round(right.within, 2), round(right.between, 2), round(wrong.within, 2), round(wrong.between, 2)
        (0.33, 0.05, 0.02, 0.34)
    """
    table = joint_table(affinity)
    membership = as_membership(labels, len(table))
    between = _Groups(membership.T @ table @ membership, np.minimum).links
    weakest, degree = np.inf, table.sum(axis=1)
    for members in membership.T.astype(bool):
        groups = _Groups(table[np.ix_(members, members)], np.minimum, degree[members])
        for _ in range(int(members.sum()) - 1):
            link, smaller = groups.join()
            if smaller >= PART / len(between):
                weakest = min(weakest, link)
    return ClusterLinks(weakest, max(float(between.max()), 0.0))


def geometric_mean(one: Floats, other: Floats) -> Floats:
    """The mean of two degrees; by the smaller one, large groups take in all others, by the product few of them."""
    return np.sqrt(one * other)


def join_by_links(
    table: Floats, n_clusters: int, mean: Callable[[Floats, Floats], Floats] = geometric_mean
) -> Int[np.ndarray, " K"]:
    """Clusters of nodes (K, K) by joining the two groups that are linked most, until so many are left.

    Once so many are no splinters, the splinters join what they are linked with. Links are relative to a mean of what
    the groups have in all.
    """
    groups, smallest = _Groups(table, mean), SMALLEST / n_clusters
    for _ in range(len(table) - n_clusters):
        is_splinter = groups.is_alive & (groups.degree < smallest)
        is_full = np.sum(groups.is_alive & ~is_splinter) <= n_clusters
        groups.join(is_splinter if is_full and is_splinter.any() else None)
    return in_order(groups.labels)


class _Groups:
    """Groups of nodes that are joined by their links: the affinity between two over a mean of what each has in all.

    Args:
        table: affinity of the nodes (K, K), symmetric.
        mean: of two degrees.
        degree: of each node (K,), with what lies outside of `table`; None for the sums of its rows.
    """

    def __init__(self, table: Floats, mean: Callable[[Floats, Floats], Floats], degree: Floats | None = None) -> None:
        self.table, self.mean = table.copy(), mean
        self.degree = table.sum(axis=1) if degree is None else degree.copy()
        self.labels, self.is_alive = np.arange(len(table)), np.ones(len(table), bool)
        self.links = self._links(self.labels[:, None], self.labels)

    def join(self, either: np.ndarray | None = None) -> tuple[float, float]:
        """Join the two linked most, one of them marked in `either` (K,); their link, and the smaller degree."""
        links = self.links if either is None else np.where(either[:, None] | either, self.links, -np.inf)
        one, other = divmod(int(np.argmax(links)), len(links))
        found = float(links[one, other]), float(min(self.degree[one], self.degree[other]))
        self.table[one] += self.table[other]
        self.table[:, one] += self.table[:, other]
        self.degree[one] += self.degree[other]
        self.is_alive[other] = False
        self.labels[self.labels == other] = one
        self.links[other] = self.links[:, other] = -np.inf
        others = np.flatnonzero(self.is_alive)
        self.links[one, others] = self.links[others, one] = self._links(one, others)
        return found

    def _links(self, one: Any, others: np.ndarray) -> Floats:
        """Links of nodes with others; none with themselves."""
        mean = np.maximum(self.mean(self.degree[one], self.degree[others]), TINY)
        return np.where(one == others, -np.inf, self.table[one, others] / mean)
