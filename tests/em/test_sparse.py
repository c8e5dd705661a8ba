"""E-steps with few components per row: certified, equal to the dense one, and free energies that never fall."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, random_moments
from dense import assert_close
from devices import on_cpus

from flax_hmog import AnalyticHMoG, PseudoCounts, moments_to_natural, natural_to_moments, prepare, sample
from flax_hmog.em.accelerate import find, follow
from flax_hmog.em.screen import make_screen, upper_bounds
from flax_hmog.em.sparse import kept_pass, sparse_pass
from flax_hmog.em.statistics import Statistics, accumulate, basis_loadings, log_likelihood
from flax_hmog.em.step import diagnose, finish_step, penalty, whiten_moments
from flax_hmog.model.frames import Frame
from flax_hmog.model.prepared import center_rows, component_logits, latent_features, posterior_gain, project_rows

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
    weights, labels = jnp.ones(len(x)), None
    if weighted:
        weights = jnp.asarray(rng.uniform(0, 3, len(x)) * (rng.uniform(size=len(x)) > 0.2))
        labels = jnp.asarray(np.where(rng.uniform(size=len(x)) < 0.3, rng.integers(0, 12, len(x)), -1))
    want = accumulate(factors, x, weights, labels)
    got, info, _ = sparse_pass(factors, x, weights, labels, rank=3, slots=6, dense_rows=len(x))
    assert info.largest_dropped <= 1e-6
    assert info.uncertain_rows == 0
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
        assert info.uncertain_rows > 0
        assert info.dense_rows == 0
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
    for _ in range(3):
        factors = prepare(natural)
        statistics, _, assignments = sparse_pass(factors, x, weights, rank=3, slots=6, dense_rows=len(x))
        history.append(float(log_likelihood(factors, statistics) + penalty(natural, regularizer)))
        for _ in range(4):
            natural, *_ = finish_step(factors, statistics, regularizer, None)
            factors = prepare(natural)
            statistics = kept_pass(factors, assignments, weights)
            energy = float(log_likelihood(factors, statistics))
            assert energy <= float(log_likelihood(factors, accumulate(factors, x, weights))) + 1e-8
            history.append(energy + float(penalty(natural, regularizer)))
        natural, *_ = finish_step(factors, statistics, regularizer, None)
    assert np.diff(history).min() > -1e-8, history


def test_a_kept_pass_with_the_same_model_is_the_pass(float64):
    _, factors, x = apart("diagonal")
    weights = jnp.linspace(0.0, 2.0, len(x))
    statistics, _, assignments = sparse_pass(factors, x, weights, rank=3, slots=6, dense_rows=len(x))
    equal_statistics(kept_pass(factors, assignments, weights), statistics, 1e-9)


def statistics_among(factors, x, weights, among):
    """The dense E-step with the components that count for every row (N, K), row by row of its formulas."""
    logits, t = logits_and_t(factors, x)
    logits = jnp.where(among, logits, -jnp.inf)
    gamma = jax.nn.softmax(logits)
    gain = posterior_gain(factors, gamma, t)
    residual = center_rows(factors, x) - (t + gain) @ basis_loadings(factors).T
    mass, both = gamma * weights[:, None], jnp.concatenate([t, gain], axis=1)
    by_component = mass.T @ latent_features(t)
    return Statistics(
        count=weights.sum(),
        residual=weights @ residual,
        residual_square=type(factors.root).second_moment(residual, weights),
        cross=(residual * weights[:, None]).T @ (t + gain),
        responsibilities=mass.sum(0),
        latent=by_component[:, : t.shape[1]],
        latent_square=by_component[:, t.shape[1] :],
        pooled_square=(both * weights[:, None]).T @ both,
        evidence=weights @ jax.nn.logsumexp(logits, axis=1),
    )


@pytest.mark.parametrize("obs_rep", KINDS)
def test_a_kept_pass_with_another_model(float64, obs_rep):
    natural, factors, x = apart(obs_rep, spread=2.0)
    weights = jnp.linspace(0.0, 2.0, len(x))
    frame = Frame(origin=jnp.full(7, 0.5), rest=jnp.zeros(7), unit=jnp.linspace(1.0, 2.0, 7), log_volume=jnp.zeros(()))
    natural = natural.in_frame(frame)
    factors = prepare(natural)
    statistics, _, assignments = sparse_pass(factors, x, weights, rank=3, slots=6)
    other = prepare(finish_step(factors, statistics, None, frame)[0])
    among = np.zeros((len(x), 13), bool)
    among[np.arange(len(x))[:, None], np.asarray(assignments.pairs.index)] = True
    assert 1 < among[:, :12].sum(1).mean() < 6
    got = kept_pass(other, assignments, weights)
    equal_statistics(got, statistics_among(other, x, weights, among[:, :12]), 1e-9)


def test_cycles_never_fall(float64):
    """The objective of a pass, the free energy after kept ones, and the objective of the next with the last model."""
    _, _, x = apart("diagonal", spread=2.0, count=600)
    case = Case(AnalyticHMoG, "diagonal", "full", 7, 4, 12)
    start = whiten_moments(jax.tree.map(jnp.asarray, random_moments(case, 5)))
    regularizer, weights = PseudoCounts().regularizer(start), jnp.ones(len(x))
    last, history = moments_to_natural(start), []
    for passes in (4, 1, 0):
        found = find(last, regularizer, x, weights, rank=3, slots=12)
        last, energy = follow(found, last, regularizer, weights, passes=passes)
        history += [float(found.objective), float(energy)]
    assert np.diff(history).min() >= 0
    assert history[-1] == history[-2]


@pytest.mark.parametrize("obs_rep", KINDS)
def test_diagnostics_without_a_step(float64, obs_rep):
    """A pass that takes no M-step gives the diagnostics of one that does."""
    natural, factors, x = apart(obs_rep, spread=1.0)
    rng = np.random.default_rng(0)
    labels = jnp.asarray(np.where(rng.uniform(size=len(x)) < 0.3, rng.integers(0, 12, len(x)), -1))
    block = x, jnp.asarray(rng.uniform(0, 3, len(x))), labels
    regularizer = PseudoCounts().regularizer(natural_to_moments(natural))
    want = finish_step(factors, accumulate(factors, *block), regularizer, None)[1]
    got = diagnose(natural, block, regularizer, None, shards=None)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-9), got, want)


SHARDED = """
import dataclasses, os, sys
sys.path[:0] = ["tests", "tests/em"]
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_sparse import apart, equal_statistics, find, follow, kept_pass, finish_step, prepare, sparse_pass
from flax_hmog.data.shards import row_shards

natural, factors, x = apart("diagonal", spread=2.0)
weights, labels = jnp.linspace(0.0, 2.0, len(x)), jnp.where(jnp.arange(len(x)) % 5 == 0, 3, -1)
options = {"rank": 3, "slots": 4, "dense_rows": 300}
want, info, assignments = sparse_pass(factors, x, weights, labels, **options)
sharded = jax.jit(sparse_pass, static_argnames=(*options, "shards"))
other = prepare(finish_step(factors, want, None, None)[0])
kept = kept_pass(other, assignments, weights)
run = jax.jit(kept_pass, static_argnames="shards")
for count in (2, 4):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    put = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("data")))
    shards = row_shards(put(x))
    got, found, parts = sharded(factors, put(x), put(weights), put(labels), **options, shards=shards)
    equal_statistics(got, want, 1e-9)
    for field in dataclasses.fields(info):
        assert np.allclose(getattr(found, field.name), getattr(info, field.name)), (count, field.name)
    equal_statistics(run(other, parts, put(weights), shards=shards), kept, 1e-9)
    text = run.lower(other, parts, put(weights), shards=shards).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text, count
"""


def test_on_several_devices():
    run = subprocess.run([sys.executable, "-c", SHARDED], env=on_cpus(4), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
