"""Clusters of any size: modularity and links by hand and by brute force, and clusters that are known."""

import itertools

import jax
import numpy as np
import pytest

from flax_hmog import AnalyticHMoG, fit_em, infer
from flax_hmog.analysis import cluster_links, component_affinity, merge_components, refine_modularity
from flax_hmog.analysis.coherence import join_by_links


def graph(nodes=9, seed=0):
    return component_affinity(np.log(np.random.default_rng(seed).dirichlet(np.full(nodes, 0.3), size=200)))


def modularity(table, labels, resolution):
    """Summed over all pairs of nodes, as it is defined."""
    table = table / table.sum()
    degree = table.sum(axis=0)
    return np.sum((table - resolution * np.outer(degree, degree))[labels[:, None] == labels])


@pytest.mark.parametrize("resolution", [0.5, 1.0])
def test_refined_clusters_gain_by_no_move(resolution):
    table, start = graph(), np.arange(9) % 3
    labels, value = refine_modularity(table, start, resolution=resolution)
    np.testing.assert_allclose(value, modularity(table, labels, resolution), rtol=1e-12)
    assert value > modularity(table, start, resolution)
    share = table.sum(axis=0) / table.sum()
    for component, cluster in itertools.product(range(9), range(3)):
        moved = np.where(np.arange(9) == component, cluster, labels)
        left = share[moved == labels[component]].sum()
        if left >= 0.05 / 3 and len(np.unique(moved)) == 3:
            assert modularity(table, moved, resolution) <= value + 1e-12


def test_no_cluster_is_left_a_splinter():
    """The first component would gain by joining the others of its kind, which leaves a cluster of a hundredth."""
    table = np.array([[30.0, 29, 0, 0], [29, 30, 0, 0], [0, 0, 1, 0], [0, 0, 0, 60]])
    start = [0, 1, 1, 2]
    assert refine_modularity(table, start)[0].tolist() == [0, 1, 1, 2]
    table[2, 2] = 10  # no splinter any more
    assert refine_modularity(table, start)[0].tolist() == [0, 0, 1, 2]


def test_links_by_hand():
    """Nodes in all: 10, 10, 5, 15, 20. Of (0, 1) and (2, 3): 4 over 10 and 2 over 5; between clusters: 3 over 20."""
    table = np.array(
        [[3.0, 4, 0, 1, 2], [4, 3, 0, 2, 1], [0, 0, 3, 2, 0], [1, 2, 2, 10, 0], [2, 1, 0, 0, 17]],
    )
    links = cluster_links(table, [0, 0, 1, 1, 2])
    np.testing.assert_allclose(links, (0.4, 3 / 20))
    np.testing.assert_allclose(links.coherence, 0.4 / (3 / 20))
    apart = cluster_links(table, np.arange(5))
    assert apart.within == np.inf
    np.testing.assert_allclose(apart.between, 0.4)
    assert cluster_links(table, np.zeros(5, int)) == (pytest.approx(0.15), 0.0)


def test_splinters_count_for_no_cluster():
    """Two clusters of two nodes, and a node without neighbours; as a component without samples they change nothing."""
    table = np.kron(np.eye(2), [[50.0, 40], [40, 50]])
    with_splinter = np.pad(table, (0, 2))
    with_splinter[4, 4] = 1
    assert join_by_links(with_splinter / with_splinter.sum(), 2)[:4].tolist() == [0, 0, 1, 1]
    assert cluster_links(with_splinter, [0, 0, 1, 1, 1, 0]).within == cluster_links(table, [0, 0, 1, 1]).within


@pytest.mark.parametrize("seed", [1, 2])
def test_clusters_of_very_different_sizes_are_found(seed):
    """Rings of 1500, 150, 100, 60 and 40 samples, the largest covered by half of the components."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(5), [1500, 150, 100, 60, 40])
    angle, radius = rng.uniform(0, 2 * np.pi, len(truth)), np.array([4, 2, 2, 2, 2])[truth, None]
    ring = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * rng.standard_normal((len(truth), 2))
    centers = np.array([[0.0, 0], [9, 0], [0, 9], [-9, 0], [0, -9]])
    x = np.concatenate([centers[truth] + ring, 0.1 * rng.standard_normal((len(truth), 3))], axis=1).astype(np.float32)
    natural = fit_em(AnalyticHMoG(2, 24), x, jax.random.key(seed), max_steps=20).natural
    rows = np.asarray(infer(natural, x).log_responsibilities)
    clusters = merge_components(rows, 5)
    together = np.zeros((5, 5), int)
    np.add.at(together, (clusters[rows.argmax(axis=1)], truth), 1)
    np.testing.assert_array_equal(np.sort(together.max(axis=1)), [40, 60, 100, 150, 1500])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"refine_modularity: `resolution` must be positive"):
        refine_modularity(graph(), np.zeros(9, int), resolution=0.0)
    with pytest.raises(ValueError, match=r"cluster_links: `labels` must have shape \(9,\); got \(4,\)"):
        cluster_links(graph(), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="cluster_links: `affinity` must be symmetric"):
        cluster_links([[1.0, 2.0], [0.0, 1.0]], [0, 1])
