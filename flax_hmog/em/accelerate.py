"""Fewer passes for the same objective.

Cycles of one pass that finds the components that count for every row and several that look at these alone, each with a
model beyond that of the M-step before. One that turns out worse is given up for the model of the M-step.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from flax_hmog.data.shards import Shards
from flax_hmog.em.options import Regularizer
from flax_hmog.em.sparse import Assignments, SparseInfo, kept_pass, sparse_pass
from flax_hmog.em.step import em_info, next_moments
from flax_hmog.model.conversions import moments_to_natural, own_moments
from flax_hmog.model.coordinates import Moments, Natural
from flax_hmog.model.kinds import Array, PositiveDefinite, diagonal, matmul, one_by_one, pytree, transpose
from flax_hmog.model.prepared import prepare
from flax_hmog.model.typed import jit

MOMENTUM = 0.75  # of extrapolations: share of the move between two updates
# and of that of the last update: those of small components turn back where they are taken too far
RELAXATION = {"loadings": 0.75, "bias": 0.75, "noise": 0.75, "weights": 0.25, "means": 0.25, "covariances": 0.25}


@pytree
class Found:
    """One pass that finds the components that count.

    Attributes:
        updated: the model after its M-step.
        assignments: the components that count.
        info: what was left out.
        objective: penalised log-likelihood per sample of the model before (), without the volume of the frame, and
            without what was left out: it is no higher than that of a dense pass.
    """

    updated: Moments
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
    objective = em_info(factors, statistics, regularizer, natural.frame).objective
    return Found(next_moments(factors, statistics, regularizer), assignments, info, objective)


@jit(static_argnames=("shards", "projection_dtype"))
def follow(
    found: Found,
    natural: Natural,
    regularizer: Regularizer | None,
    weights: Array,
    *,
    passes: int,
    shards: Shards = None,
    projection_dtype: str | None = None,
) -> tuple[Natural, Array]:
    """More steps with the components that counted in a pass, each from beyond the model of the M-step before.

    Args:
        found: of `find`.
        natural: the model of that pass.
        regularizer: pseudo-statistics or None.
        weights: the weights of the rows (N,).
        passes: kept passes.
        shards: shards of the rows.
        projection_dtype: of `prepare`.

    Returns:
        The model of the last M-step, and the highest free energy per sample before it (), which is no lower than the
        objective of `found` and no higher than that of the model.
    """
    frame, like = natural.frame, found.updated
    start, moved = _to_free(own_moments(natural)), _to_free(like)

    def model(free: dict[str, Any]) -> Natural:
        return moments_to_natural(_from_free(like, free)).in_frame(frame)

    def step(number: int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        here, last, reached, is_beyond = carry
        factors = prepare(model(here), projection_dtype)
        statistics = kept_pass(factors, found.assignments, weights, shards=shards)
        energy = em_info(factors, statistics, regularizer, frame).objective
        updated = _to_free(next_moments(factors, statistics, regularizer))
        accepted = (energy >= reached) | ~is_beyond
        new = extrapolate(last, here, updated), updated, energy, jnp.array(True)
        old = last, last, reached, jnp.array(False)
        return cast(tuple[Any, ...], jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old))

    carry = extrapolate(start, start, moved), moved, found.objective, jnp.array(True)
    _, updated, reached, _ = jax.lax.fori_loop(0, passes, step, carry)
    return model(updated), reached


def extrapolate(last: dict[str, Array], here: dict[str, Array], updated: dict[str, Array]) -> dict[str, Array]:
    """A point beyond an update of this one, in free coordinates: by what updates moved, and by what this one did."""
    return {
        name: new + MOMENTUM * (new - last[name]) + RELAXATION[name] * (new - here[name])
        for name, new in updated.items()
    }


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
