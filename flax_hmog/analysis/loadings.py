"""Axes of the latent space that mean something. Its basis is not identified: any y -> M y + c gives the same p(x)."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh

from flax_hmog.analysis.inputs import geometry
from flax_hmog.model.checks import check_shape, check_size, public
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.typed import Samples


@dataclasses.dataclass(frozen=True)
class LatentAxes:
    """Directions of the latent space and where along them a latent point lies.

    Attributes:
        directions: (L, A), one column per axis.
        center: E[y] (L,), the origin.
        scores: (A,), largest first; see the function that made the axes.

    Example:
        >>> from flax_hmog.toy import natural, output
        >>> discriminant_axes(natural, 1).project(output.latent_mean).shape
        (12, 1)
    """

    directions: Float[np.ndarray, "L A"]
    center: Float[np.ndarray, " L"]
    scores: Float[np.ndarray, " A"]

    @public
    def project(self, y: Samples) -> Float[np.ndarray, "... A"]:
        """Coordinates (..., A) of latent points (..., L), such as `latent_mean(natural, x)`."""
        y = np.asarray(y, np.float64)
        check_shape("y", y, (*y.shape[:-1], len(self.center)))
        return cast(np.ndarray, (y - self.center) @ self.directions)


@dataclasses.dataclass(frozen=True)
class CanonicalLoadings:
    """Loadings in the canonical basis.

    Attributes:
        loadings: W_c (D, L), in units of x per standard deviation of the canonical latent; columns in order of share.
        variance_shares: (L,), the share of the variance of x that each axis explains, every direction of x measured in
            units of its noise. They and the share of the noise, D / (D + total signal), sum to 1.
        axes: `LatentAxes` (L axes) from y to the canonical latents; their scores are the signal-to-noise ratios s_i^2.

    Example:
        >>> from flax_hmog.toy import natural
        >>> canonical = canonical_loadings(natural)
        >>> canonical.loadings.shape, canonical.variance_shares.shape
        ((4, 2), (2,))
    """

    loadings: Float[np.ndarray, "D L"]
    variance_shares: Float[np.ndarray, " L"]
    axes: LatentAxes


@public
def canonical_loadings(natural: Natural) -> CanonicalLoadings:
    """Loadings in the one latent basis in which y is white and its axes are orthogonal in x: canonical factor analysis.

    With T T' = Cov(y) (within and between components) and the thin SVD  Psi^-1/2 W T = U diag(s) V',

        W_c = W T V,    y_c = V' T^-1 (y - E[y]),    share_i = s_i^2 / (sum_j s_j^2 + D)

    so Cov(y_c) = I, W_c W_c' = W Cov(y) W' and W_c' Psi^-1 W_c = diag(s^2). Signs are fixed by making the entry of
    largest absolute value in each column positive. What is left open are axes of equal s, and models of equal p(x).
    Rescaling columns of x rescales rows of W_c and nothing else. With noise of kind `Scale` this is PCA of W Cov(y) W'.

    Args:
        natural: the model.

    Returns:
        `CanonicalLoadings`.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if the model does not exist.

    Source: Rao 1955, Estimation and tests of significance in factor analysis.

    Example:
        >>> from flax_hmog.toy import natural
        >>> bool(canonical_loadings(natural).variance_shares.sum() < 1)  # the rest is noise
        True
    """
    model = geometry(natural)
    obs_dim, lat_dim = model.loadings.shape
    center, within, between = model.latent_moments()
    factor = np.linalg.cholesky(within + between)
    _, scale, rotation = np.linalg.svd(model.whitened_loadings @ factor, full_matrices=obs_dim < lat_dim)
    scale = np.pad(scale, (0, lat_dim - len(scale)))
    loadings = model.loadings @ factor @ rotation.T
    signs = _signs(loadings)
    # y_c' = (y - E[y])' T^-T V
    directions = np.linalg.solve(factor.T, rotation.T) * signs
    shares = scale**2 / (np.sum(scale**2) + obs_dim)
    return CanonicalLoadings(loadings * signs, shares, LatentAxes(directions, center, scale**2))


@public
def discriminant_axes(natural: Natural, n_axes: int = 2) -> LatentAxes:
    """Axes of the latent space that separate the components best: linear discriminants of the model itself.

    The columns a of `directions` maximise a'B a / a'S a, with B = sum_k w_k (m_k - E[y])(m_k - E[y])' between and
    S = sum_k w_k S_k within components, and a'S a = 1: lengths are in standard deviations within components. Signs are
    fixed by making the component mean of largest absolute value positive. At most K - 1 axes separate anything.

    Args:
        natural: the model.
        n_axes: number of axes, at most L.

    Returns:
        `LatentAxes`; the scores are the variances between the components, a'B a.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if `n_axes` is out of bounds or the model does not exist.

    Example:
        >>> from flax_hmog.toy import natural
        >>> discriminant_axes(natural).directions.shape
        (2, 2)
    """
    model = geometry(natural)
    check_size("n_axes", n_axes, at_most=model.means.shape[1])
    center, within, between = model.latent_moments()
    values, vectors = eigh(between, within)
    directions = vectors[:, ::-1][:, :n_axes]
    directions = directions * _signs((model.means - center) @ directions)
    return LatentAxes(directions, center, np.maximum(values[::-1][:n_axes], 0))


def _signs(columns: np.ndarray) -> np.ndarray:
    """Signs (A,) that make the largest entry of each column positive."""
    largest = np.abs(columns).argmax(axis=0)
    return np.where(np.take_along_axis(columns, largest[None], axis=0)[0] < 0, -1.0, 1.0)
