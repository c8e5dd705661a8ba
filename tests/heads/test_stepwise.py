"""The Analytic head as it is trained: stepwise EM in the collection `em`, exact EM beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from dense import Dense, assert_close

from flax_hmog import (
    AnalyticHMoG,
    Diagonal,
    Moments,
    PositiveDefinite,
    ResidualMoments,
    em_step,
    fit_em,
    log_observable_density,
    mean_to_natural,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
    negative_entropy,
    ravel_mean,
    sample,
    warm_start,
    whiten_prior,
)
from flax_hmog.em.online import stepwise_update

CASE = CASES["analytic-diagonal-full-4.2.3"]
WIDER = Case(AnalyticHMoG, "diagonal", "full", 6, 2, 3)


def train_step(head, variables, x):
    output, updates = head.apply(variables, x, train=True, mutable=["em"])
    return output, variables | updates


# compiled once for all tests that share a head and a number of rows
compiled_step = jax.jit(train_step, static_argnums=0)
compiled_init = jax.jit(lambda head, key, x: head.init(key, x), static_argnums=0)


def test_stepwise_em_updates_its_collection():
    head, variables, x = CASE.head("float32"), CASE.variables("float32"), CASE.x(40).astype(np.float32)
    output, after = compiled_step(head, variables, x)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), output, head.apply(variables, x))
    assert (int(variables["em"]["step"]), int(after["em"]["step"])) == (0, 1)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), variables["em"]["model"], after["em"]["model"])
    assert max(jax.tree.leaves(moved)) > 1e-2
    # what the statistics are about is the model itself: its residuals have mean 0 and do not follow y
    running = after["em"]["running"]
    assert_close(running.observable_mean, np.zeros(4), 1e-5)
    assert_close(running.cross_moment, np.zeros((4, 2)), 1e-5)
    with pytest.raises(Exception, match=r"(?i)mutable|modify"):
        head.apply(variables, x, train=True)


def test_stepwise_em_does_not_touch_gradients():
    head, variables, x = CASE.head("float32"), CASE.variables("float32"), jnp.asarray(CASE.x(8), jnp.float32)
    plain = jax.jit(jax.grad(lambda x: jnp.sum(head.apply(variables, x).log_density)))(x)
    trained = jax.jit(jax.grad(lambda x: jnp.sum(train_step(head, variables, x)[0].log_density)))(x)
    assert_close(trained, plain, 1e-5)
    leaked = jax.jit(jax.grad(lambda x: jnp.sum(train_step(head, variables, x)[1]["em"]["model"].loadings)))(x)
    np.testing.assert_array_equal(leaked, np.zeros_like(x))


def test_stepwise_em_raises_the_density_and_compiles_once(key, compilations):
    head, truth = WIDER.head("float32"), Dense.of_natural(WIDER.natural(seed=2))
    draws = truth.sample(np.random.default_rng(0), 2000)[0]
    x = draws.astype(np.float32)
    variables = compiled_init(head, key, x[:1])
    density = lambda variables: float(jnp.mean(head.apply(variables, x).log_density))  # noqa: E731
    history, states = [density(variables)], [variables]

    def epoch():
        for batch in x.reshape(10, 200, 6):
            states.append(compiled_step(head, states[-1], batch)[1])
        return states[-1]

    for index in range(4):
        assert compilations(epoch) == 0 or index == 0
        history.append(density(states[-1]))
    assert np.all(np.diff(history) > -0.02)
    assert history[-1] > history[0] + 1
    assert history[-1] > truth.log_density(draws).mean() - 0.3


def test_initial_variables_are_not_trained_by_init(key):
    head = AnalyticHMoG(2, 3, 4)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    plain, trained = compiled_init(head, key, x), jax.jit(lambda key, x: head.init(key, x, train=True))(key, x)
    jax.tree.map(np.testing.assert_array_equal, plain, trained)


def test_expectation_maximization_is_em_step(float64):
    x, variables = CASE.x(40), CASE.variables()
    got = CASE.head().apply(variables, x, method="expectation_maximization")
    want = em_step(CASE.natural(), x)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), got, want)


def test_a_step_at_rate_1_is_an_em_step(float64):
    """Without pseudo-samples, and with all old samples forgotten."""
    x, moments = CASE.x(40), natural_to_moments(CASE.natural())
    got, _ = stepwise_update(moments, ResidualMoments.of(moments), jnp.asarray(x), jnp.ones(()), 0.0)
    want, _ = em_step(CASE.natural(), x)
    dense, wanted = Dense.of_moments(got), Dense.of_natural(want)
    assert_close(dense.log_density(x), wanted.log_density(x), 1e-8)


def test_statistics_are_those_of_the_model_without_data(float64):
    """A step at rate 0 changes nothing: a model's own statistics have it as their maximum."""
    moments = natural_to_moments(CASE.natural())
    got, _ = stepwise_update(moments, ResidualMoments.of(moments), jnp.asarray(CASE.x(5)), jnp.zeros(()), 0.0)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), got, moments)


@pytest.mark.parametrize(
    "function", [mean_to_natural, negative_entropy, whiten_prior, lambda m: ravel_mean(m, CASE.head())]
)
def test_statistics_about_a_model_are_none_of_x(function, float64):
    moments = natural_to_moments(CASE.natural())
    running = ResidualMoments.of(moments)
    with pytest.raises(TypeError, match=r"`mean` must be Mean; got ResidualMoments\. .*to_mean\(moments\)"):
        function(running)
    mean = running.to_mean(moments)
    function(mean)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), mean, natural_to_mean(CASE.natural()))


def test_many_tight_clusters_stay_as_they_are(key):
    """Pseudo-samples do not widen them, however many there are: what an encoder learns is just that."""
    n_components, rng = 50, np.random.default_rng(0)
    truth = moments_to_natural(
        Moments(
            loadings=rng.standard_normal((8, 3)).astype(np.float32),
            bias=np.zeros(8, np.float32),
            noise=Diagonal(np.full(8, 0.01, np.float32)),
            weights=np.full(n_components, 1 / n_components, np.float32),
            means=rng.standard_normal((n_components, 3)).astype(np.float32),
            covariances=PositiveDefinite(np.tile(0.003 * np.eye(3, dtype=np.float32), (n_components, 1, 1))),
        )
    )
    train_key, test_key = jax.random.split(key)
    batches = sample(truth, train_key, 40 * 512)[0].reshape(40, 512, 8)
    test = sample(truth, test_key, 4000)[0]
    head = AnalyticHMoG(3, n_components, step_delay=100.0, min_rate=0.01)
    variables = warm_start(head, truth)[0]
    for number in range(200):
        variables = compiled_step(head, variables, batches[number % 40])[1]
    lost = log_observable_density(truth, test) - head.apply(variables, test).log_density
    assert float(jnp.mean(lost)) < 0.1


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_features_far_from_the_origin(key, offset):
    """A mean of 1000 standard deviations costs no more than the rounding of the features themselves."""
    draws = Dense.of_natural(WIDER.natural(seed=2)).sample(np.random.default_rng(0), 4000)[0]
    x = (draws / draws.std(axis=0) + offset).astype(np.float32)
    head = WIDER.head("float32", obs_dim=None)
    variables = compiled_init(head, key, x[:200])
    for batch in np.tile(x, (3, 1)).reshape(-1, 200, 6):
        variables = compiled_step(head, variables, batch)[1]
    reached = float(head.apply(variables, x, method="mean_log_density"))
    best = fit_em(head, x, key, max_steps=50).objective_history[-1]
    assert reached > best - 0.3


def test_scale_of_the_first_batch_does_not_matter(key):
    x = WIDER.x(200).astype(np.float32)
    head = WIDER.head("float32")
    scale = np.float32(2.0**12)  # exact, so that only the arithmetic can tell
    plain, scaled = (compiled_init(head, key, rows) for rows in (x, x * scale))
    for _ in range(5):
        plain, scaled = (compiled_step(head, *at)[1] for at in ((plain, x), (scaled, x * scale)))
    assert_close(head.apply(scaled, x * scale).log_responsibilities, head.apply(plain, x).log_responsibilities, 1e-3)


def test_a_dead_feature_does_no_harm(key):
    """A column of zeros, as a rectified linear unit leaves it, from the first batch on or later."""
    x = WIDER.x(200).astype(np.float32)
    dead = x * np.array([0, 1, 1, 1, 1, 0], np.float32)
    head = WIDER.head("float32")
    for first in (x, dead):
        variables = compiled_init(head, key, first)
        for _ in range(300):
            output, variables = compiled_step(head, variables, dead)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(np.isfinite(leaf), True), (output, variables))


def test_a_batch_that_is_not_finite_leaves_the_statistics_as_they_are(key):
    """Compiled, where values cannot be looked at; what the call returns shows it."""
    head, variables, x = CASE.head("float32"), CASE.variables("float32"), CASE.x(40).astype(np.float32)
    bad = x.copy()
    bad[3, 1] = np.nan
    output, after = compiled_step(head, variables, bad)
    jax.tree.map(np.testing.assert_array_equal, after, variables)
    np.testing.assert_array_equal(np.isnan(output.log_density), np.arange(40) == 3)
    assert int(compiled_step(head, after, x)[1]["em"]["step"]) == 1


@pytest.mark.one_device(reason="jax 0.12 refuses psum over an axis of vmap within Explicit axes")
def test_a_batch_over_an_axis_is_one_batch(key):
    """The statistics of all parts of a `vmap` or `shard_map` make one step."""
    x = WIDER.x(200).astype(np.float32)
    whole, parts = WIDER.head("float32"), WIDER.head("float32", axis_name="batch")
    variables = compiled_init(whole, key, x)
    want = compiled_step(whole, variables, x)[1]
    split = jax.vmap(lambda x: train_step(parts, variables, x)[1], axis_name="batch")
    got = jax.jit(split)(x.reshape(4, 50, 6))
    for part in range(4):
        jax.tree.map(lambda a, b, part=part: assert_close(a[part], b, 1e-4), got, want)


def test_following_features_that_move(key):
    """With a smallest rate the head follows; with a rate that falls to nothing it stays behind."""
    x = WIDER.x(200).astype(np.float32)
    natural = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), WIDER.natural())
    densities = []
    for min_rate in (0.0, 0.05):
        head = WIDER.head("float32", min_rate=min_rate, step_decay=1.0)
        variables = warm_start(head, natural)[0]
        for number in range(300):
            variables = compiled_step(head, variables, x + 0.02 * number)[1]
        densities.append(float(head.apply(variables, x + 0.02 * number, method="mean_log_density")))
    assert densities[1] > densities[0] + 1
