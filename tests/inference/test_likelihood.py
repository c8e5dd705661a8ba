"""The mean log-density: its gradient comes from the statistics of one pass, and is that of the densities of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FEW, GRADIENTS, SOME
from dense import Dense, assert_close
from jax.test_util import check_grads

from flax_hmog import AnalyticHMoG, fit_em, log_observable_density, mean_log_density, ravel_natural, unravel_natural

WEIGHTS = np.linspace(0.2, 2, 9)


def parameters(case):
    """Parameters of a case and the map from them to its model."""
    head = case.head()
    if case.family is AnalyticHMoG:
        return ravel_natural(case.natural(), head), lambda flat: unravel_natural(flat, head)
    return case.variables()["params"], lambda params: head.apply({"params": params}, method="natural")


@GRADIENTS
def test_value_and_gradient_are_those_of_the_densities_of_rows(case, float64):
    """In the parameters, the data and the sample weights."""
    leaves, model = parameters(case)
    x, weights = jnp.asarray(case.x(9)), jnp.asarray(WEIGHTS)
    one_pass = lambda leaves, x, weights: mean_log_density(model(leaves), x, weights)  # noqa: E731
    by_rows = lambda leaves, x, weights: (  # noqa: E731
        jnp.sum(weights * log_observable_density(model(leaves), x)) / jnp.sum(weights)
    )
    got, want = (
        jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))(leaves, x, weights) for function in (one_pass, by_rows)
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-10), got, want)


@SOME
def test_check_grads_both_ways(case, float64):
    leaves, model = parameters(case)
    mean = jax.jit(lambda leaves, x: mean_log_density(model(leaves), x))
    check_grads(mean, (leaves, jnp.asarray(case.x(5))), order=1, modes=("fwd", "rev"), rtol=1e-5, atol=1e-6)


def test_second_derivatives_in_x(float64):
    case = FEW[0]
    natural = case.natural()
    mean = jax.jit(lambda x: mean_log_density(natural, x))
    check_grads(mean, (jnp.asarray(case.x(3)),), order=2, modes=("rev",), rtol=1e-4, atol=1e-5)


def test_value_is_that_of_dense_gaussians(float64):
    case = FEW[0]
    want = Dense.of_natural(case.natural()).log_density(case.x(9)) @ WEIGHTS / WEIGHTS.sum()
    assert_close(mean_log_density(case.natural(), case.x(9), WEIGHTS), want, 1e-12)
    by_head = case.head().apply(case.variables(), case.x(9), WEIGHTS, method="mean_log_density")
    assert_close(by_head, want, 1e-12)


@pytest.mark.parametrize("name", ["differentiable-diagonal-diagonal-4.2.3", "analytic-diagonal-full-4.2.3"])
def test_memory_of_a_gradient_does_not_grow_with_the_rows(name):
    """What a compiled gradient holds besides its arguments is that of a block."""
    case = CASES[name]
    natural = case.natural("float32")
    gradient = jax.jit(jax.grad(mean_log_density, allow_int=True))

    def temporary_bytes(count):
        x = jax.ShapeDtypeStruct((count, case.obs_dim), jnp.float32)
        return gradient.lower(natural, x).compile().memory_analysis().temp_size_in_bytes

    rows = 2**18
    # the weights, 4 bytes per row
    assert temporary_bytes(4 * rows) - temporary_bytes(rows) < 1.01 * 4 * 3 * rows


def test_projection_in_bfloat16_is_what_is_asked_for():
    """The head's policy reaches densities, gradients and EM: another product, results to bfloat16's rounding."""
    case = CASES["differentiable-diagonal-diagonal-4.2.3"]
    x = case.x(200).astype(np.float32)
    plain = case.head("float32")
    low = plain.clone(projection_dtype=jnp.bfloat16)
    variables = case.variables("float32")
    assert low.projection_dtype == "bfloat16"
    for method in ("log_observable_density", "mean_log_density"):
        got, want = (np.asarray(head.apply(variables, x, method=method)) for head in (low, plain))
        assert 0 < np.max(np.abs(got - want)) < 0.05 * (1 + np.max(np.abs(want))), method
    text = jax.jit(lambda v, x: low.apply(v, x, method="mean_log_density")).lower(variables, x).as_text()
    assert "bf16" in text
    analytic = AnalyticHMoG(2, 3, 4)
    fits = [
        fit_em(head, x, jax.random.key(0), max_steps=3)
        for head in (analytic, analytic.clone(projection_dtype="bfloat16"))
    ]
    gap = np.abs(fits[0].objective_history - fits[1].objective_history)
    assert 0 < gap.max() < 0.05


@pytest.mark.parametrize("dtype", ["int32", "foo"])
def test_projection_dtype_is_checked(dtype):
    with pytest.raises(ValueError, match="`projection_dtype` must be a float dtype"):
        AnalyticHMoG(2, 3, projection_dtype=dtype)
