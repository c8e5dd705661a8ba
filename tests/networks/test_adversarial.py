"""Virtual adversarial perturbations: their direction, their radius, and batch normalisation under them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog import DifferentiableHMoG
from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.networks import MLP, Clusterer, consistency, perturbation_radius, virtual_adversarial
from flax_hmog.networks.adversarial import _of_batch as of_batch

KEY = jax.random.key(0)


def output(responsibilities):
    rows = jnp.asarray(responsibilities)
    return HMoGOutput(jnp.zeros(len(rows)), jnp.log(rows), rows)


def test_the_adversarial_direction_is_that_of_largest_change():
    """Of assignments that follow the first column alone, by far more than a random direction of the same length."""
    model = lambda x: output(jax.nn.softmax(jnp.stack([3 * x[:, 0], -3 * x[:, 0]], axis=1)))  # noqa: E731
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 30)), jnp.float32)
    radius = 0.3
    got = virtual_adversarial(model, x, jax.random.key(0), radius=radius)
    ends = [consistency(model(x), model(x.at[:, 0].add(sign * radius))) for sign in (-1, 1)]
    assert min(ends) * 0.5 < got < max(ends) * 1.5
    certain = lambda x: output(jax.nn.softmax(jnp.stack([20 * x[:, 0], -20 * x[:, 0]], axis=1)))  # noqa: E731
    far = x.at[:, 0].set(1.0)  # whose gradients are below the smallest float when squared
    assert virtual_adversarial(certain, far, jax.random.key(0), radius=2.0) > 10
    random = jax.random.normal(jax.random.key(1), x.shape)
    random = radius * random / jnp.linalg.norm(random, axis=1, keepdims=True)
    assert got > 5 * consistency(model(x), model(x + random))
    with pytest.raises(ValueError, match="`radius` must be positive"):
        virtual_adversarial(model, x, jax.random.key(0), radius=0.0)
    flat = lambda x: output(jnp.full((x.shape[0], 2), 0.5) + 0 * x[:, :2])  # noqa: E731
    assert float(virtual_adversarial(flat, x, jax.random.key(0), radius=radius)) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def normalised():
    """A network with batch normalisation whose running averages are far from the batch, its variables and the batch."""
    module = Clusterer(MLP(3, (8,), normalization="batch"), DifferentiableHMoG(2, 3))
    x = jnp.asarray(np.random.default_rng(1).normal(2.0, 3.0, (24, 5)), jnp.float32)
    variables = nn.unbox(module.init(KEY, x))
    averages = jax.tree.map(lambda leaf: leaf + 1, variables["batch_stats"])
    return module, variables | {"batch_stats": averages}, x


def test_batch_normalisation_is_that_of_the_clean_batch(normalised):
    """So averages count for nothing, and no perturbed sample is seen by another."""
    module, variables, x = normalised
    loss = lambda variables, x: virtual_adversarial(module, x, KEY, radius=0.5, variables=variables)  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss))
    value, gradient = compiled(variables, x)
    other = variables | {"batch_stats": jax.tree.map(lambda leaf: 5 * leaf, variables["batch_stats"])}
    np.testing.assert_allclose(compiled(other, x)[0], value, rtol=1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["batch_stats"]))
    # a shift of what comes before a normalisation moves nothing; with averages an encoder slides along it
    assert abs(gradient["params"]["encoder"]["Dense_1"]["bias"]).max() < 1e-5
    at_batch = of_batch(module, variables, x, None)
    train, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    for got, want in zip(jax.tree.leaves(at_batch(x)), jax.tree.leaves(train), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(at_batch(x[:2] + 1).log_density, at_batch(x + 1).log_density[:2], rtol=1e-5)


class Own(nn.Module):
    """Features by running averages of its own."""

    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        return nn.Dense(3)(x - mean.value[None])


def test_running_averages_are_refused_where_a_loss_cannot_move_them(normalised):
    module, variables, x = normalised
    with pytest.raises(ValueError, match=r"must not normalise by running averages.*encoder/BatchNorm_0.*its variables"):
        virtual_adversarial(lambda x: module.apply(variables, x), x, KEY, radius=0.5)
    train = lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"])[0]  # noqa: E731
    assert np.isfinite(virtual_adversarial(train, x, KEY, radius=0.5))
    with pytest.raises(ValueError, match="`variables` must be those of the module; got None"):
        virtual_adversarial(module, x, KEY, radius=0.5)
    own = Clusterer(Own(), DifferentiableHMoG(2, 3))
    with pytest.raises(ValueError, match=r"running averages in `nn.BatchNorm`.*Give a function"):
        virtual_adversarial(own, x, KEY, radius=0.5, variables=nn.unbox(own.init(KEY, x)))


def test_a_radius_is_a_share_of_the_distance_to_a_neighbour():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 6)).astype(np.float32)
    distances = np.sort(np.linalg.norm(x[:, None].astype(float) - x, axis=-1), axis=1)
    got = perturbation_radius(x, share=0.3, neighbour=4)
    np.testing.assert_allclose(got, 0.3 * np.median(distances[:, 4]), rtol=1e-5)
    np.testing.assert_allclose(
        perturbation_radius(100 * x.reshape(700, 2, 3) + 1e4), 100 * perturbation_radius(x), rtol=1e-3
    )
    for bad, match in ((x[:1], "two rows at least; got 1"), (np.ones((30, 2)), "rows that differ")):
        with pytest.raises(ValueError, match=match):
            perturbation_radius(bad)
