"""Three kinds of symmetric positive definite matrix: `Scale`, `Diagonal`, `PositiveDefinite`.

A covariance, precision or second moment is an instance of its kind, so that a function knows the structure
without being told. All three offer the same handful of functions and take any leading batch dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

Array: TypeAlias = jax.Array
T = TypeVar("T")

# Sums of squares cancel, so products are asked for in full float32 (GPUs and TPUs round more by default).
matmul = partial(jnp.matmul, precision="highest")
einsum = partial(jnp.einsum, precision="highest")


_PYTREES: list[type] = []
_TOLD: list[Callable[[type], None]] = []


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose fields are the children of a JAX pytree, but for those marked static."""
    made = jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))
    _PYTREES.append(made)
    for function in _TOLD:
        function(made)
    return made


def for_each_pytree(function: Callable[[type], None]) -> None:
    """Call `function` with every class that `pytree` has made, and will make."""
    _TOLD.append(function)
    for cls in _PYTREES:
        function(cls)


def transpose(matrix: Array) -> Array:
    """Swap the last two axes."""
    return jnp.swapaxes(matrix, -1, -2)


def symmetrize(matrix: Array) -> Array:
    """Average of a matrix and its transpose."""
    return (matrix + transpose(matrix)) / 2


def diagonal(matrix: Array) -> Array:
    """Diagonal (..., n) of matrices (..., n, n)."""
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def identity_like(matrix: Array) -> Array:
    """Identity matrices of the shape and dtype of `matrix` (..., n, n)."""
    return jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)


def with_least_eigenvalue(matrix: Array, floor: Array) -> PositiveDefinite:
    """A symmetric matrix (n, n), its eigenvalues raised to `floor` () where they are below."""
    values, vectors = jnp.linalg.eigh(matrix)
    return PositiveDefinite(symmetrize(matmul(vectors * jnp.maximum(values, floor)[None], vectors.T)))


def inverse_lower(factor: Array) -> Array:
    """Inverse of a lower triangular matrix (n, n)."""
    return solve_triangular(factor, identity_like(factor), lower=True)


def one_by_one(function: Callable[[Array], Any], matrices: Array) -> Any:
    """`function` of each matrix of a batch (K, n, n): in turn on CPUs, at once elsewhere.

    jaxlib's batched LAPACK calls wait for the thread pool they run on: two of them at a time stop a two-core machine
    for ever. Single calls do not wait.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.platform_dependent(
            matrices, cpu=lambda batch: jax.lax.map(function, batch), default=jax.vmap(function)
        )
    return jax.lax.map(function, matrices)


@jax.custom_jvp
def inverse_and_log_det(matrix: Array) -> tuple[Array, Array]:
    """Inverses (..., n, n) and log-determinants (...) of symmetric positive definite matrices; NaN for others.

    Derivatives take products with the inverse only: dC = -C dM C, d log|M| = <C, dM>.
    """
    return _inverse_and_log_det(matrix)


@jax.jit
def _inverse_and_log_det(matrix: Array) -> tuple[Array, Array]:
    if matrix.ndim == 2:
        factor = jnp.linalg.cholesky(matrix)
        root = inverse_lower(factor)
        return matmul(root.T, root), 2 * jnp.sum(jnp.log(diagonal(factor)))
    inverse, log_det = one_by_one(_inverse_and_log_det, matrix.reshape(-1, *matrix.shape[-2:]))
    return inverse.reshape(matrix.shape), log_det.reshape(matrix.shape[:-2])


@jax.jit
def _batched_cholesky(matrices: Array) -> Array:
    return one_by_one(jnp.linalg.cholesky, matrices)


@inverse_and_log_det.defjvp
def _inverse_and_log_det_jvp(primals: tuple, tangents: tuple) -> tuple:
    inverse, log_det = inverse_and_log_det(*primals)
    tangent = symmetrize(tangents[0])  # as the factorisation reads its argument
    slope = -matmul(matmul(inverse, tangent), inverse)
    return (inverse, log_det), (slope, jnp.sum(inverse * tangent, axis=(-2, -1)))


@pytree
class Scale:
    """Isotropic: c I, held as the one number c. In `Mean` it is the average of the diagonal.

    Attributes:
        entries: c, shape (...). Left out, the instance only names the kind, as in `obs_rep=Scale()`.
    """

    entries: Any = None

    @staticmethod
    def shape(dim: int) -> tuple[int, ...]:
        """Shape of `entries` for matrices of dimension `dim`."""
        return ()

    @classmethod
    def project_product(cls, left: Array, right: Array) -> Scale:
        """Restriction of `left @ right.T` to this kind, for (..., n, m) factors."""
        return cls(jnp.sum(left * right, axis=(-2, -1)) / left.shape[-2])

    @classmethod
    def project(cls, matrix: Array) -> Scale:
        """Restriction of dense (..., n, n) to this kind: the average of the diagonal."""
        return cls(jnp.mean(diagonal(matrix), axis=-1))

    @classmethod
    def second_moment(cls, rows: Array, weights: Array) -> Scale:
        """sum_i weights_i rows_i rows_i' in this kind, for rows (B, n)."""
        return cls(matmul(weights, jnp.mean(rows * rows, axis=-1)))

    def dense(self, dim: int) -> Array:
        """The matrices (..., dim, dim)."""
        return Diagonal(self.diagonal(dim)).dense(dim)

    def diagonal(self, dim: int) -> Array:
        """The diagonals (..., dim)."""
        return jnp.broadcast_to(self.entries[..., None], (*self.entries.shape, dim))

    def inverse(self) -> Scale:
        """The inverse, of the same kind."""
        return Scale(1 / self.entries)

    def log_det(self, dim: int) -> Array:
        """Logarithm of the determinant, shape (...)."""
        return dim * jnp.log(self.entries)

    def cholesky(self) -> Scale:
        """Lower factor F with F F' equal to the matrix, of the same kind."""
        return Scale(jnp.sqrt(self.entries))

    def times(self, columns: Array) -> Array:
        """Matrix @ columns, for columns (n, m)."""
        return self.entries * columns

    def rows_times(self, rows: Array) -> Array:
        """Rows @ matrix, for rows (B, n)."""
        return rows * self.entries

    def lower_solve(self, columns: Array) -> Array:
        """F^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""
        return columns / self.entries

    def upper_solve(self, columns: Array) -> Array:
        """F'^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""
        return columns / self.entries

    def scaled(self, columns: Array) -> Scale:
        """A M A for A = diag(columns), whose entries (n,) are all equal."""
        return Scale(self.entries * columns[0] * columns[0])

    def product(self, other: Scale) -> Scale:
        """Matrix product with another of the same kind; it need not be symmetric."""
        return Scale(self.entries * other.entries)

    def weighted(self, weights: Array) -> Scale:
        """Each matrix of the batch times its weight (...)."""
        return Scale(self.entries * weights)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.entries, dtype)


@pytree
class Diagonal:
    """Diagonal matrices, held as their diagonals.

    Attributes:
        entries: diagonals (..., n). Left out, the instance only names the kind, as in `obs_rep=Diagonal()`.
    """

    entries: Any = None

    @staticmethod
    def shape(dim: int) -> tuple[int, ...]:
        """Shape of `entries` for matrices of dimension `dim`."""
        return (dim,)

    @classmethod
    def project_product(cls, left: Array, right: Array) -> Diagonal:
        """Restriction of `left @ right.T` to this kind, for (..., n, m) factors."""
        return cls(jnp.sum(left * right, axis=-1))

    @classmethod
    def project(cls, matrix: Array) -> Diagonal:
        """Restriction of dense (..., n, n) to this kind: its diagonal."""
        return cls(diagonal(matrix))

    @classmethod
    def second_moment(cls, rows: Array, weights: Array) -> Diagonal:
        """sum_i weights_i rows_i rows_i' in this kind, for rows (B, n)."""
        return cls(matmul(weights, rows * rows))

    def dense(self, dim: int) -> Array:
        """The matrices (..., dim, dim)."""
        columns = jnp.broadcast_to(self.entries[..., None], (*self.entries.shape, dim))
        return columns * identity_like(columns)

    def diagonal(self, dim: int) -> Array:
        """The diagonals (..., dim)."""
        return self.entries

    def inverse(self) -> Diagonal:
        """The inverse, of the same kind."""
        return Diagonal(1 / self.entries)

    def log_det(self, dim: int) -> Array:
        """Logarithm of the determinant, shape (...)."""
        return jnp.sum(jnp.log(self.entries), axis=-1)

    def cholesky(self) -> Diagonal:
        """Lower factor F with F F' equal to the matrix, of the same kind."""
        return Diagonal(jnp.sqrt(self.entries))

    def times(self, columns: Array) -> Array:
        """Matrix @ columns, for columns (n, m)."""
        return self.entries[..., None] * columns

    def rows_times(self, rows: Array) -> Array:
        """Rows @ matrix, for rows (B, n)."""
        return rows * self.entries[None]

    def lower_solve(self, columns: Array) -> Array:
        """F^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""
        return columns / self.entries[..., None]

    def upper_solve(self, columns: Array) -> Array:
        """F'^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""
        return columns / self.entries[..., None]

    def scaled(self, columns: Array) -> Diagonal:
        """A M A for A = diag(columns) (n,)."""
        return Diagonal(self.entries * columns * columns)

    def product(self, other: Diagonal) -> Diagonal:
        """Matrix product with another of the same kind; it need not be symmetric."""
        return Diagonal(self.entries * other.entries)

    def weighted(self, weights: Array) -> Diagonal:
        """Each matrix of the batch times its weight (...)."""
        return Diagonal(self.entries * weights[..., None])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.entries, dtype)


@pytree
class PositiveDefinite:
    """Full symmetric positive definite matrices, held plainly.

    Attributes:
        entries: matrices (..., n, n). Left out, the instance only names the kind, as in `obs_rep=PositiveDefinite()`.
    """

    entries: Any = None

    @staticmethod
    def shape(dim: int) -> tuple[int, ...]:
        """Shape of `entries` for matrices of dimension `dim`."""
        return (dim, dim)

    @classmethod
    def project_product(cls, left: Array, right: Array) -> PositiveDefinite:
        """`left @ right.T`, for (..., n, m) factors."""
        return cls(matmul(left, transpose(right)))

    @classmethod
    def project(cls, matrix: Array) -> PositiveDefinite:
        """Dense (..., n, n) as it is."""
        return cls(matrix)

    @classmethod
    def second_moment(cls, rows: Array, weights: Array) -> PositiveDefinite:
        """sum_i weights_i rows_i rows_i', for rows (B, n)."""
        return cls(matmul(transpose(rows * weights[:, None]), rows))

    def dense(self, dim: int) -> Array:
        """The matrices (..., dim, dim)."""
        return self.entries

    def diagonal(self, dim: int) -> Array:
        """The diagonals (..., dim)."""
        return diagonal(self.entries)

    def inverse(self) -> PositiveDefinite:
        """The inverse, of the same kind."""
        return PositiveDefinite(inverse_and_log_det(self.entries)[0])

    def log_det(self, dim: int) -> Array:
        """Logarithm of the determinant, shape (...)."""
        return inverse_and_log_det(self.entries)[1]

    def cholesky(self) -> PositiveDefinite:
        """Lower factor F with F F' equal to the matrix (n, n) or (K, n, n); NaN where it is not positive definite."""
        if self.entries.ndim == 2:
            return PositiveDefinite(jnp.linalg.cholesky(self.entries))
        return PositiveDefinite(_batched_cholesky(self.entries))

    def times(self, columns: Array) -> Array:
        """Matrix @ columns, for columns (n, m)."""
        return matmul(self.entries, columns)

    def rows_times(self, rows: Array) -> Array:
        """Rows @ matrix, for rows (B, n)."""
        return matmul(rows, self.entries)

    def lower_solve(self, columns: Array) -> Array:
        """F^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""
        return solve_triangular(self.entries, columns, lower=True)

    def upper_solve(self, columns: Array) -> Array:
        """F'^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""
        return solve_triangular(self.entries, columns, trans="T", lower=True)

    def scaled(self, columns: Array) -> PositiveDefinite:
        """A M A for A = diag(columns) (n,)."""
        return PositiveDefinite(self.entries * columns[:, None] * columns[None])

    def product(self, other: PositiveDefinite) -> PositiveDefinite:
        """Matrix product with another of the same kind; it need not be symmetric."""
        return PositiveDefinite(matmul(self.entries, other.entries))

    def weighted(self, weights: Array) -> PositiveDefinite:
        """Each matrix of the batch times its weight (...)."""
        return PositiveDefinite(self.entries * weights[..., None, None])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.entries, dtype)


Covariance: TypeAlias = Scale | Diagonal | PositiveDefinite
Rep: TypeAlias = type[Scale] | type[Diagonal] | type[PositiveDefinite]


def trace_product(left: Covariance, right: Covariance, dim: int) -> Array:
    """tr(left' right) () of two matrices of dimension `dim`, of any kinds."""
    if isinstance(left, PositiveDefinite) and isinstance(right, PositiveDefinite):
        return jnp.sum(left.entries * right.entries)
    return jnp.sum(left.diagonal(dim) * right.diagonal(dim))


REPS: dict[str, Rep] = {"scale": Scale, "diagonal": Diagonal, "full": PositiveDefinite}


def as_rep(rep: Any, *, caller: str, argument: str = "rep") -> Rep:
    """Resolve a kind given by class, instance or name.

    Raises:
        ValueError: for anything else, with the choices.
    """
    kind: Any = REPS.get(rep.lower()) if isinstance(rep, str) else rep if isinstance(rep, type) else type(rep)
    if kind not in REPS.values():
        choices = ", ".join(f'"{name}" ({kind.__name__})' for name, kind in REPS.items())
        raise ValueError(f"{caller}: `{argument}` must be one of {choices}; got {rep!r}. Give the name or the class.")
    return kind


def rep_name(rep: Rep) -> str:
    """The name of a kind: "scale", "diagonal" or "full"."""
    return next(name for name, kind in REPS.items() if kind is rep)
