"""`fit_neighbors`: bent clusters, new rows, the same result for the same key, and what it refuses."""

import jax
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import make_moons
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from flax_hmog.networks import MLP, nearest_neighbors, neighbor_embedding, neighbor_weights
from flax_hmog.recipe import fit_neighbors
from flax_hmog.recipe.neighbors import _clusters, _principal_components
from flax_hmog.training import export

SMALL = {"n_components": 12, "steps": 300, "encoder": MLP(6, (32,), normalization="batch")}


def moons(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two half-rings in each other, turned into four columns."""
    x, z = make_moons(count, noise=0.08, random_state=seed)
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(4, 2)))[0].T
    return (x @ turn + 3).astype(np.float32), z


@pytest.fixture(scope="module")
def found():
    return fit_neighbors(moons(300, 0)[0], 2, jax.random.key(0), **SMALL)


def test_bent_clusters_are_found_and_new_rows_go_with_their_neighbors(found):
    (x, z), (new, new_z) = moons(300, 0), moons(300, 1)
    linear = KMeans(2, n_init=3, random_state=0).fit_predict(x)
    assert adjusted_rand_score(z, linear) < 0.6
    places = NearestNeighbors(n_neighbors=5).fit(found.state["embedding"]).kneighbors(return_distance=False)
    assert np.mean(z[places] == z[:, None]) > 0.98
    assert adjusted_rand_score(z, found.state["taught"].argmax(axis=1)) > 0.95
    output = found(new)
    nearest = NearestNeighbors(n_neighbors=1).fit(x).kneighbors(new, return_distance=False)[:, 0]
    taught = found.state["taught"].argmax(axis=1)
    clusters = np.asarray(output.log_responsibilities).argmax(axis=1)
    assert np.mean(clusters == taught[nearest]) > 0.9
    assert adjusted_rand_score(new_z, clusters) > 0.8
    assert np.isfinite(output.log_density).all()
    assert found.history[0]["agreement"] > 0.9
    assert found.state["embedding"].shape == (300, 4)
    assert found.state["taught"].shape == (300, 2)
    program = export(found, platforms=("cpu",))
    np.testing.assert_array_equal(program(new)["assignment"], found(new).log_responsibilities.argmax(axis=1))


@pytest.mark.parametrize("draw", range(1, 4))
def test_thin_clusters_are_found_with_any_draw_and_key(draw):
    """Before the encoder learns them: other starts and merges had components across both, or cut one of them."""
    x, z = moons(300, draw)
    axes = _principal_components(x)
    numbers, distances = nearest_neighbors(axes, 15)
    weights = neighbor_weights(distances)
    for key in jax.random.split(jax.random.key(draw), 2):
        places = neighbor_embedding(axes, numbers, weights, key)
        taught = _clusters(places, np.asarray(numbers), np.asarray(weights), 2, 15, key)
        assert adjusted_rand_score(z, taught.argmax(axis=1)) > 0.95


def test_a_key_has_one_result(found):
    x, _ = moons(300, 0)
    again = fit_neighbors(x, 2, jax.random.key(0), **SMALL)
    np.testing.assert_array_equal(found(x[:9]).log_responsibilities, again(x[:9]).log_responsibilities)


def test_rows_of_one_length_are_compared_by_their_angles():
    x = np.random.default_rng(0).normal(size=(30, 60)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(_principal_components(unit), axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.ptp(np.linalg.norm(_principal_components(x), axis=1)), 4, atol=3)
    far = _principal_components(x + np.float32(1000))  # all of much the same length, which says nothing there
    np.testing.assert_allclose(far.std(axis=0), _principal_components(x).std(axis=0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones(5), {}, r"fit_neighbors: `x` must have shape \(N, D\); got \(5,\)"),
        (np.full((20, 3), np.nan), {}, "fit_neighbors: `x` must be finite; got row 0"),
        (np.ones((20, 3)), {}, "fit_neighbors: `x` must have rows that differ"),
        (np.full((20, 3), "a"), {}, "fit_neighbors: `x` must hold real numbers; got dtype <U1"),
        (np.eye(10), {}, "fit_neighbors: `n_neighbors` must be .* at most 9; got 15"),
        (np.eye(20), {"n_components": 1}, "fit_neighbors: `n_components` must be .* at least 2"),
        (np.eye(20), {"n_clusters": 0}, "fit_neighbors: `n_clusters` must be"),
    ],
)
def test_mistakes_are_named(x, options, message):
    given = {"n_clusters": 2, **options}
    with pytest.raises(ValueError, match=message):
        fit_neighbors(x, key=jax.random.key(0), **given)
