"""A fit does not depend on what does not matter: order, blocks, devices, origin, units, factors of weights, names."""

import dataclasses
import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_cpus
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.metrics import adjusted_rand_score

from experiments.benchmarks.invariance import (
    CHANGES,
    COMPONENTS,
    LAT_DIM,
    NOISES,
    NOT_ONLINE,
    OBS_DIM,
    ONLY_FOR,
    Problem,
    deviations,
    fit,
    fit_both,
)
from flax_hmog import (
    AnalyticHMoG,
    ConvergenceWarning,
    DifferentiableHMoG,
    PseudoCounts,
    SymmetricHMoG,
    WarmStartWarning,
    WildRowsWarning,
    em_step,
    fit_em,
    infer,
    posterior_hard_assignment,
    warm_start,
)
from flax_hmog.analysis import cluster_prototypes
from flax_hmog.data.framing import robust_frame
from flax_hmog.em import fit as fit_module

# a fixed number of steps: no gain lies at a tolerance, where rounding would decide of one step more
STEPS = {"max_steps": 5, "tolerance": -np.inf}
ROWS = [name for name in CHANGES if name != "eight devices"]


def of_rows(result, x):
    return infer(result.natural, x)


def clusters(result, x):
    return np.asarray(posterior_hard_assignment(result.natural, x))


def assert_same(change, before, after, *, responsibilities, density):
    apart, lifted = deviations(change, of_rows(before, change.before), of_rows(after, change.rows))
    assert apart < responsibilities
    assert lifted < density
    # the penalty has a pseudo-sample of the noise, whose density is one of x, too
    samples = len(change.data) if isinstance(change.data, np.ndarray) and "weights" not in change.options else None
    volume = change.log_volume * (1 + (1 / samples if samples else 0))
    objectives = np.asarray(after.objective_history) + volume, np.asarray(before.objective_history)
    np.testing.assert_allclose(*objectives, atol=density * OBS_DIM)
    assert after.converged == before.converged


def both(change, noise, **options):
    given = dataclasses.replace(
        change, options=change.options | options, options_before=change.options_before | options
    )
    return fit_both(given, noise)


@pytest.mark.parametrize("noise", [pytest.param(n, marks=[pytest.mark.slow] * (n != "diagonal")) for n in NOISES])
@pytest.mark.parametrize("name", ROWS)
def test_a_fit_is_the_same_to_rounding(name, noise):
    if noise not in ONLY_FOR.get(name, NOISES):
        pytest.skip("the change is one of the model")
    problem = Problem.of(noise, 0)
    change = CHANGES[name](problem)
    before, after = both(change, noise, **STEPS)
    assert_same(change, before, after, responsibilities=1e-4, density=2e-4)
    assert adjusted_rand_score(problem.labels[: len(change.rows)], clusters(after, change.rows)) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_in_float64_it_is_the_same_to_that_rounding(name, float64):
    noise = ONLY_FOR[name][-1] if name == "rotation" else "diagonal"
    change = CHANGES[name](Problem.of(noise, 1))
    if name == "columns over 1e12":
        pytest.skip("covered in float32")
    steps = {"options": change.options | STEPS, "options_before": change.options_before | STEPS}
    before, after = fit_both(dataclasses.replace(change, **steps), noise, dtype="float64")
    # an offset takes the digits that it needs from the data
    rounding = 1e-5 if name.startswith("origin") else 1e-9
    assert_same(change, before, after, responsibilities=rounding, density=rounding)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name not in NOT_ONLINE and name != "rotation"])
def test_online_em_is_the_same_to_rounding(name):
    change = CHANGES[name](Problem.of("diagonal", 0))
    before, after = fit_both(change, "diagonal", online=True)
    assert_same(change, before, after, responsibilities=1e-4, density=2e-4)


@pytest.mark.parametrize("noise", [pytest.param(n, marks=[pytest.mark.slow] * (n != "diagonal")) for n in NOISES])
def test_what_is_fitted_is_the_truth(noise):
    """Against scipy's density of the model that made the data: some 60 parameters gain half a nat each, on average."""
    problem = Problem.of(noise, 0)
    result = fit(problem.x, noise, {"regularizer": PseudoCounts(components=0.01)})
    parts = zip(problem.means, problem.covariances, strict=True)
    joint = [multivariate_normal.logpdf(problem.x, mean, covariance) for mean, covariance in parts]
    truth = np.mean(logsumexp(joint, axis=0) - np.log(COMPONENTS))
    assert result.converged
    assert 0 < float(result.info.log_likelihood) - truth < 100 / len(problem.x)
    assert adjusted_rand_score(problem.labels, clusters(result, problem.x)) == 1


ON_DEVICES = """
import jax, json
from experiments.benchmarks.invariance import *
report = {}
for noise in ("diagonal", "full"):
    change = devices(Problem.of(noise, 0))
    fits = fit_both(change, noise)
    report[noise] = [*deviations(change, *of_models(fits, change)), len(jax.devices())]
print(json.dumps(report))
"""


@pytest.mark.slow
def test_rows_may_lie_on_eight_devices():
    run = subprocess.run(
        [sys.executable, "-c", ON_DEVICES], env=on_cpus(8), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for apart, lifted, count in json.loads(run.stdout.splitlines()[-1]).values():
        assert count == 8
        assert apart < 1e-4
        assert lifted < 1e-3


HEADS = {
    "differentiable full": DifferentiableHMoG(LAT_DIM, COMPONENTS, OBS_DIM, pst_rep="full"),
    "differentiable diagonal": DifferentiableHMoG(LAT_DIM, COMPONENTS, OBS_DIM, pst_rep="diagonal"),
    "symmetric full": SymmetricHMoG(LAT_DIM, COMPONENTS, OBS_DIM, lat_rep="full"),
    "analytic": AnalyticHMoG(LAT_DIM, COMPONENTS, OBS_DIM),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "symmetric full")) for n in HEADS])
def test_heads_start_from_fits_in_any_units(name):
    """Also counts, as rounded: nothing is lost beyond rounding by a head that holds all models."""
    problem, losses = Problem.of("diagonal", 0), []
    for x in (problem.x, 6e4 * problem.x, 1e-6 * problem.x, np.round(100 * (problem.x + 20)).astype(np.int32)):
        result = fit(x, "diagonal", STEPS)
        variables, info = warm_start(HEADS[name], result.natural, np.asarray(x, np.float32))
        losses.append(float(info.log_likelihood_before - info.log_likelihood_after))
        if "diagonal" not in name:
            assert abs(losses[-1]) < 1e-5 * (abs(float(info.log_likelihood_before)) + OBS_DIM) + 1e-4
        said = np.argmax(HEADS[name].apply(variables, np.asarray(x, np.float32)).log_responsibilities, axis=-1)
        assert adjusted_rand_score(problem.labels, said) > 0.99
    np.testing.assert_allclose(losses, losses[0], atol=1e-2)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_far_from_the_origin_says_so(name):
    x = Problem.of("diagonal", 0).x + 1e8
    result = fit(x, "diagonal", STEPS)
    with pytest.warns(WarmStartWarning, match=r"a mean of 1e\+08 has a spacing of 8 in float32"):
        warm_start(HEADS[name], result.natural, x)


def test_a_head_that_cannot_hold_a_fit_says_so():
    x = 1e-25 * Problem.of("diagonal", 0).x
    result = fit(x, "diagonal", STEPS)
    with pytest.raises(
        ValueError, match=r"warm_start: `natural` must fit in float32 in units of x; got noise variances"
    ):
        warm_start(HEADS["analytic"], result.natural, x)
    with pytest.warns(WarmStartWarning, match="noise variances from .*e-5.* are outside `noise_bounds`"):
        warm_start(HEADS["differentiable full"], result.natural, x)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 10, 20])
def test_clusters_are_found_across_their_long_axis(dim):
    for seed in range(2):
        rng = np.random.default_rng(seed)
        y = rng.integers(2, size=1000)
        x = rng.normal(size=(1000, dim))
        x[:, 0] *= 20
        x[:, 1] += np.where(y == 1, 4.0, -4.0)
        result = fit_em(AnalyticHMoG(2, 2), x.astype(np.float32), jax.random.key(seed))
        assert adjusted_rand_score(y, clusters(result, x)) > 0.99


@pytest.mark.parametrize("noise", [pytest.param(n, marks=[pytest.mark.slow] * (n != "diagonal")) for n in NOISES])
@pytest.mark.parametrize("damage", ["a row", "a cell", "20 rows"])
def test_wild_rows_are_named_and_change_little(damage, noise):
    problem = Problem.of(noise, 0)
    x, wild = problem.x.copy(), {"a row": [17], "a cell": [17], "20 rows": list(range(17, 397, 19))}[damage]
    x[np.ix_(wild, [2] if damage == "a cell" else range(OBS_DIM))] = 1e6
    with pytest.warns(WildRowsWarning, match=rf"{len(wild)} rows are left out.* the first is row 17\."):
        result = fit(x, noise, {})
    rest = np.setdiff1d(np.arange(len(x)), wild)
    assert result.converged
    assert adjusted_rand_score(problem.labels[rest], clusters(result, x)[rest]) == 1


def test_constant_rows_have_one_density_wherever_they_are():
    densities = []
    for value in (0.0, 1.0):
        x = np.full((40, 3), value)
        result = fit_em(AnalyticHMoG(1, 2), x, jax.random.key(0), max_steps=3)
        densities.append(np.asarray(infer(result.natural, x).log_density))
    np.testing.assert_allclose(*densities, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_known_labels_keep_their_class(seed):
    rng = np.random.default_rng(seed)
    means, y = 6 * rng.normal(size=(5, 8)), rng.integers(5, size=500)
    x = means[y] + rng.normal(size=(500, 8))
    known = rng.random(500) < 0.05
    names = np.array(["T", "B", "NK", "mono", "DC"], object)[y]
    result = fit_em(AnalyticHMoG(4, 5), x, jax.random.key(seed), labels=np.where(known, names, None), max_steps=20)
    assert result.classes == tuple(sorted(set(names[known])))
    said = clusters(result, x)
    for k, name in enumerate(result.classes):
        assert (said[known & (names == name)] == k).all()
    assert adjusted_rand_score(y, said) > 0.95


def test_a_fall_is_no_convergence(monkeypatch):
    """The third pass is made to look worse than the second: the best model is returned, with a warning."""
    problem, seen = Problem.of("diagonal", 0), []
    true_evaluate = fit_module.Fit.evaluate

    def falling(fit, natural, regularizer, block=None):
        updated, info, objective = true_evaluate(fit, natural, regularizer, block)
        if block is None:
            seen.append((natural, objective))
        return updated, info, objective - (len(seen) == 3 and block is None)

    monkeypatch.setattr(fit_module.Fit, "evaluate", falling)
    with pytest.warns(ConvergenceWarning, match="the objective fell from .* beyond rounding"):
        result = fit(problem.x, "diagonal", {})
    assert not result.converged
    assert len(result.objective_history) == 3
    assert result.restart_objectives[0] == pytest.approx(seen[1][1])
    best = dataclasses.replace(result, natural=seen[1][0])
    np.testing.assert_allclose(of_rows(result, problem.x).log_density, of_rows(best, problem.x).log_density, atol=1e-3)


def test_em_in_a_network_survives_what_features_do():
    """Three batches of equal rows, a jump by 1e12, then batches as before."""
    rng = np.random.default_rng(0)
    usual = lambda: rng.normal(size=(64, 5)).astype(np.float32)  # noqa: E731
    head = AnalyticHMoG(2, 3, 5)
    variables = head.init(jax.random.key(0), usual())
    step = jax.jit(lambda variables, x: head.apply(variables, x, train=True, mutable=["em"]))
    batches = [usual() for _ in range(10)] + [np.ones((64, 5), np.float32)] * 3 + [usual() + np.float32(1e12)]
    density = []
    for x in [*batches, *(usual() for _ in range(60))]:
        output, update = step(variables, x)
        variables = {**variables, **update}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((output, variables)))
        density.append(float(jnp.mean(output.log_density)))
    # the entropy of the batches, 5 log(2 pi e) / 2, and what the model has not learnt yet
    assert density[-1] > -2.5 * np.log(2 * np.pi * np.e) - 1.5


def weighted_quantile(values, weights, level):
    """By brute force: the smallest value with at least this share of the weights at or below it."""
    shares = [weights[values <= value].sum() / weights.sum() for value in values]
    return min(value for value, share in zip(values, shares, strict=True) if share >= level - 1e-9)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_frame_is_made_of_quantiles(is_weighted):
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(61, 4)) * [1, 10, 0.5, 0], 1)
    weights = rng.uniform(0.1, 2, 61) if is_weighted else np.ones(61)
    frame = robust_frame(x, weights, True, np.float64)
    origin, unit = frame.exact()
    for d in range(3):
        median = weighted_quantile(x[:, d], weights, 0.5)
        distance = np.abs(x[:, d] - median)
        apart = distance > 0
        assert origin[d] == pytest.approx(median, abs=1e-6)
        assert unit[d] == pytest.approx(weighted_quantile(distance[apart], weights[apart], 0.75), rel=1e-6)
    assert unit[3] == pytest.approx(np.exp(np.log(unit[:3]).mean()), rel=1e-6)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_with_one_unit_the_origin_is_the_geometric_median(is_weighted):
    rng = np.random.default_rng(1)
    x = rng.standard_t(2, size=(80, 3)) + 5
    weights = rng.uniform(0.1, 2, 80) if is_weighted else np.ones(80)
    origin, unit = robust_frame(x, weights, False, np.float64).exact()
    loss = lambda point: weights @ np.linalg.norm(x - point, axis=1) / weights.sum()  # noqa: E731
    want = minimize(loss, np.median(x, axis=0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}).x
    np.testing.assert_allclose(origin, want, atol=1e-4)
    distance = np.sqrt(((x - origin) ** 2).mean(axis=1))
    np.testing.assert_allclose(unit, weighted_quantile(distance, weights, 0.75), rtol=1e-4)


@pytest.mark.parametrize("by_column", [False, True])
def test_the_frame_moves_with_the_rows(by_column):
    rng = np.random.default_rng(2)
    x, weights = rng.standard_t(3, size=(90, 4)), rng.uniform(0.1, 2, 90)
    origin, unit = robust_frame(x, weights, by_column, np.float32).exact()
    scale = np.array([1e-6, 1, 3e5, 1e12]) if by_column else 6e4
    moved = robust_frame(x * scale + 1e3 * scale, 1e-6 * weights, by_column, np.float32).exact()
    np.testing.assert_allclose(moved[0], (origin + 1e3) * scale, rtol=1e-9)
    np.testing.assert_allclose(moved[1], unit * scale, rtol=1e-6)
    if not by_column:
        turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        turned = robust_frame(x @ turn, weights, False, np.float32).exact()
        np.testing.assert_allclose(turned[0], origin @ turn, atol=1e-6)
        np.testing.assert_allclose(turned[1], unit, rtol=1e-6)


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Problem.of("diagonal", 0).x, "diagonal", {})


@pytest.mark.parametrize(("offset", "unit"), [(1e8, 1.0), (0.0, 1e-20)])
def test_prototypes_are_in_units_of_x_where_float32_holds_no_model(offset, unit):
    """Of clusters far apart the prototypes are the means of their rows."""
    problem = Problem.of("diagonal", 0)
    x = np.asarray(problem.x, np.float64) * unit + offset
    result = fit(x, "diagonal", {})
    assert result.natural.frame is not None
    said = np.asarray(posterior_hard_assignment(result.natural, x))
    means = np.stack([x[said == k].mean(axis=0) for k in range(said.max() + 1)])
    np.testing.assert_allclose(cluster_prototypes(result.natural), means, atol=0.3 * unit, rtol=0)
    # a step goes on from there
    better, info = em_step(result.natural, x)
    np.testing.assert_allclose(info.smallest_noise, result.info.smallest_noise, rtol=1e-3)
    assert jnp.mean(infer(better, x).log_density) > info.log_likelihood - 1e-2
