"""Rows and small models in few sizes: functions of batches of any size, compiled for powers of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

from flax_hmog.em.padding import InUse, padded_sizes
from flax_hmog.inference.posterior import HMoGOutput, infer
from flax_hmog.model.coordinates import Natural, Prepared
from flax_hmog.model.prepared import prepare
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import jit

R = TypeVar("R")
MOST_ROWS = 4096  # at once


def in_few_sizes(function: Callable[[np.ndarray], R], x: np.ndarray, least: int = 1) -> R:
    """`function` of rows, at most so many at once and filled up to a power of two, so that few sizes are compiled.

    Of more rows than that, all parts have one size.

    Args:
        function: of rows (B, D); leaves of what it returns have B as their first dimension.
        x: rows (N, D), N at least 1.
        least: power of two up to which rows are filled up at least. With 1 a row may round otherwise by itself than
            among others, as products of one row are computed by another algorithm.

    Returns:
        What the function returns of all rows: leaves as they are, or numpy where sizes were joined or cut.
    """
    least = MOST_ROWS if len(x) > MOST_ROWS else least
    parts = [_filled(function, x[start : start + MOST_ROWS], least) for start in range(0, len(x), MOST_ROWS)]
    if len(parts) == 1:
        return cast(R, parts[0])
    return cast(R, jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts))


class ModelOfFewSizes:
    """Inference with a model whose component matrices are full, on the host: programs serve many sizes.

    A small model is filled up with components of weight 0 and factors without loadings, as small fits are.
    """

    def __init__(self, natural: Natural, least: int) -> None:
        (obs_dim, self.lat_dim), self.n_components = natural.interaction.shape, natural.posterior_location.shape[0]
        self.least = least
        sizes = padded_sizes(MOST_ROWS, obs_dim, self.lat_dim, self.n_components)
        natural = with_prior(natural)
        self.model = prepare(natural) if sizes is None else _prepared(sizes.pad(natural), sizes.in_use())

    def __call__(self, x: np.ndarray, missing: str = "refuse") -> HMoGOutput:
        """`infer` of rows (N, D), as arrays of numpy."""
        missing = missing if np.isnan(x).any() else "refuse"
        output = in_few_sizes(lambda rows: infer(self.model, rows, missing=missing), x, self.least)
        whole: Any = jax.tree.map(np.asarray, output)
        return HMoGOutput(
            log_density=whole.log_density,
            log_responsibilities=whole.log_responsibilities[:, : self.n_components],
            latent_mean=whole.latent_mean[:, : self.lat_dim],
        )


@jit
def _prepared(natural: Natural, used: InUse) -> Prepared:
    return prepare(used.completed(natural))


def _filled(function: Callable[[np.ndarray], Any], x: np.ndarray, least: int) -> Any:
    missing = max(least, 1 << (len(x) - 1).bit_length()) - len(x)
    if not missing:
        return function(x)
    try:
        output = function(np.concatenate([x, np.broadcast_to(x[:1], (missing, *x.shape[1:]))]))
    except ValueError:
        return function(x)  # what is wrong is said of these rows alone
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(x)], output)
