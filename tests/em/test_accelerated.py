"""Accelerated fits: no lower than plain ones at equal steps, never falling, certified, resumed bit for bit."""

import dataclasses
import functools
import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest
from devices import on_cpus
from em_problems import assert_never_decreases
from sklearn.datasets import load_digits

from flax_hmog import AnalyticHMoG, EMOptions, fit_em, fit_online_em, mean_log_density, penalty
from flax_hmog.em import accelerate, cycles
from flax_hmog.em.fit import Fit

DIGITS = load_digits().data / 16
KEY = jax.random.key(0)


@functools.cache
def blobs(n_blobs, per_blob, seed=0):
    """Rows of clusters in few directions of many, and their clusters."""
    rng = np.random.default_rng(seed)
    means, loadings = 3 * rng.normal(size=(n_blobs, 5)), rng.normal(size=(12, 5))
    z = np.repeat(np.arange(n_blobs), per_blob)
    y = means[z] + 0.5 * rng.normal(size=(len(z), 5))
    return y @ loadings.T + 0.5 * rng.normal(size=(len(z), 12)), z


BLOBS, CLUSTERS = blobs(40, 25)


def fit(x=BLOBS, n_components=40, lat_dim=5, *, dtype="float64", states=None, **options):
    head = AnalyticHMoG(lat_dim, n_components, param_dtype=dtype)
    keep = None if states is None else states.append
    return fit_em(head, x, KEY, on_step=keep, **{"max_steps": 6, "tolerance": -np.inf} | options)


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.natural, want.natural)
    np.testing.assert_array_equal(got.objective_history, want.objective_history)
    np.testing.assert_array_equal(got.restart_objectives, want.restart_objectives)
    jax.tree.map(np.testing.assert_array_equal, got.sparse, want.sparse)


@pytest.mark.parametrize("data", ["digits", "blobs"])
def test_no_lower_than_plain_em(float64, data):
    x, sizes, steps = (DIGITS, (64, 12), 9) if data == "digits" else (3 * blobs(100, 20)[0], (100, 8), 8)
    plain, fast = (fit(x, *sizes, max_steps=steps, accelerate=accelerate) for accelerate in (False, True))
    assert fast.objective_history[-1] > plain.objective_history[-1] + 0.05
    assert_never_decreases(fast.objective_history)
    assert fast.objective_history.shape == plain.objective_history.shape
    assert fast.sparse.mean_dropped <= 1e-6
    assert fast.sparse.pairs < 10 * len(x)
    # the last pass is dense
    np.testing.assert_allclose(fast.info.log_likelihood, mean_log_density(fast.natural, x), rtol=1e-10)
    np.testing.assert_allclose(fast.objective_history[-1], fast.info.objective, rtol=1e-10)


def test_what_is_certified_holds(float64):
    """Objectives of sparse passes lie below those of dense ones with the same models, by no more than they say."""
    states = []
    fit(states=states, accelerate=True, max_steps=5)
    checked = 0
    for state, later in itertools.pairwise(states):
        if later.natural is None or later.cycles.sparse is None:
            continue
        plain = fit(init=state.natural, regularizer=None, max_steps=1)
        dense = float(plain.objective_history[0] + penalty(state.natural, state.regularizer) / len(BLOBS))
        assert -1e-10 <= dense - later.history[-1] <= later.cycles.sparse.mean_dropped + 1e-10
        assert state.cycles is None or dense >= state.cycles.reached
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("at", range(6))
def test_goes_on_bit_for_bit(at):
    states, options = [], {"dtype": "float32", "accelerate": True, "max_steps": 2, "n_restarts": 2}
    want = fit(states=states, **options)
    same(fit(state=states[at], **options), want)


def test_labels_and_weights(float64):
    rng = np.random.default_rng(1)
    labels = np.where(rng.uniform(size=len(BLOBS)) < 0.2, CLUSTERS, -1)
    weights = rng.uniform(0.5, 2, len(BLOBS)) * (rng.uniform(size=len(BLOBS)) < 0.8)
    plain, fast = (fit(labels=labels, weights=weights, accelerate=accelerate) for accelerate in (False, True))
    assert fast.sparse is not None
    assert fast.objective_history[-1] >= plain.objective_history[-1]
    assert_never_decreases(fast.objective_history)
    wild = np.where(weights[:, None] > 0, BLOBS, 7.0)  # which changes no unit of a column: rows without weight
    np.testing.assert_allclose(
        fit(wild, labels=labels, weights=weights, accelerate=True).objective_history, fast.objective_history, atol=1e-8
    )


@pytest.mark.parametrize("options", [{"regularizer": None}, {"regularizer": None, "max_steps": 5}])
def test_maximum_likelihood(float64, options):
    x, _ = blobs(40, 100, 3)
    assert_never_decreases(fit(x, accelerate=True, **options).objective_history)


def test_extrapolations_within_a_step_are_given_up(float64, monkeypatch):
    """With too long ones, kept passes take the models of the M-steps, and no energy falls."""
    want = fit(accelerate=True, max_steps=4)
    monkeypatch.setattr(accelerate, "MOMENTUM", 50.0)
    accelerate.follow.clear_cache()
    got = fit(accelerate=True, max_steps=4)
    accelerate.follow.clear_cache()
    assert_never_decreases(got.objective_history)
    assert got.objective_history[0] < got.objective_history[-1] < want.objective_history[-1]


@pytest.mark.parametrize("why", ["dropped", "fallen"])
def test_without_a_certificate_it_is_plain_em(float64, monkeypatch, why):
    """Rows that drop too much, and a pass whose objective fell as it lost a component."""
    start = fit(max_steps=1).natural  # given, as starts are followed for other steps
    want = fit(max_steps=8, init=start)
    if why == "dropped":
        monkeypatch.setattr(cycles, "TOLERANCE", 0.0)
        got = fit(max_steps=8, accelerate=True, init=start)
        np.testing.assert_allclose(got.objective_history, want.objective_history, rtol=1e-13)
        return
    find, passes = cycles.find, []

    def fallen(*args, **options):
        passes.append(find(*args, **options))
        found = passes[-1]
        return dataclasses.replace(found, objective=found.objective - (len(passes) == 2))

    monkeypatch.setattr(cycles, "find", fallen)
    got = fit(max_steps=8, accelerate=True, init=start)
    assert_never_decreases(got.objective_history)
    assert got.objective_history[-1] > want.objective_history[-1]


def test_small_problems_and_blocks_take_plain_steps():
    sizes = {"n_components": 32, "dtype": "float32", "max_steps": 2}
    same(fit(accelerate=True, **sizes), fit(**sizes))
    batches = np.array_split(BLOBS, 3)
    sizes["n_components"] = 40
    same(fit(batches, accelerate=True, **sizes), fit(batches, **sizes))


@pytest.mark.parametrize("option", [None, True, False])
def test_it_is_chosen_by_size(float64, monkeypatch, option):
    """Left open, it takes long passes with many components; otherwise as was said."""
    products = len(BLOBS) * 5 * (100 * 5 + 4 * 12)
    chosen = []
    for n_components, least in ((99, 0), (100, products), (100, products + 1)):
        monkeypatch.setattr(cycles, "LONG_PASS", least)
        head = AnalyticHMoG(5, n_components, param_dtype="float64")
        chosen.append(cycles._accelerates(Fit(head, BLOBS, KEY, None, None, EMOptions(accelerate=option))))
    assert chosen == ([False, True, False] if option is None else [option] * 3)


def test_other_dtypes_of_the_projection():
    head = AnalyticHMoG(5, 40, projection_dtype="bfloat16")
    result = fit_em(head, BLOBS, KEY, max_steps=4, accelerate=True)
    assert result.sparse is not None
    assert_never_decreases(result.objective_history, 1e-3)


def test_it_is_an_option_of_exact_em_alone():
    with pytest.raises(ValueError, match="EMOptions: `accelerate` must be True, False or None; got 1"):
        EMOptions(accelerate=1)
    with pytest.raises(TypeError, match="`accelerate` must be an option of fit_online_em; got one of fit_em"):
        fit_online_em(AnalyticHMoG(2, 40), BLOBS, KEY, options=EMOptions(accelerate=True))


SHARDED = """
import sys
sys.path[:0] = ["tests", "tests/em"]
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_accelerated import BLOBS, CLUSTERS, fit

labels = np.where(np.arange(len(BLOBS)) % 5 == 0, CLUSTERS, -1)
run = lambda rows: fit(rows, labels=labels, max_steps=4, accelerate=True)
want = run(BLOBS)
for count in (1, 2, 4):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    got = run(jax.device_put(BLOBS, NamedSharding(mesh, PartitionSpec("data"))))
    assert got.sparse is not None, count
    np.testing.assert_allclose(got.objective_history, want.objective_history, atol=1e-8, err_msg=str(count))
"""


@pytest.mark.slow
def test_on_several_devices():
    run = subprocess.run([sys.executable, "-c", SHARDED], env=on_cpus(4), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
