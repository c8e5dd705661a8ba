"""Independent truth in numpy and scipy only: the mixture of K dense Gaussians that a HMoG amounts to."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.special import logsumexp
from scipy.stats import multivariate_normal


def dense_matrix(kind, dim):
    """The matrices (..., dim, dim) of a `Scale`, `Diagonal` or `PositiveDefinite`, by its name only."""
    entries = np.asarray(kind.entries, np.float64)
    name = type(kind).__name__
    if name == "PositiveDefinite":
        return entries
    if name == "Scale":
        entries = np.broadcast_to(entries[..., None], (*entries.shape, dim))
    return entries[..., None] * np.eye(dim)


def restrict(matrix, kind):
    """The entries of dense matrices (..., n, n) that a kind holds: all, the diagonal, or its average."""
    diagonals = np.diagonal(matrix, axis1=-2, axis2=-1)
    return {"full": matrix, "diagonal": diagonals, "scale": diagonals.mean(-1)}[kind]


@dataclasses.dataclass(frozen=True)
class Dense:
    """z ~ w, y | z = k ~ N(m_k, S_k), x | y ~ N(W y + b, Psi), all matrices dense, float64."""

    W: np.ndarray
    b: np.ndarray
    Psi: np.ndarray
    w: np.ndarray
    m: np.ndarray
    S: np.ndarray

    @classmethod
    def of_moments(cls, moments):
        fields = (moments.loadings, moments.bias, dense_matrix(moments.noise, len(moments.bias)), moments.weights,
                  moments.means, getattr(moments.covariances, "entries", moments.covariances))  # fmt: skip
        return cls(*(np.asarray(field, np.float64) for field in fields))

    @classmethod
    def of_natural(cls, natural):
        """From the fields that define a `Natural`; those it carries along for float32 are not read."""
        location, theta, eta = (
            np.asarray(field, np.float64)
            for field in (natural.observable_location, natural.interaction, natural.posterior_location)
        )
        Psi = np.linalg.inv(dense_matrix(natural.observable_precision, theta.shape[0]))
        W, b = Psi @ theta, Psi @ location
        P = posterior_precisions(natural) - theta.T @ W
        S = np.linalg.inv(P)
        h = eta + theta.T @ b
        cat = np.concatenate([[0.0], np.asarray(natural.categorical_bias, np.float64)])
        log_w = cat + np.einsum("ki,kij,kj->k", h, S, h) / 2 - np.linalg.slogdet(P)[1] / 2
        return cls(W, b, Psi, np.exp(log_w - logsumexp(log_w)), np.einsum("kij,kj->ki", S, h), S)

    @property
    def component_means(self):
        return self.m @ self.W.T + self.b

    @property
    def component_covariances(self):
        return self.W @ self.S @ self.W.T + self.Psi

    def log_joint_z(self, x):
        """log p(x, z = k) (N, K)."""
        parts = zip(self.w, self.component_means, self.component_covariances, strict=True)
        return np.stack([np.log(w) + _log_normal(x, mean, cov) for w, mean, cov in parts], axis=-1)

    def log_density(self, x):
        return logsumexp(self.log_joint_z(x), axis=-1)

    def responsibilities(self, x):
        logits = self.log_joint_z(x)
        return np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))

    def log_joint(self, x, y, z):
        """log p(x, y, z) (N,)."""
        z = np.asarray(z)
        latent = np.empty(len(x))
        for k in np.unique(z):
            latent[z == k] = np.log(self.w[k]) + _log_normal(y[z == k], self.m[k], self.S[k])
        return latent + _log_normal(x - y @ self.W.T, self.b, self.Psi)

    def component_posterior(self, x):
        """E[y | x, k] (N, K, L) and Cov[y | x, k] (K, L, L), by conditioning the joint Gaussian of x and y."""
        gain = self.S @ self.W.T @ np.linalg.inv(self.component_covariances)
        residual = x[:, None, :] - self.component_means
        return self.m + np.einsum("kld,nkd->nkl", gain, residual), self.S - gain @ self.W @ self.S

    def latent_mean(self, x):
        return np.einsum("nk,nkl->nl", self.responsibilities(x), self.component_posterior(x)[0])

    def expected_statistics(self, x, weights=None, responsibilities=None):
        """Average over rows of E[s(x, y, z) | x], all second moments full: the fields of `Mean` by name."""
        v = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
        r = self.responsibilities(x) if responsibilities is None else responsibilities
        r = r * (v / v.sum())[:, None]
        means, covariances = self.component_posterior(x)
        return {
            "observable_mean": r.sum(1) @ x,
            "observable_second_moment": np.einsum("nk,ni,nj->ij", r, x, x),
            "cross_moment": np.einsum("nk,nd,nkl->dl", r, x, means),
            "weights": r.sum(0),
            "weighted_means": np.einsum("nk,nkl->kl", r, means),
            "weighted_second_moments": np.einsum("nk,nki,nkj->kij", r, means, means)
            + r.sum(0)[:, None, None] * covariances,
        }

    def mean_statistics(self):
        """E[s(x, y, z)] of the model, as `expected_statistics` gives those of data."""
        second = self.w[:, None, None] * (self.S + self.m[:, :, None] * self.m[:, None, :])
        pooled, latent = second.sum(0), self.w @ self.m
        cross = self.W @ pooled + np.outer(self.b, latent)
        shift = np.outer(self.W @ latent, self.b)
        return {
            "observable_mean": self.W @ latent + self.b,
            "observable_second_moment": self.W @ pooled @ self.W.T
            + shift
            + shift.T
            + np.outer(self.b, self.b)
            + self.Psi,
            "cross_moment": cross,
            "weights": self.w,
            "weighted_means": self.w[:, None] * self.m,
            "weighted_second_moments": second,
        }

    def log_partition(self):
        """psi, from p at (0, 0, z = 0), where all sufficient statistics vanish: log p = -psi + base measure."""
        D, L = self.W.shape
        zero = self.log_joint(np.zeros((1, D)), np.zeros((1, L)), [0])[0]
        return -zero - (D + L) / 2 * np.log(2 * np.pi)

    def negative_entropy(self):
        """E[log p(x, y, z)] without the base measure, by the chain rule of Gaussian entropies."""
        D, L = self.W.shape
        component = np.log(self.w) - (np.linalg.slogdet(self.S)[1] + L) / 2
        return self.w @ component - (np.linalg.slogdet(self.Psi)[1] + D) / 2

    def transformed(self, shift, factor):
        """The same p(x) with latent y' = factor^-1 (y - shift)."""
        inverse = np.linalg.inv(factor)
        return Dense(self.W @ factor, self.b + self.W @ shift, self.Psi, self.w,
                     (self.m - shift) @ inverse.T, inverse @ self.S @ inverse.T)  # fmt: skip

    def sample(self, rng, count):
        z = rng.choice(len(self.w), size=count, p=self.w / self.w.sum())
        y = self.m[z] + np.einsum(
            "nij,nj->ni", np.linalg.cholesky(self.S)[z], rng.standard_normal((count, self.m.shape[1]))
        )
        x = y @ self.W.T + self.b + rng.standard_normal((count, len(self.b))) @ np.linalg.cholesky(self.Psi).T
        return x, y, z


def posterior_precisions(natural):
    """Q_k (K, L, L) of a `Natural`."""
    L = natural.interaction.shape[1]
    precision = natural.posterior_precision
    if type(precision).__name__ == "SharedBase":
        base = np.asarray(precision.base.entries, np.float64)[None]
        return np.concatenate([base, base + dense_matrix(precision.differences, L)])
    return dense_matrix(precision, L)


def _log_normal(x, mean, covariance):
    return np.atleast_1d(multivariate_normal(mean, covariance).logpdf(x)).reshape(np.shape(x)[:-1])


def assert_close(got, want, tolerance, name=""):
    """|got - want| <= tolerance (1 + |want|), elementwise, with equal shapes."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    assert np.isfinite(got).all(), f"{name}: entries that are not finite"
    if got.size:
        excess = np.max(np.abs(got - want) / (1 + np.abs(want)))
        assert excess <= tolerance, f"{name}: off by {excess:.3g} (1 + |want|), allowed {tolerance:.3g}"


def assert_mean_close(mean, want, case, tolerance):
    """A library `Mean` against dense statistics, restricted to the kinds of the case."""
    for field in ("observable_mean", "cross_moment", "weights", "weighted_means"):
        assert_close(getattr(mean, field), want[field], tolerance, field)
    second = restrict(want["observable_second_moment"], case.obs_rep)
    assert_close(mean.observable_second_moment.entries, second, tolerance, "observable_second_moment")
    latent = restrict(want["weighted_second_moments"], case.rep)
    assert_close(mean.weighted_second_moments.entries, latent, tolerance, "weighted_second_moments")
    assert (mean.pooled_second_moment is not None) == case.is_shared_base
    if case.is_shared_base:
        pooled = want["weighted_second_moments"].sum(0)
        assert_close(mean.pooled_second_moment.entries, pooled, tolerance, "pooled_second_moment")
