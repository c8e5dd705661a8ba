"""From a fitted model to the variables of a head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
    Moments,
    PositiveDefinite,
    Scale,
    SymmetricHMoG,
    log_observable_density,
    moments_to_natural,
    sample,
    warm_start,
)
from flax_hmog.model.kinds import Diagonal

D, L, K = 7, 3, 4


def model(separation=2.0, seed=0, spherical=False):
    """A random model; `spherical` gives every head the means to hold it."""
    draw = np.random.default_rng(seed).standard_normal
    roots = draw((K, L, L)) * 0.3 + np.eye(L)
    covariances = np.broadcast_to(np.eye(L), (K, L, L)) if spherical else roots @ roots.swapaxes(1, 2)
    loadings = np.linalg.qr(draw((D, L)))[0] if spherical else draw((D, L))
    noise = np.full(D, 0.5) if spherical else 0.2 + draw(D) ** 2
    return Moments(
        *(jnp.asarray(a) for a in (loadings, draw(D))),
        Diagonal(jnp.asarray(noise)),
        jnp.full(K, 1 / K),
        jnp.asarray(separation * draw((K, L))),
        PositiveDefinite(jnp.asarray(covariances)),
    )


@pytest.fixture(scope="module")
def fitted():
    natural = moments_to_natural(model())
    return natural, sample(natural, jax.random.key(1), 500)[0]


@pytest.mark.parametrize(
    "head",
    [DifferentiableHMoG(L, K, pst_rep="full"), SymmetricHMoG(L, K, lat_rep="full"), AnalyticHMoG(L, K, D)],
    ids=lambda head: type(head).__name__,
)
def test_full_heads_hold_the_model(head, fitted):
    natural, x = fitted
    variables, info = warm_start(head, natural, x)
    got = head.apply(variables, x, method="log_observable_density")
    np.testing.assert_allclose(got, log_observable_density(natural, x), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(info.log_likelihood_before, info.log_likelihood_after, atol=1e-3)


def test_full_noise_is_held():
    moments = model(seed=3)
    root = np.random.default_rng(5).standard_normal((D, D)) * 0.3 + np.eye(D)
    moments = dataclasses.replace(moments, noise=PositiveDefinite(jnp.asarray(root @ root.T)))
    natural = moments_to_natural(moments)
    x = sample(natural, jax.random.key(0), 200)[0]
    _, info = warm_start(DifferentiableHMoG(L, K, obs_rep="full", pst_rep="full"), natural, x)
    np.testing.assert_allclose(info.log_likelihood_before, info.log_likelihood_after, atol=2e-2)


@pytest.mark.parametrize("rep", ["scale", "diagonal"])
@pytest.mark.parametrize("head", [DifferentiableHMoG, SymmetricHMoG])
def test_restricted_heads_hold_what_their_kind_allows(head, rep):
    """Equal spherical components over orthonormal loadings are in every class."""
    natural = moments_to_natural(model(spherical=True))
    x = sample(natural, jax.random.key(2), 300)[0]
    head = head(L, K, obs_rep="scale", **{"pst_rep" if head is DifferentiableHMoG else "lat_rep": rep})
    variables, info = warm_start(head, natural, x)
    np.testing.assert_allclose(info.log_likelihood_after, info.log_likelihood_before, atol=2e-3)
    assert isinstance(head.apply(variables, method="natural").observable_precision, Scale)


@pytest.mark.parametrize("rep", ["scale", "diagonal"])
def test_restricted_heads_report_what_they_lose(rep, fitted):
    natural, x = fitted
    variables, info = warm_start(DifferentiableHMoG(L, K, pst_rep=rep), natural, x)
    got = DifferentiableHMoG(L, K, pst_rep=rep).apply(variables, x, method="log_observable_density").mean()
    np.testing.assert_allclose(info.log_likelihood_after, got, rtol=1e-5)
    assert info.log_likelihood_before - 3 < info.log_likelihood_after < info.log_likelihood_before


def test_without_data_the_model_is_compared_on_its_own_draws(fitted):
    natural, _ = fitted
    _, info = warm_start(DifferentiableHMoG(L, K, pst_rep="scale"), natural)
    # on draws of the model, nothing else can have a higher expected log-density
    assert info.log_likelihood_after < info.log_likelihood_before


def test_dimensions_must_agree(fitted):
    with pytest.raises(ValueError, match=r"warm_start: `natural` must have the head's .*got \(7, 3, 4\)"):
        warm_start(DifferentiableHMoG(L, K + 1), fitted[0])
