"""Three kinds of symmetric positive definite matrix, and the linear algebra that they and the formulas are made of."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from flax_hmog.model.algebra import (
    batched_cholesky,
    diagonal,
    einsum,
    inverse_and_log_det,
    inverse_lower,
    matmul,
    namespace,
    one_by_one,
    symmetrize,
    transpose,
    with_least_eigenvalue,
)
from flax_hmog.model.checks import check_positive_definite
from flax_hmog.model.kind import (
    Array,
    Kind,
    Rep,
    RepLike,
    as_rep,
    bounded,
    diagonal_matrices,
    fill_sizes,
    for_each_pytree,
    identity_like,
    pytree,
    register_kind,
    trace_product,
    unbounded,
)
from flax_hmog.model.typed import Rows

__all__ = [
    "Array", "Diagonal", "Kind", "PositiveDefinite", "Rep", "RepLike", "Scale", "as_rep", "diagonal", "einsum",
    "fill_sizes", "for_each_pytree", "identity_like", "inverse_and_log_det", "inverse_lower", "matmul", "namespace",
    "one_by_one", "pytree", "register_kind", "symmetrize", "trace_product", "transpose", "with_least_eigenvalue",
]  # fmt: skip


@register_kind("scale")
class Scale(Kind):
    """Isotropic: c I, held as the one number c (...). In `Mean` it is the average of the diagonal.

    Attributes:
        entries: c (...).
        dim: n; static. `Moments`, `Natural` and `Mean` fill it in, so that users write `noise=Scale(0.5)`.

    Example:
        >>> float(Scale(jnp.array(2.0)).inverse().entries)  # of 2 I
        0.5
    """

    entries: Any = None
    dim: int | None = dataclasses.field(default=None, metadata={"static": True})

    is_isotropic = True

    @staticmethod
    def shape(dim: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def project(cls, matrix: Array) -> Scale:
        return cls.from_diagonal(diagonal(matrix))

    @classmethod
    def project_product(cls, left: Array, right: Array) -> Scale:
        return cls(jnp.sum(left * right, axis=(-2, -1)) / left.shape[-2], left.shape[-2])

    @classmethod
    def second_moment(cls, rows: Array, weights: Array) -> Scale:
        return cls(matmul(weights, jnp.mean(rows * rows, axis=-1)), rows.shape[-1])

    @classmethod
    def from_diagonal(cls, diagonals: Rows) -> Scale:
        """The averages of diagonals (..., n)."""
        return cls(namespace(diagonals).mean(diagonals, axis=-1), diagonals.shape[-1])

    def sized(self, dim: int) -> Scale:
        return Scale(self.entries, dim) if self.dim is None else self

    def diagonal(self) -> Any:
        return namespace(self.entries).broadcast_to(self.entries[..., None], (*self.entries.shape, self._size()))

    def inverse(self) -> Scale:
        return Scale(1 / self.entries, self.dim)

    def cholesky(self) -> Scale:
        return Scale(namespace(self.entries).sqrt(self.entries), self.dim)

    def log_det(self) -> Array:
        return self._size() * jnp.log(self.entries)

    def times(self, columns: Array) -> Any:
        return self.entries * columns

    def rows_times(self, rows: Array) -> Any:
        return rows * self.entries

    def lower_solve(self, columns: Array) -> Any:
        return columns / self.entries

    upper_solve = lower_solve

    def scaled(self, columns: Rows) -> Scale:
        return Scale(self.entries * columns[0] * columns[0], self.dim)

    def weighted(self, weights: Array) -> Scale:
        return Scale(self.entries * weights, self.dim)

    def floored(self, share: float) -> Scale:
        """The same: all eigenvalues are their average."""
        return self

    def _size(self) -> int:
        if self.dim is None:
            raise ValueError("Scale: `dim` must be known here; got None. Give it, as in Scale(0.5, dim=3).")
        return self.dim


@register_kind("diagonal")
class Diagonal(Kind):
    """Diagonal matrices, held as their diagonals (..., n).

    Example:
        >>> Diagonal(jnp.array([1.0, 4.0])).cholesky().entries.tolist()
        [1.0, 2.0]
    """

    entries: Any = None

    @staticmethod
    def shape(dim: int) -> tuple[int, ...]:
        return (dim,)

    @classmethod
    def project(cls, matrix: Array) -> Diagonal:
        return cls(diagonal(matrix))

    @classmethod
    def project_product(cls, left: Array, right: Array) -> Diagonal:
        return cls(jnp.sum(left * right, axis=-1))

    @classmethod
    def second_moment(cls, rows: Array, weights: Array) -> Diagonal:
        return cls(matmul(weights, rows * rows))

    @classmethod
    def from_diagonal(cls, diagonals: Rows) -> Diagonal:
        return cls(diagonals)

    def diagonal(self) -> Any:
        return self.entries

    def inverse(self) -> Diagonal:
        return Diagonal(1 / self.entries)

    def cholesky(self) -> Diagonal:
        return Diagonal(namespace(self.entries).sqrt(self.entries))

    def log_det(self) -> Array:
        return jnp.sum(jnp.log(self.entries), axis=-1)

    def times(self, columns: Array) -> Any:
        return self.entries[..., None] * columns

    def rows_times(self, rows: Array) -> Any:
        return rows * self.entries[None]

    def lower_solve(self, columns: Array) -> Any:
        return columns / self.entries[..., None]

    upper_solve = lower_solve

    def scaled(self, columns: Rows) -> Diagonal:
        return Diagonal(self.entries * columns * columns)

    def weighted(self, weights: Array) -> Diagonal:
        return Diagonal(self.entries * weights[..., None])

    def floored(self, share: float) -> Diagonal:
        """Entries raised to `share` times their average where they are below."""
        return Diagonal(jnp.maximum(self.entries, share * jnp.mean(self.entries)))


@register_kind("full")
class PositiveDefinite(Kind):
    """Full symmetric positive definite matrices, held plainly (..., n, n).

    Example:
        >>> PositiveDefinite(4 * jnp.eye(2)).cholesky().entries.tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    entries: Any = None
    is_diagonal = False

    @staticmethod
    def shape(dim: int) -> tuple[int, ...]:
        return (dim, dim)

    @classmethod
    def project(cls, matrix: Array) -> PositiveDefinite:
        """Dense (..., n, n) as it is."""
        return cls(matrix)

    @classmethod
    def project_product(cls, left: Array, right: Array) -> PositiveDefinite:
        """`left @ right.T`, for (..., n, m) factors."""
        return cls(matmul(left, transpose(right)))

    @classmethod
    def second_moment(cls, rows: Array, weights: Array) -> PositiveDefinite:
        return cls(matmul(transpose(rows * weights[:, None]), rows))

    @classmethod
    def from_diagonal(cls, diagonals: Rows) -> PositiveDefinite:
        return cls(diagonal_matrices(diagonals))

    def dense(self) -> Any:
        return self.entries

    def diagonal(self) -> Any:
        return namespace(self.entries).diagonal(self.entries, axis1=-2, axis2=-1)

    def log_det(self) -> Array:
        return inverse_and_log_det(self.entries)[1]

    def times(self, columns: Array) -> Any:
        return _product(self.entries, columns)

    def rows_times(self, rows: Array) -> Any:
        return _product(rows, self.entries)

    def lower_solve(self, columns: Array) -> Any:
        if namespace(self.entries) is np:
            return np.linalg.solve(self.entries, columns)
        return solve_triangular(self.entries, columns, lower=True)

    def upper_solve(self, columns: Array) -> Array:
        return solve_triangular(self.entries, columns, trans="T", lower=True)

    def scaled(self, columns: Rows) -> PositiveDefinite:
        return PositiveDefinite(self.entries * columns[:, None] * columns[None])

    def weighted(self, weights: Array) -> PositiveDefinite:
        return PositiveDefinite(self.entries * weights[..., None, None])

    def floored(self, share: float) -> PositiveDefinite:
        """One matrix, its eigenvalues raised to `share` times the average of the diagonal where they are below."""
        return PositiveDefinite(with_least_eigenvalue(self.entries, share * jnp.mean(self.diagonal())))

    def inverse(self) -> PositiveDefinite:
        if namespace(self.entries) is np:
            return PositiveDefinite(np.linalg.inv(self.entries))
        return PositiveDefinite(inverse_and_log_det(self.entries)[0])

    def cholesky(self) -> PositiveDefinite:
        is_one = self.entries.ndim == 2 or namespace(self.entries) is np
        factor = namespace(self.entries).linalg.cholesky if is_one else batched_cholesky
        return PositiveDefinite(factor(self.entries))

    def product(self, other: PositiveDefinite) -> PositiveDefinite:
        return PositiveDefinite(matmul(self.entries, other.entries))

    def whitened(self, covariance: Kind) -> PositiveDefinite:
        inverse = inverse_lower(covariance.cholesky().dense())
        return PositiveDefinite(matmul(matmul(inverse[None], self.entries), inverse.T[None])).symmetrized()

    def symmetrized(self) -> PositiveDefinite:
        return PositiveDefinite(symmetrize(self.entries))

    def check(self, argument: str, remedy: str) -> None:
        check_positive_definite(argument, self.entries, remedy)

    @classmethod
    def from_leaf(cls, leaf: Array, dim: int, interval: tuple[float, float], floor: float) -> PositiveDefinite:
        """Matrices (..., n, n): the diagonal of the leaf sets variances, the part below it correlations.

        The part above the diagonal is not used.
        """
        units = jnp.sqrt(bounded(diagonal(leaf), interval))
        return cls(correlations(leaf, floor) * units[..., :, None] * units[..., None, :])

    @classmethod
    def inverse_from_leaf(cls, leaf: Array, dim: int, interval: tuple[float, float], floor: float) -> PositiveDefinite:
        """The inverse of `from_leaf`, through the correlations, as derivatives hold the square of its entries."""
        units = jnp.sqrt(bounded(diagonal(leaf), interval))
        inverse = cls(correlations(leaf, floor)).inverse().entries
        return cls(inverse / units[..., :, None] / units[..., None, :])

    def leaf(self, interval: tuple[float, float], floor: float) -> np.ndarray:
        identity = np.eye(self.entries.shape[-1])
        variances = np.maximum(np.einsum("...ii->...i", self.entries), interval[0])
        scale = np.sqrt(variances)
        correlation = self.entries / (scale[..., :, None] * scale[..., None, :])
        values, vectors = np.linalg.eigh((1 + floor) * correlation - floor * identity)
        clipped = np.maximum(values, 1e-2 * floor)
        factor = np.linalg.cholesky((vectors * clipped[..., None, :]) @ np.swapaxes(vectors, -1, -2))
        rows = np.tril(factor / np.einsum("...ii->...i", factor)[..., :, None], -1)
        return cast(np.ndarray, rows + identity * unbounded(variances, interval)[..., :, None])

    @classmethod
    def packed_size(cls, dim: int) -> int:
        return dim * (dim + 1) // 2

    def pack(self) -> Array:
        """The upper triangles (..., n (n + 1) / 2), row by row."""
        rows, columns = np.triu_indices(self.entries.shape[-1])
        return cast(Array, self.entries[..., rows, columns])

    @classmethod
    def unpack(cls, packed: Array, dim: int) -> PositiveDefinite:
        rows, columns = np.triu_indices(dim)
        index = np.zeros((dim, dim), int)
        index[rows, columns] = index[columns, rows] = np.arange(rows.size)
        return cls(packed[..., index])

    @classmethod
    def natural_factor(cls, dim: int) -> np.ndarray:
        """-1/2 for entries of the diagonal, -1 for the others, which stand twice in x' P x."""
        rows, columns = np.triu_indices(dim)
        return np.where(rows == columns, -0.5, -1.0)


def correlations(leaf: Array, floor: float) -> Array:
    """Correlations (F F' + floor I) / (1 + floor), F the unit lower triangle of the leaf with normalised rows."""
    identity = identity_like(leaf)
    rows = jnp.tril(leaf, -1) + identity
    rows = rows / jnp.sqrt(jnp.sum(rows**2, axis=-1, keepdims=True))
    return (matmul(rows, transpose(rows)) + floor * identity) / (1 + floor)


def _product(left: Array, right: Array) -> Any:
    return left @ right if namespace(left) is np and namespace(right) is np else matmul(left, right)
