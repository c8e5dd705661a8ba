"""Expected statistics of data under a model: the E-step, and the latent basis they are expressed in."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from flax_hmog.data.rows import block_rows, check_samples, sum_rows
from flax_hmog.data.shards import Shards, row_shards
from flax_hmog.em.missing import IncompleteStatistics, accumulate_incomplete
from flax_hmog.model.checks import public
from flax_hmog.model.conversions import in_units_of_x
from flax_hmog.model.coordinates import Mean, Natural, Prepared, ResidualMoments, check_mean, check_natural, outer
from flax_hmog.model.kinds import (
    Array,
    Kind,
    PositiveDefinite,
    diagonal,
    inverse_lower,
    matmul,
    pytree,
    symmetrize,
    trace_product,
    transpose,
)
from flax_hmog.model.prepared import (
    center_rows,
    component_logits,
    component_product,
    floats_per_row,
    latent_features,
    normalize_logits,
    posterior_gain,
    prepare,
    project_rows,
    shared_log_density,
    symmetric_matrices,
)
from flax_hmog.model.structure import Structure
from flax_hmog.model.typed import Block, Samples, Tree, jit


@pytree
class Statistics:
    """Weighted sums over samples, about the model whose expectations they are: the E-step as it adds up.

    They add over blocks, streams and devices. With v the sample weights, gamma the responsibilities times v, u = T y
    the latent coordinates of `Prepared`, t = U'F'(x - b), u^ = E[u | x], g = u^ - t and e = x - b - W E[y | x].
    Taken about the model, nothing large cancels where the noise is small beside the signal.

    Attributes:
        count: sum of v ().
        residual: sum of v e (D,).
        residual_square: sum of v e e', of kind `obs_rep`.
        cross: sum of v e u^' (D, L).
        responsibilities: sum of gamma (K,).
        latent: sum of gamma t (K, L).
        latent_square: sum of gamma times the products t_i t_j (K, L2).
        pooled_square: sum of v (t, g) (t, g)' (2L, 2L).
        evidence: sum of v times logsumexp of the logits ().
    """

    count: Float[Array, ""]
    residual: Float[Array, " D"]
    residual_square: Kind
    cross: Float[Array, "D L"]
    responsibilities: Float[Array, " K"]
    latent: Float[Array, "K L"]
    latent_square: Float[Array, "K L2"]
    pooled_square: Float[Array, "2*L 2*L"]
    evidence: Float[Array, ""]

    def pooled(self) -> tuple[Array, Array, Array]:
        """Sums of v t t', v t g' and v g g' (L, L)."""
        lat_dim = self.latent.shape[-1]
        square = self.pooled_square
        return square[:lat_dim, :lat_dim], square[:lat_dim, lat_dim:], square[lat_dim:, lat_dim:]


@pytree
class Densities:
    """Weighted sums over samples that diagnostics need, with which no M-step can be taken.

    Attributes:
        count: sum of the weights v ().
        responsibilities: sum of v p(z = k | x) (K,).
        log_likelihood: sum of v log p(x) ().
    """

    count: Float[Array, ""]
    responsibilities: Float[Array, " K"]
    log_likelihood: Float[Array, ""]


@public
def expected_statistics(natural: Natural | Prepared, x: Samples, weights: Samples | None = None) -> Mean:
    """E-step: average of E[s(x, y, z) | x] over observations.

    Args:
        natural: the model.
        x: observations (N, D), sharded or not; any leading dimensions are samples.
        weights: sample weights, the leading shape of `x`; None counts every sample once.

    Returns:
        `Mean`, with latent second moments in the kind of the posterior precisions.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: for wrong shapes, entries that are not finite, negative weights or a weight sum of 0.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> np.asarray(expected_statistics(natural, x).weights, float).round(2).tolist()
        [0.33, 0.33, 0.33]
    """
    plain = in_units_of_x(check_natural(natural))
    entered, x, weights = check_samples(plain, x, weights)
    factors = prepare(entered)
    return _statistics_to_mean(factors.natural, factors, accumulate(factors, x, weights, shards=row_shards(x)))


@jit(static_argnames=("shards", "missing"))
def accumulate(
    factors: Prepared,
    x: Array,
    weights: Array,
    labels: Array | None = None,
    *,
    shards: Shards = None,
    missing: bool = False,
) -> Any:
    """The E-step: one pass over the rows.

    Args:
        factors: of the model.
        x: observations (N, D).
        weights: sample weights (N,).
        labels: known components (N,), -1 where unknown; their responsibilities are clamped and the density of such a
            row is log p(x, z = label).
        shards: shards of the rows.
        missing: True if entries may be missing, as NaN.

    Returns:
        `Statistics`, or `IncompleteStatistics` where entries may be missing.
    """
    if missing:
        return accumulate_incomplete(factors, x, weights, labels, shards=shards)
    limit = block_rows(floats_per_row(factors))
    return sum_rows(_block_sums, (factors, basis_loadings(factors)), (x, weights, labels), limit, shards)


def basis_loadings(factors: Prepared) -> Array:
    """W T^-1 = F'^-1 U (D, L): the loadings of u."""
    return factors.root.upper_solve(factors.projection)


def _block_sums(operands: Tree, block: Block, is_new: Array) -> Statistics:
    """The sums over one block: everything whose cost grows with the number of rows."""
    factors, loadings = operands
    x, weights, labels = block
    weights = jnp.where(is_new, weights, 0)
    centered = center_rows(factors, x)
    t = project_rows(factors, centered)
    lat_dim = t.shape[1]
    features, logits = _logits(factors, t, labels)
    evidence, _, responsibilities = normalize_logits(logits)
    gain = posterior_gain(factors, responsibilities, t)
    residual = centered - matmul(t + gain, loadings.T)
    responsibilities = responsibilities * weights[:, None]
    by_component = matmul(responsibilities.T, features)
    # a column of ones beside u^ gives the sum of residuals by the same product
    posterior_mean = jnp.concatenate([t + gain, jnp.ones_like(t[:, :1])], axis=-1) * weights[:, None]
    by_latent = matmul(posterior_mean.T, residual)
    both = jnp.concatenate([t, gain], axis=-1)
    return Statistics(
        count=jnp.sum(weights),
        residual=by_latent[lat_dim],
        residual_square=type(factors.root).second_moment(residual, weights),
        cross=by_latent[:lat_dim].T,
        responsibilities=jnp.sum(responsibilities, axis=0),
        latent=by_component[:, :lat_dim],
        latent_square=by_component[:, lat_dim:],
        pooled_square=matmul((weights[:, None] * both).T, both),
        evidence=jnp.sum(weights * evidence),
    )


@jit(static_argnames="shards")
def measure(
    factors: Prepared, x: Array, weights: Array, labels: Array | None = None, *, shards: Shards = None
) -> Densities:
    """The pass of `accumulate` at a third of the K-sized products, for a model that takes no M-step."""
    limit = block_rows(floats_per_row(factors))
    return sum_rows(_block_densities, factors, (x, weights, labels), limit, shards)


def _block_densities(factors: Tree, block: Block, is_new: Array) -> Densities:
    x, weights, labels = block
    weights = jnp.where(is_new, weights, 0)
    centered = center_rows(factors, x)
    t = project_rows(factors, centered)
    evidence, _, responsibilities = normalize_logits(_logits(factors, t, labels)[1])
    return Densities(
        count=jnp.sum(weights),
        responsibilities=jnp.sum(responsibilities * weights[:, None], axis=0),
        log_likelihood=jnp.sum(weights * (shared_log_density(factors, centered, t) + evidence)),
    )


def _logits(factors: Prepared, t: Array, labels: Array | None) -> tuple[Array, Array]:
    """Latent features (B, L + L2), and logits (B, K), minus infinity where the component is known to be another."""
    features = latent_features(t, squares_only=factors.is_diagonal)
    logits = component_logits(factors, features)
    if labels is not None:
        chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        logits = jnp.where((labels < 0)[:, None] | chosen, logits, -jnp.inf)
    return features, logits


def log_likelihood(factors: Prepared, statistics: Statistics | IncompleteStatistics | Densities) -> Array:
    """sum_i v_i log p(x_i) () from the sums of a pass with the same model.

    With t = U'r, u^ = t + g and V'V = I - U'U:  |r - U t|^2 + |V t|^2 = |r - U u^|^2 + |V u^|^2 - |g|^2.
    """
    if not isinstance(statistics, Statistics):
        return statistics.log_likelihood
    tt, tg, gg = statistics.pooled()
    latent = tt + tg + tg.T + gg
    square = trace_product(factors.precision, statistics.residual_square)
    square = square + jnp.sum(matmul(factors.prior_root, latent) * factors.prior_root) - jnp.trace(gg)
    return statistics.count * factors.offset + statistics.evidence - square / 2


def component_sums(factors: Prepared, statistics: Statistics) -> tuple[Array, Array, Array]:
    """Sums of gamma E[u | k, x], gamma (Cov[u | k, x] + g_k g_k') and gamma E[u u' | k, x], with E[u | k, x] = t + g_k.

    Here g_k = linear_k - curvature_k t and Cov[u | k, x] = C_k. The second is the part of the third that stays small
    where t is large. Shapes (K, L) and (K, L, L); of diagonal component matrices the diagonals (K, L).
    """
    n, total = statistics.responsibilities, statistics.latent
    linear, curvature, covariance = factors.linear, factors.curvature, factors.covariance
    pull = component_product(curvature, total)
    if covariance.ndim == 2:
        square = statistics.latent_square
        spread = n[:, None] * (covariance + linear**2) - 2 * linear * pull + curvature**2 * square
        mixed = 2 * (total * linear - curvature * square)
    else:
        square = symmetric_matrices(statistics.latent_square)
        bent = matmul(curvature, square)
        crossed = outer(linear, pull)
        spread = n[:, None, None] * (covariance + outer(linear, linear)) - crossed - transpose(crossed)
        spread = spread + matmul(bent, curvature)
        mixed = outer(linear, total) - bent
        mixed = mixed + transpose(mixed)
    return total + n[:, None] * linear - pull, spread, spread + mixed + square


def residual_mean(factors: Prepared, statistics: Statistics | IncompleteStatistics) -> ResidualMoments:
    """Average statistics of (q, y, z) with q = x - b - W y, for the M-step. Full component matrices only."""
    if isinstance(statistics, IncompleteStatistics):
        return statistics.residual_mean(factors)
    count, t_inverse = statistics.count, factors.inverse_basis
    loadings = basis_loadings(factors)
    first, spread, second = component_sums(factors, statistics)
    *_, gg = statistics.pooled()
    # E[q | x] = e, Cov[q, u | x] = -W Cov[u | x], Cov[q | x] = W Cov[u | x] W'
    posterior = symmetrize(jnp.sum(spread, axis=0) - gg) / count
    kind = type(statistics.residual_square)
    noise = jax.tree.map(lambda total: total / count, statistics.residual_square)
    noise = jax.tree.map(jnp.add, noise, kind.project_product(matmul(loadings, posterior), loadings))
    return ResidualMoments(
        observable_mean=statistics.residual / count,
        observable_second_moment=noise,
        cross_moment=matmul(statistics.cross / count - matmul(loadings, posterior), t_inverse.T),
        weights=statistics.responsibilities / count,
        weighted_means=matmul(first, t_inverse.T) / count,
        weighted_second_moments=PositiveDefinite(
            matmul(matmul(t_inverse[None], second), t_inverse.T[None]) / count,
        ),
    )


@jit
def _statistics_to_mean(natural: Natural, factors: Prepared, statistics: Statistics) -> Mean:
    """Average statistics of (x, y, z), in the model's own latent basis."""
    structure = Structure.of(natural.posterior_precision)
    count, t_inverse, bias = statistics.count, factors.inverse_basis, factors.bias
    loadings = basis_loadings(factors)
    tt, tg, gg = statistics.pooled()
    latent = tt + tg + tg.T + gg
    first, _, second = component_sums(factors, statistics)
    first, second = matmul(first, t_inverse.T) / count, second / count
    dense: Any = None
    if factors.is_diagonal:
        squares = second * (diagonal(t_inverse) ** 2)[None]
        component = structure.rep.from_diagonal(squares)
    else:
        dense = matmul(matmul(t_inverse[None], second), t_inverse.T[None])
        component = structure.rep.project(dense)
    # x - b = e + W^ u^, with W^ the loadings of u
    kind = type(statistics.residual_square)
    latent_mean = jnp.sum(first, axis=0)
    shift = statistics.residual / count + matmul(loadings, matmul(factors.basis, latent_mean))
    signal = matmul(loadings, latent)
    spread = kind.project_product(
        jnp.concatenate([loadings, statistics.cross, signal], axis=-1),
        jnp.concatenate([statistics.cross, loadings, loadings], axis=-1),
    )
    # E[x x'] = E[(x - b)(x - b)'] + b E[x - b]' + E[x] b'
    offset = kind.project_product(jnp.stack([bias, bias + shift], axis=-1), jnp.stack([shift, bias], axis=-1))
    return Mean(
        observable_mean=bias + shift,
        observable_second_moment=jax.tree.map(
            lambda square, rest, shifted: (square + rest) / count + shifted, statistics.residual_square, spread, offset
        ),
        cross_moment=matmul(statistics.cross + signal, t_inverse.T) / count + outer(bias, latent_mean),
        weights=statistics.responsibilities / count,
        weighted_means=first,
        weighted_second_moments=component,
        pooled_second_moment=PositiveDefinite(jnp.sum(dense, axis=0)) if structure.has_base else None,  # type: ignore[arg-type]
    )


@public
def whiten_prior(mean: Mean) -> Mean:
    """Statistics in the latent basis y' = H^-1 (y - E[y]), H H' = Cov(y), in which y has mean 0 and covariance I.

    The basis is not identifiable: p(x) is unchanged. With restricted second moments only what their kind allows: one
    common scale for `Scale`, one for each axis for another diagonal kind and for a shared base.

    Args:
        mean: expected statistics.

    Returns:
        `Mean` of the same kinds.

    Raises:
        TypeError: if `mean` is of another coordinate type.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> whitened = whiten_prior(expected_statistics(natural, x))
        >>> bool(abs(whitened.weighted_second_moments.entries.sum(axis=0) - jnp.eye(2)).max() < 1e-4)  # E[y y'] = I
        True
    """
    check_mean(mean)
    second = mean.weighted_second_moments
    center = jnp.sum(mean.weighted_means, axis=0)
    spread = second.project(outer(center, center))
    covariance = jax.tree.map(lambda total, shift: jnp.sum(total, axis=0) - shift, second, spread)
    inverse = inverse_lower(covariance.cholesky().dense())

    def whiten(square: Kind, weights: Array, means: Array) -> Kind:
        """Weighted second moments about the centre, in the new basis."""
        # w E[(y-c)(y-c)'] = w E[y y'] - w E[y] c' - c w E[y]' + w c c'
        mixed = outer(means - outer(weights, center) / 2, jnp.broadcast_to(center[None], means.shape))
        centered: Kind = jax.tree.map(jnp.subtract, square, square.project(mixed + transpose(mixed)))
        return centered.whitened(covariance)

    pooled = mean.pooled_second_moment
    if pooled is not None:
        one = jnp.ones_like(mean.weights[:1])
        pooled = PositiveDefinite(whiten(PositiveDefinite(pooled.entries[None]), one, center[None]).entries[0])
    return dataclasses.replace(
        mean,
        cross_moment=matmul(mean.cross_moment - outer(mean.observable_mean, center), inverse.T),
        weighted_means=matmul(mean.weighted_means - outer(mean.weights, center), inverse.T),
        weighted_second_moments=whiten(second, mean.weights, mean.weighted_means),
        pooled_second_moment=pooled,
    )
