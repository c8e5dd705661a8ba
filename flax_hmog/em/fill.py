"""Missing entries filled in for a start of EM, which looks at whole rows: by factor analysis of what is there."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from flax_hmog.data.rows import map_rows
from flax_hmog.data.shards import Shards
from flax_hmog.em.directions import latent_directions, tame_rows
from flax_hmog.em.options import PseudoCounts
from flax_hmog.em.step import one_step
from flax_hmog.model.conversions import moments_to_natural
from flax_hmog.model.coordinates import Moments
from flax_hmog.model.frames import Frame
from flax_hmog.model.incomplete import Conditioner, condition, incomplete_block_rows, split_rows
from flax_hmog.model.kinds import Array, PositiveDefinite, Rep, matmul
from flax_hmog.model.prepared import prepare
from flax_hmog.model.typed import jit

FILL_STEPS = 10  # of EM for the factor analysis


@jit(static_argnames=("lat_dim", "by_column", "obs_rep", "shards"))
def filled_rows(
    x: Array,
    weights: Array,
    frame: Frame,
    key: Array,
    *,
    lat_dim: int,
    by_column: bool,
    obs_rep: Rep,
    shards: Shards,
) -> Array:
    """Rows (N, D) whose missing entries have their mean given the others under one Gaussian of L factors.

    Wild entries are drawn in for it, as they are for the rest of a start; what is there stays as it is.

    Args:
        x: rows (N, D), NaN where an entry is missing.
        weights: sample weights (N,).
        frame: map from the rows to those of the model.
        key: PRNG key.
        lat_dim: L.
        by_column: True if columns have units of their own.
        obs_rep: kind of the noise.
        shards: shards of the rows.
    """
    is_missing = jnp.isnan(x)
    typical = jnp.where(is_missing, frame.origin[None] + frame.rest[None], x)
    found = latent_directions(
        typical, weights, frame, key,
        lat_dim=lat_dim, by_column=by_column, obs_rep=obs_rep, method="pca", shards=shards,
    )  # fmt: skip
    one = jnp.ones(1, x.dtype)
    identity = PositiveDefinite(jnp.eye(lat_dim, dtype=x.dtype)[None])
    moments = Moments(found.loadings, found.center, found.noise, one, jnp.zeros((1, lat_dim), x.dtype), identity)
    rows = jnp.where(is_missing, jnp.nan, tame_rows(frame, by_column, typical))
    step = partial(
        one_step, block=(rows, weights, None), regularizer=PseudoCounts().regularizer(moments), shards=shards,
        missing=True,
    )  # fmt: skip
    natural = jax.lax.fori_loop(0, FILL_STEPS, lambda _, natural: step(natural)[0], moments_to_natural(moments))
    conditioner = Conditioner.of(prepare(natural))
    expected = map_rows(_expected, conditioner, rows, incomplete_block_rows(conditioner.factors), shards)
    return jnp.where(is_missing, frame.outward(expected), x)


def _expected(conditioner: Conditioner, x: Array) -> Array:
    """W E[y | x_o] + b (B, D) of a model with one component."""
    posterior = condition(conditioner, split_rows(conditioner.factors, x))
    return matmul((posterior.point + posterior.gain[0]).T, conditioner.loadings.T) + conditioner.factors.bias[None]
