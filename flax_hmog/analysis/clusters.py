"""Clusters of a fitted model: distances, hierarchies, merges and prototypes.

Components are those of the model; clusters are components, or groups of them. All in float64 on the host.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from flax_hmog.analysis.inputs import as_array, as_labels, as_responsibilities, check_choice, geometry
from flax_hmog.inference.posterior import posterior_soft_assignments
from flax_hmog.model.checks import check_size, door, public
from flax_hmog.model.coordinates import Natural, Prepared, check_natural
from flax_hmog.model.typed import Floats, Samples

MEASURES = ("bhattacharyya", "kl")
METHODS = ("average", "complete", "single", "weighted")


@dataclasses.dataclass(frozen=True)
class ComponentSummary:
    """One number per component.

    Attributes:
        weights: w_k (K,).
        expected_counts: sum_n r_nk (K,), in samples.
        entropies: mean entropy of p(z | x) over the samples of the component (K,), in nats: 0 where no other component
            claims them, log K at most; NaN for a component without any sample.
        log_volumes: 1/2 log(|Cov(x | k)| / |Psi|) (K,), in nats: how much larger than the noise the component is.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> component_summary(natural, x).rows()[0]["expected count"].__round__()
        4
    """

    weights: Float[np.ndarray, " K"]
    expected_counts: Float[np.ndarray, " K"]
    entropies: Float[np.ndarray, " K"]
    log_volumes: Float[np.ndarray, " K"]

    def rows(self) -> list[dict[str, Any]]:
        """The same as a table, one dict per component."""
        return [
            {
                "component": k,
                "weight": float(self.weights[k]),
                "expected count": float(self.expected_counts[k]),
                "entropy [nats]": float(self.entropies[k]),
                "log volume [nats]": float(self.log_volumes[k]),
            }
            for k in range(len(self.weights))
        ]


@public
def component_distances(natural: Natural, *, measure: str = "bhattacharyya") -> Float[np.ndarray, "K K"]:
    """Distances between the densities p(x | k) of all pairs of components, in nats, in closed form.

    Components share W, b and Psi, so they differ in R = min(D, L) directions u of x only (`u | k ~ N(g_k, C_k)`,
    C_k = I + G S_k G' with G'G = W'Psi^-1 W), and what follows is exact for x, at the cost of R x R matrices:

        kl              1/2 [tr(C_j^-1 C_k) + tr(C_k^-1 C_j) - 2 R + d'(C_j^-1 + C_k^-1) d],    d = g_j - g_k
        bhattacharyya   1/8 d' C^-1 d + 1/2 log(|C| / sqrt(|C_j| |C_k|)),                       C = (C_j + C_k) / 2

    The first is KL(j || k) + KL(k || j); a narrow component is far from all others by it. The second is -log of the
    overlap of the densities: with weights w_j and w_k, telling j from k fails with probability at most
    sqrt(w_j w_k) exp(-distance). Neither depends on the latent basis, the weights or the units of x.

    Args:
        natural: the model.
        measure: "bhattacharyya" or "kl".

    Returns:
        Distances (K, K), symmetric, with a diagonal of 0.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: for another measure, or a model that does not exist.

    Example:
        >>> from flax_hmog.toy import natural
        >>> component_distances(natural).shape
        (3, 3)
    """
    check_choice("measure", measure, MEASURES)
    means, covariances = geometry(natural).signal_components()
    distances = (_kl if measure == "kl" else _bhattacharyya)(means, covariances)
    distances = np.maximum((distances + distances.T) / 2, 0)  # rounding only: both are at least 0
    np.fill_diagonal(distances, 0)
    return distances


@public
def co_assignment(responsibilities: npt.ArrayLike, *, normalize: str = "rows") -> Float[np.ndarray, "K K"]:
    """Frequency with which two components claim the same samples, from M = R'R = sum_n r_n r_n'.

        rows      M_jk / sum_k M_jk:   a sample drawn to j would be drawn to k the second time with this probability
        cosine    M_jk / sqrt(M_jj M_kk):   symmetric, 1 on the diagonal, 0 where no sample is shared

    Args:
        responsibilities: p(z = k | x) (..., K).
        normalize: "rows" or "cosine".

    Returns:
        Co-assignment (K, K), from 0 to 1. A component without any sample is alone: its row is that of the identity.

    Raises:
        TypeError: if `responsibilities` holds no real numbers.
        ValueError: unless the rows are probabilities, or for another `normalize`.

    Example:
        >>> co_assignment([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).tolist()
        [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """
    check_choice("normalize", normalize, ("rows", "cosine"))
    r = as_responsibilities(responsibilities)
    joint = r.T @ r
    alone = np.diag(joint) == 0
    joint[alone, alone] = 1
    if normalize == "rows":
        return cast(Floats, joint / joint.sum(axis=1, keepdims=True))
    root = np.sqrt(np.diag(joint))
    return joint / root[:, None] / root[None, :]


@public
def cluster_hierarchy(
    source: npt.ArrayLike | Natural, *, method: str = "average", measure: str | None = None
) -> Float[np.ndarray, "K-1 4"]:
    """Hierarchy of the components by agglomeration: the nearest two merge first.

    Args:
        source: the model (`Natural`): distances are `component_distances`; or responsibilities (..., K): distances are
            1 - `co_assignment` (cosine), so that components which claim the same samples merge.
        method: "average", "complete", "single" or "weighted" linkage. (Ward and centroids need points in a Euclidean
            space, which components are not.)
        measure: of a model, "bhattacharyya" (default) or "kl"; None for responsibilities.

    Returns:
        Linkage matrix (K - 1, 4) as scipy.cluster.hierarchy has it: two members, distance, number of components. Leaves
        are ordered so that neighbours are close.

    Raises:
        TypeError: if `source` is no model and holds no real numbers.
        ValueError: for another method or measure, or responsibilities that are no probabilities.

    Example:
        >>> from flax_hmog.toy import natural
        >>> cluster_hierarchy(natural).shape  # K - 1 merges
        (2, 4)
    """
    check_choice("method", method, METHODS)
    if isinstance(source, Natural | Prepared):
        distances = component_distances(check_natural(source), measure=MEASURES[0] if measure is None else measure)
    elif measure is not None:
        raise ValueError(
            f"cluster_hierarchy: `measure` must be None for responsibilities; got {measure!r}. Give the model for it."
        )
    else:
        distances = np.maximum(1 - co_assignment(source, normalize="cosine"), 0)
        np.fill_diagonal(distances, 0)
    if len(distances) == 1:
        return np.zeros((0, 4))
    condensed = squareform(distances, checks=False)
    return cast(np.ndarray, hierarchy.linkage(condensed, method, optimal_ordering=True))


@public
def merge_clusters(linkage: npt.ArrayLike, n_clusters: int) -> Int[np.ndarray, " K"]:
    """Cut a hierarchy of K components into exactly `n_clusters` clusters, by its first K - n_clusters merges.

    Args:
        linkage: (K - 1, 4), from `cluster_hierarchy`.
        n_clusters: from 1 to K.

    Returns:
        The cluster of each component (K,), int, numbered in the order of their first components.

    Raises:
        TypeError: if `linkage` holds no numbers.
        ValueError: if `linkage` is no hierarchy or `n_clusters` is out of bounds.

    Example:
        >>> merge_clusters(cluster_hierarchy([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), 2).tolist()
        [0, 0, 1]
    """
    linkage = check_linkage(linkage)
    n_components = len(linkage) + 1
    check_size("n_clusters", n_clusters, at_most=n_components)
    members = {k: [k] for k in range(n_components)}
    for merge in range(n_components - n_clusters):
        left, right = linkage[merge, :2].astype(int)
        members[n_components + merge] = members.pop(left) + members.pop(right)
    labels = np.empty(n_components, int)
    for label, cluster in enumerate(sorted(members.values(), key=min)):
        labels[cluster] = label
    return labels


@public
def merged_responsibilities(responsibilities: npt.ArrayLike, labels: Samples) -> Float[np.ndarray, "... C"]:
    """p(cluster | x): the responsibilities of the components of each cluster, summed.

    Args:
        responsibilities: p(z = k | x) (..., K).
        labels: the cluster of each component (K,), integers from 0, from `merge_clusters`.

    Returns:
        Probabilities (..., n_clusters), float64.

    Raises:
        TypeError: if `responsibilities` holds no real numbers.
        ValueError: unless the rows are probabilities and there is one label per component.

    Example:
        >>> merged_responsibilities([[0.5, 0.25, 0.25]], [0, 0, 1]).tolist()
        [[0.75, 0.25]]
    """
    r = as_responsibilities(responsibilities)
    return (r @ as_membership(labels, r.shape[1])).reshape(*np.shape(responsibilities)[:-1], -1)


@public
def cluster_prototypes(natural: Natural, *, labels: Samples | None = None) -> Float[np.ndarray, "C D"]:
    """Mean of each cluster: E[x | z = k] = W m_k + b, or E[x | cluster] for merged components.

    Args:
        natural: the model.
        labels: the cluster of each component (K,), from `merge_clusters`; None for the components themselves.

    Returns:
        Prototypes (K, D) or (n_clusters, D), in units of x.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: unless there is one label per component, or if the model does not exist.

    Example:
        >>> from flax_hmog.toy import natural
        >>> cluster_prototypes(natural).round(1).tolist()
        [[1.0, 1.0, 2.0, 1.0], [3.0, 1.5, -1.0, -1.0], [-1.0, -2.5, -1.0, -3.0]]
    """
    model = geometry(natural)
    means = model.means
    if labels is not None:
        share = model.weights[:, None] * as_membership(labels, len(means))
        means = (share / share.sum(axis=0, keepdims=True)).T @ means
    return means @ model.loadings.T + model.bias


@public
def cluster_differences(natural: Natural, *, labels: Samples | None = None) -> Float[np.ndarray, "C D"]:
    """Difference of each cluster's mean from the mean of all others, in standard deviations within clusters.

        d_cj = (E[x_j | c] - E[x_j | not c]) / sqrt(sum_c w_c Var(x_j | c))

    The columns with the largest ones mark the cluster: marker genes, for example.

    Args:
        natural: the model.
        labels: the cluster of each component (K,), from `merge_clusters`; None for the components themselves.

    Returns:
        Differences (K, D) or (n_clusters, D); they do not depend on the units of x.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: unless there are two clusters or more, and one label per component, or if the model does not exist.

    Example:
        >>> from flax_hmog.toy import natural
        >>> int(cluster_differences(natural)[0].argmax())  # the column that marks the first cluster
        2
    """
    model = geometry(natural)
    membership = as_membership(np.arange(len(model.means)) if labels is None else labels, len(model.means))
    if membership.shape[1] < 2:
        raise ValueError("cluster_differences: `natural` must have two clusters or more; got 1. There are no others.")
    shares = model.weights @ membership
    means = model.means @ model.loadings.T
    centers = (membership * model.weights[:, None] / shares).T @ means
    # E[x | c] - E[x] = (1 - w_c) (E[x | c] - E[x | not c])
    gaps = (centers - model.weights @ means) / (1 - shares[:, None])
    within = np.einsum("k,kij->ij", model.weights, model.covariances)
    spread = np.sum((model.loadings @ within) * model.loadings, axis=1) + model.noise_variances
    variances = spread + model.weights @ (means - membership @ centers) ** 2
    return cast(Floats, gaps / np.sqrt(variances))


@public
def component_summary(natural: Natural, x: Samples) -> ComponentSummary:
    """Size, crispness and extent of each component.

    Args:
        natural: the model.
        x: observations (..., D).

    Returns:
        `ComponentSummary`.

    Raises:
        TypeError: if `natural` is of another coordinate type or `x` holds no real numbers.
        ValueError: for a wrong last dimension, entries that are not finite, or a model that does not exist.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> component_summary(natural, x).weights.round(2).tolist()
        [0.5, 0.25, 0.25]
    """
    model = geometry(natural)
    _, covariances = model.signal_components()
    r = np.asarray(posterior_soft_assignments(natural, x), np.float64).reshape(-1, len(model.weights))
    entropy = -np.sum(r * np.log(np.where(r > 0, r, 1)), axis=1)
    counts = r.sum(axis=0)
    shared = np.divide(entropy @ r, counts, out=np.full_like(counts, np.nan), where=counts > 0)
    # |Cov(x | k)| = |I + G S_k G'| |Psi|
    return ComponentSummary(model.weights, counts, shared, np.linalg.slogdet(covariances)[1] / 2)


def check_linkage(linkage: npt.ArrayLike) -> Floats:
    """A linkage matrix in float64; (0, 4) for one component.

    Raises:
        TypeError: if it holds no numbers.
        ValueError: if it is no hierarchy.
    """
    if np.shape(linkage) == (0, 4):
        return np.zeros((0, 4))
    linkage = as_array("linkage", linkage, 2, "(K - 1, 4)")
    if not hierarchy.is_valid_linkage(linkage):
        raise ValueError(
            f"{door()}: `linkage` must be a hierarchy (K - 1, 4); got an array {linkage.shape} that is none. "
            "Use cluster_hierarchy."
        )
    return linkage


def _kl(means: Floats, covariances: Floats) -> Floats:
    """KL(j || k) + KL(k || j), from the terms with C_k^-1 and their transpose (K, K)."""
    n_components, dim = means.shape
    precisions = np.linalg.inv(covariances)
    flat = (n_components, dim * dim)
    traces = precisions.reshape(flat) @ covariances.reshape(flat).T
    terms = np.stack([_squares(means - means[k], precisions[k]) for k in range(n_components)]) + traces - dim
    return cast(Floats, (terms + terms.T) / 2)


def _bhattacharyya(means: Floats, covariances: Floats) -> Floats:
    """-log integral sqrt(p(u | j) p(u | k)) du (K, K), a row at a time."""
    half_log_det = np.linalg.slogdet(covariances)[1] / 2
    distances = np.empty((len(means), len(means)))
    for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        pooled = (covariances + covariance) / 2
        gap = means - mean
        squares = np.sum(gap * np.linalg.solve(pooled, gap[..., None])[..., 0], axis=1)
        distances[k] = squares / 8 + (np.linalg.slogdet(pooled)[1] - half_log_det - half_log_det[k]) / 2
    return distances


def _squares(rows: Floats, precision: Floats) -> Floats:
    """Squared lengths r' P r of rows r (K,)."""
    return cast(Floats, np.sum((rows @ precision) * rows, axis=1))


def as_membership(labels: Samples, n_components: int) -> Floats:
    """Indicators (K, n_clusters) of labels (K,)."""
    labels = as_labels("labels", labels, n_components)
    if labels.dtype.kind not in "iu" or not np.array_equal(np.unique(labels), np.arange(labels.max() + 1)):
        raise ValueError(
            f"{door()}: `labels` must be integers that number the clusters from 0; got {np.unique(labels)}. "
            "Use merge_clusters."
        )
    return np.eye(labels.max() + 1)[labels]
