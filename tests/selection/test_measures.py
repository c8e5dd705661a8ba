"""Measures of clusters without labels, beside scikit-learn's and beside sums by hand."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import adjusted_rand_score, cohen_kappa_score

from flax_hmog.selection import measures
from flax_hmog.selection.measures import Probe, adjusted_rand, folds_of, merge_entropies, weighted_entropy

RNG = np.random.default_rng(0)


def test_adjusted_rand_is_that_of_scikit_learn():
    one, other = RNG.integers(0, 4, 60), RNG.integers(0, 3, 60)
    other[:40] = one[:40] % 3
    assert adjusted_rand(one, other, np.ones(60)) == pytest.approx(adjusted_rand_score(one, other))
    assert adjusted_rand(one, (one + 1) % 4, np.ones(60)) == 1
    assert adjusted_rand(np.zeros(9, int), np.zeros(9, int), np.ones(9)) is None


def test_adjusted_rand_takes_weights_for_numbers_of_rows():
    one, other, counts = RNG.integers(0, 3, 20), RNG.integers(0, 3, 20), RNG.integers(1, 4, 20)
    repeated = adjusted_rand_score(np.repeat(one, counts), np.repeat(other, counts))
    assert adjusted_rand(one, other, counts.astype(float)) == pytest.approx(repeated)


def test_folds_are_of_one_size():
    assert np.bincount(folds_of(11, 3, 0)).tolist() == [4, 4, 3]


def test_merges_take_the_pair_that_lowers_the_entropy_most():
    r = RNG.dirichlet([0.3] * 4, 50)
    weights = RNG.uniform(0.5, 2, 50)
    curve, clusters = [weighted_entropy(r, weights)], [[0], [1], [2], [3]]
    while len(clusters) > 1:  # by trying all pairs
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i)]
        tried = {}
        for i, j in pairs:
            joined = [c for n, c in enumerate(clusters) if n not in (i, j)] + [clusters[i] + clusters[j]]
            tried[i, j] = weighted_entropy(np.stack([r[:, c].sum(axis=1) for c in joined], axis=1), weights), joined
        entropy, clusters = min(tried.values(), key=lambda found: found[0])
        curve.append(entropy)
    np.testing.assert_allclose(merge_entropies(r, weights), curve[::-1], atol=1e-6)


def test_one_component_has_no_entropy():
    assert merge_entropies(np.ones((5, 1)), np.ones(5)) == (0.0,)


def test_the_probe_is_the_linear_discriminant_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(measures, "PROBE_SHRINKAGE", 0.0)
    clusters = RNG.integers(0, 3, 90)
    x = RNG.normal(size=(90, 4)) * [1, 10, 0.1, 1] + np.eye(3, 4)[clusters] * [2, 10, 0.2, 1]
    folds = folds_of(90, 2, 0)
    said = np.empty(90, int)
    for fold in (0, 1):
        asked = folds == fold
        said[asked] = LinearDiscriminantAnalysis(solver="lsqr").fit(x[~asked], clusters[~asked]).predict(x[asked])
    assert Probe(x, np.ones(90), folds).score(clusters) == pytest.approx(cohen_kappa_score(clusters, said))


def test_the_probe_finds_real_clusters_and_no_others():
    clusters = RNG.integers(0, 3, 200)
    x = RNG.normal(size=(200, 5)) + 8 * np.eye(3, 5)[clusters]
    x[::7, 4] = np.nan
    probe = Probe(x, np.ones(200), folds_of(200, 2, 0))
    assert probe.score(clusters) > 0.99
    assert abs(probe.score(RNG.integers(0, 3, 200))) < 0.25
    assert probe.score(np.zeros(200, int)) is None


def test_the_probe_says_nothing_of_a_cluster_that_it_has_not_seen():
    folds = np.arange(20) % 2
    clusters = np.where(folds == 0, 0, np.arange(20) // 10)
    assert Probe(RNG.normal(size=(20, 2)), np.ones(20), folds).score(clusters) < 0.5
