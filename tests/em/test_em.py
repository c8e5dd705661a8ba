"""Exact EM: it never decreases its objective, finds what generated the data, and survives degenerate data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, Case, random_moments, random_spd
from dense import Dense, assert_close, dense_matrix, restrict
from em_problems import CROWDED, SMALL, assert_never_decreases, assert_whitened, fit, problem
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import FactorAnalysis

from flax_hmog import (
    AnalyticHMoG,
    EMOptions,
    PseudoCounts,
    em_step,
    expected_statistics,
    fit_em,
    initialize_moments,
    log_observable_density,
    mean_to_natural,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
    ravel_natural,
    whiten_prior,
)


@pytest.mark.parametrize("obs_rep", ["diagonal", pytest.param("scale", marks=pytest.mark.slow),
                                     pytest.param("full", marks=pytest.mark.slow)])  # fmt: skip
def test_recovers_what_generated_the_data(obs_rep, key):
    """Up to the order of components and the latent basis: component means, covariances and weights in x-space."""
    case = Case(AnalyticHMoG, obs_rep, "full", 6, 2, 3)
    moments = dataclasses.replace(random_moments(case, 3), means=np.array([[-4.0, 0.0], [3.0, 3.0], [3.0, -4.0]]))
    true = Dense.of_moments(moments)
    x, _, _ = true.sample(np.random.default_rng(0), 20_000)
    result = fit(case, x, key=key, dtype="float32", init="fa", max_steps=100, tolerance=1e-6)
    found = Dense.of_natural(result.natural)
    distance = np.linalg.norm(true.component_means[:, None] - found.component_means[None], axis=-1)
    rows, order = linear_sum_assignment(distance)
    np.testing.assert_array_equal(rows, np.arange(3))
    # 20,000 samples: standard errors are below 0.03 for means and 0.05 of the largest variance for covariances
    assert np.max(distance[rows, order]) < 0.2
    assert_close(found.w[order], true.w, 0.02)
    scale = np.abs(true.component_covariances).max()
    assert_close(found.component_covariances[order] / scale, true.component_covariances / scale, 0.05)
    # full noise starts diagonal and is slow to converge: 100 steps end .005 nats below the truth
    slack = 1e-2 if obs_rep == "full" else 1e-4
    assert np.mean(true.log_density(x)) < float(result.info.log_likelihood) + slack


def test_one_component_is_maximum_likelihood_factor_analysis(float64, key):
    case = Case(AnalyticHMoG, "diagonal", "full", 6, 2, 1)
    _, x, _ = problem(case, 400, 2)
    result = fit(case, x, key=key, init="fa", regularizer=None, max_steps=400, tolerance=1e-10)
    reference = FactorAnalysis(2, tol=1e-8, max_iter=5000, svd_method="lapack").fit(x)
    assert_close(result.info.log_likelihood, reference.score(x), 1e-5)
    got = Dense.of_natural(result.natural)
    assert_close(got.component_covariances[0], reference.get_covariance(), 2e-2)


def test_weights_are_repeated_rows(float64):
    moments, x, _ = problem(SMALL, 40, 1)
    times = np.random.default_rng(4).integers(0, 4, len(x))
    weighted = fit(SMALL, x, init=moments, weights=times.astype(float))
    repeated = fit(SMALL, np.repeat(x, times, axis=0), init=moments)
    assert_close(weighted.objective_history, repeated.objective_history, 1e-9)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-8), weighted.natural, repeated.natural)
    assert_close(weighted.info.occupancy, repeated.info.occupancy, 1e-8)


def clamped_responsibilities(dense, x, labels):
    known = np.eye(len(dense.w))[labels]
    return np.where(labels[:, None] < 0, dense.responsibilities(x), known)


def test_labels_clamp_responsibilities(float64):
    moments, x, z = problem(SMALL, 60, 5)
    labels = np.where(np.arange(60) % 3 == 0, -1, z)
    result = fit(SMALL, x, init=moments, labels=labels, regularizer=None, max_steps=1)
    dense = Dense.of_moments(moments)
    logits = dense.log_joint_z(x)
    rows = np.where(labels < 0, dense.log_density(x), logits[np.arange(60), labels])
    assert_close(result.objective_history[0], rows.mean(), 1e-9)
    # the step is the maximum with the clamped statistics: whitened, in whatever basis
    statistics = dense.expected_statistics(x, responsibilities=clamped_responsibilities(dense, x, labels))
    assert_close(np.exp(result.natural.prior.log_weights), statistics["weights"], 1e-9)
    found = Dense.of_natural(result.natural)
    assert_close(found.w @ found.component_means, x.mean(0), 1e-9)


def test_full_labels_are_supervised_learning(float64):
    moments, x, z = problem(SMALL, 60, 5)
    result = fit(SMALL, x, init=moments, labels=z, regularizer=None)
    frequencies = np.bincount(z, minlength=3) / 60
    assert_close(np.exp(result.natural.prior.log_weights), frequencies, 1e-12)
    assert_never_decreases(result.objective_history)
    unknown = fit(SMALL, x, init=moments, labels=np.full(60, -1))
    plain = fit(SMALL, x, init=moments)
    assert_close(unknown.objective_history, plain.objective_history, 1e-12)


def test_batches_are_the_array(float64):
    moments, x, _ = problem(SMALL, 60, 7)
    whole = fit(SMALL, x, init=moments)
    for parts in ([x[:25], x[25:50], x[50:]], (x[:10], x[10:])):
        batches = fit(SMALL, parts, init=moments)
        assert_close(batches.objective_history, whole.objective_history, 1e-10)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-8), batches.natural, whole.natural)


def test_epochs_over_batches_compile_nothing_new(compilations):
    moments, x, _ = problem(SMALL, 60, 7)
    x, run = x.astype(np.float32), lambda x: fit(SMALL, x, init=moments, dtype="float32").info
    run([x[:25], x[25:50], x[50:]])
    assert compilations(run, [x[:25], x[25:50], x[50:]]) == 0
    assert compilations(run, [x[35:], x[10:35], x[:10]]) == 0


def test_restarts_return_the_best(key):
    _, x, _ = problem(CROWDED, 60, 8)
    result = fit(CROWDED, x, key=key, dtype="float32", n_restarts=4, max_steps=8)
    assert result.restart_objectives.shape == (4,)
    assert len(set(result.restart_objectives)) > 1
    assert result.objective_history[-1] == result.restart_objectives.max()
    density = jnp.mean(log_observable_density(result.natural, x))
    assert_close(density, result.info.log_likelihood, 1e-4)


def test_starts_from_moments_and_natural_are_one(float64):
    moments, x, _ = problem(SMALL, 60, 9)
    first = fit(SMALL, x, init=moments)
    for init in (moments_to_natural(moments), moments_to_natural(first_basis(moments))):
        other = fit(SMALL, x, init=init)
        assert_close(other.objective_history, first.objective_history, 1e-9)
    # without a penalty the start of the history is the log-likelihood of the given model
    plain = fit(SMALL, x, init=moments, regularizer=None)
    assert_close(plain.objective_history[0], Dense.of_moments(moments).log_density(x).mean(), 1e-9)


def first_basis(moments):
    """The same model with another latent basis."""
    dense = Dense.of_moments(moments).transformed(np.array([1.0, -2.0]), np.array([[2.0, 0.0], [1.0, 0.5]]))
    entries = dataclasses.replace(moments.covariances, entries=dense.S)
    return dataclasses.replace(moments, loadings=dense.W, bias=dense.b, means=dense.m, covariances=entries)


def test_history_and_convergence(float64):
    moments, x, _ = problem(SMALL, 60, 10)
    stopped = fit(SMALL, x, init=moments, max_steps=3)
    assert (len(stopped.objective_history), stopped.converged) == (4, False)
    at_once = fit(SMALL, x, init=moments, tolerance=np.inf)
    assert (len(at_once.objective_history), at_once.converged) == (2, True)
    result = fit(SMALL, x, init=moments, tolerance=1e-3, max_steps=200)
    gains = np.diff(result.objective_history)
    assert result.converged
    assert gains[-1] < 1e-3 <= gains[:-1].min()
    assert_close(result.info.objective, result.objective_history[-1], 1e-12)
    assert_close(log_observable_density(result.natural, x).mean(), result.info.log_likelihood, 1e-9)


@pytest.mark.parametrize("obs_rep", KINDS)
def test_step_is_the_m_step_of_expected_statistics(obs_rep, float64):
    case = dataclasses.replace(SMALL, obs_rep=obs_rep)
    moments, x, _ = problem(case, 60, 11)
    natural, weights = moments_to_natural(moments), np.linspace(0.5, 2, 60)
    after, info = em_step(natural, x, weights)
    want = mean_to_natural(whiten_prior(expected_statistics(natural, x, weights)))
    assert_close(ravel_natural(after, case.head()), ravel_natural(want, case.head()), 1e-9)
    assert_whitened(after, 1e-9)
    dense = Dense.of_moments(moments)
    assert_close(info.log_likelihood, np.average(dense.log_density(x), weights=weights), 1e-9)
    assert_close(info.objective, info.log_likelihood, 1e-12)
    assert_close(info.occupancy, weights @ dense.responsibilities(x), 1e-9)
    assert_close(info.smallest_noise, np.diag(dense.Psi).min(), 1e-9)
    smallest = 1 / np.max(np.diagonal(np.linalg.inv(dense.S), axis1=-2, axis2=-1))
    assert_close(info.smallest_latent_variance, smallest, 1e-9)


def test_penalty_is_the_documented_one(float64):
    """The documented penalty in numpy: of 3 pseudo-samples of a component, .6 lie at the centre."""
    moments, x, _ = problem(SMALL, 60, 12)
    regularizer = PseudoCounts(2.0, 3.0, 1.5, mean_share=0.2).regularizer(moments)
    natural = moments_to_natural(moments)
    _, info = em_step(natural, x, None, regularizer)
    dense, D, L = Dense.of_moments(moments), 4, 2
    center, spread = regularizer.component_mean, np.asarray(regularizer.component_covariance.entries)
    noise = dense_matrix(regularizer.noise_covariance, D)
    penalty = 2.0 * np.log(dense.w).sum()
    for m, S in zip(dense.m, dense.S, strict=True):
        second = spread + 0.2 * np.outer(center - m, center - m)
        penalty -= 3.0 / 2 * (L * np.log(2 * np.pi) + np.linalg.slogdet(S)[1] + np.trace(np.linalg.solve(S, second)))
    trace = np.trace(np.linalg.solve(dense.Psi, noise))
    penalty -= 1.5 / 2 * (D * np.log(2 * np.pi) + np.linalg.slogdet(dense.Psi)[1] + trace)
    assert_close(info.objective, (dense.log_density(x).sum() + penalty) / 60, 1e-9)

    history = []
    for _ in range(4):
        natural, info = em_step(natural, x, None, regularizer)
        history.append(info.objective)
    assert_never_decreases(history)


def test_a_fit_can_be_continued(float64):
    """The result's regulariser is the same penalty, up to a constant, in the basis of the result."""
    moments, x, _ = problem(SMALL, 60, 16)
    whole = fit(SMALL, x, init=moments, max_steps=10)
    half = fit(SMALL, x, init=moments, max_steps=5)
    rest = fit(SMALL, x, init=half.natural, regularizer=half.regularizer, max_steps=5)
    assert_close(np.diff(rest.objective_history), np.diff(whole.objective_history)[5:], 1e-9)
    assert_close(rest.info.log_likelihood, whole.info.log_likelihood, 1e-9)


def test_initial_model_is_a_valid_whitened_start(key):
    for obs_rep, method in (("diagonal", "pca"), ("full", "fa")):
        case = Case(AnalyticHMoG, obs_rep, "full", 6, 2, 3)
        _, x, _ = problem(case, 300, 14)
        moments = initialize_moments(case.head("float32"), x, key, method=method)
        dense = Dense.of_moments(moments)
        assert_close(dense.w.sum(), 1.0, 1e-6)
        assert_close(dense.b, x.mean(0), 1e-4)
        assert np.all(np.linalg.eigvalsh(dense.S) > 0)
        assert np.all(np.linalg.eigvalsh(dense.Psi) > 0)
        # better than one Gaussian with the data's mean and variances
        independent = -0.5 * np.log(2 * np.pi * x.var(0)).sum() - 0.5 * 6
        assert dense.log_density(x).mean() > independent


def test_mean_of_a_stream_is_that_of_its_parts(float64):
    """Statistics add up: averages of halves, weighted by their sizes, are the average of the whole."""
    natural = moments_to_natural(random_moments(SMALL, 15))
    x = np.random.default_rng(15).standard_normal((50, 4)) + random_spd(np.random.default_rng(1), dim=4)[0]
    parts = [expected_statistics(natural, part) for part in (x[:20], x[20:])]
    average = jax.tree.map(lambda a, b: 0.4 * a + 0.6 * b, *parts)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), average, expected_statistics(natural, x))
    assert_close(average.observable_second_moment.entries, restrict(x.T @ x / 50, "diagonal"), 1e-12)
    moments = natural_to_moments(natural)
    assert_close(natural_to_mean(moments_to_natural(moments)).weights, moments.weights, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [30, 1000])
def test_float32_holds_at_any_signal_to_noise_ratio(ratio, key):
    """The noise is 1 / ratio of the signal: float32 ends where float64 does, without a fall on the way."""
    case = Case(AnalyticHMoG, "diagonal", "full", 8, 2, 3)
    moments = random_moments(case, 5)
    moments = dataclasses.replace(moments, noise=jax.tree.map(lambda noise: noise / ratio**2, moments.noise))
    x = Dense.of_moments(moments).sample(np.random.default_rng(0), 3000)[0]
    results = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            results[dtype] = fit(case, x, key=key, dtype=dtype, init="pca", max_steps=20, regularizer=None)
    single, double = results["float32"], results["float64"]
    assert np.diff(single.objective_history).min() > -1e-4
    assert abs(single.objective_history[-1] - double.objective_history[-1]) < 1e-3
    noise = [np.asarray(result.natural.observable_precision.entries) / ratio**2 for result in (single, double)]
    assert_close(*noise, 1e-2)


def test_options_are_the_same_by_name_and_together(float64):
    moments, x, _ = problem(SMALL, 60, 1)
    together = EMOptions(init=moments, max_steps=4, tolerance=-np.inf, regularizer=PseudoCounts(noise=30))
    by_name = fit(SMALL, x, init=moments, max_steps=4, regularizer=PseudoCounts(noise_share=0.5))
    for result in (
        fit_em(SMALL.head(), x, jax.random.key(0), options=together),
        fit_em(SMALL.head(), x, jax.random.key(0), options=dataclasses.replace(together, max_steps=9), max_steps=4),
        fit(SMALL, [x[:20], x[20:]], init=moments, max_steps=4, regularizer=PseudoCounts(noise_share=0.5)),
    ):
        assert_close(result.objective_history, by_name.objective_history, 1e-10)
