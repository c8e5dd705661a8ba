"""The E-step where few responsibilities count, and passes that keep them.

Components whose bound by the screen is low are left out, and the sum of their bounds is what at most was dropped. Rows
that drop more than a tolerance look at all components. All sums are products over pairs of a row and a component.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_hmog.data.rows import block_rows, map_rows
from flax_hmog.data.shards import Shards, on_shards
from flax_hmog.em.pairs import Pairs, component_matrices, pair_logits, pair_sums, sorted_pairs
from flax_hmog.em.screen import ROUNDING, Screen, make_screen, upper_bounds
from flax_hmog.em.statistics import Statistics, basis_loadings
from flax_hmog.model.coordinates import Prepared
from flax_hmog.model.kinds import Array, Kind, matmul, pytree
from flax_hmog.model.prepared import (
    center_rows,
    component_logits,
    distinct_entries,
    floats_per_row,
    latent_features,
    project_rows,
)

FAR = 40.0  # nats below the best bound of a row: a component this far is not looked at, but counted as dropped
NEGLIGIBLE = 1e-9  # responsibilities below this are dropped, and counted as dropped
DENSE_BLOCK = 256  # rows that look at all components at a time


@pytree
class SparseInfo:
    """Bounds of the mass that a sparse pass left out, and the rows and pairs it looked at.

    Attributes:
        largest_dropped: largest bound of what a row's log-density lost, over rows with a weight, in nats ().
        mean_dropped: weighted mean of these bounds ().
        dense_rows: rows that looked at all components ().
        uncertain_rows: rows whose bound is above the tolerance ().
        pairs: pairs of a row and a component that count ().

    Example:
        >>> from flax_hmog import fit_em
        >>> from flax_hmog.toy import head, x
        >>> result = fit_em(head, x, jax.random.key(0), max_steps=1, accelerate=True)
        >>> result.sparse is None  # so few components take plain steps
        True
    """

    largest_dropped: Array
    mean_dropped: Array
    dense_rows: Array
    uncertain_rows: Array
    pairs: Array


@pytree
class Assignments:
    """Components that count in a pass with a model, and the rows about that model: the input of kept passes.

    A later model explains x = e + W y + b, where e, W, y and b are of this one, by products with e alone. What moves
    between the models is small, so that nothing cancels.

    Attributes:
        pairs: the components that count (N, C).
        residual: e = x - b - W y (N, D).
        latent: y = E[y | x] (N, L).
        loadings: W (D, L).
        bias: b (D,).
        sums: weighted sums of e (D,), of e e', of kind `obs_rep`, and of e y' (D, L), over all shards.
    """

    pairs: Pairs
    residual: Array
    latent: Array
    loadings: Array
    bias: Array
    sums: tuple[Array, Kind, Array]


def sparse_pass(
    factors: Prepared,
    x: Array,
    weights: Array,
    labels: Array | None = None,
    *,
    rank: int,
    slots: int = 8,
    dense_rows: int = 0,
    tolerance: float = 1e-6,
    shards: Shards = None,
) -> tuple[Statistics, SparseInfo, Assignments]:
    """The E-step with few components per row: the `Statistics` of `accumulate`, but for what `SparseInfo` bounds.

    Args:
        factors: of the model, with full component matrices.
        x: observations (N, D).
        weights: sample weights (N,).
        labels: known components (N,), -1 where unknown.
        rank: directions of the screen.
        slots: components per row at most.
        dense_rows: rows per shard at most that look at all components.
        tolerance: nats that a row may drop by its bound before it does.
        shards: shards of the rows.

    Returns:
        `Statistics`, `SparseInfo`, and the `Assignments` for `kept_pass`.
    """
    slots = min(slots, factors.constant.shape[0])
    operands = factors, make_screen(factors, min(rank, factors.linear.shape[1]))
    local = partial(_sparse_rows, slots=slots, dense_rows=dense_rows, tolerance=tolerance)
    (statistics, info), largest, own = _on_shards(local, operands, (x, weights, labels), shards)
    mean = info.mean_dropped / statistics.count
    pairs, residual, latent = own
    assignments = Assignments(
        pairs=pairs,
        residual=residual,
        latent=latent,
        loadings=matmul(basis_loadings(factors), factors.basis),
        bias=factors.bias,
        sums=(statistics.residual, statistics.residual_square, matmul(statistics.cross, factors.inverse_basis.T)),
    )
    return statistics, dataclasses.replace(info, largest_dropped=largest, mean_dropped=mean), assignments


def kept_pass(factors: Prepared, assignments: Assignments, weights: Array, *, shards: Shards = None) -> Statistics:
    """The E-step with the components that counted in a pass before.

    `log_likelihood` of the result is a free energy, which no M-step lowers and which is at most the sum of
    log-densities: sum_i v_i log sum_k p(x_i, z = k) over the components of row i.

    Args:
        factors: of the model, with full component matrices.
        assignments: of `sparse_pass`, with a model from which this one came.
        weights: the weights of the rows (N,).
        shards: shards of the rows.

    Returns:
        `Statistics`.
    """
    a = assignments
    rows = weights, a.pairs, a.residual, a.latent
    shift, turn = a.bias - factors.bias, a.loadings - matmul(basis_loadings(factors), factors.basis)
    sums, _, _ = _on_shards(_kept_rows, (factors, a.loadings, shift), rows, shards)
    statistics: Statistics = sums[0]
    by_latent, square = sums[1:]
    # e' = e + M h with M = (b - b', W, W - W') and h = (1, y - y', y'), and sums of e h'
    residual, residual_square, cross = a.sums
    moved = jnp.concatenate([shift[:, None], a.loadings, turn], axis=1)
    products = jnp.concatenate([residual[:, None], cross - by_latent, by_latent], axis=1)
    change = matmul(moved, square)
    kind = type(residual_square)
    added = kind.project_product(
        jnp.concatenate([products, moved], axis=1), jnp.concatenate([moved, products + change], axis=1)
    )
    lat_dim = by_latent.shape[1]
    return dataclasses.replace(
        statistics,
        residual=residual + change[:, 0],
        residual_square=jax.tree.map(jnp.add, residual_square, added),
        cross=matmul(by_latent + change[:, 1 + lat_dim :], factors.basis.T),
    )


def _on_shards(
    function: Callable[[Any, Any], tuple[Any, ...]], operands: Any, rows: Any, shards: Shards
) -> tuple[Any, ...]:
    """`function(operands, rows)` on the rows of every shard: sums, which are added up once, largest ones, and own."""
    if shards is None:
        return function(operands, rows)
    names = shards[1]

    def on_one_device(operands: Any, rows: Any) -> tuple[Any, ...]:
        sums, largest, own = function(operands, rows)
        return jax.lax.psum(sums, names), jax.lax.pmax(largest, names), own

    specs = PartitionSpec(), PartitionSpec(), PartitionSpec(names)
    return on_shards(on_one_device, operands, rows, shards, specs, check_vma=False)


def _sparse_rows(
    operands: tuple[Prepared, Screen], rows: tuple[Any, ...], *, slots: int, dense_rows: int, tolerance: float
) -> tuple[Any, ...]:
    """`sparse_pass` over the rows of one shard."""
    factors, _ = operands
    x, weights, labels = rows
    n_components = factors.constant.shape[0]
    limit = block_rows(floats_per_row(factors))
    t, index, rest = map_rows(partial(_screened, slots=slots), operands, x, limit, None)
    if labels is not None:
        known = (labels >= 0)[:, None]
        only = jnp.where(jnp.arange(slots)[None] == 0, labels[:, None], n_components)
        index, rest = jnp.where(known, only, index), jnp.where(known[:, 0], -jnp.inf, rest)
    matrices, with_ones = component_matrices(factors), _with_ones(t)
    logits = pair_logits(matrices, with_ones, sorted_pairs(index, n_components))
    evidence = jax.nn.logsumexp(logits, axis=-1)
    beyond = (_dropped(rest, evidence) > tolerance) & (weights > 0)
    index, logits, rest, n_dense = _look_again(factors, t, index, logits, rest, beyond, dense_rows)
    # what does not count is dropped, and its logits are counted so
    kept = logits > jax.nn.logsumexp(logits, axis=-1, keepdims=True) + math.log(NEGLIGIBLE)
    rest = jnp.logaddexp(rest, jax.nn.logsumexp(jnp.where(kept, -jnp.inf, logits), axis=-1))
    pairs = sorted_pairs(jnp.where(kept, index, n_components), n_components)
    evidence, gain, squares = pair_sums(matrices, with_ones, pairs, weights)
    residual, (by_latent, square) = _residuals(factors, x, t + gain, weights)
    dropped = jnp.where(weights > 0, _dropped(rest, evidence), 0)
    counts = (jnp.sum(dropped > tolerance), n_dense, pairs.starts[-1])
    uncertain, looked, counted = (count.astype(jnp.int32) for count in counts)
    info = SparseInfo(jnp.zeros(()), jnp.sum(weights * dropped), looked, uncertain, counted)
    statistics = dataclasses.replace(
        _latent_statistics(t, gain, squares, weights),
        residual=by_latent[-1],
        residual_square=square,
        cross=by_latent[:-1].T,
        evidence=jnp.sum(weights * evidence),
    )
    own = pairs, residual, matmul(t + gain, factors.inverse_basis.T)
    return (statistics, info), jnp.max(dropped), own


def _kept_rows(operands: tuple[Any, ...], rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """Over the rows of one shard: `Statistics` but for what needs e, sum of v e y'' (D, L) and of v h h'."""
    factors, loadings, shift = operands
    weights, pairs, residual, old = rows
    projector = factors.projector
    # t = (F U)'(x - b) with x - b = e + W y + (b_old - b)
    t = matmul(residual.astype(projector.dtype), projector, preferred_element_type=residual.dtype)
    exact = projector.astype(residual.dtype)
    t = t + matmul(old, matmul(loadings.T, exact)) + matmul(shift, exact)[None]
    evidence, gain, squares = pair_sums(component_matrices(factors), _with_ones(t), pairs, weights)
    latent = matmul(t + gain, factors.inverse_basis.T)
    both = jnp.concatenate([jnp.ones_like(t[:, :1]), old - latent, latent], axis=1)
    weighted = weights[:, None] * both
    by_latent = matmul(weighted[:, 1 + t.shape[1] :].T, residual).T
    sums = _latent_statistics(t, gain, squares, weights)
    sums = dataclasses.replace(sums, evidence=jnp.sum(weights * evidence))
    return (sums, by_latent, matmul(weighted.T, both)), (), ()


def _latent_statistics(t: Array, gain: Array, squares: Array, weights: Array) -> Statistics:
    """`Statistics` of t, g and the sums of v gamma (t, 1)(t, 1)', all others missing."""
    lat_dim = t.shape[1]
    both = jnp.concatenate([t, gain], axis=-1)
    missing: Any = None
    return Statistics(
        count=jnp.sum(weights),
        residual=missing,
        residual_square=missing,
        cross=missing,
        responsibilities=squares[:, lat_dim, lat_dim],
        latent=squares[:, lat_dim, :lat_dim],
        latent_square=distinct_entries(squares[:, :lat_dim, :lat_dim]),
        pooled_square=matmul((weights[:, None] * both).T, both),
        evidence=missing,
    )


def _residuals(factors: Prepared, x: Array, mean: Array, weights: Array) -> tuple[Array, Any]:
    """The residuals e = x - b - W E[y | x] (N, D), and sums of v (u^, 1) e' (L + 1, D) and of v e e'."""
    loadings, count, kind = basis_loadings(factors), x.shape[0], type(factors.root)
    size = min(count, block_rows(3 * x.shape[1]))

    def at(number: Array) -> tuple[Array, Array, Any]:
        start = jnp.minimum(number * size, count - size)
        rows, inner, mass = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (x, mean, weights))
        # the last block overlaps the one before it
        mass = jnp.where(jnp.arange(size) + start >= number * size, mass, 0)
        residual = center_rows(factors, rows) - matmul(inner, loadings.T)
        by_latent = matmul((_with_ones(inner) * mass[:, None]).T, residual)
        return start, residual, (by_latent, kind.second_moment(residual, mass))

    def one_block(number: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        start, residual, sums = at(number)
        out = jax.lax.dynamic_update_slice_in_dim(carry[0], residual, start, 0)
        return out, jax.tree.map(jnp.add, carry[1], sums)

    shapes = jax.eval_shape(lambda: at(jnp.int32(0))[2])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    out = jnp.zeros(x.shape, loadings.dtype)
    return cast(tuple[Array, Any], jax.lax.fori_loop(0, -(-count // size), one_block, (out, zeros)))


def _projected(factors: Prepared, x: Array) -> Array:
    return project_rows(factors, center_rows(factors, x))


def _with_ones(t: Array) -> Array:
    return jnp.concatenate([t, jnp.ones_like(t[:, :1])], axis=1)


def _dropped(rest: Array, evidence: Array) -> Array:
    """Nats that log-densities lose where components with this log-sum are left out."""
    return jnp.log1p(jnp.exp(jnp.minimum(rest - evidence, 80)))


def _screened(operands: tuple[Prepared, Screen], x: Array, *, slots: int) -> tuple[Array, Array, Array]:
    """Block of rows: t (B, L), the components with the highest bounds (B, C), the log-sum of all others' (B,)."""
    factors, screen = operands
    t = _projected(factors, x)
    bounds = upper_bounds(screen, t)
    n_components = bounds.shape[1]
    index, values, rest = _best(bounds, slots)
    near = values > jnp.max(values, axis=-1, keepdims=True) - FAR
    rest = jnp.logaddexp(rest, jax.nn.logsumexp(jnp.where(near, -jnp.inf, values), axis=-1))
    return t, jnp.where(near, index, n_components), rest


def _best(values: Array, slots: int) -> tuple[Array, Array, Array]:
    """The largest of every row: indices and values (B, C), and the log-sum of all others (B,)."""
    # XLA takes a part that is cut from the result for a sort of all values, many times slower
    top, index = jax.lax.top_k(values, slots)
    edge = jnp.min(top, axis=-1, keepdims=True)
    # the last one is among those that are no larger than itself
    total = jnp.sum(jnp.where(values <= edge, jnp.exp(values - edge), 0), axis=-1)
    others = jnp.maximum(total - 1, 0) + ROUNDING * jnp.finfo(values.dtype).eps * total
    is_cut = slots < values.shape[1]
    return index, top, edge[:, 0] + jnp.log(others) if is_cut else jnp.full_like(total, -jnp.inf)


def _look_again(
    factors: Prepared,
    t: Array,
    index: Array,
    logits: Array,
    rest: Array,
    beyond: Array,
    capacity: int,
) -> tuple[Array, Array, Array, Array]:
    """Slots of rows `beyond` the tolerance from the logits of all components, and the number of these rows ()."""
    slots, count = index.shape[1], index.shape[0]
    capacity = min(capacity, count)
    if capacity == 0:
        return index, logits, rest, jnp.int32(0)
    block = min(capacity, DENSE_BLOCK)
    (rows,) = jnp.nonzero(beyond, size=-(-capacity // block) * block, fill_value=count)
    n_rows = jnp.minimum(jnp.sum(beyond), capacity)

    def look(number: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        here = jax.lax.dynamic_slice_in_dim(rows, number * block, block)
        all_logits = component_logits(factors, latent_features(t[jnp.minimum(here, count - 1)]))
        found = _best(all_logits, slots)
        return tuple(old.at[here].set(new, mode="drop") for old, new in zip(carry, found, strict=True))

    index, logits, rest = jax.lax.fori_loop(0, (n_rows + block - 1) // block, look, (index, logits, rest))
    return index, logits, rest, n_rows
