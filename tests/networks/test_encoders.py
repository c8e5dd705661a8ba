"""Encoders beside the heads on them: lower precision, normalisation, what they are told, several devices, images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from own_networks import init

from flax_hmog import AnalyticHMoG, DifferentiableHMoG
from flax_hmog.networks.encoders import MLP, Autoencoder, Clusterer, ConvNet, train_arguments

D, F, L, K, B = 12, 5, 2, 3, 32
X = np.random.default_rng(0).standard_normal((B, D)).astype(np.float32)


ENCODERS = {
    "MLP": MLP,
    "ConvNet": functools.partial(ConvNet, image_shape=(4, 3)),
    "Autoencoder": functools.partial(Autoencoder, obs_dim=D),
}
EACH_ENCODER = pytest.mark.parametrize(
    "make",
    [pytest.param(make, id=name, marks=[pytest.mark.slow] * (make is not MLP)) for name, make in ENCODERS.items()],
)


@EACH_ENCODER
def test_an_encoder_in_bfloat16_under_a_head_in_float32(make, key):
    module = Clusterer(make(F, dtype=jnp.bfloat16), DifferentiableHMoG(L, K))
    variables = init(module, key, X)
    output, _ = jax.jit(lambda v: module.apply(v, X, train=True, mutable=["batch_stats"]))(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {jnp.dtype("float32")}
    features = module.apply(variables, X, method="features")
    plain = Clusterer(make(F), DifferentiableHMoG(L, K))
    exact = plain.apply(variables, X, method="features")
    np.testing.assert_allclose(features, exact, atol=0.1)
    assert np.abs(features - exact).max() > 1e-4


@pytest.mark.parametrize("normalization", ["none", "layer", "batch"])
def test_normalization_of_encoders(normalization, key):
    module = Clusterer(ConvNet(F, (4, 3), (4, 6), 8, normalization), DifferentiableHMoG(L, K))
    variables = init(module, key, X)
    assert ("batch_stats" in variables) == (normalization == "batch")
    features, updates = module.apply(variables, X, train=True, method="features", mutable=["batch_stats"])
    assert features.shape == (B, F)
    if normalization == "batch":
        np.testing.assert_allclose(features.mean(axis=0), np.zeros(F), atol=1e-5)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), variables["batch_stats"], updates["batch_stats"])
        assert max(jax.tree.leaves(moved)) > 1e-3
    with pytest.raises(ValueError, match='`normalization` must be "none", "layer" or "batch"; got \'group\''):
        ConvNet(F, (4, 3), normalization="group").init(key, X)


def test_in_network_em_starts_at_the_scale_of_training(key):
    module = Clusterer(MLP(F, (8,), "batch"), AnalyticHMoG(L, K))
    variables = init(module, key, X, train=True)
    features, _ = module.apply(variables, X, train=True, method="features", mutable=["batch_stats"])
    moments = variables["em"]["head"]["model"]
    np.testing.assert_allclose(moments.noise.entries, np.var(features, axis=0), rtol=1e-3)
    np.testing.assert_allclose(moments.bias, np.mean(features, axis=0), atol=1e-5)


class Deterministic(nn.Module):
    """Says whether it is trained as flax's own layers do."""

    @nn.compact
    def __call__(self, x, deterministic=True, **unused):
        return nn.Dense(F)(nn.Dropout(0.5)(x, deterministic=deterministic))


def test_an_encoder_is_told_that_it_is_trained(key):
    module = Clusterer(Deterministic(), DifferentiableHMoG(L, K))
    variables = init(module, key, X)
    trained = module.apply(variables, X, train=True, rngs={"dropout": key})
    assert not np.allclose(trained.log_density, module.apply(variables, X).log_density)


class Train(nn.Module):
    def __call__(self, x, train):
        """By position, as it comes right after the inputs."""


class NamedOnly(nn.Module):
    def __call__(self, x, *, is_training=False, deterministic=True):
        """By name, both."""


class After(nn.Module):
    def __call__(self, x, mask=None, training=False):
        """By name, as something stands between."""


@pytest.mark.parametrize(
    ("module", "trained"),
    [
        (Train(), ((True,), {})),
        (NamedOnly(), ((), {"is_training": True, "deterministic": False})),
        (After(), ((), {"training": True})),
        (nn.BatchNorm(), ((False,), {})),
        (nn.Dense(F), ((), {})),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_arguments_that_say_that_a_module_is_trained(module, trained):
    assert train_arguments(module, True) == trained
    positional, named = trained
    flipped = tuple(not v for v in positional), {name: not v for name, v in named.items()}
    assert train_arguments(module, False) == flipped


@EACH_ENCODER
def test_a_batch_spread_over_an_axis_is_one_batch(make, key):
    """For the running averages of the encoder and the statistics of EM, as they are without the axis."""
    whole = Clusterer(make(F, normalization="batch"), AnalyticHMoG(L, K))
    parts = Clusterer(make(F, normalization="batch", axis_name="batch"), AnalyticHMoG(L, K, axis_name="batch"))
    variables = init(whole, key, X, train=True)

    def update(module, x):
        return module.apply(variables, x, train=True, mutable=["batch_stats", "em"])[1]

    want = jax.jit(lambda x: update(whole, x))(X)
    got = jax.jit(jax.vmap(lambda x: update(parts, x), axis_name="batch"))(X.reshape(4, B // 4, D))
    for part in range(4):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-3)
        jax.tree.map(lambda a, b, part=part, close=close: close(a[part], b), got, want)


def test_an_encoder_that_is_always_the_same_is_told_nothing(key):
    module = Clusterer(nn.Sequential([nn.Dense(F), nn.relu]), DifferentiableHMoG(L, K))
    output, _ = module.init_with_output(key, X, train=True)
    assert np.isfinite(output.log_density).all()


def test_a_network_for_images_takes_rows_or_images(key):
    images = X.reshape(B, 4, 3, 1)
    net = ConvNet(F, (4, 3, 1), normalization="layer")
    variables = net.init(key, X)
    np.testing.assert_array_equal(net.apply(variables, X), net.apply(variables, images))
    with pytest.raises(
        ValueError, match=r"images \(4, 3, 1\) of 12 numbers, one for each sample; got shape \(32, 11\)"
    ):
        net.apply(variables, X[:, :11])


def test_an_autoencoder_makes_inputs_again(key):
    module = Clusterer(Autoencoder(F, D, (8,)), DifferentiableHMoG(L, K))
    variables = init(module, key, X)
    assert set(variables["params"]["encoder"]) == {"encoder", "decoder"}
    assert module.apply(variables, X, method="reconstruct").shape == X.shape
    optimizer = optax.adam(1e-2)

    def loss(variables):
        return jnp.mean((module.apply(variables, X, method="reconstruct") - X) ** 2)

    state, first, slope = optimizer.init(variables), loss(variables), jax.jit(jax.grad(loss))
    for _ in range(60):
        updates, state = optimizer.update(slope(variables), state)
        variables = optax.apply_updates(variables, updates)
    assert loss(variables) < 0.6 * first


@pytest.mark.parametrize("normalization", ["layer", "batch"])
def test_normalisation_does_not_depend_on_an_offset(normalization):
    """A constant added to all units before normalisation changes nothing but rounding."""
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    module = MLP(4, (8,), normalization=normalization)
    variables = module.init(jax.random.key(0), x)
    params = dict(variables["params"])
    name = next(name for name in params if name.startswith("Dense"))
    shifted = dict(params) | {name: params[name] | {"bias": params[name]["bias"] + 3000.0}}
    near, far = (
        module.apply({**variables, "params": p}, x, True, mutable=["batch_stats"])[0] for p in (params, shifted)
    )
    # inputs near 3000 have a spacing of 2e-4
    np.testing.assert_allclose(far, near, atol=0.01)
