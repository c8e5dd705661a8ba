"""Temperatures that are known, and what cannot be answered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog.analysis import fit_temperature, scale_temperature

K, N = 4, 20_000


def drawn(temperature, rng):
    """Log-probabilities of rows that are too sure by a temperature, and two more fits that draw from the right ones."""
    right = rng.normal(size=(N, K)) * 2
    right -= np.log(np.exp(right).sum(axis=1, keepdims=True))
    sure = np.asarray(jax.nn.log_softmax(jnp.asarray(right * temperature, jnp.float32)))
    renamed = rng.permutation(K)
    others = []
    for _ in range(2):
        clusters = (right + rng.gumbel(size=right.shape)).argmax(axis=1)
        others.append(np.log(np.where(np.eye(K)[renamed[clusters]] == 1, 0.97, 0.01)))
    return right, sure, others


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 10.0])
def test_a_temperature_that_is_known_is_found(temperature):
    right, sure, others = drawn(temperature, np.random.default_rng(0))
    found = fit_temperature(sure, *others)
    np.testing.assert_allclose(found, temperature, rtol=0.05)
    np.testing.assert_allclose(scale_temperature(sure, temperature), right, atol=2e-4 * temperature)
    assert fit_temperature(sure.reshape(2, -1, K), others[0].reshape(2, -1, K)) == pytest.approx(temperature, rel=0.05)


def test_fits_that_agree_on_nothing_are_worth_equal_probabilities():
    rng = np.random.default_rng(1)
    sure = np.log(np.where(np.eye(2)[rng.integers(2, size=N)] == 1, 0.999, 0.001))
    other = np.log(np.where(np.eye(2)[rng.integers(2, size=N)] == 1, 0.999, 0.001))
    scaled = np.exp(scale_temperature(sure, fit_temperature(sure, other)))
    assert scaled.max() < 0.52


def test_impossible_clusters_are_finite():
    impossible = np.array([[0.0, -np.inf], [0.0, -np.inf], [-np.inf, 0.0], [-np.inf, 0.0]])
    other = np.log([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
    temperature = fit_temperature(impossible, other)
    scaled = np.exp(scale_temperature(impossible, temperature))
    np.testing.assert_allclose(scaled.max(axis=1), 0.75, rtol=1e-3)  # three of four agree
    assert fit_temperature(np.zeros((5, 1)), np.zeros((5, 1))) > 0


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ((), "`others` must be one fit at least"),
        ((np.log(np.full((4, 3), 1 / 3)),), r"shape of `log_responsibilities`, \(4, 2\); got \(4, 3\) for number 0"),
        ((np.zeros((4, 2)),), "must be logarithms of probabilities"),
    ],
)
def test_mistakes_are_named(others, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(np.log(np.full((4, 2), 0.5)), *others)
