"""The NNX heads: the linen ones' numbers, and NNX's transformations, modes and filters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, is_slow, over
from flax import nnx

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, fit_em, warm_start
from flax_hmog import nnx as heads
from flax_hmog.networks import MLP, negative_joint_information
from flax_hmog.networks import Clusterer as LinenClusterer
from flax_hmog.toy import natural, x
from flax_hmog.training import CheckpointWriter, restore

X = jnp.asarray(np.random.default_rng(0).standard_normal((64, 6)), jnp.float32)
NATIVE = [heads.DifferentiableHMoG, heads.SymmetricHMoG, heads.AnalyticHMoG]
EACH = pytest.mark.parametrize("native", NATIVE, ids=lambda native: native.__name__)
MODES = pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])


def small(native, obs_dim=4, seed=0, **options):
    return native(2, 3, obs_dim, rngs=nnx.Rngs(seed), **options)


@over(CASES.values(), is_slow)
def test_outputs_and_gradients_are_those_of_linen(case):
    linen, variables, rows = case.head("float32"), case.variables("float32"), case.x().astype(np.float32)
    native = heads.from_linen(linen, variables)
    assert native.linen == linen
    jax.tree.map(np.testing.assert_array_equal, native.variables(), variables)
    jax.tree.map(np.testing.assert_array_equal, native(rows), linen.apply(variables, rows))
    moments, want = native.moments(), linen.apply(variables, method="moments")
    jax.tree.map(np.testing.assert_array_equal, moments, want)
    if case.family is AnalyticHMoG:
        assert not nnx.state(native, nnx.Param)
        _, after = linen.apply(variables, rows, train=True, mutable=["em"])
        native(rows, train=True)
        jax.tree.map(np.testing.assert_array_equal, native.variables(), after)
        return
    found = nnx.grad(lambda head: head.mean_log_density(rows))(native)
    expected = jax.grad(lambda v: linen.apply(v, rows, method="mean_log_density"))(variables)["params"]
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name].get_value(), leaf, rtol=1e-6, atol=1e-6, err_msg=name)


@EACH
def test_a_fresh_head_is_a_model(native):
    head = small(native)
    assert np.isfinite(head(x).log_density).all()
    assert (head.obs_dim, head.lat_dim, head.n_components, head.obs_rep) == (4, 2, 3, "diagonal")
    rows, latent, components = head.sample(5, jax.random.key(0))
    assert (rows.shape, latent.shape, components.shape) == ((5, 4), (5, 2), (5,))
    assert not np.array_equal(small(native, seed=1)(x).log_density, head(x).log_density)
    with pytest.raises(ValueError, match=r"`lat_dim` must be .* at most 4; got 5"):
        native(5, 3, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_clusters'"):
        small(native, n_clusters=3)


@EACH
def test_fits_go_into_heads(native):
    head = small(native)
    if native is heads.AnalyticHMoG:
        found = fit_em(head, x, jax.random.key(0), max_steps=2)
        assert found.natural.interaction.shape == (4, 2)
    info = head.warm_start(natural, x)
    np.testing.assert_allclose(head.mean_log_density(x), info.log_likelihood_after, rtol=1e-5)
    assert abs(float(info.log_likelihood_after - info.log_likelihood_before)) < 2
    with pytest.raises(TypeError, match="an NNX head its warm_start"):
        warm_start(head, natural)


@MODES
@EACH
def test_transformations(native, graph):
    head = small(native)
    want = head(x).log_density
    got = nnx.jit(lambda head, x: head(x).log_density, graph=graph, graph_updates=graph)(head, x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    again = nnx.remat(lambda head, x: head(x).log_density, graph=graph, graph_updates=graph)(head, x)
    np.testing.assert_allclose(again, want, rtol=1e-5)
    # a pure function of state, for transformations of jax
    definition, state = nnx.split(head)
    pure = jax.jit(lambda state, x: nnx.merge(definition, state)(x).log_density)
    np.testing.assert_allclose(pure(state, x), want, rtol=1e-5)


@EACH
def test_an_ensemble_by_vmap(native):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return native(2, 3, 4, rngs=rngs)

    ensemble = make(nnx.Rngs(0))
    densities = np.asarray(nnx.vmap(lambda head, x: head(x).log_density, in_axes=(0, None))(ensemble, x))
    assert densities.shape == (3, 12)
    assert len(np.unique(densities[:, 0])) == 3


@pytest.mark.parametrize("native", NATIVE[:2], ids=lambda native: native.__name__)
def test_training_with_an_encoder(native):
    rngs = nnx.Rngs(0)
    encoder = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs))
    module = heads.Clusterer(encoder, native(2, 3, 4, rngs=rngs))
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        def loss(module):
            joint, alone = module.joint_and_head_outputs(x)
            information = negative_joint_information(joint, joint)
            return information - 0.01 * alone.log_density.mean(), information

        (_, value), gradients = nnx.value_and_grad(loss, has_aux=True)(module)
        optimizer.update(module, gradients)
        return value

    values = [float(step(module, optimizer, X)) for _ in range(20)]
    assert values[-1] < values[0]
    module.eval()
    assert module(X).log_density.shape == (64,)


def test_steps_of_em_in_training_mode():
    head = small(heads.AnalyticHMoG, x=x)
    module = heads.Clusterer(lambda x: x, head)
    steps = lambda: int(head.em.get_value()["step"])  # noqa: E731
    module(x)
    assert steps() == 0
    module.train()
    before = float(head.mean_log_density(x))
    for graph in (True, False):
        step = nnx.jit(lambda module, x: module(x), graph=graph, graph_updates=graph)
        for _ in range(5):
            step(module, x)
    assert steps() == 10
    assert float(head.mean_log_density(x)) > before
    head(x, train=False)
    module.eval()
    module(x)
    joint, _ = module.joint_and_head_outputs(x)
    assert steps() == 10
    assert joint.log_density.shape == (12,)
    with pytest.raises(ValueError, match="`missing` must be"):
        head(x, train=True, missing="nan")
    # under jax.jit a module is an argument like any other: what changes in it is lost, unless it is returned
    module.train()
    jax.jit(lambda module, x: module(x))(module, x)
    assert steps() == 10
    learnt = jax.jit(lambda module, x: (module(x), nnx.state(module))[1])(module, x)
    nnx.update(module, learnt)
    assert steps() == 11


def test_steps_of_em_in_a_scan():
    head, batches = small(heads.AnalyticHMoG, x=x), jnp.stack([x] * 4)
    carried = nnx.StateAxes({...: nnx.Carry})
    nnx.scan(lambda head, x: head(x, train=True).log_density, in_axes=(carried, 0), out_axes=0)(head, batches)
    one_by_one = small(heads.AnalyticHMoG, x=x)
    for batch in batches:
        one_by_one(batch, train=True)
    assert int(head.em.get_value()["step"]) == 4
    np.testing.assert_allclose(head(x).log_density, one_by_one(x).log_density, rtol=1e-4)


def test_checkpoints_by_way_of_linen(tmp_path):
    head = small(heads.SymmetricHMoG)
    with CheckpointWriter(tmp_path / "run", head=head.linen) as writer:
        writer.save(1, head.variables())
    restored = restore(tmp_path / "run")
    again = heads.from_linen(restored.head, restored.variables)
    np.testing.assert_array_equal(again(x).log_density, head(x).log_density)


def test_variables_are_a_snapshot():
    """As `nnx.state` is none: it holds the Variables that training changes."""
    head = small(heads.DifferentiableHMoG)
    variables, state, before = head.variables(), nnx.state(head), head(x).log_density
    optimizer = nnx.Optimizer(head, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(head, nnx.grad(lambda head: -head.mean_log_density(x))(head))
    nnx.update(head, state)
    assert not np.array_equal(head(x).log_density, before)
    head.take(variables)
    np.testing.assert_array_equal(head(x).log_density, before)


def test_only_heads_come_from_linen():
    module = LinenClusterer(MLP(4, (8,)), DifferentiableHMoG(2, 3))
    with pytest.raises(TypeError, match="from_linen: `head` must be one of the three linen heads; got Clusterer"):
        heads.from_linen(module, {})
    with pytest.raises(TypeError, match="`encoder` must come before `head`"):
        heads.Clusterer(small(NATIVE[0]), nnx.Linear(6, 4, rngs=nnx.Rngs(0)))


def test_axes_have_names_only_if_asked_for():
    with nnx.use_eager_sharding(False):  # else they must be axes of a mesh that is there
        plain, named = (small(heads.DifferentiableHMoG, logical_axes=names) for names in (False, True))
    assert plain.loadings.get_metadata().get("out_sharding") is None
    assert named.loadings.get_metadata()["out_sharding"] == ("observed", "latent")
    np.testing.assert_array_equal(plain(x).log_density, named(x).log_density)
