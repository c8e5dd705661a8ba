"""The E-step over rows with missing entries: sums about the model, in the form that the M-step takes.

A missing entry is latent as y is. Given y it has its own noise: its residual has mean 0, variance Psi_d and nothing in
common with y. So it adds Psi_d to the squares of its column and nothing else, and the M-step is that of complete data.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flax_hmog.data.rows import sum_rows
from flax_hmog.data.shards import Shards
from flax_hmog.model.coordinates import Prepared, ResidualMoments
from flax_hmog.model.incomplete import Conditioned, Conditioner, condition, incomplete_block_rows, split_rows
from flax_hmog.model.kinds import Array, PositiveDefinite, matmul, pytree
from flax_hmog.model.prepared import entry_index, normalize_logits
from flax_hmog.model.typed import Block, jit


@pytree
class IncompleteStatistics:
    """Weighted sums over rows with missing entries, about the model whose expectations they are.

    They add as `Statistics` do, with the same symbols; of u the whole posterior is summed, as rows differ in its
    covariance. Sums over entries are over those that are there.

    Attributes:
        count: sum of v ().
        log_likelihood: sum of v log p(x_o) ().
        responsibilities: sum of gamma (K,).
        latent: sum of gamma E[u | x_o, k] (K, L).
        latent_square: sum of gamma E[u u' | x_o, k] (K, L, L).
        observed: sum of v (D,).
        residual: sum of v e (D,).
        residual_square: sum of v e^2 (D,).
        cross: sum of v e u^' (D, L).
        spread: distinct entries of the sum of v Cov[u | x_o] (L2, D).
    """

    count: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    responsibilities: Float[Array, " K"]
    latent: Float[Array, "K L"]
    latent_square: Float[Array, "K L L"]
    observed: Float[Array, " D"]
    residual: Float[Array, " D"]
    residual_square: Float[Array, " D"]
    cross: Float[Array, "D L"]
    spread: Float[Array, "L2 D"]

    def residual_mean(self, factors: Prepared) -> ResidualMoments:
        """Average statistics of (q, y, z) with q = x - b - W y, for the M-step."""
        count, t_inverse = self.count, factors.inverse_basis
        loadings = factors.root.upper_solve(factors.projection)
        index = entry_index(loadings.shape[1])
        # Cov[q_d, u] = -W_d Cov[u], Var[q_d] = W_d Cov[u] W_d' where x_d is there
        shared = jnp.stack([jnp.sum(self.spread[row] * loadings.T, axis=0) for row in index], axis=-1)
        unexplained = (count - self.observed) / factors.root.diagonal() ** 2
        square = self.residual_square + jnp.sum(shared * loadings, axis=-1) + unexplained
        second = matmul(matmul(t_inverse[None], self.latent_square), t_inverse.T[None])
        return ResidualMoments(
            observable_mean=self.residual / count,
            observable_second_moment=type(factors.root).from_diagonal(square / count),
            cross_moment=matmul(self.cross - shared, t_inverse.T) / count,
            weights=self.responsibilities / count,
            weighted_means=matmul(self.latent, t_inverse.T) / count,
            weighted_second_moments=PositiveDefinite(second / count),
        )


@jit(static_argnames="shards")
def accumulate_incomplete(
    factors: Prepared, x: Array, weights: Array, labels: Array | None = None, *, shards: Shards = None
) -> IncompleteStatistics:
    """The E-step over rows x (N, D) with NaN where an entry is missing: arguments as of `accumulate`."""
    operands = Conditioner.of(factors)
    return sum_rows(_block_sums, operands, (x, weights, labels), incomplete_block_rows(factors), shards)


def _block_sums(conditioner: Conditioner, block: Block, is_new: Array) -> IncompleteStatistics:
    x, weights, labels = block
    weights = jnp.where(is_new, weights, 0)
    shown = split_rows(conditioner.factors, x)
    posterior = condition(conditioner, shown)
    logits = posterior.log_joint.T
    if labels is not None:
        chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        logits = jnp.where((labels < 0)[:, None] | chosen, logits, -jnp.inf)
    evidence, _, responsibilities = normalize_logits(logits)
    mean, spread, (latent, latent_square) = mixed_posterior(posterior, responsibilities.T, weights)
    residual = shown.centered - shown.mask * matmul(mean.T, conditioner.loadings.T)
    weighted = residual * weights[:, None]
    i, j = np.triu_indices(mean.shape[0])
    return IncompleteStatistics(
        count=jnp.sum(weights),
        log_likelihood=jnp.sum(weights * evidence),
        responsibilities=matmul(weights, responsibilities),
        latent=latent,
        latent_square=latent_square,
        observed=matmul(weights, shown.mask),
        residual=jnp.sum(weighted, axis=0),
        residual_square=jnp.sum(weighted * residual, axis=0),
        cross=matmul(mean, weighted).T,
        spread=matmul(spread[i, j] * weights[None], shown.mask),
    )


def mixed_posterior(
    posterior: Conditioned, responsibilities: Array, weights: Array
) -> tuple[Array, Array, tuple[Array, Array]]:
    """E[u | x_o] (L, B), Cov[u | x_o] (L, L, B), and the sums of gamma E[u | k] (K, L) and gamma E[u u' | k] (K, L, L).

    Args:
        posterior: of a block of rows.
        responsibilities: (K, B).
        weights: of the rows (B,).
    """
    point = posterior.point
    zeros = jnp.zeros_like(point), jnp.zeros_like(posterior.covariance[0])

    def add(totals: tuple[Array, Array], component: tuple[Array, ...]) -> tuple[Any, Any]:
        covariance, gain, share, weighted = component
        total_gain, total_square = totals
        # products of two factors each, which the compiler makes long vectors of
        square = total_square + share[None, None] * covariance + weighted[:, None] * gain[None]
        mean, counted = point + gain, share * weights
        second = matmul(covariance, counted) + matmul(mean * counted[None], mean.T)
        return (total_gain + weighted, square), (matmul(mean, counted), second)

    weighted = responsibilities[:, None] * posterior.gain
    components = posterior.covariance, posterior.gain, responsibilities, weighted
    (gain, square), sums = jax.lax.scan(add, zeros, components)
    return point + gain, square - gain[:, None] * gain[None], sums
