"""Every array of the golden numbers of goal-jax (float64; `fixtures/README.md`)."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import Dense, assert_close, dense_matrix, posterior_precisions
from goal_layout import mixture_parameters, sufficient_statistic

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
    em_step,
    expected_statistics,
    latent_mean,
    log_observable_density,
    log_partition,
    mean_to_natural,
    natural_to_mean,
    natural_to_moments,
    negative_entropy,
    posterior_at,
    posterior_categorical,
    posterior_hard_assignment,
    posterior_soft_assignments,
    ravel_mean,
    ravel_natural,
    unravel_mean,
    unravel_natural,
    whiten_prior,
)
from flax_hmog.model.prior import conjugation

FOLDER = Path(__file__).parent.parent / "fixtures"
FILES = (
    "analytic_diagonal_d5_l2_k3",
    "analytic_scale_d4_l1_k2",
    "diff_diagonal_diagonal_d5_l2_k3",
    "diff_diagonal_full_d4_l1_k2",
    "diff_diagonal_scale_d6_l3_k4",
    "diff_full_scale_d4_l2_k2",
    "diff_scale_diagonal_d5_l3_k2",
)
INPUTS = {"x", "y", "z", "em_x", "meta"}
MODEL = {
    "flat", "obs_location", "obs_precision", "interaction", "pst_location", "pst_precision", "pst_categorical",
    "rho_location", "rho_precision", "prior_location", "prior_precision", "prior_log_odds", "prior_flat",
    "std_W", "std_b", "std_Psi", "std_pi", "std_m", "std_S", "log_partition_function",
}  # fmt: skip
DATA = {
    "log_observable_density", "average_log_observable_density", "posterior_flat", "posterior_categorical",
    "posterior_probs", "posterior_hard", "posterior_mean_flat", "posterior_y_mean", "posterior_statistics",
    "sufficient_statistic", "log_joint_density", "grad_average_log_density",
}  # fmt: skip
MEAN = {
    "flat", "obs_location", "obs_second", "interaction", "lat_stats", "lat_stats_by_component", "categorical",
    "component_stats",
}  # fmt: skip
EM = {"em_ll_before", "em_stats_flat"}
ANALYTIC = {"natural_roundtrip_flat", "whiten_natural_flat", "negative_entropy"}
ANALYTIC_EM = {f"em_{name}" for name in MODEL - {"log_partition_function"}} | {"em_ll_after"}
TRACE = {"em_ll_trace", "em_flat_20"}
GROUPS = {
    "model": MODEL,
    "data": DATA,
    "mean": {f"mean_{name}" for name in MEAN} | {f"whiten_{name}" for name in MEAN},
    "em": EM,
    "analytic": ANALYTIC,
    "analytic_em": ANALYTIC_EM,
    "trace": TRACE,
}


@functools.cache
def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def head_of(arrays):
    """The unbound head of a file."""
    meta = json.loads(str(arrays["meta"]))
    sizes = {"lat_dim": meta["l"], "n_components": meta["k"], "obs_dim": meta["d"], "obs_rep": meta["obs_rep"]}
    return AnalyticHMoG(**sizes) if meta["kind"] == "analytic" else DifferentiableHMoG(**sizes, pst_rep=meta["pst_rep"])


class Fixture:
    """One file, its head, and the model of its `flat`."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.head = head_of(arrays)
        self.is_analytic = isinstance(self.head, AnalyticHMoG)
        self.natural = unravel_natural(arrays["flat"], self.head)


SLOW = (
    "diff_diagonal_scale_d6_l3_k4",
    "diff_full_scale_d4_l2_k2",
    "diff_scale_diagonal_d5_l3_k2",
)  # sizes of their own


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FILES])
def fixture(request, float64):
    return Fixture(load(request.param))


def model_arrays(natural, head):
    """Arrays that describe a model; prefixed by "em_" they describe one after an EM step."""
    D = natural.interaction.shape[0]
    moments = natural_to_moments(natural)
    location, gram = conjugation(natural)
    kind = getattr(head, "pst_rep", "full")
    log_weights = natural.prior.log_weights
    prior = mixture_parameters(
        np.asarray(natural.prior.location),
        np.asarray(natural.prior.precision.entries),
        natural.categorical_bias,
        kind,
        base_kind="full",
    )
    return {
        "flat": ravel_natural(natural, head),
        "obs_location": natural.observable_location,
        "obs_precision": dense_matrix(natural.observable_precision, D),
        "interaction": natural.interaction,
        "pst_location": natural.posterior_location,
        "pst_precision": posterior_precisions(natural),
        "pst_categorical": natural.categorical_bias,
        "rho_location": location,
        "rho_precision": -gram,
        "prior_location": natural.prior.location,
        "prior_precision": natural.prior.precision.entries,
        "prior_log_odds": log_weights[1:] - log_weights[0],
        "prior_flat": prior,
        "std_W": moments.loadings,
        "std_b": moments.bias,
        "std_Psi": dense_matrix(moments.noise, D),
        "std_pi": moments.weights,
        "std_m": moments.means,
        "std_S": moments.covariances.entries,
        "log_partition_function": log_partition(natural),
    }


def latent_size(head, flat):
    """Length of the latent part of a flat vector."""
    D, L = head.obs_dim, head.lat_dim
    return flat.size - D - {"scale": 1, "diagonal": D, "full": D * (D + 1) // 2}[head.obs_rep] - D * L


def data_arrays(fixture):
    """Arrays with a row per observation, and the gradient of their mean density."""
    natural, head, arrays = fixture.natural, fixture.head, fixture.arrays
    flat, x = jnp.asarray(arrays["flat"]), jnp.asarray(arrays["x"])
    latent = latent_size(head, flat)
    posterior = posterior_at(natural, x)
    ravel_posterior = lambda location: ravel_natural(  # noqa: E731
        dataclasses.replace(natural, posterior_location=location, posterior_precision=posterior.precision,
                            categorical_bias=posterior.bias), head)[-latent:]  # fmt: skip
    per_sample = np.stack([ravel_mean(expected_statistics(natural, row[None]), head) for row in x])
    kinds = (head.obs_rep, getattr(head, "pst_rep", "full"), head.n_components)
    triples = zip(arrays["x"], arrays["y"], arrays["z"], strict=True)
    statistic = np.stack([sufficient_statistic(*triple, *kinds) for triple in triples])
    base_measure = -(head.obs_dim + head.lat_dim) / 2 * np.log(2 * np.pi)
    mean_density = lambda flat: jnp.mean(log_observable_density(unravel_natural(flat, head), x))  # noqa: E731
    average, slope = jax.jit(jax.value_and_grad(mean_density))(flat)
    return {
        "log_observable_density": log_observable_density(natural, x),
        "average_log_observable_density": average,
        "posterior_flat": np.stack([ravel_posterior(location) for location in posterior.location]),
        "posterior_categorical": posterior_categorical(natural, x),
        "posterior_probs": posterior_soft_assignments(natural, x),
        "posterior_hard": posterior_hard_assignment(natural, x),
        "posterior_mean_flat": per_sample[:, -latent:],
        "posterior_y_mean": latent_mean(natural, x),
        "posterior_statistics": per_sample,
        "sufficient_statistic": statistic,
        "log_joint_density": statistic @ ravel_natural(natural, head) - log_partition(natural) + base_measure,
        "grad_average_log_density": slope,
    }


def mean_arrays(mean, head):
    """A flat mean vector and its parts; prefixed by "mean_" or "whiten_"."""
    D, L, K = head.obs_dim, head.lat_dim, head.n_components
    flat = ravel_mean(mean, head)
    latent = latent_size(head, flat)
    y_dim = (latent - (K - 1)) // K
    parts = np.split(np.asarray(flat), [D, flat.size - latent - D * L, flat.size - latent])
    pooled, others, _ = np.split(parts[3], [y_dim, K * y_dim])
    # component 0 is what the others leave of the average
    stats = np.concatenate([pooled[:, None] - others.reshape(y_dim, K - 1).sum(1, keepdims=True),
                            others.reshape(y_dim, K - 1)], axis=1)  # fmt: skip
    return {
        "flat": flat,
        "obs_location": mean.observable_mean,
        "obs_second": parts[1],
        "interaction": mean.cross_moment,
        "lat_stats": pooled,
        "lat_stats_by_component": others.reshape(y_dim, K - 1),
        "categorical": mean.weights[1:],
        "component_stats": (stats / np.asarray(mean.weights)).T,
    }


def prefixed(prefix, arrays):
    return {f"{prefix}_{name}": array for name, array in arrays.items()}


def group_arrays(group, fixture):
    """What the library gives for the arrays of a group."""
    natural, head = fixture.natural, fixture.head
    mean, em_x = natural_to_mean(natural), fixture.arrays["em_x"]
    if group == "model":
        return model_arrays(natural, head)
    if group == "data":
        return data_arrays(fixture)
    if group == "mean":
        return prefixed("mean", mean_arrays(mean, head)) | prefixed("whiten", mean_arrays(whiten_prior(mean), head))
    if group == "em":
        before = jnp.mean(log_observable_density(natural, em_x))
        return {"em_ll_before": before, "em_stats_flat": ravel_mean(expected_statistics(natural, em_x), head)}
    if group == "analytic":
        return {
            "natural_roundtrip_flat": ravel_natural(mean_to_natural(mean), head),
            "whiten_natural_flat": ravel_natural(mean_to_natural(whiten_prior(mean)), head),
            "negative_entropy": negative_entropy(mean),
        }
    step = lambda natural: em_step(natural, em_x)  # noqa: E731
    if group == "analytic_em":
        after, info = step(natural)
        assert_close(info.log_likelihood, fixture.arrays["em_ll_before"], 1e-9)
        arrays = prefixed("em", model_arrays(after, head)) | {"em_ll_after": step(after)[1].log_likelihood}
        return {name: array for name, array in arrays.items() if name in ANALYTIC_EM}
    trace = []
    for _ in range(21):
        last, (natural, info) = natural, step(natural)
        trace.append(info.log_likelihood)
    return {"em_ll_trace": np.array(trace), "em_flat_20": ravel_natural(last, head)}


@pytest.mark.parametrize("group", GROUPS)
def test_arrays_are_reproduced(fixture, group):
    if not fixture.is_analytic and group in ("analytic", "analytic_em", "trace"):
        assert not GROUPS[group] & set(fixture.arrays)
        return
    got = group_arrays(group, fixture)
    assert set(got) == GROUPS[group]
    for name, array in got.items():
        assert_close(array, fixture.arrays[name], 1e-9, name)


def test_no_array_is_left_uncovered(fixture):
    covered = set().union(*GROUPS.values()) | INPUTS
    if not fixture.is_analytic:
        covered -= ANALYTIC | ANALYTIC_EM | TRACE
    assert set(fixture.arrays) == covered


def test_no_file_is_left_uncovered():
    assert {path.stem for path in FOLDER.glob("*.npz")} == set(FILES)


def test_mean_vectors_survive_a_round_trip(fixture):
    for name in ("mean_flat", "whiten_flat", "em_stats_flat"):
        flat = fixture.arrays[name]
        assert_close(ravel_mean(unravel_mean(flat, fixture.head), fixture.head), flat, 1e-14, name)


def test_densities_are_those_of_dense_gaussians(fixture):
    names = ("std_W", "std_b", "std_Psi", "std_pi", "std_m", "std_S")
    dense = Dense(*(fixture.arrays[name] for name in names))
    x = fixture.arrays["x"]
    assert_close(log_observable_density(fixture.natural, x), dense.log_density(x), 1e-9)
    assert_close(fixture.arrays["log_observable_density"], dense.log_density(x), 1e-9)
    assert_close(fixture.arrays["posterior_probs"], dense.responsibilities(x), 1e-9)


@pytest.mark.parametrize("name", FILES)
def test_densities_hold_in_float32(name):
    arrays = load(name)
    head = head_of(arrays)
    density = jax.jit(lambda flat, x: log_observable_density(unravel_natural(flat, head), x))
    got = density(*(np.asarray(arrays[key], np.float32) for key in ("flat", "x")))
    assert got.dtype == np.float32
    assert_close(got, arrays["log_observable_density"], 1e-4)
