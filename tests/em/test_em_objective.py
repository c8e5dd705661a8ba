"""EM never decreases its objective, whatever the problem, and survives data on which likelihood has no maximum."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from cases import KINDS, Case
from dense import Dense, assert_close
from em_problems import CROWDED, SMALL, assert_never_decreases, assert_whitened, fit, problem

from flax_hmog import AnalyticHMoG, PseudoCounts, log_observable_density


def random_options(rng, case, z):
    """Weights with zeros, partial labels and a regulariser of random strengths, each in some of the problems."""
    options = {"regularizer": PseudoCounts(*10 ** rng.uniform(-2, 1, 3))}
    if rng.random() < 0.5:
        options["weights"] = rng.exponential(size=z.size) * (rng.random(z.size) < rng.uniform(0.5, 1))
    # always given, so that all problems share one program; all -1 is none
    options["labels"] = np.where(rng.random(z.size) < rng.uniform(0, 0.6), z, -1)
    if rng.random() < 0.3:
        # maximum likelihood, which needs enough samples in every component for its maximum
        options |= {"regularizer": None, "weights": None}
    return options


SIZES = ((4, 2, 3), (3, 3, 2), (5, 1, 4))


@pytest.mark.parametrize(
    ("obs_rep", "sizes"),
    [
        pytest.param(obs_rep, sizes, marks=[pytest.mark.slow] * (i not in (0, 4, 8)))
        for i, (obs_rep, sizes) in enumerate(itertools.product(KINDS, SIZES))
    ],
)
def test_objective_never_decreases_on_random_problems(obs_rep, sizes, float64):
    case = Case(AnalyticHMoG, obs_rep, "full", *sizes)
    for seed in range(24):  # 9 x 24 problems
        rng = np.random.default_rng([seed, *sizes])
        moments, x, z = problem(case, 60, seed)
        options = random_options(rng, case, z)
        if options["regularizer"] is None:
            moments = dataclasses.replace(moments, weights=np.full(case.n_components, 1 / case.n_components))
        result = fit(case, x, init=moments, max_steps=15, **options)
        assert len(result.objective_history) == 16
        assert_never_decreases(result.objective_history)
        assert_whitened(result.natural, 1e-7)


def degenerate_data(rng):
    """Float32 data on which maximum likelihood has no maximum."""
    points = rng.standard_normal((8, 4))
    spread = rng.standard_normal((60, 4))
    return {
        "constant columns": spread * [1, 0, 1, 0] + [0, 5, 0, -1],
        "all constant": np.ones((60, 4)),
        "duplicated rows": points[:2][rng.integers(0, 2, 60)],
        "K = N": points,
        "far apart": np.concatenate([spread[:30] * 1e-3, spread[30:] * 1e-3 + 1e3]),
    }


@pytest.mark.filterwarnings("ignore::flax_hmog.ConvergenceWarning")  # without a tolerance rounding has the last word
@pytest.mark.parametrize("kind", ["constant columns", "all constant", "duplicated rows", "K = N", "far apart"])
def test_degenerate_data_do_no_harm(kind, key):
    x = degenerate_data(np.random.default_rng(0))[kind]
    result = fit(CROWDED, x.astype(np.float32), key=key, dtype="float32", max_steps=30)
    # the data leave 1e-5 of their variance to the noise, which a float32 difference holds to about 1 %
    assert_never_decreases(result.objective_history, rounding=1e-2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result.natural, result.info)))
    assert np.isfinite(log_observable_density(result.natural, x)).all()
    assert_whitened(result.natural, 1e-3)


def test_empty_components_keep_a_valid_model(float64):
    """A component far from all data has no samples, and takes the shape of the pseudo-samples, narrow as it is."""
    moments, x, _ = problem(SMALL, 60, 13)
    moments = dataclasses.replace(moments, means=moments.means + np.array([[0.0], [0.0], [1e4]]))
    result = fit(SMALL, x, init=moments, max_steps=20, regularizer=PseudoCounts(component_floor=0.0))
    assert_never_decreases(result.objective_history)
    assert_close(result.info.occupancy[2], 0, 1e-12)
    assert_close(Dense.of_natural(result.natural).S[2], result.regularizer.component_covariance.entries, 1e-8)
