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


@pytest.mark.parametrize("seed", range(4))
def test_no_other_clusters_have_a_shorter_description(seed):
    """All ways to make three clusters of nine components, on a noisy ring of them."""
    rng = np.random.default_rng(seed)
    table = rng.gamma(0.3, size=(9, 9)) / 4 + np.diag(rng.gamma(4.0, size=9))
    table += np.roll(np.diag(rng.gamma(2.0, size=9)), 1, axis=0)
    table += table.T
    ways = (np.array([0, *rest]) for rest in itertools.product(range(3), repeat=8))
    best = min(length(table, labels) for labels in ways if len(np.unique(labels)) == 3)
    assert length(table, merge_by_flow(table, 3)) == pytest.approx(best, abs=1e-12)


def test_sizes_do_not_count_and_empty_components_are_merged_first():
    sizes = np.array([100.0, 90.0, 1.0, 1.2, 0.0])
    table = np.diag(sizes) + np.array([[0, 60, 0, 0, 0], [0] * 5, [0, 0, 0, 0.6, 0], [0] * 5, [0] * 5])
    assert merge_by_flow(table + table.T, 2).tolist()[:4] == [0, 0, 1, 1]


@pytest.mark.parametrize("flow", [np.ones((2, 3)), [[1.0, 2.0], [0.0, 1.0]], -np.eye(2), np.zeros((2, 2))])
def test_mistakes_are_named(flow):
    with pytest.raises(ValueError, match="merge_by_flow: `flow` must be symmetric"):
        merge_by_flow(flow, 1)
