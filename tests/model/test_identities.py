"""What must hold between the functions, whatever the model: gradients, round trips, whitening, conjugation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALL, CASES, FAST, FEW, KINDS, Case, is_slow, over, random_moments
from dense import Dense, assert_close, assert_mean_close, dense_matrix, posterior_precisions, restrict
from goal_layout import mixture_parameters, mixture_statistics, shape_parameters, shape_statistics
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from flax_hmog import (
    AnalyticHMoG,
    Diagonal,
    DifferentiableHMoG,
    Natural,
    PositiveDefinite,
    Scale,
    expected_statistics,
    infer,
    join_conjugated,
    kl_divergence,
    log_observable_density,
    log_partition,
    mean_to_natural,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
    negative_entropy,
    posterior_at,
    ravel_mean,
    ravel_natural,
    split_conjugated,
    unravel_mean,
    unravel_natural,
    whiten_prior,
)
from flax_hmog.model.frames import Frame
from flax_hmog.model.prior import with_prior

pytestmark = pytest.mark.usefixtures("float64")
# full precisions are the same structure in every family: gradients compile it once
STRUCTURES = over(
    [case for case in CASES.values() if not case.is_full or case.family is DifferentiableHMoG or case.name in FAST],
    lambda case: case not in FEW[:2],
)
FULL = over([case for case in CASES.values() if case.is_full], is_slow)


@functools.cache
def truth(case, seed=0):
    return Dense.of_natural(case.natural(seed=seed))


def assert_trees_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance), got, want)


@ALL
def test_log_partition_is_that_of_the_dense_model(case):
    assert_close(log_partition(case.natural()), truth(case).log_partition(), 1e-9)


@STRUCTURES
def test_derivatives_are_statistics(case):
    """Of the log-partition the mean, of the log-density the posterior statistics less the mean."""
    head, natural, x = case.head(), case.natural(), jnp.asarray(case.x(4))

    @jax.jit
    @jax.grad
    def gradient(flat, of_partition, of_density):
        model = unravel_natural(flat, head)
        return of_partition * log_partition(model) + of_density * jnp.mean(log_observable_density(model, x))

    flat = ravel_natural(natural, head)
    slope, score = gradient(flat, 1.0, 0.0), gradient(flat, 0.0, 1.0)
    mean = ravel_mean(natural_to_mean(natural), head)
    assert_close(slope, mean, 1e-9)
    assert_close(score, ravel_mean(expected_statistics(natural, x), head) - mean, 1e-9)


@ALL
def test_flat_vectors_are_in_the_layout_of_goal(case):
    """Against packers written from the fixtures' README; the fixtures hold no Symmetric case."""
    natural, mean, head = case.natural(), natural_to_mean(case.natural()), case.head()
    base = "full" if case.is_shared_base else case.rep
    Q = posterior_precisions(natural)
    parts = [
        natural.observable_location,
        shape_parameters(dense_matrix(natural.observable_precision, case.obs_dim), case.obs_rep),
        natural.interaction.ravel(),
        mixture_parameters(np.asarray(natural.posterior_location), Q, natural.categorical_bias, case.rep, base),
    ]
    assert_close(ravel_natural(natural, head), np.concatenate(parts), 1e-12)
    want = truth(case).mean_statistics()
    latent = (want["weighted_means"], want["weighted_second_moments"], want["weights"])
    parts = [
        want["observable_mean"],
        shape_statistics(want["observable_second_moment"], case.obs_rep),
        want["cross_moment"].ravel(),
        mixture_statistics(*latent, case.rep, base),
    ]
    assert_close(ravel_mean(mean, head), np.concatenate(parts), 1e-9)


@ALL
def test_flat_vectors_survive_a_round_trip(case):
    head, natural = case.head(), case.natural()
    mean = natural_to_mean(natural)
    assert_trees_close(unravel_natural(ravel_natural(natural, head), head), natural, 1e-9)
    assert_trees_close(unravel_mean(ravel_mean(mean, head), head), mean, 1e-12)


@ALL
def test_carried_prior_is_the_difference_that_defines_it(case):
    natural = case.natural()
    bare = dataclasses.replace(natural)
    assert_trees_close(with_prior(bare), natural, 1e-9)
    assert_close(infer(bare, case.x()).log_density, truth(case).log_density(case.x()), 1e-9)


@ALL
def test_a_change_of_any_field_is_seen(case):
    natural, x = case.natural(), case.x()
    arrays = {field.name: getattr(natural, field.name) for field in dataclasses.fields(natural)[:6]}
    for name, array in arrays.items():
        changed = {name: jax.tree.map(lambda a, name=name: (0.98 if name == "interaction" else 1.02) * a, array)}
        got = log_observable_density(dataclasses.replace(natural, **changed), x)
        anew = Natural(**arrays | changed)
        assert_close(got, log_observable_density(anew, x), 1e-12)
        assert_close(got, Dense.of_natural(anew).log_density(x), 1e-9)
    frame = Frame.of(np.full(case.obs_dim, 0.5), np.linspace(1, 2, case.obs_dim), np.float64)
    got = log_observable_density(dataclasses.replace(natural, frame=frame), x)
    assert_close(got, log_observable_density(Natural(**arrays, frame=frame), x), 1e-12)


def test_transformations_keep_the_prior():
    natural = CASES["analytic-diagonal-full-4.2.3"].natural()
    assert_trees_close(jax.jit(lambda natural: natural)(natural), natural, 0)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), natural)
    assert_trees_close(jax.vmap(lambda natural: natural)(stacked), stacked, 0)
    assert natural.prior is not None
    assert dataclasses.replace(natural).prior is None
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(natural)]
    assert names[-3:] == [".prior.location", ".prior.precision.entries", ".prior.log_weights"]


@ALL
def test_moments_survive_a_round_trip(case):
    natural = case.natural()
    again = moments_to_natural(natural_to_moments(natural), case.rep, shared_base=case.is_shared_base)
    assert_trees_close(again, natural, 1e-9)


@FULL
def test_means_survive_a_round_trip(case):
    natural = case.natural()
    mean = natural_to_mean(natural)
    again = mean_to_natural(mean)
    assert_trees_close(again, natural, 1e-8)  # covariances are differences of moments
    assert_trees_close(natural_to_mean(again), mean, 1e-9)


@ALL
def test_split_and_join_are_inverse_to_rounding(case):
    natural = case.natural()
    if not (case.is_full or case.is_shared_base):
        with pytest.raises(TypeError, match="split_conjugated: `natural` must have full or shared-base precisions"):
            split_conjugated(natural)
        return
    likelihood, prior = split_conjugated(natural)
    assert_trees_close(join_conjugated(likelihood, prior), natural, 1e-11)
    dense = truth(case)
    P = np.linalg.inv(dense.S)
    assert_close(prior.precision.dense(), P, 1e-9)
    assert_close(prior.location, np.einsum("kij,kj->ki", P, dense.m), 1e-9)
    assert_close(likelihood.location, np.linalg.solve(dense.Psi, dense.b), 1e-9)
    assert_close(likelihood.interaction, np.linalg.solve(dense.Psi, dense.W), 1e-9)


@ALL
def test_whitening_is_a_change_of_latent_basis(case):
    """Statistics of the same model in the basis F^-1 (y - E y), F F' = Cov(y) as far as the kind holds it."""
    dense, L = truth(case), case.lat_dim
    second = dense.mean_statistics()["weighted_second_moments"].sum(0)
    shift = dense.w @ dense.m
    restricted = restrict(second - np.outer(shift, shift), case.rep)
    factor = {
        "scale": lambda c: np.sqrt(c) * np.eye(L),
        "diagonal": lambda c: np.diag(np.sqrt(c)),
        "full": np.linalg.cholesky,
    }
    whitened = whiten_prior(natural_to_mean(case.natural()))
    assert_mean_close(whitened, dense.transformed(shift, factor[case.rep](restricted)).mean_statistics(), case, 1e-8)
    assert_close(jnp.sum(whitened.weighted_means, 0), np.zeros(L), 1e-9)
    spread = restrict(np.eye(L), case.rep)
    assert_close(jnp.sum(whitened.weighted_second_moments.entries, 0), spread, 1e-9)


@FULL
def test_whitening_keeps_the_density(case):
    whitened = mean_to_natural(whiten_prior(natural_to_mean(case.natural())))
    assert_close(log_observable_density(whitened, case.x()), truth(case).log_density(case.x()), 1e-9)


@ALL
def test_permuting_components_changes_nothing(case):
    moments, order = natural_to_moments(case.natural()), np.random.default_rng(5).permutation(case.n_components)
    permuted = dataclasses.replace(
        moments,
        weights=moments.weights[order],
        means=moments.means[order],
        covariances=PositiveDefinite(moments.covariances.entries[order]),
    )
    natural = moments_to_natural(permuted, case.rep, shared_base=case.is_shared_base)
    got, want = infer(natural, case.x()), infer(case.natural(), case.x())
    assert_close(got.log_density, want.log_density, 1e-10)
    assert_close(got.latent_mean, want.latent_mean, 1e-10)
    assert_close(got.log_responsibilities, want.log_responsibilities[:, order], 1e-10)
    # psi is taken against component 0
    assert_close(log_partition(natural), Dense.of_moments(permuted).log_partition(), 1e-9)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.obs_dim == 1], ids=lambda case: case.name)
def test_density_integrates_to_one(case):
    dense = truth(case)
    reach = np.abs(dense.component_means).max() + 12 * np.sqrt(dense.component_covariances.max())
    grid = np.linspace(-reach, reach, 20_001)
    total = np.trapezoid(np.exp(log_observable_density(case.natural(), grid[:, None])), grid)
    assert_close(total, 1.0, 1e-9)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.n_components == 1], ids=lambda case: case.name)
def test_one_component_is_factor_analysis(case):
    natural, x = case.natural(), case.x()
    moments = natural_to_moments(natural)
    W, Psi = np.asarray(moments.loadings), dense_matrix(moments.noise, case.obs_dim)
    root = np.linalg.cholesky(np.asarray(moments.covariances.entries[0]))
    mean = W @ moments.means[0] + moments.bias
    want = multivariate_normal(mean, (W @ root) @ (W @ root).T + Psi).logpdf(x)
    output = infer(natural, x)
    assert_close(output.log_density, want, 1e-9)
    assert_close(output.log_responsibilities, np.zeros((len(x), 1)), 1e-12)


def all_kinds(moments):
    """One model in every structure of its posterior precisions."""
    structures = [(rep, False) for rep in KINDS] + [("scale", True), ("diagonal", True)]
    return {structure: moments_to_natural(moments, structure[0], shared_base=structure[1]) for structure in structures}


@pytest.mark.parametrize("sizes", [(1, 1, 3), pytest.param((3, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_all_latent_kinds_agree_at_one_latent_dimension(sizes):
    case = Case(AnalyticHMoG, "diagonal", "full", *sizes)
    naturals = all_kinds(random_moments(case))
    want = infer(naturals["full", False], case.x())
    statistics = expected_statistics(naturals["full", False], case.x())
    for natural in naturals.values():
        assert_trees_close(infer(natural, case.x()), want, 1e-10)
        got = expected_statistics(natural, case.x())
        assert_close(
            got.weighted_second_moments.entries.ravel(), statistics.weighted_second_moments.entries.ravel(), 1e-10
        )
        assert_close(got.cross_moment, statistics.cross_moment, 1e-10)
        assert_close(log_partition(natural), log_partition(naturals["full", False]), 1e-10)


@pytest.mark.parametrize("rep", KINDS)
def test_all_noise_kinds_agree_at_one_observed_dimension(rep):
    case = Case(DifferentiableHMoG, "scale", rep, 1, 1, 3)
    moments = random_moments(case)
    noises = [Scale(np.asarray(0.7)), Diagonal(np.array([0.7])), PositiveDefinite(np.array([[0.7]]))]
    naturals = [moments_to_natural(dataclasses.replace(moments, noise=noise), rep) for noise in noises]
    for natural in naturals[1:]:
        assert_trees_close(infer(natural, case.x()), infer(naturals[0], case.x()), 1e-10)
        assert_close(log_partition(natural), log_partition(naturals[0]), 1e-10)
    flats = [
        ravel_natural(n, Case(DifferentiableHMoG, kind, rep, 1, 1, 3).head())
        for n, kind in zip(naturals, KINDS, strict=True)
    ]
    assert_close(flats[1], flats[0], 1e-12)
    assert_close(flats[2], flats[0], 1e-12)


@ALL
def test_conjugation_equation(case):
    """log p(x | y) + log p(y, z) = log p(x) + log p(y, z | x) at random x, y and every z."""
    natural, dense, x = case.natural(), truth(case), case.x()
    y = np.random.default_rng(9).standard_normal((len(x), case.lat_dim))
    posterior, density = posterior_at(natural, x), log_observable_density(natural, x)
    Q, location = posterior_precisions(natural), np.asarray(posterior.location)
    # log p(y, z | x) up to its normaliser: cat_z + location . y - 1/2 y'Q_z y
    quadratic = np.einsum("ni,kij,nj->nk", y, Q, y)
    bias = np.concatenate([[0.0], posterior.bias])
    energy = bias + np.einsum("nkl,nl->nk", location, y) - quadratic / 2
    psi = np.einsum("nki,kij,nkj->nk", location, np.linalg.inv(Q), location) / 2 - np.linalg.slogdet(Q)[1] / 2
    normaliser = logsumexp(bias + psi, axis=-1) + case.lat_dim / 2 * np.log(2 * np.pi)
    for z in range(case.n_components):
        got = np.asarray(density) + energy[:, z] - normaliser
        assert_close(got, dense.log_joint(x, y, np.full(len(x), z)), 1e-9)


@ALL
def test_kl_divergence_is_the_expected_log_ratio(case):
    p, q = case.natural(seed=0), case.natural(seed=1)
    assert_close(kl_divergence(p, p), 0.0, 1e-10)
    divergence = float(kl_divergence(p, q))
    assert divergence > 0
    count = 4000
    draws = truth(case, 0).sample(np.random.default_rng(11), count)
    ratio = truth(case, 0).log_joint(*draws) - truth(case, 1).log_joint(*draws)
    assert abs(ratio.mean() - divergence) < 5 * ratio.std() / np.sqrt(count)


@FULL
def test_negative_entropy_is_the_convex_conjugate(case):
    head, natural = case.head(), case.natural()
    mean = natural_to_mean(natural)
    product = ravel_natural(natural, head) @ ravel_mean(mean, head)
    assert_close(negative_entropy(mean), product - log_partition(natural), 1e-9)
    assert_close(negative_entropy(mean), truth(case).negative_entropy(), 1e-9)


def test_priors_of_symmetric_heads_differ_only_in_their_kind():
    case = CASES["symmetric-diagonal-diagonal-4.2.3"]
    P = np.linalg.inv(truth(case).S)
    off_diagonal = (P[1:] - P[:1]) * (1 - np.eye(case.lat_dim))
    assert_close(off_diagonal, np.zeros_like(P[1:]), 1e-9)
    scale = CASES["symmetric-diagonal-scale-4.2.3"]
    P = np.linalg.inv(truth(scale).S)
    gaps = P[1:] - P[:1]
    assert_close(gaps, gaps[:, :1, :1] * np.eye(scale.lat_dim), 1e-9)
