"""Online EM, and data that are not an array: files larger than memory, sparse matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from cases import Case, random_moments
from dense import Dense, assert_close
from em_problems import SMALL, assert_whitened, fit, problem

from flax_hmog import (
    AnalyticHMoG,
    expected_statistics,
    fit_em,
    fit_online_em,
    infer,
    infer_blocks,
    initialize_moments,
    log_observable_density,
    mean_to_natural,
    moments_to_natural,
    natural_to_mean,
)
from flax_hmog.data import sources


def fit_online(x, init, dtype="float64", **options):
    head = AnalyticHMoG(SMALL.lat_dim, SMALL.n_components, SMALL.obs_dim, SMALL.obs_rep, param_dtype=dtype)
    return fit_online_em(head, x, jax.random.key(0), init=init, **options)


@pytest.mark.parametrize("regularizer", ["default", None])
def test_a_whole_batch_at_rate_1_is_a_step_of_em(regularizer, float64):
    moments, x, _ = problem(SMALL, 60, 1)
    options = {} if regularizer else {"regularizer": None}
    online = fit_online(x, moments, batch_size=60, passes=1, step_delay=1.0, **options)
    batch = fit(SMALL, x, init=moments, max_steps=1, **options)
    assert_close(online.objective_history, batch.objective_history, 1e-10)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-8), online.natural, batch.natural)
    assert_whitened(online.natural, 1e-8)


def mixed(moments, steps):
    """The model after steps (rate, batch) from a start, by averages of its statistics of x."""
    natural = moments_to_natural(moments)
    running = natural_to_mean(natural)
    for rate, batch in steps:
        statistics = expected_statistics(natural, batch)
        running = jax.tree.map(lambda a, b, rate=rate: (1 - rate) * a + rate * b, running, statistics)
        natural = mean_to_natural(running)
    return natural


def test_running_statistics_are_mixed_as_those_of_x(float64):
    """Statistics about a moving model, carried along, are the plain average of E[s(x, y, z) | x] over time."""
    moments, x, _ = problem(SMALL, 60, 2)
    online = fit_online(x, moments, batch_size=60, passes=4, regularizer=None)
    natural = mixed(moments, [((step + 2.0) ** -0.75, x) for step in range(4)])
    assert_close(log_observable_density(online.natural, x), log_observable_density(natural, x), 1e-8)


def test_averaging_takes_the_last_pass(float64):
    moments, x, _ = problem(SMALL, 64, 3)
    last, averaged = (fit_online(x, moments, batch_size=16, average=average) for average in (False, True))
    assert_close(last.objective_history[:-1], averaged.objective_history[:-1], 1e-12)
    assert abs(last.objective_history[-1] - averaged.objective_history[-1]) > 1e-6
    one = fit_online(x, moments, batch_size=64, passes=1, average=True)
    assert_close(one.objective_history, fit_online(x, moments, batch_size=64, passes=1).objective_history, 1e-12)


def test_comes_further_than_batch_em_in_as_many_passes(key):
    case = Case(AnalyticHMoG, "diagonal", "full", 6, 2, 3)
    moments = dataclasses.replace(random_moments(case, 3), means=np.array([[-4.0, 0.0], [3.0, 3.0], [3.0, -4.0]]))
    x = Dense.of_moments(moments).sample(np.random.default_rng(0), 20_000)[0].astype(np.float32)
    # the key that gives both the same start
    start = initialize_moments(case.head("float32"), x, jax.random.split(key, 1)[0])
    online = fit_online_em(case.head("float32"), x, key, init=start)
    first, *_, third = fit_em(case.head("float32"), x, key, max_steps=3).objective_history
    converged = fit_em(case.head("float32"), x, key, max_steps=200, tolerance=1e-5).objective_history[-1]
    assert first < third < online.objective_history[-1] < converged + 1e-3


def test_rows_of_weight_0_change_nothing(float64):
    """Batches of a stream that are filled up, and rows that are weighted away."""
    moments, x, _ = problem(SMALL, 50, 4)
    weights = np.where(np.arange(60) < 50, 1.0, 0.0)
    padded = np.concatenate([x, 100 * np.ones((10, 4))])
    one = fit_online(padded, moments, batch_size=60, passes=3, step_delay=1.2, weights=weights)
    want = fit_online(x, moments, batch_size=50, passes=3, step_delay=1.2)
    assert_close(one.objective_history, want.objective_history, 1e-10)


def test_a_partial_batch_counts_less_and_compiles_nothing(float64, compilations):
    moments, x, z = problem(SMALL, 50, 4)
    options = {"batch_size": 20, "passes": 2, "weights": np.ones(50), "labels": z}
    fit_online(x, moments, **options)
    assert compilations(fit_online, x, moments, **options) == 0
    # two batches of 30, the second a third as full: its rate is a third, too
    halves = [x[:30], x[30:40]]
    stream = fit_online(halves, moments, passes=1, regularizer=None)
    natural = mixed(moments, [(2.0**-0.75, halves[0]), (3.0**-0.75 / 3, halves[1])])
    assert_close(log_observable_density(stream.natural, x), log_observable_density(natural, x), 1e-8)


def test_a_batch_is_no_larger_than_the_data(float64):
    moments, x, _ = problem(SMALL, 60, 1)
    default, whole = (fit_online(x, moments, **options) for options in ({}, {"batch_size": 60}))
    np.testing.assert_array_equal(default.objective_history, whole.objective_history)


def test_streams_are_taken_as_they_come(float64):
    moments, x, _ = problem(SMALL, 60, 5)
    stream = fit_online([x[:25], x[25:50], x[50:]], moments)
    again = fit_online((x[:25], x[25:50], x[50:]), moments)
    np.testing.assert_array_equal(stream.objective_history, again.objective_history)
    other = fit_online([x[50:], x[25:50], x[:25]], moments)
    assert not np.array_equal(stream.objective_history, other.objective_history)


@pytest.fixture
def small_host_blocks(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 4 * 8 * 17)  # 17 rows of 4 columns in float64


@pytest.mark.parametrize("kind", ["file", "sparse"])
def test_files_and_sparse_matrices_are_the_array(kind, tmp_path, small_host_blocks, float64):
    moments, x, z = problem(SMALL, 60, 6)
    x = np.where(np.abs(x) > 0.5, x, 0)
    weights = np.linspace(0.5, 2, 60)
    if kind == "file":
        np.save(tmp_path / "x.npy", x)
        data = np.load(tmp_path / "x.npy", mmap_mode="r")
    else:
        data = scipy.sparse.csr_array(x)
    plain, blocks = (fit(SMALL, a, init=moments, weights=weights, labels=z, max_steps=3) for a in (x, data))
    assert_close(blocks.objective_history, plain.objective_history, 1e-10)
    seeded, whole = fit(SMALL, data, init="pca", max_steps=2), fit(SMALL, x, init="pca", max_steps=2)
    assert_close(seeded.objective_history, whole.objective_history, 1e-8)
    online = [fit_online(a, moments, batch_size=60, passes=2).objective_history for a in (x, data)]
    assert_close(online[0], online[1], 1e-10)
    output, want = infer_blocks(plain.natural, data), infer(plain.natural, jnp.asarray(x))
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-12), output, want)
    assert isinstance(output.log_density, np.ndarray)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"passes": 0}, "passes"),
        ({"step_decay": 0.5}, "step_decay"),
        ({"step_delay": 0.0}, "step_delay"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    moments, x, _ = problem(SMALL, 20, 7)
    with pytest.raises(ValueError, match=rf"fit_online_em: .*{message}"):
        fit_online(x, moments, **options)


def test_entries_of_a_file_that_are_not_finite_are_an_error(tmp_path, small_host_blocks):
    moments, x, _ = problem(SMALL, 60, 7)
    x[45, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    data = np.load(tmp_path / "x.npy", mmap_mode="r")
    for call in (lambda: fit(SMALL, data, init=moments, dtype="float32"), lambda: fit_online(data, moments, "float32")):
        with pytest.raises(ValueError, match=r"`data` must be finite .* the first in row 45\."):
            call()


def test_mistakes_are_named():
    moments, x, _ = problem(SMALL, 20, 7)
    natural = moments_to_natural(jax.tree.map(np.float32, moments))
    with pytest.raises(TypeError, match="infer_blocks: `natural` must be Natural; got Moments"):
        infer_blocks(moments, x)
    for fit_function in (fit_em, fit_online_em):
        with pytest.raises(ValueError, match="`data` must hold at least one batch"):
            fit_function(SMALL.head("float32"), [], jax.random.key(0), init=natural)
    with pytest.raises(ValueError, match="`data` must have at least as many samples"):
        fit_em(SMALL.head("float32"), x[:2], jax.random.key(0))


def test_batches_may_be_sparse(float64):
    moments, x, _ = problem(SMALL, 40, 8)
    plain, sparse = (
        fit(SMALL, [kind(x[:20]), kind(x[20:])], init=moments) for kind in (np.asarray, scipy.sparse.csr_array)
    )
    np.testing.assert_array_equal(plain.objective_history, sparse.objective_history)
