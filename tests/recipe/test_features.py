"""`fit_features`: clusters of frozen features, new rows, and what it refuses."""

import jax
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from flax_hmog.networks import nearest_neighbors
from flax_hmog.recipe import FeatureClusters, fit_features
from flax_hmog.recipe.features import _averaged

CLUSTERS, DIM = 4, 12


def features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (count, F) along an arc per cluster: bent, of several lengths, and with one common direction."""
    rng, axes = np.random.default_rng(seed), np.random.default_rng(7).normal(size=(CLUSTERS, 2, DIM))
    z, angle = rng.integers(CLUSTERS, size=count), rng.uniform(0, np.pi / 2, size=(count, 1))
    x = np.cos(angle) * axes[z, 0] + np.sin(angle) * axes[z, 1] + 2.0 + 0.25 * rng.normal(size=(count, DIM))
    return x * rng.uniform(1, 5, size=(count, 1)), z


@pytest.fixture(scope="module")
def found() -> FeatureClusters:
    return fit_features(features(300, 0)[0], CLUSTERS, jax.random.key(0), lat_dim=5)


def test_clusters_of_rows_and_of_new_ones(found: FeatureClusters):
    (_, z), (new, new_z) = features(300, 0), features(200, 1)
    assert normalized_mutual_info_score(z, found.assignments) > 0.9
    assert normalized_mutual_info_score(new_z, found(new).argmax(axis=1)) > 0.9
    np.testing.assert_allclose(found(new).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found(3 * new[:5]), found(new[:5]), atol=1e-4)  # lengths count nothing
    assert found(new[:0]).shape == found(new[:5])[:0].shape
    with pytest.raises(ValueError, match=r"must have shape \(N, \d+\); got \(5, 2\)"):
        found(new[:5, :2])


def test_averages_are_those_of_the_normalised_graph():
    rows = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = np.asarray(nearest_neighbors(rows, 3)[0])
    likeness = rows @ rows.T - 9 * np.eye(30)
    np.testing.assert_array_equal(np.sort(nearest), np.sort(np.argsort(-likeness)[:, :3]))
    graph = np.zeros((30, 30))
    np.put_along_axis(graph, nearest, 1.0, axis=1)
    graph = graph + graph.T + np.eye(30)
    hubs = np.sqrt(graph.sum(axis=1))
    expected = (graph / hubs[:, None] / hubs[None]) @ rows
    scaled = jax.numpy.asarray(rows / hubs[:, None], "float32")
    averaged = _averaged(scaled, jax.numpy.asarray(nearest), scaled, both=True)
    np.testing.assert_allclose(averaged, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (np.ones(5), {}, "`features` must have shape"),
        (np.zeros((20, 3)), {}, "`features` must be finite and differ from 0; got row 0"),
        (np.full((20, 3), np.nan), {}, "`features` must be finite"),
        (np.ones((20, 3)), {"n_neighbors": 20}, "`n_neighbors` must be at least 0 and below"),
        (np.ones((20, 3)), {"n_clusters": 0}, "`n_clusters` must be"),
    ],
)
def test_mistakes_are_named(rows: np.ndarray, options: dict, message: str):
    given = {"n_clusters": 2, **options}
    with pytest.raises(ValueError, match=message):
        fit_features(rows, key=jax.random.key(0), **given)
