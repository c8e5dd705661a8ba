"""The units in which a fit computes: an origin and a unit for every column, so that nothing depends on those of x.

A fit of x and one of any other origin and unit of x are then the same computation. Origin and unit are robust: a few
wild rows or entries leave them as they are.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from flax_hmog.model.kinds import Array, pytree
from flax_hmog.model.typed import Rows


@pytree
class Frame:
    """x' = (x - origin) / unit, column by column.

    The origin is held as a sum of two numbers, so that in float32 it has the digits of a float64.

    Attributes:
        origin: (D,), in units of x.
        rest: the exact origin less `origin` (D,).
        unit: (D,), positive, in units of x.
        log_volume: sum over columns of log unit (): log p(x) = log p(x') - log_volume.

    Example:
        >>> frame = Frame.of(np.full(2, 100.0), np.array([1.0, 10.0]), np.float32)
        >>> frame.inward(jnp.array([[101.0, 90.0]])).tolist()
        [[1.0, -1.0]]
    """

    origin: Float[Array, " D"]
    rest: Float[Array, " D"]
    unit: Float[Array, " D"]
    log_volume: Float[Array, ""]

    @classmethod
    def of(cls, origin: np.ndarray, unit: np.ndarray, dtype: DTypeLike) -> Frame:
        """The frame with this origin and unit (D,), given in float64."""
        unit = np.asarray(unit, dtype)
        high = np.asarray(origin, dtype)
        rest = np.asarray(origin - high.astype(np.float64), dtype)
        volume = np.asarray(np.log(unit.astype(np.float64)).sum(), dtype)
        return cls(*(jnp.asarray(part) for part in (high, rest, unit, volume)))

    def inward(self, x: Array) -> Array:
        """Rows x' (B, D) of rows x (B, D)."""
        return ((x - self.origin[None]) - self.rest[None]) / self.unit[None]

    def outward(self, rows: Array) -> Array:
        """Rows x (B, D) of rows x' (B, D)."""
        return self.origin[None] + (self.rest[None] + rows * self.unit[None])

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Origin and unit (D,) in float64, on the host."""
        origin, rest, unit = (np.asarray(part, np.float64) for part in (self.origin, self.rest, self.unit))
        return origin + rest, unit

    def applied(self, *, to_units: bool = True) -> Frame:
        """The frame for rows that are x' already, or x - origin: their density is still one of x."""
        zero = jnp.zeros_like(self.origin)
        return Frame(zero, zero, jnp.ones_like(self.unit) if to_units else self.unit, self.log_volume)

    def inward_on_host(self, x: Rows, *, to_units: bool = True) -> np.ndarray:
        """Rows x' (B, D) float64 of rows x (B, D), or x - origin: digits beyond the working precision are not lost.

        Where entries are missing the units stay in the frame, since each column has its part of the volume.
        """
        origin, unit = self.exact()
        moved = np.asarray(x, np.float64) - origin
        return cast(np.ndarray, moved / unit if to_units else moved)


def has_more_digits(x: object, dtype: DTypeLike) -> bool:
    """True if `x` lies on the host in a dtype whose values the working precision would round."""
    if isinstance(x, jax.Array):
        return False
    kind = np.dtype(getattr(x, "dtype", np.float64))
    return kind.kind in "iuf" and not np.can_cast(kind, np.dtype(dtype))
