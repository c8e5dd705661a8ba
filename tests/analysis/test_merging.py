"""Components merged to clusters: affinities and hierarchies against brute force, and clusters that are known."""

import itertools

import jax
import numpy as np
import pytest

from flax_hmog import AnalyticHMoG, fit_em, infer
from flax_hmog.analysis import (
    component_affinity,
    information_hierarchy,
    merge_clusters,
    merge_components,
    merging,
    refine_information,
)


def log_responsibilities(count=40, components=5, seed=0):
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.full(components, 0.3), size=count))


def information(table):
    table = table / table.sum()
    marginal = table.sum(axis=0)
    outside = marginal[:, None] * marginal
    return np.sum(table * np.log(np.where(table > 0, table / outside, 1)))


def merged_table(table, labels):
    share = np.eye(labels.max() + 1)[labels]
    return share.T @ table @ share


def pairs_of(labels):
    return {pair for pair in itertools.combinations(range(len(labels)), 2) if labels[pair[0]] == labels[pair[1]]}


def test_affinity_is_that_of_the_first_two_choices():
    rows = log_responsibilities()
    want = np.zeros((5, 5))
    for row in np.exp(rows):
        first, second = np.argsort(-row)[:2]
        share = np.zeros(5)
        share[[first, second]] = row[[first, second]] ** 0.5
        want += np.outer(share, share)
    np.testing.assert_allclose(component_affinity(rows, temperature=2.0), want, rtol=1e-12)
    np.testing.assert_allclose(component_affinity(rows.reshape(5, 8, 5), temperature=2.0), want, rtol=1e-12)


def test_affinity_of_certain_responsibilities_counts_them():
    rows = np.full((7, 3), -np.inf)
    rows[:4, 0] = rows[4:, 2] = 0
    np.testing.assert_array_equal(component_affinity(rows), np.diag([4.0, 0, 3]))
    np.testing.assert_array_equal(component_affinity(np.zeros((4, 1))), [[4.0]])


@pytest.mark.parametrize("count", [15, 200])
def test_information_hierarchy_takes_the_best_pair_every_time(count):
    """Of few samples too, where most pairs of components have none in common."""
    table = component_affinity(log_responsibilities(count, 7))
    linkage = information_hierarchy(table)
    whole, members = information(table), [[k] for k in range(7)]

    def merged(groups):
        return merged_table(table, np.array([[k in group for group in groups].index(True) for k in range(7)]))

    for step in range(6):
        options = [
            [*(g for k, g in enumerate(members) if k not in pair), members[pair[0]] + members[pair[1]]]
            for pair in itertools.combinations(range(len(members)), 2)
        ]
        members = max(options, key=lambda groups: information(merged(groups)))
        labels = merge_clusters(linkage, len(members))
        assert {frozenset(group) for group in members} == {
            frozenset(np.flatnonzero(labels == label)) for label in np.unique(labels)
        }
        np.testing.assert_allclose(linkage[step, 2], whole - information(merged(members)), atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_refined_clusters_gain_by_no_move(seed):
    """From any start: what is returned is the information, not less than before, and no component is better elsewhere."""
    table = component_affinity(log_responsibilities(200, 9, seed=seed))
    start = np.random.default_rng(seed).permutation(np.arange(9) % 3)
    labels, value = refine_information(table, start)
    np.testing.assert_allclose(value, information(merged_table(table, labels)), rtol=1e-12)
    assert value > information(merged_table(table, start))
    np.testing.assert_array_equal(np.unique(labels), np.arange(3))
    for component, cluster in itertools.product(range(9), range(3)):
        moved = np.where(np.arange(9) == component, cluster, labels)
        if len(np.unique(moved)) == 3:
            assert information(merged_table(table, moved)) <= value + 1e-12


def test_a_merge_tells_most_of_all():
    """Of all ways to merge eight components to three clusters, where they neighbour each other in three groups."""
    rng = np.random.default_rng(1)
    group = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    closeness = np.where(group[:, None] == group, 0.0, -6.0) + rng.normal(0, 2, (8, 8))
    rows = 3 * closeness[rng.integers(8, size=400)] + rng.normal(0, 1, (400, 8))
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    table = component_affinity(rows)
    every = (np.array(labels) for labels in itertools.product(range(3), repeat=8) if len(set(labels)) == 3)
    best = max(information(merged_table(table, labels)) for labels in every)
    np.testing.assert_allclose(information(merged_table(table, merge_components(rows, 3))), best, rtol=1e-12)


def test_clusters_of_other_components_are_named():
    affinity = component_affinity(log_responsibilities())
    with pytest.raises(ValueError, match=r"refine_information: `labels` must have shape \(5,\); got \(4,\)"):
        refine_information(affinity, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="must be integers that number the clusters from 0"):
        refine_information(affinity, np.linspace(0, 1, 5))


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 4, 5])
def test_every_number_of_clusters_can_be_had(n_clusters):
    labels = merge_components(log_responsibilities(), n_clusters)
    assert labels.shape == (5,)
    np.testing.assert_array_equal(np.unique(labels), np.arange(n_clusters))
    _, first = np.unique(labels, return_index=True)
    assert np.all(np.diff(first) > 0)  # numbered in the order of their first components


def test_clusters_do_not_depend_on_the_order_of_components():
    rows = log_responsibilities(300, 8, seed=3)
    order = np.random.default_rng(0).permutation(8)
    labels, shuffled = (merge_components(r, 3) for r in (rows, rows[:, order]))
    assert pairs_of(labels[order]) == pairs_of(shuffled)


def test_clusters_that_are_not_gaussian_are_put_together():
    """Three rings of samples, each covered by several components of one mixture."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=1500)
    angle = rng.uniform(0, 2 * np.pi, 1500)
    centers = np.array([[0.0, 0], [9, 0], [0, 9]])
    ring = centers[truth] + 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * rng.standard_normal((1500, 2))
    x = np.concatenate([ring, 0.1 * rng.standard_normal((1500, 3))], axis=1).astype(np.float32)
    for steps in (3, 100):  # neither early nor late
        natural = fit_em(AnalyticHMoG(2, 24), x, jax.random.key(0), max_steps=steps).natural
        rows = np.asarray(infer(natural, x).log_responsibilities)
        clusters = merge_components(rows, 3)[rows.argmax(axis=1)]
        together = np.zeros((3, 3), int)
        np.add.at(together, (clusters, truth), 1)
        assert together.max(axis=1).sum() > 0.98 * 1500


@pytest.mark.parametrize("empty", [1, 3])
def test_components_without_samples_change_nothing(empty):
    """The others merge as without them, into as many clusters."""
    rows = log_responsibilities(50, 4)
    labels = merge_components(np.concatenate([rows, np.full((50, empty), -np.inf)], axis=1), 3)
    assert pairs_of(labels[:4]) == pairs_of(merge_components(rows, 3))


def test_a_cut_of_fewer_clusters_is_left_out(monkeypatch):
    monkeypatch.setattr(merging, "normalized_cut", lambda affinity, n_clusters: np.zeros(len(affinity), int))
    np.testing.assert_array_equal(np.unique(merge_components(log_responsibilities(), 3)), np.arange(3))


def test_half_precision_will_do():
    rows = log_responsibilities(50, 4)
    rows[:, 0] = -np.inf
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(merge_components(rows.astype(np.float16), 2), merge_components(rows, 2))
