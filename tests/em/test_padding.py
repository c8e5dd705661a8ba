"""Small fits are padded to few sizes, and none of what they find depends on it."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import KINDS, Case
from dense import assert_close
from em_problems import problem

from flax_hmog import AnalyticHMoG, PseudoCounts, fit_em, moments_to_natural
from flax_hmog.em import fit as fits
from flax_hmog.em import padding

CASE = Case(AnalyticHMoG, "diagonal", "full", 6, 2, 3)
PADDINGS = {"common": ((16, 32), (8, 16, 24)), "tight": ((3,), (3,)), "wide": ((32,), (6,)), "components": ((7,), (2,))}


def fit(case, x, *, steps=6, key=0, **options):
    return fit_em(case.head(), x, jax.random.key(key), max_steps=steps, tolerance=-np.inf, **options)


def unpadded(monkeypatch):
    monkeypatch.setattr(fits, "padded_sizes", lambda *_: None)


def assert_same(got, want, tolerance=1e-10):
    assert_close(got.objective_history, want.objective_history, tolerance)
    assert got.converged == want.converged
    for tree in ("natural", "info", "regularizer"):
        old, new = getattr(want, tree), getattr(got, tree)
        assert jax.tree.structure(old) == jax.tree.structure(new)
        jax.tree.map(lambda a, b: (assert_close(a, b, 1e3 * tolerance), None)[1], new, old)


def rows(case=CASE, count=90, seed=1):
    return problem(case, count, seed)


@pytest.mark.parametrize("name", PADDINGS)
def test_no_padding_changes_a_fit(name, float64, monkeypatch):
    _, x, _ = rows()
    components, factors = PADDINGS[name]
    monkeypatch.setattr(padding, "COMPONENT_SIZES", components)
    monkeypatch.setattr(padding, "FACTOR_SIZES", factors)
    assert padding.padded_sizes(*x.shape, 2, 3).padded[1:] == (components[0], min(factors[0], 6))
    padded = fit(CASE, x)
    unpadded(monkeypatch)
    assert_same(padded, fit(CASE, x))


@pytest.mark.parametrize("obs_rep", KINDS)
@pytest.mark.parametrize("init", ["pca", "fa"])
def test_kinds_and_starts(init, obs_rep, float64, monkeypatch):
    case = dataclasses.replace(CASE, obs_rep=obs_rep)
    _, x, z = rows(case)
    rng = np.random.default_rng(0)
    given = {"weights": rng.integers(0, 4, len(x)).astype(float), "labels": np.where(np.arange(len(x)) % 3, -1, z)}
    padded = fit(case, x, init=init, **given)
    unpadded(monkeypatch)
    assert_same(padded, fit(case, x, init=init, **given))


@pytest.mark.parametrize("start", [0, 1, 2])
def test_each_metric_of_starts(start, float64, monkeypatch):
    _, x, _ = rows()
    one = lambda *args, **given: [list(fits_starts(*args, **given))[start]]  # noqa: E731
    fits_starts = fits.starts
    monkeypatch.setattr(fits, "starts", one)
    padded = fit(CASE, x)
    unpadded(monkeypatch)
    assert_same(padded, fit(CASE, x))


@pytest.mark.parametrize("regularizer", [None, PseudoCounts(0, 0, 0), PseudoCounts(3, 20, 10, 0.1)], ids=str)
@pytest.mark.parametrize("is_given", [False, True])
def test_regularisers_and_models_to_start_from(is_given, regularizer, float64, monkeypatch):
    moments, x, _ = rows()
    options = {"regularizer": regularizer} | ({"init": moments} if is_given else {})
    padded = fit(CASE, x, **options)
    unpadded(monkeypatch)
    assert_same(padded, fit(CASE, x, **options))


def test_a_regulariser_that_is_given(float64, monkeypatch):
    moments, x, _ = rows()
    options = {"regularizer": PseudoCounts(2, 3, 4).regularizer(moments), "init": moments_to_natural(moments)}
    padded = fit(CASE, x, **options)
    unpadded(monkeypatch)
    assert_same(padded, fit(CASE, x, **options))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 1), (5, 5, 16), (12, 9, 20)], ids=str)
def test_sizes(sizes, float64, monkeypatch):
    case = Case(AnalyticHMoG, "diagonal", "full", *sizes)
    x = np.random.default_rng(0).normal(size=(101, sizes[0])) * np.arange(1, sizes[0] + 1)
    padded = fit(case, x)
    assert padded.natural.interaction.shape == sizes[:2]
    assert padded.info.occupancy.shape == sizes[2:]
    unpadded(monkeypatch)
    assert_same(padded, fit(case, x), 1e-9)


def test_rows_far_away_belong_to_no_component_that_does_not_count(float64, monkeypatch):
    moments, x, _ = rows()
    x = np.concatenate([x, [[1e4, -1e4, 0, 0, 0, 0]]])
    options = {"max_distance": np.inf, "steps": 3, "init": moments}
    padded = fit(CASE, x, **options)
    assert_close(np.sum(padded.info.occupancy), len(x), 1e-9)
    unpadded(monkeypatch)
    assert_close(padded.objective_history, fit(CASE, x, **options).objective_history, 1e-9)


@pytest.mark.parametrize("regularizer", [PseudoCounts(), None], ids=["counts", "none"])
def test_states_have_the_size_of_the_model_and_resume_bit_for_bit(regularizer):
    _, x, _ = rows()
    head, states = CASE.head("float32"), []
    given = {"max_steps": 5, "tolerance": -np.inf, "n_restarts": 2, "regularizer": regularizer}
    whole = fit_em(head, x.astype(np.float32), jax.random.key(0), on_step=states.append, **given)
    of_starts = [state for state in states if state.natural is not None]
    assert all(state.natural.posterior_location.shape == (3, 2) for state in of_starts)
    for state in states[:-1]:
        again = fit_em(head, x.astype(np.float32), jax.random.key(0), state=state, **given)
        equal = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), again.natural, whole.natural)
        assert all(jax.tree.leaves(equal))
        assert (again.objective_history == whole.objective_history).all()


def test_many_sizes_share_programs(compilations):
    x = np.random.default_rng(0).normal(size=(300, 9)).astype(np.float32)

    def run(lat_dim, n_components, rows):
        return fit_em(AnalyticHMoG(lat_dim, n_components), x[:rows], jax.random.key(0), max_steps=3).info

    run(2, 3, 300)
    programs = compilations(run, 3, 5, 299)
    assert programs < 25, programs
