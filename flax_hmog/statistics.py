"""Expected statistics of data under a model: the E-step, and the latent basis they are expressed in."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.checks import check_observations, check_shape, check_type, is_concrete
from flax_hmog.conversions import with_prior
from flax_hmog.coordinates import Mean, Natural, Statistics, observable_bias, outer, structure, symmetrize
from flax_hmog.covariances import (
    Array,
    Covariance,
    Diagonal,
    PositiveDefinite,
    Rep,
    Scale,
    diagonal,
    inverse_lower,
    matmul,
    pytree,
    trace_product,
    transpose,
)
from flax_hmog.factors import (
    Factors,
    block_rows,
    component_logits,
    component_product,
    factorise,
    posterior_rows,
    project_rows,
    quadratic_features,
    unpack_quadratic,
)


@pytree
class RowSums:
    """Weighted sums over rows, as they come out of the matrix products.

    With v the sample weights, e = x - center, t the latent coordinates, r responsibilities and w = E[u | x].

    Attributes:
        count: sum of v ().
        observed: sum of v e (D,).
        observed_square: sum of v e e', of kind `obs_rep`.
        cross: sum of v e w' (D, L).
        responsibilities: sum of v r (K,).
        latent: sum of v r t (K, L).
        latent_square: sum of v r times the quadratic features of t (K, F).
        evidence: sum of v (|t|^2 / 2 + logsumexp of the logits) ().
    """

    count: Array
    observed: Array
    observed_square: Covariance
    cross: Array
    responsibilities: Array
    latent: Array
    latent_square: Array
    evidence: Array


def expected_statistics(natural: Natural, x: Any, weights: Any = None) -> Mean:
    """E-step: average of E[s(x, y, z) | x] over observations.

    Args:
        natural: the model.
        x: observations (N, D); any leading dimensions are samples.
        weights: sample weights, the leading shape of `x`; None counts every sample once.

    Returns:
        `Mean`, with latent second moments in the kind of the posterior precisions.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: for wrong shapes, entries that are not finite, negative weights or a weight sum of 0.
    """
    natural, x, weights = check_samples("expected_statistics", natural, x, weights)
    statistics, _ = accumulate(natural, x, weights, observable_bias(natural))
    return statistics.mean()


def check_samples(caller: str, natural: Any, x: Any, weights: Any) -> tuple[Natural, Array, Array]:
    """The model with its prior, samples as rows (N, D) and their weights (N,)."""
    check_type(caller, "natural", natural, Natural, "Convert with moments_to_natural or mean_to_natural.")
    interaction = natural.interaction
    x = check_observations(caller, x, interaction.shape[0], interaction.dtype)
    if x.size == 0:
        raise ValueError(f"{caller}: `x` must hold at least one sample (N, D); got shape {x.shape}. Give more samples.")
    weights = check_weights(caller, weights, x.shape[:-1], interaction.dtype)
    return with_prior(natural, caller), x.reshape(-1, x.shape[-1]), weights.reshape(-1)


def check_weights(caller: str, weights: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Sample weights as an array of this shape; ones if None.

    Raises:
        ValueError: for another shape, entries that are negative or not finite, or a sum of 0.
    """
    if weights is None:
        return jnp.ones(shape, dtype)
    check_shape(caller, "weights", weights, shape)
    weights = jnp.asarray(weights, dtype)
    if is_concrete(weights):
        values = np.asarray(weights)
        if not np.isfinite(values).all() or values.min() < 0 or not values.any():
            raise ValueError(
                f"{caller}: `weights` must be finite, at least 0 and not all 0; got a smallest weight of "
                f"{values.min():.3g}. Use 0 to leave a sample out."
            )
    return weights


@jax.jit
def accumulate(
    natural: Natural, x: Array, weights: Array, center: Array, labels: Array | None = None
) -> tuple[Statistics, Array]:
    """Sums of expected statistics over rows, and the sum of weighted log-densities.

    Args:
        natural: the model, with its prior.
        x: observations (N, D).
        weights: sample weights (N,).
        center: the fixed point (D,) about which x is taken.
        labels: known components (N,), -1 where unknown; their responsibilities are clamped and the density of such a
            row is log p(x, z = label).

    Returns:
        `Statistics` and sum_i v_i log p(x_i) ().
    """
    factors = factorise(natural)
    count = x.shape[0]
    rows = min(count, block_rows(factors))
    blocks = -(-count // rows)

    def block_sums(index: Array | int) -> RowSums:
        # the last block starts early so that all have one shape; rows already seen get weight 0
        start = jnp.minimum(index * rows, count - rows)
        x_block, weights_block, labels_block = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, start, rows), (x, weights, labels)
        )
        weights_block = jnp.where(jnp.arange(rows) + start >= index * rows, weights_block, 0)
        kind = type(natural.observable_precision)
        return _row_sums(factors, kind, center, x_block, weights_block, labels_block)

    if blocks == 1:
        sums = block_sums(0)
    else:
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(block_sums, 0))
        add = lambda total, index: (jax.tree.map(jnp.add, total, block_sums(index)), None)  # noqa: E731
        sums, _ = jax.lax.scan(add, zeros, jnp.arange(blocks))
    statistics = Statistics(sums.count, _latent_sums(natural, factors, sums), center)
    # sum_i v_i |F'(x_i - b)|^2 = <Psi^-1, sum_i v_i (x_i - b)(x_i - b)'>
    shift = center - factors.bias
    about_bias = jax.tree.map(
        jnp.add,
        sums.observed_square,
        type(sums.observed_square).project_product(
            jnp.stack([sums.observed, sums.count * shift], axis=-1),
            jnp.stack([shift, shift + sums.observed / sums.count], axis=-1),
        ),
    )
    square = trace_product(natural.observable_precision, about_bias, x.shape[1])
    return statistics, sums.count * factors.offset + sums.evidence - square / 2


def _row_sums(factors: Factors, kind: Rep, center: Array, x: Array, weights: Array, labels: Array | None) -> RowSums:
    """The sums over one block: everything whose cost grows with the number of rows."""
    _, t = project_rows(factors, x)
    logits = component_logits(factors, t)
    if labels is not None:
        chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        logits = jnp.where((labels < 0)[:, None] | chosen, logits, -jnp.inf)
    evidence = jax.nn.logsumexp(logits, axis=-1)
    responsibilities = jax.nn.softmax(logits, axis=-1) * weights[:, None]
    centered = x - center[None]
    return RowSums(
        count=jnp.sum(weights),
        observed=matmul(weights, centered),
        observed_square=kind.second_moment(centered, weights),
        cross=matmul(centered.T, posterior_rows(factors, responsibilities, t)),
        responsibilities=jnp.sum(responsibilities, axis=0),
        latent=matmul(responsibilities.T, t),
        latent_square=matmul(responsibilities.T, quadratic_features(t, factors.covariance)),
        evidence=jnp.sum(weights * (evidence + jnp.sum(t**2, axis=-1) / 2)),
    )


def _latent_sums(natural: Natural, factors: Factors, sums: RowSums) -> Mean:
    """Sums of the family's statistics of (x - center, y, z), in the model's own latent basis."""
    rep, shared_base = structure(natural)
    n, h, c, t_inverse = sums.responsibilities, factors.location, factors.covariance, factors.inverse_basis
    # sum r E[u | x, k] = C_k (n h~ + sum r t)
    means = component_product(c, n[:, None] * h + sums.latent)
    dense: Any = None
    second: Covariance
    if c.ndim == 2:
        # sum r E[u^2 | x, k] = n C_k + C_k^2 sum r (h~ + t)^2
        square = n[:, None] * h**2 + 2 * h * sums.latent + sums.latent_square
        squares = (n[:, None] * c + c**2 * square) * (diagonal(t_inverse) ** 2)[None]
        second = Scale(jnp.mean(squares, axis=-1)) if rep is Scale else Diagonal(squares)
    else:
        mixed = outer(h, sums.latent)
        square = n[:, None, None] * outer(h, h) + mixed + transpose(mixed) + unpack_quadratic(sums.latent_square)
        # sum r E[u u' | x, k] = n C_k + C_k sum r (h~ + t)(h~ + t)' C_k
        dense = n[:, None, None] * c + matmul(matmul(c, square), c)
        dense = matmul(matmul(t_inverse[None], dense), t_inverse.T[None])
        second = rep.project(dense)
    return Mean(
        observable_mean=sums.observed,
        observable_second_moment=sums.observed_square,
        cross_moment=matmul(sums.cross, t_inverse.T),
        weights=n,
        weighted_means=matmul(means, t_inverse.T),
        weighted_second_moments=second,
        pooled_second_moment=PositiveDefinite(jnp.sum(dense, axis=0)) if shared_base else None,  # type: ignore[arg-type]
    )


def whiten_prior(mean: Mean) -> Mean:
    """Statistics in the latent basis y' = H^-1 (y - E[y]), H H' = Cov(y), in which y has mean 0 and covariance I.

    The basis is not identifiable: p(x) is unchanged. With restricted second moments only what their kind allows: per
    axis for `Diagonal` and for a shared base, one common scale for `Scale`.

    Args:
        mean: expected statistics.

    Returns:
        `Mean` of the same kinds.

    Raises:
        TypeError: if `mean` is of another coordinate type.
    """
    check_type("whiten_prior", "mean", mean, Mean, "Convert with natural_to_mean.")
    second = mean.weighted_second_moments
    rep, lat_dim = type(second), mean.weighted_means.shape[-1]
    center = jnp.sum(mean.weighted_means, axis=0)
    spread = rep.project(outer(center, center))
    covariance = jax.tree.map(lambda total, shift: jnp.sum(total, axis=0) - shift, second, spread)
    inverse = inverse_lower(covariance.cholesky().dense(lat_dim))

    def whiten(square: Covariance, weights: Array, means: Array) -> Covariance:
        # w E[(y-c)(y-c)'] = w E[y y'] - w E[y] c' - c w E[y]' + w c c'
        mixed = outer(means - outer(weights, center) / 2, jnp.broadcast_to(center[None], means.shape))
        kind = type(square)
        centered = jax.tree.map(jnp.subtract, square, kind.project(mixed + transpose(mixed)))
        if kind is PositiveDefinite:
            return PositiveDefinite(symmetrize(matmul(matmul(inverse[None], centered.entries), inverse.T[None])))
        return kind(centered.entries / covariance.entries[None])

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
