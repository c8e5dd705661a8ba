"""E-steps with few components per row: certified, equal to the dense one, and free energies that never fall."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, random_moments
from dense import assert_close

from flax_hmog import AnalyticHMoG, PseudoCounts, moments_to_natural, prepare, sample
from flax_hmog.em.sparse import frozen_pass, make_screen, sparse_pass, upper_bounds
from flax_hmog.em.statistics import accumulate, log_likelihood
from flax_hmog.em.step import next_natural, penalty, whiten_moments
from flax_hmog.model.prepared import center_rows, component_logits, latent_features, project_rows

KINDS = ("scale", "diagonal", "full")


def apart(obs_rep, n_components=12, count=300, seed=0, spread=6.0, lat_dim=4):
    """A model whose components lie apart, and its samples."""
    case = Case(AnalyticHMoG, obs_rep, "full", 7, lat_dim, n_components)
    moments = random_moments(case, seed)
    moments = dataclasses.replace(moments, means=spread * moments.means)
    natural = moments_to_natural(jax.tree.map(jnp.asarray, moments))
    x, _, _ = sample(natural, jax.random.key(seed), count)
    return natural, prepare(natural), x


def logits_and_t(factors, x):
    t = project_rows(factors, center_rows(factors, x))
    return component_logits(factors, latent_features(t)), t


@pytest.mark.parametrize("obs_rep", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bounds_hold(float64, obs_rep, rank):
    _, factors, x = apart(obs_rep, spread=2.0)
    x = jnp.concatenate([x, 50 * x])
    logits, t = logits_and_t(factors, x)
    excess = upper_bounds(make_screen(factors, rank), t) - logits
    assert excess.min() >= 0


@pytest.mark.parametrize("obs_rep", KINDS)
def test_in_all_directions_bounds_are_logits(float64, obs_rep):
    _, factors, x = apart(obs_rep, spread=2.0)
    logits, t = logits_and_t(factors, x)
    assert_close(upper_bounds(make_screen(factors, t.shape[1]), t), logits, 1e-8)


def equal_statistics(got, want, tolerance):
    for field in dataclasses.fields(want):
        a, b = (jax.tree.leaves(getattr(s, field.name))[0] for s in (got, want))
        scale = float(jnp.abs(b).max())
        assert_close(a / scale, b / scale, tolerance)


@pytest.mark.parametrize("obs_rep", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_dense_pass(float64, obs_rep, weighted):
    _, factors, x = apart(obs_rep)
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.uniform(0, 3, len(x)) * (rng.uniform(size=len(x)) > 0.2)) if weighted else jnp.ones(len(x))
    labels = jnp.asarray(np.where(rng.uniform(size=len(x)) < 0.3, rng.integers(0, 12, len(x)), -1)) if weighted else None
    want = accumulate(factors, x, weights, labels)
    got, info, _ = sparse_pass(factors, x, weights, labels, rank=3, slots=6, dense_rows=len(x))
    assert info.largest_dropped <= 1e-6 and info.uncertain_rows == 0
    assert 0 <= want.evidence - got.evidence <= info.mean_dropped * want.count + 1e-9
    equal_statistics(got, want, 1e-6)


def test_the_bound_covers_what_was_dropped(float64):
    """Few slots and few directions: much is dropped, and the bound says at least that."""
    _, factors, x = apart("diagonal", spread=1.0)
    weights = jnp.ones(len(x))
    for rank, slots in ((1, 1), (2, 2), (3, 2), (2, 4)):
        got, info, _ = sparse_pass(factors, x, weights, rank=rank, slots=slots, dense_rows=0)
        lost = (accumulate(factors, x, weights).evidence - got.evidence) / len(x)
        assert 0 < lost <= info.mean_dropped
        assert info.uncertain_rows > 0 and info.dense_rows == 0
        exact, _, _ = sparse_pass(factors, x, weights, rank=rank, slots=slots, dense_rows=len(x))
        assert exact.evidence >= got.evidence  # of all components the best


def test_with_a_slot_for_every_component_nothing_is_dropped(float64):
    _, factors, x = apart("diagonal", n_components=5, spread=1.0)
    weights = jnp.ones(len(x))
    got, info, _ = sparse_pass(factors, x, weights, rank=2, slots=9)
    assert info.largest_dropped < 1e-8
    equal_statistics(got, accumulate(factors, x, weights), 1e-6)


@pytest.mark.parametrize("obs_rep", KINDS)
def test_free_energies_never_fall(float64, obs_rep):
    natural, _, x = apart(obs_rep, spread=2.0)
    start = random_moments(Case(AnalyticHMoG, obs_rep, "full", 7, 4, 12), 5)
    start = whiten_moments(jax.tree.map(jnp.asarray, start))
    regularizer = PseudoCounts().regularizer(start)
    natural, weights, history = moments_to_natural(start), jnp.ones(len(x)), []
    for cycle in range(3):
        factors = prepare(natural)
        statistics, _, assignments = sparse_pass(factors, x, weights, rank=3, slots=6, dense_rows=len(x))
        history.append(float(log_likelihood(factors, statistics) + penalty(natural, regularizer)))
        for frozen in range(4):
            natural, _ = next_natural(factors, statistics, regularizer)
            factors = prepare(natural)
            statistics = frozen_pass(factors, assignments, x, weights)
            energy = float(log_likelihood(factors, statistics))
            assert energy <= float(log_likelihood(factors, accumulate(factors, x, weights))) + 1e-8
            history.append(energy + float(penalty(natural, regularizer)))
        natural, _ = next_natural(factors, statistics, regularizer)
    assert np.diff(history).min() > -1e-8, history


def test_a_frozen_pass_with_the_same_model_is_the_pass(float64):
    _, factors, x = apart("diagonal")
    weights = jnp.linspace(0.0, 2.0, len(x))
    statistics, _, assignments = sparse_pass(factors, x, weights, rank=3, slots=6, dense_rows=len(x))
    equal_statistics(frozen_pass(factors, assignments, x, weights), statistics, 1e-9)
