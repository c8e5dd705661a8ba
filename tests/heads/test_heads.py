"""The three linen modules: every method of the contract, lazy sizes, nesting, logical axes, training."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, KINDS
from dense import Dense, assert_close

import flax_hmog
from flax_hmog import (
    AnalyticHMoG,
    Diagonal,
    DifferentiableHMoG,
    HMoGOutput,
    Mean,
    Moments,
    Natural,
    PositiveDefinite,
    ResidualMoments,
    Scale,
    SymmetricHMoG,
    analytic_hmog,
    differentiable_hmog,
    join_conjugated,
    natural_to_mean,
    natural_to_moments,
    split_conjugated,
    symmetric_hmog,
    whiten_prior,
)

THREE = [CASES[f"{name}-4.2.3"] for name in ("differentiable-diagonal-diagonal", "symmetric-diagonal-diagonal",
                                             "analytic-diagonal-full")]  # fmt: skip
EACH = pytest.mark.parametrize("case", THREE, ids=lambda case: case.name)
BATCHED = {
    "log_observable_density": lambda K, L: (),
    "posterior_categorical": lambda K, L: (K - 1,),
    "posterior_soft_assignments": lambda K, L: (K,),
    "posterior_assignments": lambda K, L: (K,),
    "posterior_hard_assignment": lambda K, L: (),
    "latent_mean": lambda K, L: (L,),
}


def collection(case):
    return "em" if case.family is AnalyticHMoG else "params"


@EACH
@pytest.mark.parametrize("batch", [pytest.param((), marks=pytest.mark.slow), (3, 2)], ids=str)
def test_methods_are_the_functions_of_their_names(case, batch):
    head, variables = case.head("float32"), case.variables("float32")
    x = case.x(int(np.prod(batch))).reshape(*batch, case.obs_dim)
    natural = head.apply(variables, method="natural")
    for name, trailing in BATCHED.items():
        got = head.apply(variables, x, method=name)
        assert got.shape == (*batch, *trailing(case.n_components, case.lat_dim)), name
        np.testing.assert_array_equal(got, getattr(flax_hmog, name)(natural, x))
    posterior = head.apply(variables, x, method="posterior_at")
    assert posterior.location.shape == (*batch, case.n_components, case.lat_dim)
    assert posterior.bias.shape == (case.n_components - 1,)
    probabilities = head.apply(variables, x, method="posterior_soft_assignments")
    assert_close(np.sum(probabilities, axis=-1), np.ones(batch), 1e-6)
    assert np.issubdtype(head.apply(variables, x, method="posterior_hard_assignment").dtype, np.integer)


@EACH
def test_output_agrees_with_single_methods(case):
    head, variables, x = case.head("float32"), case.variables("float32"), case.x()
    output = head.apply(variables, x)
    assert isinstance(output, HMoGOutput)
    single = {name: head.apply(variables, x, method=name) for name in BATCHED}
    assert_close(output.log_density, single["log_observable_density"], 1e-6)
    assert_close(np.exp(output.log_responsibilities), single["posterior_soft_assignments"], 1e-6)
    assert_close(output.latent_mean, single["latent_mean"], 1e-6)
    np.testing.assert_array_equal(np.argmax(output.log_responsibilities, -1), single["posterior_hard_assignment"])


@EACH
def test_coordinates_of_a_head_are_one_model(case):
    head, variables = case.head("float32"), case.variables("float32")
    natural, moments, mean, whitened = (
        head.apply(variables, method=name) for name in ("natural", "moments", "mean", "whiten_prior")
    )
    assert [type(value) for value in (natural, moments, mean, whitened)] == [Natural, Moments, Mean, Mean]
    pairs = ((moments, natural_to_moments(natural)), (mean, natural_to_mean(natural)), (whitened, whiten_prior(mean)))
    for got, want in pairs:
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), got, want)
    if case.family is not DifferentiableHMoG:
        parts = head.apply(variables, method="split_conjugated")
        jax.tree.map(np.testing.assert_array_equal, parts, split_conjugated(natural))
        joined = head.apply(variables, *parts, method="join_conjugated")
        jax.tree.map(np.testing.assert_array_equal, joined, join_conjugated(*parts))


@EACH
def test_init_infers_the_observed_dimension(case, key):
    x = case.x(2).astype(np.float32)
    lazy, given = case.head("float32", obs_dim=None), case.head("float32")
    variables = lazy.init(key, x)
    assert set(variables) == {collection(case)}
    same = x if case.family is AnalyticHMoG else x[0]  # which takes location and scale from its first batch
    jax.tree.map(np.testing.assert_array_equal, variables, given.init(key, same))
    assert jax.tree.leaves(variables)[0].dtype == np.float32
    # what is stored is enough for methods without observations, and for the checks of those with
    assert lazy.apply(variables, method="natural").interaction.shape == (case.obs_dim, case.lat_dim)
    with pytest.raises(ValueError, match=r"log_observable_density: `x` must have shape \(..., 4\)"):
        lazy.apply(variables, np.ones((2, 5)), method="log_observable_density")
    with pytest.raises(ValueError, match="natural: `obs_dim` must be known"):
        lazy.init(key, method="natural")
    assert given.init(key, method="natural").keys() == variables.keys()


@EACH
def test_init_differs_by_key_and_is_a_proper_start(case):
    x = case.x(50).astype(np.float32)
    first, other = (case.head("float32").init(jax.random.key(seed), x) for seed in (0, 1))
    distances = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(initial=0), first, other)
    assert max(jax.tree.leaves(distances)) > 0.1
    output = case.head("float32").apply(first, x)
    assert np.isfinite(output.log_density).all()
    # components differ, so that gradients and EM can tell them apart
    assert np.asarray(output.log_responsibilities).std(axis=0).min() > 1e-2


@EACH
def test_logical_axis_names(case, key):
    x = case.x(1).astype(np.float32)
    boxed = jax.eval_shape(case.head("float32").init, key, x)
    if case.family is AnalyticHMoG:
        assert isinstance(boxed["em"]["model"], Moments)
        assert isinstance(boxed["em"]["running"], ResidualMoments)
        assert boxed["em"]["step"].shape == ()
        return
    specs = nn.get_partition_spec(boxed)["params"]
    want = {
        "bias": ("observed",),
        "noise": ("observed",),
        "loadings": ("observed", "latent"),
        "logits": ("component",),
        "means": ("component", "latent"),
        "precisions": ("component", "latent"),
    }
    if case.family is SymmetricHMoG:
        want["base_precision"] = ("latent", None)
    assert {name: tuple(spec) for name, spec in specs.items()} == want
    full = jax.eval_shape(DifferentiableHMoG(2, 3, obs_rep="full", pst_rep="full").init, key, x)
    specs = nn.get_partition_spec(full)["params"]
    assert tuple(specs["precisions"]) == ("component", "latent", None)
    assert tuple(specs["noise"]) == ("observed", None)


@EACH
def test_sample_uses_its_rng_stream(case, key):
    head, variables = case.head("float32"), case.variables("float32")
    draw = lambda key: head.apply(variables, 5, method="sample", rngs={"sample": key})  # noqa: E731
    x, y, z = draw(key)
    assert (x.shape, y.shape, z.shape) == ((5, case.obs_dim), (5, case.lat_dim), (5,))
    jax.tree.map(np.testing.assert_array_equal, draw(key), (x, y, z))
    assert not np.any(np.asarray(draw(jax.random.key(1))[0]) == np.asarray(x))


def test_factories_have_the_argument_order_of_goal():
    assert differentiable_hmog(6, "full", 2, "scale", 4) == DifferentiableHMoG(
        lat_dim=2, n_components=4, obs_dim=6, obs_rep="full", pst_rep="scale"
    )
    assert symmetric_hmog(6, "scale", 2, "diagonal", 4, signal_bound=50.0) == SymmetricHMoG(
        lat_dim=2, n_components=4, obs_dim=6, obs_rep="scale", lat_rep="diagonal", signal_bound=50.0
    )
    assert analytic_hmog(None, "diagonal", 2, 4) == AnalyticHMoG(lat_dim=2, n_components=4, obs_rep="diagonal")
    orders = {
        differentiable_hmog: ["obs_dim", "obs_rep", "lat_dim", "pst_rep", "n_components"],
        symmetric_hmog: ["obs_dim", "obs_rep", "lat_dim", "lat_rep", "n_components"],
        analytic_hmog: ["obs_dim", "obs_rep", "lat_dim", "n_components"],
    }
    for factory, order in orders.items():
        assert list(inspect.signature(factory).parameters)[: len(order)] == order


@pytest.mark.parametrize(("name", "kind"), [*zip(KINDS, (Scale, Diagonal, PositiveDefinite), strict=True)])
def test_kinds_by_class_instance_or_name(name, kind):
    heads = [DifferentiableHMoG(2, 3, 4, rep, rep) for rep in (name, name.upper(), kind, kind())]
    assert all(head == heads[0] for head in heads)
    assert {hash(head) for head in heads} == {hash(heads[0])}
    assert (heads[0].obs_rep, heads[0].pst_rep) == (name, name)


class Compact(nn.Module):
    """An encoder with a head made where it is called."""

    head: dict

    @nn.compact
    def __call__(self, x, train=False):
        features = nn.Dense(4)(x)
        head = self.head["family"](2, 3, **{k: v for k, v in self.head.items() if k != "family"}, name="head")
        return head(features, train=train) if isinstance(head, AnalyticHMoG) else head(features)


class InSetup(nn.Module):
    """An encoder with a head given from outside and used twice."""

    head: nn.Module

    def setup(self):
        self.encoder = nn.Dense(4)

    def __call__(self, x):
        return self.head(self.encoder(x))

    def density_and_draw(self, x):
        return self.head.log_observable_density(self.encoder(x)), self.head.natural()


@EACH
def test_heads_nest_in_encoders(case, key):
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    for module in (Compact({"family": case.family}), InSetup(case.family(2, 3))):
        variables = module.init(key, x)
        assert "head" in variables[collection(case)]
        assert module.apply(variables, x).log_responsibilities.shape == (6, 3)
    density, natural = module.apply(variables, x, method="density_and_draw")
    assert_close(density, module.apply(variables, x).log_density, 1e-6)
    assert isinstance(natural, Natural)


@EACH
def test_gradients_reach_the_encoder(case, key):
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    module = InSetup(case.family(2, 3))
    variables = nn.meta.unbox(module.init(key, x))
    loss = lambda params: jnp.mean(module.apply(variables | {"params": params}, x).log_density)  # noqa: E731
    slope = jax.jit(jax.grad(loss))(variables["params"])["encoder"]["kernel"]
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() > 1e-6


@EACH
def test_a_second_apply_compiles_nothing(case, compilations):
    head, x = case.head("float32"), case.x(6).astype(np.float32)
    step = jax.jit(head.apply)
    step(case.variables("float32"), x)
    other = case.variables("float32", seed=1)
    assert compilations(step, other, x + 1) == 0


@pytest.mark.parametrize("case", THREE[:2], ids=lambda case: case.name)
def test_gradients_train_a_head(case, key):
    """Adam from the initial leaves comes within reach of the model that drew the data."""
    true = Dense.of_natural(case.natural(seed=4))
    x = true.sample(np.random.default_rng(1), 500)[0].astype(np.float32)
    head = case.head("float32")
    params = nn.meta.unbox(head.init(key, x))["params"]
    optimizer = optax.adam(3e-2)

    def step(carry, _):
        params, state = carry
        loss = lambda params: -jnp.mean(head.apply({"params": params}, x).log_density)  # noqa: E731
        value, slopes = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slopes, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, length=600))
    losses = np.asarray(run(params)[1])
    assert losses[-1] < losses[0] - 1
    assert losses[-1] < -true.log_density(np.asarray(x, np.float64)).mean() + 0.1
