"""Component covariances that shrink toward the shape they share, how far, and the warning of fits that should."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog import (
    AnalyticHMoG,
    OverfitWarning,
    PositiveDefinite,
    PseudoCounts,
    ResidualMoments,
    fit_em,
    infer,
    natural_to_moments,
)
from flax_hmog.em.online import OnlineState, online_step
from flax_hmog.em.shrinkage import common_covariances

D, L, K = 9, 6, 5
AUTO = PseudoCounts(shrinkage="auto")


def rows_of(count: int, shapes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows (count, D) of clusters that are apart, with these covariances (K, L, L) along six factors."""
    rng = np.random.default_rng(seed)
    loadings, means = np.linalg.qr(np.random.default_rng(9).normal(size=(D, L)))[0], 6 * np.eye(K, L)
    z = rng.integers(K, size=count)
    y = means[z] + np.einsum("nij,nj->ni", np.linalg.cholesky(shapes)[z], rng.normal(size=(count, L)))
    return (y @ loadings.T + 0.1 * rng.normal(size=(count, D))).astype(np.float32)


@pytest.fixture(scope="module")
def alike() -> np.ndarray:
    """One shape at five scales (K, L, L)."""
    return np.linspace(0.5, 1.5, K)[:, None, None] * np.diag(np.linspace(0.2, 1.5, L))[None]


@pytest.fixture(scope="module")
def differing() -> np.ndarray:
    """Shapes that share nothing (K, L, L)."""
    rng = np.random.default_rng(3)
    turns = np.stack([np.linalg.qr(rng.normal(size=(L, L)))[0] for _ in range(K)])
    return turns * rng.choice([0.02, 1.5], size=(K, 1, L)) @ turns.transpose(0, 2, 1)


def test_the_nearest_covariances_of_one_shape_minimise_the_divergences(differing: np.ndarray):
    precision = np.linalg.inv(differing + 0.1 * np.eye(L))
    log_det = np.linalg.slogdet(precision)[1]

    def twice_divergences(common: np.ndarray) -> np.ndarray:
        ratio = np.einsum("kij,kji->k", common, precision)
        return ratio - L - np.linalg.slogdet(common)[1] - log_det

    common, divergence = map(np.asarray, common_covariances(jnp.asarray(precision), jnp.asarray(log_det)))
    np.testing.assert_allclose(divergence, twice_divergences(common), rtol=1e-3, atol=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(20):  # other scales, and another shape
        noise = 0.05 * rng.normal(size=(L, L))
        turn = np.eye(L) + noise
        other = np.exp(0.05 * rng.normal(size=(K, 1, 1))) * (turn @ common @ turn.T)
        assert twice_divergences(other).sum() > divergence.sum() - 1e-3


def test_the_strength_follows_the_data_and_helps_on_new_rows(alike: np.ndarray, differing: np.ndarray):
    head, key, options = AnalyticHMoG(L, K), jax.random.key(0), {"max_steps": 40, "tolerance": 1e-3}
    x, new = rows_of(200, alike), rows_of(2000, alike, seed=1)
    found, other = (fit_em(head, rows, key, regularizer=AUTO, **options) for rows in (x, rows_of(200, differing)))
    for result in (found, other):
        assert (np.diff(result.objective_history) > -1e-4).all()
    assert float(found.regularizer.shrinkage) > 3 * float(other.regularizer.shrinkage)
    assert L < float(other.regularizer.shrinkage) < 3 * L
    plain = fit_em(head, x, key, **options)
    assert infer(found.natural, new).log_density.mean() > infer(plain.natural, new).log_density.mean() + 0.05
    assert found.optimism < plain.optimism
    gap = infer(plain.natural, x).log_density.mean() - infer(plain.natural, new).log_density.mean()
    assert plain.optimism == pytest.approx(float(gap), rel=0.2)


def test_strong_shrinkage_makes_one_shape_of_all_and_batches_do_it_too(differing: np.ndarray):
    x, strong = rows_of(200, differing), PseudoCounts(components=0.0, shrinkage=1e5)
    found = fit_em(AnalyticHMoG(L, K), x, jax.random.key(0), regularizer=strong, max_steps=20)
    differ = PositiveDefinite(jnp.asarray(differing, jnp.float32))
    moments = dataclasses.replace(natural_to_moments(found.natural), covariances=differ)
    statistics, regularizer = ResidualMoments.of(moments), strong.regularizer(moments)
    online = online_step(OnlineState(moments, statistics), statistics, 0.5, 200.0, regularizer)
    for model in (natural_to_moments(found.natural), online.moments):
        covariances = np.asarray(model.covariances.entries)
        shapes = covariances / np.linalg.det(covariances)[:, None, None] ** (1 / L)
        np.testing.assert_allclose(shapes, np.broadcast_to(shapes[:1], shapes.shape), atol=0.1)


def test_a_fit_of_few_rows_per_entry_warns_with_the_numbers_and_the_remedy(alike: np.ndarray):
    """Eight rows for each component: assignments that are sure, and new rows that are far less likely."""
    x, few, head, key = (
        rows_of(200, alike),
        (np.arange(200) < 40).astype(np.float32),
        AnalyticHMoG(L, K),
        jax.random.key(0),
    )
    said = r"fit_em: half of the components hold .* for 21 entries .*{} Use PseudoCounts\(shrinkage=\"auto\"\)"
    with pytest.warns(OverfitWarning, match=said.format("average, and EM has not converged.")):
        fit_em(head, x, key, weights=few, max_steps=3, tolerance=-np.inf)
    with pytest.warns(OverfitWarning, match=said.format("on average.")):
        found = fit_em(head, x, key, weights=few)
    assert found.converged
    fitted, new = (infer(found.natural, rows) for rows in (x[:40], x[40:]))
    assert np.exp(fitted.log_responsibilities).max(axis=1).mean() > 0.99
    assert fitted.log_density.mean() - new.log_density.mean() > found.optimism > 4
    with pytest.warns(
        OverfitWarning, match=r"converged\. Lower lat_dim or n_components; "
    ):  # what is used is no remedy
        fit_em(head, x, key, weights=few, max_steps=3, regularizer=PseudoCounts(shrinkage=0.1), tolerance=-np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OverfitWarning)
        fit_em(AnalyticHMoG(L, K), x, jax.random.key(0), weights=few, max_steps=3, regularizer=AUTO)
