"""Samples as they enter a model: checked, in its dtype and frame, their weights as numbers of samples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from flax_hmog.data.containers import in_memory
from flax_hmog.data.rows import Shards, row_shards
from flax_hmog.model.checks import check_finite, check_shape, door, is_concrete
from flax_hmog.model.conversions import with_prior
from flax_hmog.model.coordinates import Natural, Prepared, check_natural
from flax_hmog.model.frames import has_more_digits
from flax_hmog.model.kinds import (
    Array,
)

MOST_REPEATS, WHOLE = 1000, 1e-3  # of weights that are counts: the largest, and how far from a whole number


def check_samples(natural: Any, x: Any, weights: Any) -> tuple[Natural | Prepared, Array, Array]:
    """The model with its prior, samples as rows (N, D) and their weights (N,)."""
    natural, x, _ = enter(natural, x)
    if x.size == 0:
        raise ValueError(f"{door()}: `x` must hold at least one sample (N, D); got shape {x.shape}. Give more samples.")
    weights = check_weights(weights, x.shape[:-1], x.dtype)
    return natural, x.reshape(-1, x.shape[-1]), weights.reshape(-1)


def check_weights(weights: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Sample weights as an array of this shape; ones if None.

    Raises:
        ValueError: for another shape, entries that are negative or not finite, or a sum of 0.
    """
    if weights is None:
        return jnp.ones(shape, dtype)
    weights = in_memory("weights", weights)
    check_shape("weights", weights, shape)
    if not is_concrete(weights):
        return jnp.asarray(weights, dtype)
    with jax.ensure_compile_time_eval():
        weights = jnp.asarray(weights, dtype)
        # on the devices, since the rows may be spread over processes, all of which must raise
        smallest, largest = float(jnp.min(weights)), float(jnp.max(weights))
    if not (smallest >= 0 and 0 < largest < math.inf):
        raise ValueError(
            f"{door()}: `weights` must be finite, at least 0 and not all 0; got weights from {smallest:.3g} to "
            f"{largest:.3g}. Use 0 to leave a sample out."
        )
    return weights


def effective_weights(weights: Array) -> Array:
    """Weights (N,) that sum to the number of samples that they stand for: a common factor changes nothing.

    Weights that are all whole multiples of the smallest one (up to `MOST_REPEATS`) are counts of equal samples. Others
    stand for (sum v)^2 / sum v^2 samples (Kish 1965). Rows of weight 0 are none. Tracers are left as they are.
    """
    if not is_concrete(weights):
        return weights
    with jax.ensure_compile_time_eval():
        return _effective_weights(weights)


@jax.jit
def _effective_weights(weights: Array) -> Array:
    weights = weights / jnp.max(weights)
    repeats = weights / jnp.min(jnp.where(weights > 0, weights, 1))
    is_whole = jnp.max(jnp.abs(repeats - jnp.round(repeats))) <= WHOLE
    total = jnp.sum(weights)
    kish = total**2 / jnp.sum(weights**2)
    count = jnp.where(is_whole & (jnp.max(repeats) <= MOST_REPEATS), jnp.sum(jnp.round(repeats)), kish)
    return weights * (count / total)


def enter(
    natural: Any, x: Any, argument: str = "x", row_numbers: Any = None
) -> tuple[Natural | Prepared, Array, Shards]:
    """Checked arguments of a function of (natural, x): the model with its prior, observations (..., D) in its dtype,
    and their shards.

    Rows on the host with more digits than the dtype has are moved to the model's frame before any is lost. Errors name
    rows by `row_numbers`, if given.
    """
    model: Any = natural if isinstance(natural, Prepared) else with_prior(check_natural(natural))
    parameters = check_natural(model)
    interaction, frame = parameters.interaction, parameters.frame
    given = check_given(x, interaction.shape[0], argument=argument)
    rows = as_rows(given, interaction.dtype, argument=argument, row_numbers=row_numbers)
    if frame is not None and is_concrete(frame) and has_more_digits(given, interaction.dtype):
        rows = jnp.asarray(frame.inward_on_host(given), interaction.dtype)
        applied = parameters.in_frame(frame.applied())
        model = dataclasses.replace(model, natural=applied) if isinstance(model, Prepared) else applied
    return model, rows, row_shards(rows)


def check_observations(
    x: Any, obs_dim: int | None, dtype: Any, *, argument: str = "x", row_numbers: Any = None
) -> Array:
    """Observations (..., D) as an array of the working dtype; errors name rows by `row_numbers` (N,), if given.

    Raises:
        TypeError: for something that is no array of real numbers.
        ValueError: for no dimension, a wrong last dimension, missing entries, or such that are not finite once
            converted.
    """
    x = check_given(x, obs_dim, argument=argument)
    return as_rows(x, dtype, argument=argument, row_numbers=row_numbers)


def check_given(x: Any, obs_dim: int | None, *, argument: str = "x") -> Any:
    """Observations (..., D) as an array in the dtype they have, on the host if they are there; values are not seen.

    Raises:
        TypeError: for something that is no array of real numbers.
        ValueError: for no dimension, a wrong last dimension, or missing entries.
    """
    if type(x) is not np.ndarray or x.dtype == object:
        x = in_memory(argument, x)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
        raise TypeError(f"{door()}: `{argument}` must hold real numbers; got dtype {x.dtype}. Convert it first.")
    if x.ndim == 0 or (obs_dim is not None and x.shape[-1] != obs_dim):
        wanted = "D" if obs_dim is None else obs_dim
        raise ValueError(
            f"{door()}: `{argument}` must have shape (..., {wanted}); got {x.shape}. Put the observed dimensions last."
        )
    return x


def as_rows(x: Any, dtype: Any, *, argument: str = "x", row_numbers: Any = None, is_finite: bool = False) -> Array:
    """Observations of `check_given` in the working dtype: the one place where they are converted.

    Those that were seen to be finite before are not looked at again (`is_finite`).

    Raises:
        ValueError: for entries that are not finite in this dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if type(x) is np.ndarray:  # looked at where it is, without a program
            x = np.asarray(x, dtype)
            is_finite = is_finite or bool(np.isfinite(x.sum()))
        x = jnp.asarray(x, dtype)
    sharding = None if isinstance(x, jax.core.Tracer) else x.sharding
    if isinstance(sharding, NamedSharding) and any(kind != AxisType.Auto for kind in sharding.mesh.axis_types):
        # on the same devices, with axes that the compiler may choose
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        x = jax.device_put(x, NamedSharding(mesh, sharding.spec))
    if not is_finite:
        check_finite(argument, x, row_numbers=row_numbers)
    return x
