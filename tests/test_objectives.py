"""Losses against their definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog import HMoGOutput
from flax_hmog.objectives import (
    conditional_entropy,
    consistency,
    marginal_entropy,
    negative_log_likelihood,
    negative_mutual_information,
)


def output(probabilities, density=None):
    p = jnp.asarray(probabilities)
    density = jnp.zeros(p.shape[:-1]) if density is None else jnp.asarray(density)
    return HMoGOutput(density, jnp.log(p), jnp.zeros((*p.shape[:-1], 2)))


@pytest.fixture
def random_output():
    p = np.random.default_rng(0).dirichlet(np.ones(4), size=(6, 5)).astype(np.float32)
    return p, output(p, np.arange(30.0).reshape(6, 5))


def test_mutual_information_is_that_of_the_joint_table(random_output):
    p, out = random_output
    rows = p.reshape(-1, 4) / 30
    product = rows.sum(1, keepdims=True) * rows.sum(0, keepdims=True)
    want = np.sum(rows * np.log(rows / product))
    np.testing.assert_allclose(-negative_mutual_information(out), want, rtol=1e-5)
    np.testing.assert_allclose(marginal_entropy(out) - conditional_entropy(out), want, rtol=1e-5)


def test_extremes():
    certain = output(np.eye(3) * (1 - 3e-6) + 1e-6)
    np.testing.assert_allclose(negative_mutual_information(certain), -np.log(3), atol=1e-4)
    uniform = output(np.full((5, 3), 1 / 3))
    np.testing.assert_allclose(negative_mutual_information(uniform), 0, atol=1e-6)


def test_likelihood_is_the_mean(random_output):
    np.testing.assert_allclose(negative_log_likelihood(random_output[1]), -14.5)


def test_consistency_is_a_divergence_that_trains_the_perturbed_side_only(random_output):
    p, out = random_output
    other = output(np.roll(p, 1, axis=-1))
    assert consistency(out, out) == pytest.approx(0, abs=1e-6)
    want = np.mean(np.sum(p * np.log(p / np.roll(p, 1, axis=-1)), axis=-1))
    np.testing.assert_allclose(consistency(out, other), want, rtol=1e-4)
    to_target = jax.grad(lambda o: consistency(o, other))(out)
    to_perturbed = jax.grad(lambda o: consistency(out, o))(other)
    assert not np.any(to_target.log_responsibilities)
    assert np.any(to_perturbed.log_responsibilities)
