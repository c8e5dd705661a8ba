"""EM with missing entries: exact steps, monotone objectives, and all that fits take besides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from dense import Dense, assert_close
from em_problems import SMALL, assert_never_decreases, fit, problem
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from flax_hmog import (
    PseudoCounts,
    em_step,
    fit_em,
    fit_online_em,
    impute,
    initialize_moments,
    mean_log_density,
    moments_to_natural,
    natural_to_moments,
)

TOLD = {"missing": "nan"}
SCALE = CASES["analytic-scale-full-4.2.3"]


def with_holes(x, share=0.3, seed=0):
    holes = np.random.default_rng(seed).random(x.shape) < share
    return np.where(holes, np.nan, x)


def joint_step(dense, x, weights, kind):
    """A step of EM in numpy, row by row, with the whole of (x, y) latent where it is missing."""
    D, L = dense.W.shape
    sums = {"n": np.zeros(len(dense.w)), "y": 0, "yy": 0, "q": 0, "qy": 0, "qq": 0}
    for row, v in zip(x, weights, strict=True):
        o = ~np.isnan(row)
        logits, parts = np.log(dense.w).copy(), []
        for k, (m, s) in enumerate(zip(dense.m, dense.S, strict=True)):
            mean = np.concatenate([dense.W @ m + dense.b, m])  # of (x, y)
            covariance = np.block([[dense.W @ s @ dense.W.T + dense.Psi, dense.W @ s], [s @ dense.W.T, s]])
            seen = np.concatenate([o, np.zeros(L, bool)])
            inner = covariance[np.ix_(seen, seen)]
            gain = covariance[:, seen] @ np.linalg.inv(inner) if o.any() else np.zeros((D + L, 0))
            logits[k] += multivariate_normal(mean[seen], inner).logpdf(row[o]) if o.any() else 0
            parts.append((mean + gain @ (row[o] - mean[seen]), covariance - gain @ covariance[seen]))
        r = v * np.exp(logits - logsumexp(logits))
        for k, (mean, covariance) in enumerate(parts):
            second = covariance + np.outer(mean, mean)
            sums["n"][k] += r[k]
            sums["y"] = sums["y"] + r[k] * np.eye(len(r))[k][:, None] * mean[D:]
            sums["yy"] = sums["yy"] + r[k] * np.eye(len(r))[k][:, None, None] * second[D:, D:]
            sums["q"], sums["qy"] = sums["q"] + r[k] * mean[:D], sums["qy"] + r[k] * second[:D, D:]
            sums["qq"] = sums["qq"] + r[k] * np.diag(second)[:D]
    n = sums["n"].sum()
    one = np.concatenate([[n], sums["y"].sum(0)])
    square = np.block([[one[None]], [one[1:, None], sums["yy"].sum(0)]])
    cross = np.concatenate([sums["q"][:, None], sums["qy"]], axis=1)
    slope = np.linalg.solve(square, cross.T).T
    noise = (sums["qq"] - np.sum(slope * cross, axis=1)) / n
    noise = np.full(D, noise.mean()) if kind == "scale" else noise
    means = sums["y"] / sums["n"][:, None]
    covariances = sums["yy"] / sums["n"][:, None, None] - means[:, :, None] * means[:, None, :]
    return Dense(slope[:, 1:], slope[:, 0], np.diag(noise), sums["n"] / n, means, covariances)


@pytest.mark.parametrize("case", [SMALL, SCALE], ids=lambda case: case.obs_rep)
def test_a_step_is_that_of_the_joint_model(case, float64):
    start, x, _ = problem(case, 40, 0)
    x, weights = with_holes(x), np.random.default_rng(1).uniform(0.5, 2, 40)
    x[0] = np.nan
    natural, info = em_step(moments_to_natural(start), x, weights, **TOLD)
    want = joint_step(Dense.of_moments(start), x, weights, case.obs_rep)
    got = Dense.of_moments(natural_to_moments(natural))
    rows = np.random.default_rng(2).normal(size=(20, 4)) * 3
    assert_close(got.log_density(rows), want.log_density(rows), 1e-8)
    assert_close(info.log_likelihood, mean_log_density(moments_to_natural(start), x, weights, **TOLD), 1e-12)


def test_nothing_missing_is_the_same_fit(float64):
    _, x, _ = problem(SMALL, 200, 0)
    assert np.array_equal(fit(SMALL, x).objective_history, fit(SMALL, x, **TOLD).objective_history)
    in_batches = [fit(SMALL, [x[:80], x[80:]], **told).objective_history for told in ({}, TOLD)]
    assert_close(*in_batches, 1e-10)


@pytest.mark.parametrize("case", [SMALL, SCALE], ids=lambda case: case.obs_rep)
@pytest.mark.parametrize("regularizer", [PseudoCounts(), None], ids=["regularised", "plain"])
def test_the_objective_never_falls(case, regularizer, float64):
    _, x, z = problem(case, 150, 1)
    x = with_holes(x)
    labels = np.where(np.arange(150) % 3 == 0, z, -1)
    for options in ({}, {"labels": labels}, {"init": "fa"}, {"column_units": "common"}):
        result = fit(case, x, regularizer=regularizer, max_steps=25, **TOLD, **options)
        assert_never_decreases(result.objective_history)
    assert_close(result.info.log_likelihood, mean_log_density(result.natural, x, **TOLD), 1e-9)


def test_weights_count_rows(float64):
    start, x, _ = problem(SMALL, 60, 2)
    x, counts = with_holes(x), np.random.default_rng(0).integers(0, 4, 60)
    one = fit(SMALL, x, weights=counts, init=start, **TOLD)
    other = fit(SMALL, np.repeat(x, counts, axis=0), init=start, **TOLD)
    assert_close(one.objective_history, other.objective_history, 1e-10)


def test_all_kinds_of_sources_give_one_fit(tmp_path, float64):
    start, x, _ = problem(SMALL, 90, 3)
    x = with_holes(x)
    np.save(tmp_path / "x.npy", x)
    want = fit(SMALL, x, init=start, **TOLD).objective_history
    for data in ([x[:40], x[40:]], np.load(tmp_path / "x.npy", mmap_mode="r"), np.ma.masked_invalid(x)):
        assert_close(fit(SMALL, data, init=start, **TOLD).objective_history, want, 1e-10)


def test_the_fit_is_the_same_in_any_units(float64):
    """Likelihoods are those of what is seen, in its units."""
    _, x, _ = problem(SMALL, 120, 4)
    x, unit = with_holes(x), np.array([1e-3, 1.0, 10.0, 1e4])
    seen = (~np.isnan(x)).mean(axis=0)
    want = fit(SMALL, x, **TOLD).objective_history
    moved = fit(SMALL, x * unit + 5 * unit, **TOLD)
    # one pseudo-sample of the noise has all columns
    volume = np.log(unit) @ seen + np.log(unit).sum() / 120
    assert_close(moved.objective_history, want - volume, 1e-7)
    low = fit(SMALL, x * unit + 1e4 * unit, dtype="float32", **TOLD)
    assert_close(low.objective_history, want - volume, 1e-2)


def test_parameters_are_found_where_entries_are_missing_at_random(float64):
    """The likelihood of all rows that the model has which saw a part of their entries."""
    _start, x, _ = problem(SMALL, 3000, 5)
    more = problem(SMALL, 3000, 5)[1][::-1]
    whole = fit(SMALL, x, max_steps=200, tolerance=1e-7, init="fa")
    part = fit(SMALL, with_holes(x), max_steps=400, tolerance=1e-7, init="fa", **TOLD)
    gap = mean_log_density(whole.natural, more) - mean_log_density(part.natural, more)
    assert abs(gap) < 0.01
    mean_only = np.sqrt(np.nanmean((x - x.mean(0))[np.isnan(with_holes(x))] ** 2))
    error = np.sqrt(np.mean((impute(part.natural, with_holes(x)).mean - x)[np.isnan(with_holes(x))] ** 2))
    assert error < mean_only


def test_online_steps(float64):
    _, x, _ = problem(SMALL, 600, 6)
    x = with_holes(x)
    options = {"batch_size": 100, "passes": 4, "step_delay": 4.0}
    result = fit_online_em(SMALL.head(), x, jax.random.key(0), **options, **TOLD)
    assert result.objective_history[-1] > result.objective_history[0]
    batch = fit(SMALL, x, max_steps=5, **TOLD)
    assert result.objective_history[-1] > batch.objective_history[2] - 0.1
    whole = problem(SMALL, 600, 6)[1]
    told = [fit_online_em(SMALL.head(), whole, jax.random.key(0), **options, **t).objective_history for t in ({}, TOLD)]
    assert np.array_equal(*told)


def test_wild_rows_are_found_beside_missing_entries():
    _, x, _ = problem(SMALL, 100, 7)
    x = with_holes(x).astype(np.float32)
    x[5] = [np.nan, 1e7, np.nan, np.nan]
    with pytest.warns(UserWarning, match="1 rows are left out, .*the first is row 5"):
        fit(SMALL, x, dtype="float32", **TOLD)


def test_accelerated_fits_take_plain_steps(float64):
    _, x, _ = problem(SMALL, 100, 8)
    x = with_holes(x)
    head = SMALL.head(n_components=40)
    options = {"max_steps": 2, "tolerance": -np.inf, **TOLD}
    plain, asked = (
        fit_em(head, x, jax.random.key(0), accelerate=a, **options).objective_history for a in (False, True)
    )
    assert np.array_equal(plain, asked)


def test_refused(float64):
    _, x, _ = problem(SMALL, 50, 9)
    x = with_holes(x)
    with pytest.raises(ValueError, match=r'fit_em: .*Give missing="nan"'):
        fit(SMALL, x)
    empty = np.where(np.arange(4) == 2, np.nan, x)
    for function in (fit_em, fit_online_em, initialize_moments):
        with pytest.raises(ValueError, match="`data` must have an entry in every column; got none in column 2"):
            function(SMALL.head(), empty, jax.random.key(0), **TOLD)
    with pytest.raises(ValueError, match='`missing` must be "refuse" where noise is correlated'):
        fit(CASES["analytic-full-full-4.2.3"], x, **TOLD)
    seen = []
    with pytest.raises(ValueError, match='Give missing="nan"'):  # what a callback calls is told by itself
        fit(SMALL, x, on_step=lambda state: seen.append(mean_log_density(state.natural, x)), **TOLD)


def test_starts_fill_in_what_is_missing(float64):
    _, x, _ = problem(SMALL, 200, 10)
    moments = initialize_moments(SMALL.head(), with_holes(x), jax.random.key(0), **TOLD)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(moments))
    same = [initialize_moments(SMALL.head(), x, jax.random.key(0), **told) for told in ({}, TOLD)]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, same), strict=True))
