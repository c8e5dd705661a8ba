"""The mean log-density of a data set and its gradient, both from the sums of one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from flax_hmog.data.containers import is_in_blocks
from flax_hmog.data.rows import block_rows, check_samples, map_rows
from flax_hmog.data.shards import Shards, row_shards
from flax_hmog.data.sources import entered
from flax_hmog.em.statistics import Statistics, accumulate, basis_loadings, log_likelihood
from flax_hmog.inference.missing import infer_incomplete
from flax_hmog.model.checks import is_concrete, may_miss, public
from flax_hmog.model.coordinates import Natural, Prepared
from flax_hmog.model.incomplete import Conditioner, incomplete_block_rows
from flax_hmog.model.kinds import Array, matmul, trace_product
from flax_hmog.model.prepared import (
    center_rows,
    component_logits,
    floats_per_row,
    latent_features,
    normalize_logits,
    posterior_gain,
    prepare,
    project_rows,
    quadratic_coefficients,
    shared_log_density,
)
from flax_hmog.model.typed import Data, Samples, Tree, jit


@public
def mean_log_density(
    natural: Natural | Prepared, x: Data, weights: Samples | None = None, *, missing: str = "refuse"
) -> Float[Array, ""]:
    """Weighted average of log p(x) over observations, in nats: minus the loss that fits a model to data.

    Its gradient is that of the average of `log_observable_density`, but it comes from the statistics of the same pass
    that gives the value, as in EM: posterior less prior statistics. Memory stays O(block + parameters) for any N.

    Args:
        natural: the model.
        x: observations (N, D) of any kind that holds rows, sharded or not; any leading dimensions are samples.
        weights: sample weights, the leading shape of `x`; None counts every sample once.
        missing: as in `infer`. Derivatives with respect to missing entries are 0.

    Returns:
        The average (), in nats.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: for wrong shapes, entries that are not finite, negative weights or a weight sum of 0.

    Example:
        >>> from flax_hmog.toy import natural, output, x
        >>> bool(abs(mean_log_density(natural, x) - output.log_density.mean()) < 1e-3)
        True
    """
    if not is_in_blocks(x) or not is_concrete(natural):
        natural, x, weights = check_samples(natural, x, weights)
        return _mean_log_density(natural, x, weights, row_shards(x), may_miss())
    total = count = jnp.zeros(())
    for model, rows, shards, share, _ in entered(natural, x, weights):
        total, count = total + _summed(model, rows, jnp.asarray(share), shards, may_miss()), count + jnp.sum(share)
    return total / count


@jit(static_argnames=("shards", "missing"))
def _mean_log_density(natural: Natural | Prepared, x: Array, weights: Array, shards: Shards, missing: bool) -> Array:
    return _summed(prepare(natural), x, weights, shards, missing) / jnp.sum(weights)


@jit(static_argnames=("shards", "missing"))
def _summed(factors: Prepared, x: Array, weights: Array, shards: Shards, missing: bool) -> Array:
    if not missing:
        return summed_log_density(factors, x, weights, shards)
    density: Callable[..., Array] = lambda conditioner, block: infer_incomplete(conditioner, block).log_density  # noqa: E731
    rows = incomplete_block_rows(factors)
    return jnp.sum(weights * map_rows(density, Conditioner.of(factors), x, rows, shards))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def summed_log_density(factors: Prepared, x: Array, weights: Array, shards: Shards) -> Array:
    """sum_i v_i log p(x_i) (), with derivatives in `factors`, x and v."""
    return log_likelihood(factors, accumulate(factors, x, weights, shards=shards))


@partial(summed_log_density.defjvp, symbolic_zeros=True)
def _summed_log_density_jvp(shards: Shards, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    factors, x, weights = primals
    d_factors, d_x, d_weights = tangents
    statistics = accumulate(factors, x, weights, shards=shards)
    is_zero: Callable[[Any], bool] = lambda leaf: isinstance(leaf, SymbolicZero)  # noqa: E731
    d_factors = jax.tree.map(lambda d, f: jnp.zeros_like(f) if is_zero(d) else d, d_factors, factors, is_leaf=is_zero)
    tangent = _tangent(factors, statistics, d_factors)
    if not is_zero(d_x) or not is_zero(d_weights):
        rows = block_rows(floats_per_row(factors))
        density, score = map_rows(_density_and_score, (factors, basis_loadings(factors)), x, rows, shards)
        if not is_zero(d_weights):
            tangent = tangent + jnp.sum(d_weights * density)
        if not is_zero(d_x):
            tangent = tangent + jnp.sum(d_x * score * weights[:, None])
    return log_likelihood(factors, statistics), tangent


def _tangent(factors: Prepared, statistics: Statistics, d: Prepared) -> Array:
    """Derivative of the summed log-density along `d`.

    Of log p(x) = offset - (|r - U t|^2 + |V t|^2) / 2 + logsumexp_k(...) with t = U'r, r = F'(x - b): where
    U'U + V'V = I, d/dt = g, d/dr = -F'e, d/dU = F'e u^' + U (g t' + u^ g') and d/dV = -V t t'.
    """
    tt, tg, gg = statistics.pooled()
    by_projection = factors.root.rows_times(statistics.cross.T).T + matmul(factors.projection, tg + tg.T + gg)
    # sum v (x - b) e', as x - b = e + W^ u^, with W^ the loadings of u
    kind = type(factors.root)
    signal = kind.project_product(basis_loadings(factors), statistics.cross)
    moment = jax.tree.map(jnp.add, statistics.residual_square, signal)
    by_root = moment.product(factors.root)
    residual = factors.precision.times(statistics.residual[:, None])[:, 0]
    quadratic = jnp.sum(quadratic_coefficients(d.curvature) * statistics.latent_square)
    return (
        statistics.count * d.offset
        + jnp.sum(residual * d.bias)
        - trace_product(d.root, by_root)
        + jnp.sum(by_projection * d.projection)
        - jnp.sum(matmul(factors.prior_root, tt) * d.prior_root)
        + jnp.sum(statistics.responsibilities * d.constant)
        + jnp.sum(statistics.latent * d.linear)
        - quadratic / 2
    )


def _density_and_score(operands: Tree, x: Array) -> tuple[Array, Array]:
    """Log p(x) (B,) and its derivative in x, -Psi^-1 (x - b - W E[y | x]) (B, D)."""
    factors, loadings = operands
    centered = center_rows(factors, x)
    t = project_rows(factors, centered)
    logits = component_logits(factors, latent_features(t, squares_only=factors.is_diagonal))
    evidence, _, responsibilities = normalize_logits(logits)
    w = t + posterior_gain(factors, responsibilities, t)
    unexplained = centered - matmul(w, loadings.T)
    score = -factors.precision.rows_times(unexplained)
    density = shared_log_density(factors, centered, t) + evidence
    return density, score if factors.frame is None else score / factors.frame.unit[None]
