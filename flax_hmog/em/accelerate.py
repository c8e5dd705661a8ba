"""Fewer passes for the same objective.

Cycles of one pass that finds responsibilities and several that keep them, and squared extrapolation of the models
between cycles (SQUAREM, Varadhan & Roland 2008).
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from flax_hmog.data.rows import Shards
from flax_hmog.em.options import Regularizer
from flax_hmog.em.sparse import Assignments, SparseInfo, frozen_pass, sparse_pass
from flax_hmog.em.step import finish_step
from flax_hmog.model.conversions import moments_to_natural, own_moments
from flax_hmog.model.coordinates import Moments, Natural
from flax_hmog.model.kinds import Array, PositiveDefinite, diagonal, matmul, one_by_one, pytree, transpose
from flax_hmog.model.prepared import prepare
from flax_hmog.model.typed import jit

LONGEST_STEP = 2.5  # of an extrapolation; 1 is none. With longer ones most are rejected


@pytree
class Found:
    """One pass that finds responsibilities.

    Attributes:
        natural: the model after its M-step.
        assignments: the responsibilities.
        info: what was left out.
        objective: penalised log-likelihood per sample of the model before (), without the volume of the frame, and
            without what was left out: it is no higher than that of a dense pass.
    """

    natural: Natural
    assignments: Assignments
    info: SparseInfo
    objective: Array


@jit(static_argnames=("rank", "slots", "dense_rows", "tolerance", "shards", "projection_dtype"))
def find(
    natural: Natural,
    regularizer: Regularizer | None,
    x: Array,
    weights: Array,
    labels: Array | None = None,
    *,
    rank: int,
    slots: int = 8,
    dense_rows: int = 0,
    tolerance: float = 1e-6,
    shards: Shards = None,
    projection_dtype: str | None = None,
) -> Found:
    """A sparse pass with a model and its M-step; arguments as in `sparse_pass` and `prepare`."""
    factors = prepare(natural, projection_dtype)
    statistics, info, assignments = sparse_pass(
        factors, x, weights, labels,
        rank=rank, slots=slots, dense_rows=dense_rows, tolerance=tolerance, shards=shards,
    )  # fmt: skip
    updated, of_model, _, _ = finish_step(factors, statistics, regularizer, natural.frame)
    return Found(updated, assignments, info, of_model.objective)


@jit(static_argnames=("passes", "shards", "projection_dtype"))
def follow(
    found: Found,
    regularizer: Regularizer | None,
    weights: Array,
    *,
    passes: int = 4,
    shards: Shards = None,
    projection_dtype: str | None = None,
) -> tuple[Natural, Array]:
    """More steps with the responsibilities of a pass.

    Args:
        found: of `find`.
        regularizer: pseudo-statistics or None.
        weights: the weights of the rows (N,).
        passes: frozen passes.
        shards: shards of the rows.
        projection_dtype: of `prepare`.

    Returns:
        The model after them, and the free energy per sample before the last of them (). It is no lower than the
        objective of `found`, and no higher than that of the model.
    """

    def step(number: int, carry: tuple[Natural, Array]) -> tuple[Natural, Array]:
        factors = prepare(carry[0], projection_dtype)
        statistics = frozen_pass(factors, found.assignments, weights, shards=shards)
        updated, info, _, _ = finish_step(factors, statistics, regularizer, factors.natural.frame)
        return updated, info.objective

    start = found.natural, found.objective
    return cast(tuple[Natural, Array], jax.lax.fori_loop(0, passes, step, start))


@jit
def beyond(first: Natural, second: Natural, third: Natural) -> Natural:
    """`extrapolate` of three models with one frame."""
    found = extrapolate(own_moments(first), own_moments(second), own_moments(third))
    return moments_to_natural(found).in_frame(third.frame)


@jit
def extrapolate(first: Moments, second: Moments, third: Moments, longest: Array | float = LONGEST_STEP) -> Moments:
    """The model that three successive ones point to.

    With r = second - first and v = (third - second) - r in free coordinates it is first + 2 a r + a^2 v, where
    a = |r| / |v| within [1, longest], one for each of W, b, noise, weights, means and covariances; a = 1 is the third.
    """

    def block(zero: Array, one: Array, two: Array) -> Array:
        r, v = one - zero, two - 2 * one + zero
        square = jnp.sum(v**2)
        ratio = jnp.sqrt(jnp.sum(r**2) / jnp.where(square > 0, square, 1))
        a = jnp.clip(jnp.where(square > 0, ratio, 1), 1, longest)
        return zero + 2 * a * r + a**2 * v

    return _from_free(third, jax.tree.map(block, _to_free(first), _to_free(second), _to_free(third)))


def _to_free(moments: Moments) -> dict[str, Any]:
    """The blocks of a model, without bounds: logarithms of what is positive."""
    noise = moments.noise
    return {
        "loadings": moments.loadings,
        "bias": moments.bias,
        "noise": jnp.log(noise.entries) if noise.is_diagonal else _log_cholesky(noise.entries[None]),
        "weights": jnp.log(moments.weights),
        "means": moments.means,
        "covariances": _log_cholesky(moments.covariances.entries),
    }


def _from_free(like: Moments, free: dict[str, Any]) -> Moments:
    noise, covariances = like.noise, free["covariances"]
    entries = jnp.exp(free["noise"]) if noise.is_diagonal else _square(free["noise"])[0]
    return Moments(
        loadings=free["loadings"],
        bias=free["bias"],
        noise=jax.tree.map(lambda _: entries, noise),
        weights=jax.nn.softmax(free["weights"]),
        means=free["means"],
        covariances=PositiveDefinite(_square(covariances)),
    )


def _log_cholesky(matrices: Array) -> Array:
    """Lower Cholesky factors (K, n, n) with the logarithms of their diagonals."""
    factors = one_by_one(jnp.linalg.cholesky, matrices)
    is_diagonal = jnp.eye(matrices.shape[-1], dtype=bool)[None]
    return jnp.where(is_diagonal, jnp.log(diagonal(factors))[:, None], factors)


def _square(logs: Array) -> Array:
    is_diagonal = jnp.eye(logs.shape[-1], dtype=bool)[None]
    factors = jnp.where(is_diagonal, jnp.exp(diagonal(logs))[:, None], logs)
    return matmul(factors, transpose(factors))
