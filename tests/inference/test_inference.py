"""Densities, posteriors, expected statistics and draws against K dense Gaussians; batching, blocks and compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALL, CASES, FEW, SOME, Case, is_slow, over, random_moments
from dense import Dense, assert_close, assert_mean_close, posterior_precisions
from jax.test_util import check_grads

from flax_hmog import (
    AnalyticHMoG,
    PositiveDefinite,
    expected_statistics,
    infer,
    latent_mean,
    log_observable_density,
    mean_log_density,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
    posterior_assignments,
    posterior_at,
    posterior_categorical,
    posterior_hard_assignment,
    posterior_soft_assignments,
    sample,
)
from flax_hmog.data import rows
from flax_hmog.em import statistics
from flax_hmog.inference import likelihood
from flax_hmog.inference import posterior as inference
from flax_hmog.model.prepared import prepare

BOTH_DTYPES = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # another dtype compiles all anew
        pytest.param(
            case,
            dtype,
            marks=[pytest.mark.slow] * (is_slow(case) or (dtype == "float32" and case not in FEW)),
            id=f"{name}-{dtype}",
        )
        for dtype in ("float64", "float32")
        for name, case in CASES.items()
    ],
)
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}

FUNCTIONS = {
    "log_observable_density": log_observable_density,
    "posterior_soft_assignments": posterior_soft_assignments,
    "posterior_categorical": posterior_categorical,
    "posterior_hard_assignment": posterior_hard_assignment,
    "latent_mean": latent_mean,
}


def in_dtype(dtype):
    return jax.enable_x64(dtype == "float64")


@functools.cache
def truth(case):
    """The dense model that the float64 `Natural` of a case stands for."""
    return Dense.of_natural(case.natural())


def want_of(case, x):
    dense = truth(case)
    logits = dense.log_joint_z(x)
    return {
        "log_observable_density": dense.log_density(x),
        "posterior_soft_assignments": dense.responsibilities(x),
        "posterior_categorical": logits[:, 1:] - logits[:, :1],
        "posterior_hard_assignment": logits.argmax(-1),
        "latent_mean": dense.latent_mean(x),
    }


@BOTH_DTYPES
def test_inference_is_that_of_dense_gaussians(case, dtype):
    x = case.x()
    with in_dtype(dtype):
        output = infer(case.natural(dtype), x)
    want = want_of(case, x)
    assert_close(output.log_density, want["log_observable_density"], TOLERANCE[dtype])
    assert_close(np.exp(output.log_responsibilities), want["posterior_soft_assignments"], TOLERANCE[dtype])
    assert_close(output.latent_mean, want["latent_mean"], TOLERANCE[dtype])
    assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {np.dtype(dtype)}


@over(CASES.values(), lambda case: case not in (*FEW, CASES["analytic-scale-full-1.1.3"]))
def test_single_functions_are_those_of_dense_gaussians(case, float64):
    x = case.x()
    for name, want in want_of(case, x).items():
        assert_close(FUNCTIONS[name](case.natural(), x), want, 1e-9, name)
    assert posterior_hard_assignment(case.natural(), x).dtype == np.int32
    assert_close(np.sum(posterior_soft_assignments(case.natural(), x), -1), np.ones(len(x)), 1e-14)


def test_responsibilities_of_rows_far_from_the_model_sum_to_one_in_float32():
    """Of three components that are alike: their logits are so large that log 3 is lost in rounding beside them."""
    moments = random_moments(Case(AnalyticHMoG, "diagonal", "full", n_components=1))
    three = dataclasses.replace(
        moments,
        weights=np.full(3, 1 / 3),
        means=np.repeat(moments.means, 3, axis=0),
        covariances=PositiveDefinite(np.repeat(moments.covariances.entries, 3, axis=0)),
    )
    natural = moments_to_natural(jax.tree.map(np.float32, three))
    x = 1e3 * np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    np.testing.assert_allclose(np.exp(infer(natural, x).log_responsibilities), 1 / 3, rtol=1e-6)


@BOTH_DTYPES
def test_conversions_are_those_of_the_dense_model(case, dtype):
    with in_dtype(dtype):
        moments, mean = natural_to_moments(case.natural(dtype)), natural_to_mean(case.natural(dtype))
    dense, got = truth(case), Dense.of_moments(moments)
    for field in ("W", "b", "Psi", "w", "m", "S"):
        assert_close(getattr(got, field), getattr(dense, field), TOLERANCE[dtype], field)
    assert_mean_close(mean, dense.mean_statistics(), case, TOLERANCE[dtype])


@BOTH_DTYPES
def test_expected_statistics_are_weighted_averages(case, dtype):
    x, weights = case.x(9), np.array([1, 2, 0, 0.5, 1, 3, 0.25, 1, 1])
    with in_dtype(dtype):
        natural = case.natural(dtype)
        plain, weighted = expected_statistics(natural, x), expected_statistics(natural, x, weights)
    assert_mean_close(plain, truth(case).expected_statistics(x), case, TOLERANCE[dtype])
    assert_mean_close(weighted, truth(case).expected_statistics(x, weights), case, TOLERANCE[dtype])


@ALL
def test_summed_density_of_the_e_step_is_the_density(case, float64):
    x, labels = case.x(9), np.arange(9) % (case.n_components + 1) - 1
    weights, natural = np.linspace(0.5, 2, 9), case.natural()
    factors = prepare(natural)
    sums = statistics.accumulate(factors, *(jnp.asarray(array) for array in (x, weights, labels)))
    logits = truth(case).log_joint_z(x)
    clamped = np.where(labels < 0, truth(case).log_density(x), np.take_along_axis(logits, labels[:, None], 1)[:, 0])
    assert_close(statistics.log_likelihood(factors, sums), weights @ clamped, 1e-9)
    responsibilities = np.where(labels[:, None] < 0, truth(case).responsibilities(x), np.eye(case.n_components)[labels])
    want = truth(case).expected_statistics(x, weights, responsibilities)
    assert_mean_close(statistics._statistics_to_mean(natural, factors, sums), want, case, 1e-9)


@ALL
def test_posterior_at_conditions_the_joint_gaussian(case, float64):
    x = case.x()
    posterior = posterior_at(case.natural(), x)
    means, covariances = truth(case).component_posterior(x)
    Q = posterior_precisions(case.natural())
    assert_close(np.linalg.inv(Q), covariances, 1e-9)
    assert_close(np.einsum("kij,nkj->nki", np.linalg.inv(Q), posterior.location), means, 1e-9)
    # cat_k + psi_N(location, Q_k) are the log-odds of the posterior
    psi = np.einsum("nki,nki->nk", posterior.location, means) / 2 - np.linalg.slogdet(Q)[1] / 2
    logits = psi + np.concatenate([[0.0], posterior.bias])
    assert_close(logits[:, 1:] - logits[:, :1], want_of(case, x)["posterior_categorical"], 1e-9)


@SOME
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_leading_dimensions(case, batch, float64):
    natural, x = case.natural(), case.x(int(np.prod(batch))).reshape(*batch, case.obs_dim)
    flat = x.reshape(-1, case.obs_dim)
    K, L = case.n_components, case.lat_dim
    functions = FUNCTIONS | {"posterior_assignments": posterior_assignments}
    functions["location"] = lambda natural, x: posterior_at(natural, x).location
    trailing = {"log_observable_density": (), "posterior_hard_assignment": (), "posterior_categorical": (K - 1,),
                "latent_mean": (L,), "location": (K, L)}  # fmt: skip
    for name, function in functions.items():
        got = function(natural, x)
        assert got.shape == (*batch, *trailing.get(name, (K,))), name
        assert_close(got.reshape(len(flat), *got.shape[len(batch) :]), function(natural, flat), 1e-12, name)
    weights = np.linspace(1, 2, len(flat))
    got = expected_statistics(natural, x, weights.reshape(batch))
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), got, expected_statistics(natural, flat, weights))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 rows."""
    monkeypatch.setattr(rows, "MIN_ROWS", 64)
    monkeypatch.setattr(rows, "MAX_ROWS", 64)
    compiled = (inference._by_blocks, statistics.accumulate, likelihood._mean_log_density)
    for function in compiled:
        function.clear_cache()
    yield 64
    for function in compiled:
        function.clear_cache()


@SOME
@pytest.mark.parametrize("count", [pytest.param(128, marks=pytest.mark.slow), 150], ids=["whole", "partial"])
def test_blocks_change_nothing(case, count, small_blocks, float64):
    assert rows.block_rows(1) == small_blocks < count
    x, weights = case.x(count), np.linspace(0.1, 3, count)
    output = infer(case.natural(), x)
    want = want_of(case, x)
    assert_close(output.log_density, want["log_observable_density"], 1e-9)
    assert_close(np.exp(output.log_responsibilities), want["posterior_soft_assignments"], 1e-9)
    assert_close(output.latent_mean, want["latent_mean"], 1e-9)
    got = expected_statistics(case.natural(), x, weights)
    assert_mean_close(got, truth(case).expected_statistics(x, weights), case, 1e-9)


@pytest.mark.parametrize("count", [5, 6, 7, 11, 12])
def test_map_rows_gives_every_row_once(count):
    x = np.arange(2.0 * count, dtype=np.float32).reshape(count, 2)
    function = lambda _, block: {"twice": 2 * block, "first": block[:, 0]}  # noqa: E731
    got = rows.map_rows(function, (), jnp.asarray(x), 6, None)
    np.testing.assert_array_equal(got["twice"], 2 * x)
    np.testing.assert_array_equal(got["first"], x[:, 0])


@pytest.mark.slow
def test_gradients_over_blocks_are_those_of_one_block(small_blocks, float64):
    case = FEW[0]
    natural, x = case.natural(), jnp.asarray(case.x(150))
    objective = lambda natural, x: jnp.mean(log_observable_density(natural, x))  # noqa: E731
    blocks = jax.jit(jax.grad(objective, argnums=(0, 1)))(natural, x)
    weights = jnp.full(3, 50 / 150)
    parts = [jax.grad(objective, argnums=(0, 1))(natural, x[i : i + 50]) for i in (0, 50, 100)]
    whole = jax.tree.map(
        lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *[p[0] for p in parts]
    )
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-10), blocks[0], whole)
    assert_close(blocks[1], np.concatenate([part[1] for part in parts]) / 3, 1e-10)


@SOME
def test_check_grads_in_leaves_and_x(case, float64):
    head, variables, x = case.head(), case.variables(), jnp.asarray(case.x(4))
    params, steps = (
        (variables.get("params"), {}) if "params" in variables else (variables["em"]["model"], variables["em"])
    )

    def mean_log_density(leaves, x):
        tree = {"em": steps | {"model": leaves}} if steps else {"params": leaves}
        return jnp.mean(head.apply(tree, x, method="log_observable_density"))

    check_grads(jax.jit(mean_log_density), (params, x), order=1, modes=("rev",), rtol=1e-5, atol=1e-6)


def test_check_grads_of_every_output(float64):
    case = FEW[0]
    natural = case.natural()
    direction = np.random.default_rng(3).standard_normal((4, case.n_components + case.lat_dim))

    def outputs(x):
        output = infer(natural, x)
        return jnp.sum(jnp.concatenate([output.log_responsibilities, output.latent_mean], axis=-1) * direction)

    check_grads(jax.jit(outputs), (jnp.asarray(case.x(4)),), order=2, modes=("rev",), rtol=1e-4, atol=1e-5)


@SOME
def test_draws_have_the_moments_of_the_model(case, key):
    natural = case.natural("float32")
    count = 20_000
    x, y, z = sample(natural, key, count)
    assert (x.shape, y.shape, z.shape) == ((count, case.obs_dim), (count, case.lat_dim), (count,))
    assert z.dtype == np.int32
    assert x.dtype == y.dtype == np.float32
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    member = np.eye(case.n_components)[np.asarray(z)]
    draws = {
        "observable_mean": x,
        "observable_second_moment": x[:, :, None] * x[:, None, :],
        "cross_moment": x[:, :, None] * y[:, None, :],
        "weights": member,
        "weighted_means": member[:, :, None] * y[:, None, :],
        "weighted_second_moments": member[:, :, None, None] * (y[:, :, None] * y[:, None, :])[:, None],
    }
    want = truth(case).mean_statistics()
    for name, values in draws.items():
        error = values.std(axis=0) / np.sqrt(count)
        assert np.all(np.abs(values.mean(axis=0) - want[name]) < 5 * error + 1e-6), name


def test_draws_are_reproduced_by_the_key(key):
    natural = FEW[0].natural("float32")
    first, again, other = (sample(natural, k, 50) for k in (key, key, jax.random.key(1)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.any(np.asarray(first[0]) == np.asarray(other[0]))


def test_rows_may_be_written_to_once_a_function_has_returned():
    """As by readers that fill one buffer again and again, while programs still run."""
    case = Case(AnalyticHMoG, "diagonal", "full", 16, 3, 5)
    natural = prepare(moments_to_natural(random_moments(case)))
    blocks = np.random.default_rng(0).normal(size=(8, 2**14, 16)).astype(np.float32)
    memory = np.empty(blocks[0].nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64  # from where on jax takes it as it is
    buffer = memory[start : start + blocks[0].nbytes].view(np.float32).reshape(blocks[0].shape)

    def filled():
        for block in blocks:
            buffer[:] = block
            yield buffer

    class Batches:
        __iter__ = staticmethod(filled)

    for function in (log_observable_density, mean_log_density, posterior_hard_assignment):
        want = [np.asarray(function(natural, block)) for block in blocks]
        given = [function(natural, buffer) for _ in filled()]
        buffer[:] = 0
        np.testing.assert_array_equal(np.stack(given), want)
    np.testing.assert_allclose(mean_log_density(natural, Batches()), mean_log_density(natural, list(blocks)), rtol=1e-6)
