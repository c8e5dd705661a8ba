"""Two-stage baselines from scikit-learn, scored with the exact density of the model that each amounts to."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np

from flax_hmog.model.checks import public
from flax_hmog.model.optional import require

NOISE_FLOOR = 1e-3  # of the mean variance of the training data, for the floored factor analysis


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A fitted baseline on test and training data.

    Attributes:
        assignments: clusters of the test samples (N,).
        train_log_density: mean log p(x) on the training data in nats, NaN where the method has no density.
        test_log_density: the same on the test data.
    """

    assignments: np.ndarray
    train_log_density: float
    test_log_density: float


@public
def fit_baselines(
    train: np.ndarray, test: np.ndarray, *, lat_dim: int, n_components: int, seed: int
) -> dict[str, Baseline]:
    """PCA + k-means, PCA + GMM and FA + GMM (plain and with floored noise), each with scikit-learn's defaults.

    Args:
        train: training data (N, D).
        test: test data (M, D).
        lat_dim: dimension of the reduced space.
        n_components: number of clusters.
        seed: random state.

    Returns:
        `Baseline` by name.
    """
    cluster, decomposition, mixture = (
        require(f"sklearn.{name}", "cluster") for name in ("cluster", "decomposition", "mixture")
    )
    train, test = train.astype(np.float64), test.astype(np.float64)
    pca = decomposition.PCA(lat_dim, random_state=seed).fit(train)
    k_means = cluster.KMeans(n_components, n_init=10, random_state=seed).fit(pca.transform(train))
    gmm = mixture.GaussianMixture(n_components, random_state=seed, n_init=5).fit(pca.transform(train))
    residual = np.full(train.shape[1], pca.noise_variance_)
    fa = decomposition.FactorAnalysis(lat_dim, random_state=seed).fit(train)
    fa_gmm = mixture.GaussianMixture(n_components, random_state=seed, n_init=5).fit(fa.transform(train))
    floored = np.maximum(fa.noise_variance_, NOISE_FLOOR * train.var(axis=0).mean())
    fa_assignments = fa_gmm.predict(fa.transform(test))

    def density(loadings: np.ndarray, noise: np.ndarray, mixture: Any, mean: np.ndarray) -> list[float]:
        return [float(np.mean(_log_density(x, loadings, noise, mixture, mean))) for x in (train, test)]

    return {
        "PCA + k-means": Baseline(k_means.predict(pca.transform(test)), np.nan, np.nan),
        "PCA + GMM": Baseline(gmm.predict(pca.transform(test)), *density(pca.components_.T, residual, gmm, pca.mean_)),
        "FA + GMM": Baseline(fa_assignments, *density(fa.components_.T, fa.noise_variance_, fa_gmm, fa.mean_)),
        "FA + GMM, floored": Baseline(fa_assignments, *density(fa.components_.T, floored, fa_gmm, fa.mean_)),
    }


def _log_density(x: np.ndarray, loadings: np.ndarray, noise: np.ndarray, mixture: Any, mean: np.ndarray) -> np.ndarray:
    """Log sum_k w_k N(x; W m_k + b, W S_k W' + Psi) with dense covariances."""
    special, stats = (require(f"scipy.{name}", "cluster") for name in ("special", "stats"))
    # in units of the noise's standard deviations, so that the smallest variances are not lost beside the largest
    root = np.sqrt(noise)
    scaled, whitened = (x - mean) / root, loadings / root[:, None]
    terms = [
        np.log(weight)
        + stats.multivariate_normal(whitened @ center, np.eye(len(noise)) + whitened @ covariance @ whitened.T).logpdf(
            scaled
        )
        for weight, center, covariance in zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True)
    ]
    return cast(np.ndarray, special.logsumexp(terms, axis=0) - np.sum(np.log(root)))
