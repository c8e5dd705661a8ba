"""Numbers of parameters against the rank of a Jacobian in numpy, and criteria against scikit-learn's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

from flax_hmog import Diagonal, Moments, PositiveDefinite, moments_to_natural
from flax_hmog.analysis import information_criteria, n_parameters
from flax_hmog.model.kind import REPS

KINDS = ("scale", "diagonal", "full")
STRUCTURES = [("full", False), ("diagonal", False), ("scale", False), ("diagonal", True), ("scale", True)]


def packed(kind, dim):
    return {"scale": 1, "diagonal": dim, "full": dim * (dim + 1) // 2}[kind]


def matrix(entries, dim, kind):
    """A symmetric matrix of complex entries."""
    if kind != "full":
        return np.diag(entries) if kind == "diagonal" else entries[0] * np.eye(dim)
    lower = np.zeros((dim, dim), complex)
    lower[np.tril_indices(dim)] = entries
    return lower + lower.T - np.diag(np.diag(lower))


def positive(rng, dim, kind):
    root = rng.normal(size=(dim, dim))
    dense = root @ root.T / dim + np.eye(dim)
    return dense[np.tril_indices(dim)] if kind == "full" else rng.uniform(1, 2, packed(kind, dim))


def rank_of_density(D, L, K, noise, kind, has_base):
    """Rank of the derivative of weights, means and covariances of x by the parameters, from complex steps.

    A mixture of Gaussians determines its weights, means and covariances, so that this is the rank of the Fisher
    information at a point in general position.
    """
    rng = np.random.default_rng(0)
    each = packed(kind, L)
    sizes = [D * L, D, packed(noise, D), K - 1, K * L, packed("full", L) if has_base else 0, (K - has_base) * each]
    cuts = np.cumsum(sizes)[:-1]

    def density(theta):
        W, b, psi, w, m, base, rest = np.split(theta, cuts)
        W, Psi, m = W.reshape(D, L), matrix(psi, D, noise), m.reshape(K, L)
        precisions = [matrix(part, L, kind) for part in rest.reshape(-1, each)]
        if has_base:
            precisions = [np.zeros((L, L)), *precisions]
        shared = matrix(base, L, "full") if has_base else -W.T @ np.linalg.inv(Psi) @ W
        spreads = [W @ np.linalg.inv(shared + part) @ W.T + Psi for part in precisions]
        lower = np.tril_indices(D)
        return np.concatenate([w, *(W @ mean + b for mean in m), *(spread[lower] for spread in spreads)])

    spread = [positive(rng, L, kind) + (0 if has_base else 60 * matrix_one(L, kind)) for _ in range(K - has_base)]
    theta = np.concatenate([
        rng.normal(size=D * L + D), positive(rng, D, noise), rng.normal(size=K - 1 + K * L),
        positive(rng, L, "full") if has_base else [], *spread,
    ])  # fmt: skip
    jacobian = np.stack([density(theta + 1e-30j * step).imag / 1e-30 for step in np.eye(len(theta))], axis=1)
    singular = np.linalg.svd(jacobian / np.linalg.norm(jacobian, axis=0).clip(1e-12), compute_uv=False)
    return int(np.sum(singular > 1e-9 * singular[0]))


def matrix_one(dim, kind):
    """Entries of the identity."""
    return np.eye(dim)[np.tril_indices(dim)] if kind == "full" else np.ones(packed(kind, dim))


def model(D, L, K, noise, kind, has_base):
    """The sizes and kinds of a model, which are all that counts: of its numbers only their shapes."""

    def any_numbers():
        standard = Moments(
            jnp.eye(D, L), jnp.zeros(D), REPS[noise].from_diagonal(jnp.ones(D)),
            jnp.full(K, 1 / K), jnp.zeros((K, L)), PositiveDefinite(jnp.stack([jnp.eye(L)] * K)),
        )  # fmt: skip
        return moments_to_natural(standard, REPS[kind], shared_base=has_base)

    return jax.eval_shape(any_numbers)


@pytest.mark.parametrize(("kind", "has_base"), STRUCTURES)
@pytest.mark.parametrize("noise", KINDS)
def test_parameters_are_counted_as_the_fisher_information_has_rank(noise, kind, has_base):
    for D, L, K in itertools.product((2, 3, 5), (1, 2, 3), (1, 2, 5)):
        if L <= D:
            expected = rank_of_density(D, L, K, noise, kind, has_base)
            assert n_parameters(model(D, L, K, noise, kind, has_base)) == expected, (D, L, K)


def test_criteria_equal_those_of_the_same_mixture_in_scikit_learn():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(60, 2)), 2 + rng.normal(size=(40, 2)) @ np.array([[1.0, 0.5], [0.0, 0.7]])])
    peer = GaussianMixture(2, random_state=0).fit(x)
    # factors as many as columns, and noise that takes a little of every covariance, are this mixture
    little = 1e-2 * np.eye(2)
    same = Moments(
        np.eye(2, dtype=np.float32), np.zeros(2, np.float32), Diagonal(np.full(2, 1e-2, np.float32)),
        peer.weights_.astype(np.float32), peer.means_.astype(np.float32),
        PositiveDefinite((peer.covariances_ - little).astype(np.float32)),
    )  # fmt: skip
    found = information_criteria(moments_to_natural(same), x)
    assert found.n_parameters == peer._n_parameters()
    np.testing.assert_allclose([found.aic, found.bic], [peer.aic(x), peer.bic(x)], rtol=1e-5)
    r = peer.predict_proba(x)
    np.testing.assert_allclose(found.icl - found.bic, -2 * np.sum(r * np.log(r.clip(1e-300))), rtol=1e-4)
    twice = information_criteria(moments_to_natural(same), x, weights=np.full(100, 2.0))
    doubled = information_criteria(moments_to_natural(same), np.concatenate([x, x]))
    np.testing.assert_allclose([twice.bic, twice.icl], [doubled.bic, doubled.icl], rtol=1e-6)


@pytest.mark.parametrize("noise", ["diagonal", "scale", "full"])
def test_columns_that_were_constant_carry_no_density(noise):
    """Beside dense Gaussians of the other columns; one that is constant in a training part has none in that fold."""
    sklearn = pytest.importorskip("flax_hmog.sklearn")
    from sklearn.model_selection import GridSearchCV, KFold

    rng = np.random.default_rng(0)
    centres = np.array([[-8.0, 0, 8]]).T * [1.0, -1.0, 0.8, 0.9]
    x = centres[np.arange(120) % 3] + rng.normal(size=(120, 4))
    rare = (np.arange(120) == 7) * 1.0  # constant in the training part of the first fold
    still = np.column_stack([x[:, :2], np.full(120, 7e3), x[:, 2:]])
    model = sklearn.HMoG(2, lat_dim=1, noise=noise, random_state=0).fit(still)
    kept = [0, 1, 3, 4]
    blocks = [
        w * multivariate_normal(m[kept], c[np.ix_(kept, kept)]).pdf(x)
        for w, m, c in zip(model.weights_, model.means_, model.covariances_, strict=True)
    ]
    np.testing.assert_allclose(model.score_samples(still), np.log(np.sum(blocks, axis=0)), rtol=1e-9)
    count = {"diagonal": 15, "scale": 12, "full": 20}[noise]  # of two clusters and one factor in four columns
    assert model.criteria_.n_parameters == count
    assert model.bic(still) == pytest.approx(count * np.log(120) - 2 * np.log(np.sum(blocks, axis=0)).sum())
    assert (
        model.outlier_scores(still + np.array([0, 0, 50, 0, 0])) < 1e-3
    ).all()  # what was constant is expected all the same
    if noise == "diagonal":
        grid = GridSearchCV(sklearn.HMoG(lat_dim=1, random_state=0), {"n_components": [2, 3]}, cv=KFold(2), refit=False)
        plain = grid.fit(x).cv_results_["split0_test_score"]
        np.testing.assert_allclose(
            grid.fit(np.column_stack([still, rare])).cv_results_["split0_test_score"], plain, rtol=1e-9
        )
