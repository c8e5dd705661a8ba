"""Inference for rows with missing entries, which are NaN: exact, for noise of a diagonal kind.

A row is conditioned on what it shows. Rows o of W, b and Psi are its model, so that its posterior precisions
P_k + W_o'Psi_o^-1 W_o are its own. They are sums over the columns that it shows, for all rows one matrix product, and
are inverted for a block of rows at once. In the basis u = T y of `Prepared`, with U the whitened loadings,

    Q_k = T^-T P_k T^-1 + U_o'U_o,   C_k = Q_k^-1

and log p(x_o, z = k) is expanded about a point y^ near the posterior mean, so that nothing large cancels
(docs/derivations.md). Arrays (..., B) have the rows of a block along the last axis.
"""

from __future__ import annotations

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flax_hmog.model.algebra import inverses_along_last
from flax_hmog.model.checks import door
from flax_hmog.model.coordinates import Prepared
from flax_hmog.model.kinds import Array, Kind, diagonal, matmul, pytree
from flax_hmog.model.prepared import center_rows, entry_index

CACHED_ROWS = 128  # of a block on CPUs: their matrices of one component stay in the cache
BLOCK_FLOATS = {"cpu": 2**22}  # of the component matrices of a block
LONG_BLOCK_FLOATS = 2**27


@pytree
class Shown:
    """A block of rows, split into what they show and where.

    Attributes:
        mask: 1 where an entry is there, else 0 (B, D), in the dtype of the model.
        centered: x - b in the frame of the model, 0 where it is missing (B, D).
        offset: log-density of the noise at its mean, over the entries that are there (B,).
    """

    mask: Float[Array, "B D"]
    centered: Float[Array, "B D"]
    offset: Float[Array, " B"]


@pytree
class Conditioner:
    """A model prepared for conditioning on a part of the columns, once for all rows.

    Attributes:
        factors: of `prepare`.
        loadings: W T^-1 (D, L), the loadings of u.
        pairs: products U_di U_dj of every column (D, L2).
        prior: T^-T P_k T^-1 (K, L, L).
        means: T m_k (K, L).
        constant: log w_k + log|T^-T P_k T^-1| / 2 (K,).
    """

    factors: Prepared
    loadings: Float[Array, "D L"]
    pairs: Float[Array, "D L2"]
    prior: Float[Array, "K L L"]
    means: Float[Array, "K L"]
    constant: Float[Array, " K"]

    @classmethod
    def of(cls, factors: Prepared) -> Conditioner:
        """That of a model, its noise of a diagonal kind."""
        t_inverse, prior, projection = factors.inverse_basis, factors.natural.prior, factors.projection
        i, j = np.triu_indices(projection.shape[1])
        log_volume = jnp.sum(jnp.log(jnp.abs(diagonal(factors.basis))))
        return cls(
            factors=factors,
            loadings=factors.root.upper_solve(projection),
            pairs=projection[:, i] * projection[:, j],
            prior=matmul(matmul(t_inverse.T[None], prior.precision.entries), t_inverse[None]),
            means=matmul(factors.prior_means, factors.basis.T),
            constant=prior.log_weights + factors.prior_log_det / 2 - log_volume,
        )


@pytree
class Conditioned:
    """Posterior of a block of rows, u given component k being N(point + gain_k, covariance_k).

    Attributes:
        log_joint: log p(x_o, z = k), in nats (K, B).
        point: what log_joint is expanded about (L, B).
        gain: E[u | x_o, k] - point (K, L, B).
        covariance: C_k (K, L, L, B).
    """

    log_joint: Float[Array, "K B"]
    point: Float[Array, "L B"]
    gain: Float[Array, "K L B"]
    covariance: Float[Array, "K L L B"]


def check_noise(noise: Kind | type[Kind]) -> None:
    """ValueError for noise that is correlated between columns, where entries may be missing."""
    if not noise.is_diagonal:
        raise ValueError(
            f'{door()}: `missing` must be "refuse" where noise is correlated between columns (obs_rep="full"); got '
            '"nan". Use obs_rep="diagonal" or "scale".'
        )


def incomplete_block_rows(factors: Prepared) -> int:
    """Rows of a block of incomplete rows."""
    n_components, lat_dim = factors.linear.shape
    backend = jax.default_backend()
    most = BLOCK_FLOATS.get(backend, LONG_BLOCK_FLOATS) // (n_components * lat_dim**2)
    return max(8, min(most, CACHED_ROWS if backend == "cpu" else 2**14))


def split_rows(factors: Prepared, x: Array) -> Shown:
    """Rows x (B, D) split into what is there and where; derivatives do not see what is missing."""
    is_there = ~jnp.isnan(x)
    mask = is_there.astype(x.dtype)
    centered = jnp.where(is_there, center_rows(factors, jnp.where(is_there, x, 0)), 0)
    # of every column log N(0; 0, Psi_d); the volume of the frame is one number for all, as `prepare` takes it
    offset = matmul(mask, jnp.log(factors.root.diagonal()) - math.log(2 * math.pi) / 2)
    frame = factors.frame
    if frame is not None:
        offset = offset + matmul(1 - mask, jnp.log(frame.unit)) - frame.log_volume
    return Shown(mask, centered, offset)


def condition(conditioner: Conditioner, shown: Shown) -> Conditioned:
    """The posterior of a block of rows given what they show."""
    factors, loadings, prior = conditioner.factors, conditioner.loadings, conditioner.prior
    projector = factors.root.times(factors.projection)
    # U_o'U_o (L, L, B), a sum over the columns that a row shows
    gram = matmul(shown.mask, conditioner.pairs).T[entry_index(loadings.shape[1])]

    def invert(total: Array, precision: Array) -> tuple[Array, tuple[Array, Array]]:
        covariance, log_det = inverses_along_last(gram + precision[:, :, None])
        return total + covariance, (covariance, log_det)

    total, (covariances, log_dets) = jax.lax.scan(invert, jnp.zeros_like(gram), prior)
    # any point is exact; this one leaves residuals of the size of the noise
    point = matrix_product(total / prior.shape[0], matmul(projector.T, shown.centered.T))
    residual = shown.centered - shown.mask * matmul(point.T, loadings.T)
    slope_of_rows = matmul(projector.T, residual.T)
    square = jnp.sum(factors.precision.rows_times(residual**2), axis=-1)

    # log p(x_o, y^, k) + s'C s / 2 - log|Q| / 2 without what components share, s the slope at y^
    gap = point[None] - conditioner.means[:, :, None]
    pull = matmul(prior, gap)
    slope = slope_of_rows[None] - pull
    gain = matrix_product(covariances, slope)
    quadratic = jnp.sum(slope * gain, axis=1) - jnp.sum(gap * pull, axis=1) - log_dets
    log_joint = conditioner.constant[:, None] + quadratic / 2 + (shown.offset - square / 2)[None]
    return Conditioned(log_joint, point, gain, covariances)


def matrix_product(matrices: Array, vectors: Array) -> Array:
    """M v (..., L, B) of symmetric matrices (..., L, L, B) and vectors (..., L, B), column by column."""

    def add(column: Array, total: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(matrices, column, -3, keepdims=False)
        return cast(Array, total + row * jax.lax.dynamic_index_in_dim(vectors, column, -2))

    return cast(Array, jax.lax.fori_loop(0, vectors.shape[-2], add, jnp.zeros_like(vectors)))
