"""Small models of the analysis tests: random ones, and one whose hierarchy is known."""

from __future__ import annotations

import functools

import numpy as np

from flax_hmog import Diagonal, Moments, PositiveDefinite, Scale, moments_to_natural


@functools.cache
def random_model(obs_dim, lat_dim, n_components, rep=Diagonal):
    return moments_to_natural(random_moments(obs_dim, lat_dim, n_components, rep))


def random_moments(obs_dim, lat_dim, n_components, rep=Diagonal, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n_components, lat_dim, lat_dim))
    square = rng.normal(size=(obs_dim, obs_dim))
    noise = {
        Scale: np.float32(0.7),
        Diagonal: rng.uniform(0.5, 2, obs_dim).astype(np.float32),
        PositiveDefinite: (square @ square.T / obs_dim + np.eye(obs_dim)).astype(np.float32),
    }[rep]
    weights = rng.uniform(1, 2, n_components)
    return Moments(
        loadings=rng.normal(size=(obs_dim, lat_dim)).astype(np.float32),
        bias=rng.normal(size=obs_dim).astype(np.float32),
        noise=rep(noise),
        weights=(weights / weights.sum()).astype(np.float32),
        means=rng.normal(scale=2, size=(n_components, lat_dim)).astype(np.float32),
        covariances=PositiveDefinite((root @ root.transpose(0, 2, 1) + np.eye(lat_dim)).astype(np.float32)),
    )


@functools.cache
def nested_model():
    """Six components on a line in pairs: (0, 3), (1, 4), (2, 5) are near each other, and the first two pairs nearer."""
    means = np.array([[0.0], [20.0], [60.0], [3.0], [23.0], [63.0]], np.float32)
    return moments_to_natural(
        Moments(
            loadings=np.array([[1.0], [0.5], [0.0]], np.float32),
            bias=np.zeros(3, np.float32),
            noise=Scale(np.float32(0.1)),
            weights=np.full(6, 1 / 6, np.float32),
            means=means,
            covariances=PositiveDefinite(np.ones((6, 1, 1), np.float32)),
        )
    )
