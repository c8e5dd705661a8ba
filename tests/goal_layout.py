"""The flat layout of goal-jax in numpy, written from the fixtures' README and independent of `flax_hmog.model.goal`."""

from __future__ import annotations

import numpy as np


def shape_statistics(matrix, kind):
    """Second moments (..., n, n) in mean coordinates: average of the diagonal, diagonal, or upper triangle."""
    if kind == "full":
        i, j = np.triu_indices(matrix.shape[-1])
        return matrix[..., i, j]
    diagonals = np.diagonal(matrix, axis1=-2, axis2=-1)
    return diagonals if kind == "diagonal" else diagonals.mean(axis=-1, keepdims=True)


def shape_parameters(precision, kind):
    """Precisions (..., n, n) as natural parameters, so that their dot product with the statistics is -1/2 x' P x."""
    n = precision.shape[-1]
    factor = {"scale": -n / 2, "diagonal": -0.5}.get(kind)
    if factor is None:
        i, j = np.triu_indices(n)
        factor = np.where(i == j, -0.5, -1.0)
    return factor * shape_statistics(precision, kind)


def mixture_parameters(location, precision, categorical, kind, base_kind=None):
    """[component 0 | differences (y_dim, k-1) row-major | categorical]; component 0 may have a shape of its own."""
    first = np.concatenate([location[0], shape_parameters(precision[0], base_kind or kind)])
    shapes = shape_parameters(precision, kind)
    others = np.concatenate([location, shapes], axis=-1)
    return np.concatenate([first, (others[1:] - others[:1]).T.ravel(), categorical])


def mixture_statistics(means, seconds, weights, kind, base_kind=None):
    """Mean coordinates of a mixture: [E s(y) | E[s(y) 1(z = j)] | w_j] from w_k E[y | k] and w_k E[y y' | k]."""
    total = np.concatenate([means.sum(0), shape_statistics(seconds.sum(0), base_kind or kind)])
    components = np.concatenate([means, shape_statistics(seconds, kind)], axis=-1)
    return np.concatenate([total, components[1:].T.ravel(), weights[1:]])


def sufficient_statistic(x, y, z, obs_kind, kind, n_components, base_kind=None):
    """s(x, y, z) of one triple."""
    member = np.eye(n_components)[z]
    latent = mixture_statistics(member[:, None] * y, member[:, None, None] * np.outer(y, y), member, kind, base_kind)
    return np.concatenate([x, shape_statistics(np.outer(x, x), obs_kind), np.outer(x, y).ravel(), latent])
