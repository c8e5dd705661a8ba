"""A head on an encoder, as its users attach it: nested, frozen, in the middle, transformed, in lower precision, in NNX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from own_networks import init

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.networks.objectives import (
    negative_joint_information,
    negative_log_likelihood,
    negative_mutual_information,
)

D, F, L, K, B = 12, 5, 2, 3, 32
X = np.random.default_rng(0).standard_normal((B, D)).astype(np.float32)
HEADS = (DifferentiableHMoG(L, K), SymmetricHMoG(L, K), AnalyticHMoG(L, K))


def each(heads, fast):
    """Over heads, of which all but these are slow: programs of each take seconds to compile."""
    slow = pytest.mark.slow
    of_heads = [pytest.param(head, id=type(head).__name__, marks=[slow] * (head not in fast)) for head in heads]
    return pytest.mark.parametrize("head", of_heads)


EACH_HEAD = each(HEADS, HEADS[::2])
EACH_TRAINED = each(HEADS[:2], HEADS[:1])
ANALYTIC_FIRST = each(HEADS, HEADS[2:])
DIFFERENTIABLE_FIRST = each(HEADS, HEADS[:1])


class Compact(nn.Module):
    """A head as users attach it in `compact`."""

    head: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.head(nn.Dense(F)(x))


class InSetup(nn.Module):
    """And in `setup`, made there."""

    def setup(self):
        self.dense = nn.Dense(F)
        self.cluster = DifferentiableHMoG(L, K)

    def __call__(self, x):
        return self.cluster(self.dense(x))


class InTheMiddle(nn.Module):
    """What a head says of features, as features of what follows."""

    head: nn.Module

    @nn.compact
    def __call__(self, x):
        output = self.head(nn.Dense(F)(x))
        said = [output.latent_mean, output.log_responsibilities, output.log_density[..., None]]
        return nn.Dense(1)(jnp.concatenate(said, axis=-1))


def gradient(loss, **options):
    return jax.jit(jax.grad(loss, **options))


def loss_of(module, variables, x=X):
    return negative_mutual_information(module.apply(variables, x))


def leaves_that_move(gradients):
    return {name for name, part in gradients["params"].items() if any(np.any(leaf) for leaf in jax.tree.leaves(part))}


@EACH_HEAD
def test_a_head_in_compact_has_nested_variables(head, key):
    module = Compact(head)
    variables = init(module, key, X)
    collection = "em" if isinstance(head, AnalyticHMoG) else "params"
    assert "head" in variables[collection]
    own = head.apply({collection: variables[collection]["head"]}, nn.Dense(F).apply(_part(variables, "Dense_0"), X))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), module.apply(variables, X), own)


def test_a_head_in_setup_learns_with_its_encoder(key):
    module = InSetup()
    variables = nn.unbox(module.init(key, X))
    gradients = jax.grad(lambda variables: loss_of(module, variables))(
        variables
    )  # without jit, as one looks at it first
    assert leaves_that_move(gradients) == {"dense", "cluster"}


@EACH_HEAD
def test_a_head_in_the_middle_passes_gradients_on(head, key):
    module = InTheMiddle(head)
    variables = init(module, key, X)
    square = lambda params: jnp.mean(module.apply(variables | {"params": params}, X) ** 2)  # noqa: E731
    gradients = gradient(square)(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert leaves_that_move({"params": gradients}) == set(variables["params"])


@EACH_TRAINED
def test_the_likelihood_of_the_second_output_teaches_the_head_alone(head, key):
    module = Clusterer(MLP(F, (8,)), head)
    variables = init(module, key, X)

    def loss(variables):
        _, head_only = module.apply(variables, X, method="joint_and_head_outputs")
        return negative_log_likelihood(head_only)

    assert leaves_that_move(gradient(loss)(variables)) == {"head"}


@EACH_TRAINED
def test_parts_have_their_own_rates_and_can_be_frozen(head, key):
    module = Clusterer(MLP(F, (8,)), head)
    variables = init(module, key, X)
    params = variables["params"]
    rates = {"encoder": optax.set_to_zero(), "head": optax.sgd(0.1)}
    labels = {name: jax.tree.map(lambda _, name=name: name, part) for name, part in params.items()}
    optimizer = optax.multi_transform(rates, labels)
    gradients = gradient(lambda params: loss_of(module, {"params": params}))(params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["encoder"]))
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-5), updates["head"], gradients["head"])
    # a clip within the part sees the gradients of that part alone
    rates["head"] = optax.chain(optax.clip_by_global_norm(1e6), rates["head"])
    optimizer = optax.multi_transform(rates, labels)
    far = gradients | {"encoder": jax.tree.map(lambda leaf: leaf + 1e9, gradients["encoder"])}
    clipped, _ = optimizer.update(far, optimizer.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, clipped, updates)


@DIFFERENTIABLE_FIRST
def test_under_jit_and_vmap(head, key):
    module = Compact(head)
    variables = init(module, key, X)
    want = module.apply(variables, X)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, nn.jit(Compact)(head).apply(variables, X), want)
    jax.tree.map(close, jax.jit(jax.vmap(lambda row: module.apply(variables, row)))(X), want)
    jax.tree.map(close, jax.jit(module.apply)(variables, X), want)


LIFTS = {"remat": functools.partial(nn.remat, static_argnums=2), "jit": functools.partial(nn.jit, static_argnums=2)}


@pytest.mark.parametrize("lift", LIFTS)
@ANALYTIC_FIRST
def test_training_under_remat_and_jit(head, lift, key):
    """Of the whole, or of the encoder alone: the same collections and gradients as without."""
    plain = Clusterer(MLP(F, (8,), "batch"), head)
    lifted = LIFTS[lift]
    variables = init(plain, key, X)
    mutable = [name for name in variables if name != "params"]

    def loss(module, params):
        output, updates = module.apply(variables | {"params": params}, X, True, mutable=mutable)
        return negative_mutual_information(output), updates

    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    slopes, updates = gradient(lambda p: loss(plain, p), has_aux=True)(variables["params"])
    assert "batch_stats" in updates
    for module in (lifted(Clusterer)(plain.encoder, head), Clusterer(lifted(MLP)(F, (8,), "batch"), head)):
        own = jax.eval_shape(lambda key, m=module: nn.unbox(m.init(key, X, False)), key)
        assert jax.tree.structure(own) == jax.tree.structure(variables)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, m=module: loss(m, p)[0]))(variables["params"])
        assert lift in str(jaxpr)
        got = gradient(lambda p, m=module: loss(m, p), has_aux=True)(variables["params"])
        jax.tree.map(close, got, (slopes, updates))


@ANALYTIC_FIRST
def test_an_ensemble_by_vmap_over_parameters(head, key):
    """`nn.vmap`: members with parameters of their own, on the same features. Leaves have names for their axes, so that
    flax wants one for the new axis as well."""
    ensemble = nn.vmap(
        Compact, in_axes=None, out_axes=0, axis_size=3, variable_axes={"params": 0, "em": 0},
        split_rngs={"params": True}, metadata_params={nn.PARTITION_NAME: "member"},
    )(head)  # fmt: skip
    variables = init(ensemble, key, X)
    output = ensemble.apply(variables, X)
    assert output.log_responsibilities.shape == (3, B, K)
    for member in range(3):
        own = jax.tree.map(lambda leaf, member=member: leaf[member], variables)
        np.testing.assert_allclose(Compact(head).apply(own, X).log_density, output.log_density[member], rtol=1e-4)


@EACH_TRAINED
def test_over_time_by_scan(head, key):
    """`nn.scan`: one head and one cell for all times."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            carry, y = nn.GRUCell(F)(carry, x)
            return carry, type(head)(L, K)(y)

    scanned = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)()
    sequence = X.reshape(4, 8, D)
    start = jnp.zeros((4, F))
    variables = init(scanned, key, start, sequence)
    _, output = jax.jit(scanned.apply)(variables, start, sequence)
    assert output.log_responsibilities.shape == (4, 8, K)
    gradients = gradient(lambda v: negative_mutual_information(scanned.apply(v, start, sequence)[1]))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_in_network_em_under_scan(key):
    """Steps of stepwise EM carried through `nn.scan`, as a Python loop takes them."""
    head = AnalyticHMoG(L, K, obs_dim=D)
    scanned = nn.scan(
        lambda module, _, x: (None, module(x, train=True)), variable_carry="em", split_rngs={"params": False}
    )
    batches = X.reshape(4, 8, D)
    variables = init(head, key, X)

    def run(module, x):
        return scanned(module, None, x)[1]

    output, after = jax.jit(nn.apply(run, head, mutable=["em"]))(variables, batches)
    expected, step = variables, jax.jit(lambda v, x: head.apply(v, x, train=True, mutable=["em"]))
    for batch in batches:
        _, expected = step(expected, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), after, expected)
    assert output.log_density.shape == (4, 8)


def test_features_in_bfloat16_are_taken_in_the_dtype_of_the_head(key):
    for head in HEADS:
        features = jnp.asarray(X, jnp.bfloat16)
        variables = init(head, key, features)
        want = head.apply(variables, features.astype(jnp.float32))
        jax.tree.map(np.testing.assert_array_equal, head.apply(variables, features), want)


@ANALYTIC_FIRST
def test_in_nnx(head, key):
    """Through the bridge: the same numbers and gradients, and steps of EM in its state."""
    module = Clusterer(MLP(F, (8,)), head)
    with nnx.use_eager_sharding(False):
        bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(X)
    is_analytic = isinstance(head, AnalyticHMoG)
    own = {name: variable.get_value() for name, variable in bridged.head.items()}
    params = {name: {leaf: v.get_value() for leaf, v in layer.items()} for name, layer in bridged.encoder.items()}
    variables = {"params": {"encoder": params} | ({} if is_analytic else {"head": own})}
    variables |= {"em": {"head": own}} if is_analytic else {}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, bridged(X), module.apply(variables, X))
    gradients = nnx.grad(lambda bridged: negative_mutual_information(bridged(X)))(bridged)
    want = gradient(lambda v: loss_of(module, variables | {"params": v}))(variables["params"])["encoder"]
    close(gradients.encoder["Dense_0"]["kernel"].get_value(), want["Dense_0"]["kernel"])
    if is_analytic:
        bridged(X, train=True, mutable=["em"])
        _, updates = module.apply(variables, X, train=True, mutable=["em"])
        jax.tree.map(close, bridged.head["model"].get_value(), updates["em"]["head"]["model"])


@ANALYTIC_FIRST
def test_methods_of_heads_in_nnx(head):
    """A variable would hide a method of its name."""
    with nnx.use_eager_sharding(False):
        bridged = nnx.bridge.ToNNX(head, rngs=nnx.Rngs(0)).lazy_init(X[:, :F])
    assert not vars(bridged).keys() & {name for name in dir(head) if not name.startswith("_")}
    for name in ("natural", "moments"):
        method = functools.partial(bridged, method=name)
        jax.tree.map(np.testing.assert_array_equal, getattr(bridged, name)(), method())


def test_the_likelihood_of_features_collapses_an_encoder_and_information_does_not(key):
    """What docs/encoders.md says: the density rises without limit as features shrink; the remedy keeps them apart."""
    rng = np.random.default_rng(1)
    x = (4 * np.eye(D)[rng.integers(K, size=256)] + 0.3 * rng.standard_normal((256, D))).astype(np.float32)
    module = Clusterer(MLP(F, (16,)), DifferentiableHMoG(L, K))

    def train(loss):
        variables = init(module, key, x)
        optimizer = optax.adam(3e-3)

        @jax.jit
        def step(variables, state):
            updates, state = optimizer.update(jax.grad(loss)(variables), state)
            return optax.apply_updates(variables, updates), state

        state = optimizer.init(variables)
        for _ in range(400):
            variables, state = step(variables, state)
        spread = float(module.apply(variables, x, method="features").std(axis=0).mean())
        return spread, module.apply(variables, x)

    def naive(variables):
        return negative_log_likelihood(module.apply(variables, x))

    def safe(variables):
        joint, head_only = module.apply(variables, x, method="joint_and_head_outputs")
        return negative_joint_information(joint, joint) + 0.01 * negative_log_likelihood(head_only)

    collapsed, output = train(naive)
    kept, safe_output = train(safe)
    assert collapsed < 0.05 < 0.3 < kept
    assert -float(negative_mutual_information(output)) < 0.1 * np.log(K)
    assert -float(negative_mutual_information(safe_output)) > 0.5 * np.log(K)  # from a random start


def _part(variables, name):
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}
