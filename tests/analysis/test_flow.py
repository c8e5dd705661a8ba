"""Merges by flow, against the length of the description written out for every pair."""

import itertools

import numpy as np
import pytest

from flax_hmog.analysis import merge_by_flow


def length(table: np.ndarray, labels: np.ndarray) -> float:
    """Nats per step of a walk: a code book for clusters that are entered, and one for each cluster with its exit."""
    table, shares = table / table.sum(), table.sum(axis=1) / table.sum()
    leaves = np.array([table[np.ix_(labels == c, labels != c)].sum() for c in np.unique(labels)])

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0] / p.sum()
        return float(-(p * np.log(p)).sum())

    own = [np.append(shares[labels == c], q) for c, q in zip(np.unique(labels), leaves, strict=True)]
    return leaves.sum() * entropy(leaves) + sum(p.sum() * entropy(p) for p in own)


def test_every_merge_is_the_best():
    table = np.random.default_rng(0).gamma(0.3, size=(8, 8)) + np.diag(np.arange(8.0))
    table += table.T
    labels = np.arange(8)
    for count in range(7, 1, -1):
        options = []
        for left, right in itertools.combinations(range(count + 1), 2):
            merged = np.where(labels == right, left, labels)
            options.append(merged - (merged > right))
        labels = min(options, key=lambda option: length(table, option))
        np.testing.assert_array_equal(merge_by_flow(table, count), labels)


def test_sizes_do_not_count_and_empty_components_are_merged_first():
    sizes = np.array([100.0, 90.0, 1.0, 1.2, 0.0])
    table = np.diag(sizes) + np.array([[0, 60, 0, 0, 0], [0] * 5, [0, 0, 0, 0.6, 0], [0] * 5, [0] * 5])
    assert merge_by_flow(table + table.T, 2).tolist()[:4] == [0, 0, 1, 1]


@pytest.mark.parametrize("flow", [np.ones((2, 3)), [[1.0, 2.0], [0.0, 1.0]], -np.eye(2), np.zeros((2, 2))])
def test_mistakes_are_named(flow):
    with pytest.raises(ValueError, match="merge_by_flow: `flow` must be symmetric"):
        merge_by_flow(flow, 1)
