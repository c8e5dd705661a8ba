"""Neighbours, their weights and the embedding, against numpy and scipy."""

import jax
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.spatial.distance import cdist

from flax_hmog.networks import nearest_neighbors, neighbor_embedding, neighbor_weights, neighbors


def test_neighbours_are_those_of_all_distances(monkeypatch):
    monkeypatch.setattr(neighbors, "BLOCK", 13)  # rows of several blocks, the last one shorter
    rng = np.random.default_rng(0)
    x, others = rng.normal(size=(40, 5)) + 1e3, rng.normal(size=(30, 5)) + 1e3  # far from the origin
    for numbers, distances, expected in (
        (*nearest_neighbors(x, 4), cdist(x, x) + 1e9 * np.eye(40)),
        (*nearest_neighbors(x, 4, among=others), cdist(x, others)),
    ):
        order = np.argsort(expected, axis=1)[:, :4]
        np.testing.assert_array_equal(numbers, order)
        np.testing.assert_allclose(distances, np.take_along_axis(expected, order, axis=1), atol=2e-3)


def test_weights_solve_their_equation():
    distances = np.sort(np.random.default_rng(1).gamma(2.0, size=(6, 8)), axis=1) * 10.0 ** np.arange(-3, 3)[:, None]
    for row, weights in zip(distances, np.asarray(neighbor_weights(distances)), strict=True):
        beyond = row - row[0]
        scale = brentq(lambda s, b=beyond: np.exp(-b / s).sum() - 3, 1e-3 * row.mean(), 1e3 * row.mean())
        np.testing.assert_allclose(weights, np.exp(-beyond / scale), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(neighbor_weights(np.zeros((2, 4))), 1)  # copies of one row


def test_the_embedding_parts_what_neighbours_do_not_link():
    rng = np.random.default_rng(2)
    angle, ring = rng.uniform(0, 2 * np.pi, 120), np.arange(120) % 2
    x = (1 + 2 * ring)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)  # a ring within another
    numbers, distances = nearest_neighbors(x, 5)
    places = neighbor_embedding(x, numbers, neighbor_weights(distances), jax.random.key(0))
    assert np.isfinite(places).all()
    apart = cdist(places, places) + 1e9 * np.eye(120)
    assert (ring[apart.argmin(axis=1)] == ring).all()
    again = neighbor_embedding(x, numbers, neighbor_weights(distances), jax.random.key(0))
    np.testing.assert_array_equal(places, again)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones(5), {}, "nearest_neighbors: `x` must have shape"),
        (np.ones((5, 2)), {"among": np.ones((5, 3))}, r"got \(5, 2\) and \(5, 3\)"),
        (np.ones((3, 2)), {}, "`n_neighbors` must be a whole number of at least 1 and at most 2; got 3"),
    ],
)
def test_mistakes_are_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(x, 3, **options)
