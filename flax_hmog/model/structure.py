"""The structure of component precisions: matrices of one kind, or differences from a full base."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeAlias

import jax.numpy as jnp
from jaxtyping import Float

from flax_hmog.model.kinds import Array, Kind, PositiveDefinite, Rep, fill_sizes, pytree


@pytree
class SharedBase:
    """Component precisions Q_0 + Delta_k (Delta_0 = 0): a full base and differences of a restricted kind.

    Attributes:
        base: Q_0, `PositiveDefinite` (L, L).
        differences: Delta_1 .. Delta_{K-1}, of kind `lat_rep`, batch (K-1); any sign.

    Example:
        >>> from flax_hmog import PositiveDefinite, Scale
        >>> precision = SharedBase(PositiveDefinite(jnp.eye(2)), Scale(jnp.array([1.0, 2.0])))
        >>> precision.base.entries.shape, precision.differences.entries.shape  # K = 3
        ((2, 2), (2,))
    """

    base: PositiveDefinite
    differences: Kind

    is_diagonal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        fill_sizes(self, getattr(self.base, "entries", None), "differences")

    def dense(self) -> Float[Array, "K L L"]:
        """The precisions (K, L, L)."""
        base = self.base.entries[None]
        return jnp.concatenate([base, base + self.differences.dense()])


Precision: TypeAlias = Kind | SharedBase


@dataclasses.dataclass(frozen=True)
class Structure:
    """Structure of component precisions: matrices of one kind, or `SharedBase` with differences of that kind.

    Attributes:
        rep: the kind.
        has_base: True for differences from a full base. Full matrices need none: then it is False.

    Example:
        >>> from flax_hmog import Diagonal
        >>> Structure(Diagonal, has_base=True).restrict(jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])).differences.entries
        Array([[1., 1.]], dtype=float32)
    """

    rep: Rep
    has_base: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_base", self.has_base and self.rep is not PositiveDefinite)

    @classmethod
    def of(cls, precision: Precision) -> Structure:
        """That of component precisions."""
        if isinstance(precision, SharedBase):
            return cls(type(precision.differences), has_base=True)
        return cls(type(precision))

    def restrict(self, dense: Array) -> Precision:
        """Component precisions (K, L, L) in this structure; what it cannot hold is dropped."""
        if self.has_base:
            return SharedBase(PositiveDefinite(dense[0]), self.rep.project(dense[1:] - dense[:1]))
        return self.rep.project(dense)
