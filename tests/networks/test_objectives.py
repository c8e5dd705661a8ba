"""Losses against their definitions in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case
from dense import Dense

from flax_hmog import AnalyticHMoG, HMoGOutput, moments_to_natural, natural_to_moments
from flax_hmog.inference.posterior import merge_output
from flax_hmog.model.kinds import PositiveDefinite
from flax_hmog.networks.objectives import (
    combine,
    conditional_entropy,
    consistency,
    distillation,
    loading_penalty,
    marginal_entropy,
    negative_joint_information,
    negative_log_likelihood,
    negative_mutual_information,
    negative_weight_entropy,
    precision_penalty,
    reconstruction,
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


def test_joint_information_is_that_of_the_table_of_two_views(random_output):
    p, out = random_output
    twin = output(np.roll(p, 1, axis=1))
    first, second = p.reshape(-1, 4), np.roll(p, 1, axis=1).reshape(-1, 4)
    table = first.T @ second / 30
    table = (table + table.T) / 2
    want = np.sum(table * np.log(table / np.outer(table.sum(0), table.sum(0))))
    np.testing.assert_allclose(-negative_joint_information(out, twin), want, atol=1e-6)
    np.testing.assert_allclose(negative_joint_information(twin, out), -want, atol=1e-6)
    entropy = -np.sum(table.sum(0) * np.log(table.sum(0)))
    less = negative_joint_information(out, twin, marginal_weight=0.75)
    np.testing.assert_allclose(less, -want + entropy / 2, rtol=1e-5)


def test_joint_information_is_largest_for_equal_certain_assignments():
    certain = HMoGOutput(jnp.zeros(9), jnp.log(jnp.tile(jnp.eye(3), (3, 1))), jnp.zeros((9, 1)))
    collapsed = HMoGOutput(jnp.zeros(9), jnp.log(jnp.eye(3)[jnp.zeros(9, int)]), jnp.zeros((9, 1)))
    np.testing.assert_allclose(negative_joint_information(certain, certain), -np.log(3), rtol=1e-6)
    np.testing.assert_allclose(negative_joint_information(collapsed, collapsed), 0, atol=1e-6)
    barely = negative_joint_information(certain, certain, marginal_weight=0.51)
    assert barely < negative_joint_information(collapsed, collapsed, marginal_weight=0.51)
    for loss in (negative_joint_information(certain, certain), negative_mutual_information(certain)):
        assert np.isfinite(loss)
    with pytest.raises(ValueError, match=r"`marginal_weight` must be above 1/2, .* got 0\.5"):
        negative_joint_information(certain, certain, marginal_weight=0.5)
    weight = jnp.asarray(0.75)  # a compiled function may close over it
    compiled = jax.jit(lambda o: negative_joint_information(o, o, marginal_weight=weight))(certain)
    np.testing.assert_allclose(compiled, -0.5 * np.log(3), rtol=1e-6)
    with pytest.raises(ValueError, match="`marginal_weight` must be positive; got 0"):
        negative_mutual_information(certain, marginal_weight=0.0)
    gradient = jax.grad(lambda rows: negative_joint_information(output(rows), output(rows)))(jnp.full((6, 3), 1 / 3))
    assert np.isfinite(gradient).all()


def test_distillation_is_cross_entropy(random_output):
    p, out = random_output
    targets = np.roll(p, 1, axis=-1)
    np.testing.assert_allclose(distillation(out, targets), -np.mean(np.sum(targets * np.log(p), -1)), rtol=1e-5)


def test_reconstruction_is_a_mean_squared_distance():
    x = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_allclose(reconstruction(jnp.asarray(x + 2), jnp.asarray(x)), 4 * 12)


def test_merged_output_sums_responsibilities(random_output):
    p, out = random_output
    merged = merge_output(out, np.array([1, 0, 1, 0]), 2)
    want = np.stack([p[..., 1] + p[..., 3], p[..., 0] + p[..., 2]], axis=-1)
    np.testing.assert_allclose(np.exp(merged.log_responsibilities), want, rtol=1e-5)
    np.testing.assert_array_equal(merged.log_density, out.log_density)
    with pytest.raises(ValueError, match="`labels` must be integers from 0 to 1; got 0 to 2"):
        merge_output(out, [0, 1, 2, 0], 2)
    with pytest.raises(ValueError, match=r"`labels` must be integers from 0 to 1; got 0\.0 to 1\.0 in float64"):
        merge_output(out, [0.0, 1, 1, 0], 2)
    labels = jnp.array([1, 0, 1, 0])  # a compiled function may close over them
    compiled = jax.jit(lambda o: merge_output(o, labels, 2))(out)
    np.testing.assert_allclose(np.exp(compiled.log_responsibilities), want, rtol=1e-5)
    # components far below the rest, or impossible, do no harm
    extreme = HMoGOutput(jnp.zeros(1), jnp.array([[0.0, -500.0, -600.0]]), jnp.zeros((1, 1)))
    np.testing.assert_allclose(merge_output(extreme, [0, 1, 1], 2).log_responsibilities, [[0, -500]])
    impossible = HMoGOutput(jnp.zeros(1), jnp.array([[0.0, -jnp.inf]]), jnp.zeros((1, 1)))
    np.testing.assert_array_equal(merge_output(impossible, [0, 1], 2).log_responsibilities, [[0, -np.inf]])
    gradient = jax.grad(lambda o: merge_output(o, [0, 1, 1], 2).log_responsibilities.sum())(extreme)
    assert np.isfinite(gradient.log_responsibilities).all()


@pytest.mark.parametrize(
    "loss",
    [
        negative_mutual_information,
        lambda o: negative_joint_information(o, o),
        lambda o: consistency(o, o),
        lambda o: distillation(o, jnp.exp(o.log_responsibilities)),
    ],
)
def test_a_cluster_without_components_counts_as_one_of_probability_0(random_output, loss):
    _, out = random_output
    empty = [0, 2, 2, 0]  # of clusters 0 to 2
    value, gradient = jax.value_and_grad(lambda o: loss(merge_output(o, empty, 3)))(out)
    want, want_gradient = jax.value_and_grad(lambda o: loss(merge_output(o, [0, 1, 1, 0], 2)))(out)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient.log_responsibilities, want_gradient.log_responsibilities, rtol=1e-4, atol=1e-8)


def test_penalties_of_a_model(float64):
    case = CASES["analytic-diagonal-full-4.2.3"]
    natural = case.natural()
    dense = Dense.of_natural(natural)
    np.testing.assert_allclose(negative_weight_entropy(natural), np.sum(dense.w * np.log(dense.w)), rtol=1e-8)
    center = dense.w @ dense.m
    within = np.einsum("k,kij->ij", dense.w, dense.S)
    spread = within + np.einsum("k,ki,kj->ij", dense.w, dense.m - center, dense.m - center)
    precisions = [np.linalg.inv(s) @ within for s in dense.S]
    want = np.mean([np.trace(p) - np.linalg.slogdet(p)[1] - 2 for p in precisions]) / 2
    np.testing.assert_allclose(precision_penalty(natural), want, rtol=1e-8)
    signal = np.trace(spread @ dense.W.T @ np.linalg.inv(dense.Psi) @ dense.W) / 4
    np.testing.assert_allclose(loading_penalty(natural), signal, rtol=1e-8)
    # another latent basis and other units are the same model
    moments = natural_to_moments(natural)
    turn = np.array([[2.0, 0.3], [0.1, -1.0]])
    other = moments_to_natural(
        moments.__class__(
            moments.loadings @ np.linalg.inv(turn) * 7,
            moments.bias * 7,
            type(moments.noise)(moments.noise.entries * 49),
            moments.weights,
            moments.means @ turn.T,
            PositiveDefinite(turn @ moments.covariances.entries @ turn.T),
        )
    )
    np.testing.assert_allclose(precision_penalty(other), want, rtol=1e-8)
    np.testing.assert_allclose(loading_penalty(other), signal, rtol=1e-8)


def test_precision_penalty_is_of_widths_alone(float64):
    """It is 0 for components of one covariance, does not pull their means together, and rises as one narrows."""
    single = Case(AnalyticHMoG, "diagonal", "full", 4, 2, 1).natural()
    assert float(precision_penalty(single)) == pytest.approx(0, abs=1e-10)
    moments = natural_to_moments(CASES["analytic-diagonal-full-4.2.3"].natural())
    penalty_of = lambda **changes: float(precision_penalty(moments_to_natural(dataclasses.replace(moments, **changes))))  # noqa: E731
    alike = PositiveDefinite(np.tile(np.array([[2.0, 0.3], [0.3, 1.0]]), (3, 1, 1)))
    assert penalty_of(covariances=alike) == pytest.approx(0, abs=1e-10)
    assert penalty_of(means=10 * moments.means) == pytest.approx(penalty_of(), rel=1e-8)
    narrow = [
        penalty_of(covariances=PositiveDefinite(alike.entries * np.array([s, 1, 1])[:, None, None])) for s in (0.5, 0.1)
    ]
    assert 0.01 < narrow[0] < narrow[1]


MISMATCHES = {
    "labels for responsibilities": (lambda out: distillation(out, jnp.zeros(6, int)), "distillation: `responsibilities`"),
    "one column": (lambda out: distillation(out, jnp.ones((6, 5, 1))), "distillation: `responsibilities`"),
    "other rows": (lambda out: consistency(out, output(np.full((1, 5, 4), 0.25))), "consistency: `perturbed`"),
    "another twin": (lambda out: negative_joint_information(out, output(np.full((3, 4), 0.25))), "`twin`"),
    "one column decoded": (lambda out: reconstruction(jnp.zeros((4, 1)), jnp.zeros((4, 6))), "reconstruction: `decoded`"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISMATCHES)
def test_what_does_not_belong_together_is_no_loss(mistake, random_output):
    """It would broadcast to a number that means nothing, also when it is traced."""
    call, message = MISMATCHES[mistake]
    for run in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=f"{message} must have shape"):
            run(random_output[1])


def test_what_is_no_output_or_no_probability_is_named(random_output):
    _, out = random_output
    for loss in (negative_log_likelihood, conditional_entropy, marginal_entropy):
        with pytest.raises(TypeError, match=r"must be HMoGOutput; got tuple.* joint_and_head_outputs returns two"):
            loss((out, out))
    with pytest.raises(TypeError, match="`twin` must be HMoGOutput; got tuple"):
        negative_joint_information(out, (out, out))
    with pytest.raises(ValueError, match="must be probabilities; got negative ones"):
        distillation(out, out.log_responsibilities)


def test_terms_are_combined_by_schedules():
    terms = {"a": jnp.asarray(2.0), "b": jnp.asarray(3.0)}
    weights = {"a": 0.5, "b": optax.linear_schedule(0.0, 1.0, 10)}
    assert [float(combine(terms, weights, step)) for step in (0, 5, 20)] == [1.0, 2.5, 4.0]
    with pytest.raises(ValueError, match=r"one weight for each term, \['a', 'b'\]; got \['a'\]"):
        combine(terms, {"a": 1.0}, 0)
