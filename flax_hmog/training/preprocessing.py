"""Preprocessing that is fitted on training data and stored with the model."""

from __future__ import annotations

from typing import Any

import numpy as np

from flax_hmog.checks import check_positive, check_shape
from flax_hmog.covariances import Array, pytree


@pytree
class Affine:
    """(raw - offset) / scale, column by column.

    Attributes:
        offset: (D,), in units of the raw data.
        scale: (D,), positive, in units of the raw data.
    """

    offset: Any
    scale: Any

    @classmethod
    def constant(cls, obs_dim: int, *, offset: float = 0.0, scale: float = 1.0) -> Affine:
        """The same offset and scale for every column."""
        check_positive("Affine.constant", "scale", scale, "Divide by a positive number.")
        return cls(np.full(obs_dim, offset, np.float32), np.full(obs_dim, scale, np.float32))

    def __call__(self, raw: Any) -> Array:
        """Model inputs (..., D), float32, of raw data (..., D)."""
        check_shape("Affine", "raw", np.empty(np.shape(raw)[-1:]), np.shape(self.offset))
        return (np.asarray(raw, np.float32) - np.asarray(self.offset)) / np.asarray(self.scale)
