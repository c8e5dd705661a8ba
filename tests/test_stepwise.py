"""The Analytic head as it is trained: stepwise EM in the collection `em`, exact EM beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from dense import Dense, assert_close

from flax_hmog import AnalyticHMoG, em_step, mean_to_natural, natural_to_moments

CASE = CASES["analytic-diagonal-full-4.2.3"]


def train_step(head, variables, x):
    output, updates = head.apply(variables, x, train=True, mutable=["em"])
    return output, variables | updates


def test_stepwise_em_updates_its_collection():
    head, variables, x = CASE.head("float32"), CASE.variables("float32"), CASE.x(40).astype(np.float32)
    output, after = train_step(head, variables, x)
    jax.tree.map(np.testing.assert_array_equal, output, head.apply(variables, x))
    assert (int(variables["em"]["step"]), int(after["em"]["step"])) == (0, 1)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), variables["em"]["mean"], after["em"]["mean"])
    assert max(jax.tree.leaves(moved)) > 1e-2
    dense = Dense.of_moments(natural_to_moments(mean_to_natural(after["em"]["mean"])))
    assert_close(dense.w @ dense.m, np.zeros(2), 1e-4)
    assert_close(dense.mean_statistics()["weighted_second_moments"].sum(0), np.eye(2), 1e-4)
    with pytest.raises(Exception, match=r"(?i)mutable|modify"):
        head.apply(variables, x, train=True)


def test_stepwise_em_does_not_touch_gradients():
    head, variables, x = CASE.head("float32"), CASE.variables("float32"), jnp.asarray(CASE.x(8), jnp.float32)
    plain = jax.grad(lambda x: jnp.sum(head.apply(variables, x).log_density))(x)
    trained = jax.grad(lambda x: jnp.sum(train_step(head, variables, x)[0].log_density))(x)
    assert_close(trained, plain, 1e-5)
    leaked = jax.grad(lambda x: jnp.sum(jax.tree.leaves(train_step(head, variables, x)[1]["em"]["mean"])[0]))(x)
    np.testing.assert_array_equal(leaked, np.zeros_like(x))


def test_stepwise_em_raises_the_density_and_compiles_once(key, compilations):
    case = Case(AnalyticHMoG, "diagonal", "full", 6, 2, 3)
    head, draws = case.head("float32"), Dense.of_natural(case.natural(seed=2)).sample(np.random.default_rng(0), 2000)[0]
    x = draws.astype(np.float32)
    variables = head.init(key, x[:1])
    step = jax.jit(lambda variables, x: train_step(head, variables, x))
    density = lambda variables: float(jnp.mean(head.apply(variables, x).log_density))  # noqa: E731
    history, states = [density(variables)], [variables]

    def epoch():
        for batch in x.reshape(10, 200, 6):
            states.append(step(states[-1], batch)[1])
        return states[-1]

    for index in range(4):
        assert compilations(epoch) == 0 or index == 0
        history.append(density(states[-1]))
    assert np.all(np.diff(history) > -0.02)
    assert history[-1] > history[0] + 1
    assert history[-1] > Dense.of_natural(case.natural(seed=2)).log_density(draws).mean() - 0.3


def test_initial_variables_are_not_trained_by_init(key):
    head = AnalyticHMoG(2, 3, 4)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    plain, trained = head.init(key, x), head.init(key, x, train=True)
    jax.tree.map(np.testing.assert_array_equal, plain, trained)


def test_expectation_maximization_is_em_step(float64, eager):
    x, variables = CASE.x(40), CASE.variables()
    got = CASE.head().apply(variables, x, method="expectation_maximization")
    want = em_step(CASE.natural(), x)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), got, want)
