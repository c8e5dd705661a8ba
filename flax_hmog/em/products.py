"""Split products in a fit, where densities stay those of full float32."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import jax
import numpy as np

from flax_hmog.data.rows import block_rows, map_rows
from flax_hmog.data.shards import row_shards
from flax_hmog.model.algebra import split_product
from flax_hmog.model.checks import door
from flax_hmog.model.coordinates import Natural, Prepared
from flax_hmog.model.kinds import Array
from flax_hmog.model.prepared import (
    center_rows,
    component_logits,
    floats_per_row,
    latent_features,
    normalize_logits,
    prepare,
    project_rows,
    shared_log_density,
)
from flax_hmog.model.typed import jit

if TYPE_CHECKING:
    from flax_hmog.em.fit import Fit

LARGEST_CHANGE = 1e-4  # nats per sample by which split products may change the mean log-density


def checked_products(fit: Fit, natural: Natural) -> AbstractContextManager[object]:
    """The context of a step: products as `jax.default_matmul_precision` says, or full float32 with a warning.

    The first model that a fit takes a step from decides, by the log-densities of the rows that starts are made from.
    """
    name = split_product()
    if name is None:
        return nullcontext()
    if fit.products is None:
        fit.products, change, allowed = name, *_change(fit, natural)
        if not change <= allowed:
            fit.products = "highest"
            warnings.warn(
                f"{door()}: `jax.default_matmul_precision` must keep the mean log-density to {allowed:.0e} nats; got "
                f"{change:.1e} by {name}. The fit goes on in full float32.",
                stacklevel=4,
            )
    context: AbstractContextManager[object] = jax.default_matmul_precision(fit.products)
    return context


def _change(fit: Fit, natural: Natural) -> tuple[float, float]:
    """The change of the mean log-density by split products, and that which is allowed, at least rounding: in nats."""
    x, inner = fit.source.sample()[0], natural.in_frame(fit.row_frame)
    split = np.asarray(_densities(inner, x, fit.dtype), np.float64)
    with jax.default_matmul_precision("highest"):
        full = np.asarray(_densities(inner, x, fit.dtype), np.float64)
    whole = np.isfinite(full)  # rows with missing entries have no density here
    rounding = float(np.finfo(np.float32).eps * np.abs(np.mean(full, where=whole)))
    return float(np.abs(np.mean(split - full, where=whole))), max(LARGEST_CHANGE, rounding)


@jit(static_argnames="projection_dtype")
def _densities(natural: Natural, x: Array, projection_dtype: str | None) -> Array:
    factors = prepare(natural, projection_dtype)
    return map_rows(_density, factors, x, block_rows(floats_per_row(factors)), row_shards(x))


def _density(factors: Prepared, x: Array) -> Array:
    centered = center_rows(factors, x)
    t = project_rows(factors, centered)
    logits = component_logits(factors, latent_features(t, squares_only=factors.is_diagonal))
    return shared_log_density(factors, centered, t) + normalize_logits(logits)[0]
