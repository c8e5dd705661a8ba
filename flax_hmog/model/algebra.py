"""Products, inverses and factors of matrices, as all formulas use them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike, DTypeLike

from flax_hmog.model.typed import jit

# Names of `jax.lax.DotAlgorithmPreset`: the digits of float32, from several products of fewer digits each.
SPLIT_PRODUCTS = ("BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "TF32_TF32_F32_X3")
# Backends that lack them; XLA's for CPUs takes some names in some programs and changes nothing.
UNSPLIT_BACKENDS = ("cpu",)

einsum = partial(jnp.einsum, precision="highest")


def matmul(left: ArrayLike, right: ArrayLike, *, preferred_element_type: DTypeLike | None = None) -> Array:
    """Product in full float32, as sums of squares cancel (GPUs and TPUs round more by default).

    Within `jax.default_matmul_precision(name)`, with a name of `SPLIT_PRODUCTS`, float32 is multiplied that way.
    """
    split = split_product()
    if split is None or jnp.result_type(left, right) != jnp.float32:
        split = "highest"
    return jnp.matmul(left, right, precision=split, preferred_element_type=preferred_element_type)


def split_product() -> str | None:
    """The name of `SPLIT_PRODUCTS` that `jax.default_matmul_precision` has in scope, or None.

    Raises:
        ValueError: on a backend that lacks them.
    """
    name = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  typed as none
    if name not in SPLIT_PRODUCTS:
        return None
    if (backend := jax.default_backend()) in UNSPLIT_BACKENDS:
        raise ValueError(
            f"matmul: `jax.default_matmul_precision` must name products that the backend has; got {name} on {backend}. "
            "Leave it out there: products are in full float32."
        )
    return str(name)


def transpose(matrix: Array) -> Array:
    """Swap the last two axes."""
    return jnp.swapaxes(matrix, -1, -2)


def symmetrize(matrix: Array) -> Array:
    """Average of a matrix and its transpose."""
    return (matrix + transpose(matrix)) / 2


def diagonal(matrix: Array) -> Array:
    """Diagonal (..., n) of matrices (..., n, n)."""
    return cast(Array, jnp.diagonal(matrix, axis1=-2, axis2=-1))


def namespace(array: object) -> Any:
    """`numpy` for its own arrays, which stay on the host and in float64; `jax.numpy` for all others."""
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def with_least_eigenvalue(matrix: Array, floor: Array) -> Array:
    """A symmetric matrix (n, n), its eigenvalues raised to `floor` () where they are below."""
    values, vectors = jnp.linalg.eigh(matrix)
    return symmetrize(matmul(vectors * jnp.maximum(values, floor)[None], vectors.T))


def inverse_lower(factor: Array) -> Array:
    """Inverse of a lower triangular matrix (n, n)."""
    return solve_triangular(factor, jnp.eye(factor.shape[-1], dtype=factor.dtype), lower=True)


@jax.custom_jvp
def orthonormalize(matrix: Array) -> tuple[Array, Array]:
    """QR factors (m, n) and (n, n) of a matrix (m, n); JAX's derivative of them multiplies in few digits on GPUs."""
    return cast(tuple[Array, Array], tuple(jnp.linalg.qr(matrix)))


@orthonormalize.defjvp
def _orthonormalize_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    with jax.default_matmul_precision("highest"):
        return jax.jvp(lambda matrix: tuple(jnp.linalg.qr(matrix)), primals, tangents)


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


@jit
def _inverse_and_log_det(matrix: Array) -> tuple[Array, Array]:
    stack = matrix if matrix.ndim == 2 else matrix.reshape(-1, *matrix.shape[-2:])
    of_each: Callable[..., Any] = one_by_one if matrix.ndim > 2 else lambda function, single: function(single)
    factor = of_each(jnp.linalg.cholesky, stack)
    root, log_det = of_each(lambda each: (inverse_lower(each), 2 * jnp.sum(jnp.log(diagonal(each)))), factor)
    return matmul(transpose(root), root).reshape(matrix.shape), log_det.reshape(matrix.shape[:-2])


@jit
def batched_cholesky(matrices: Array) -> Array:
    """Lower factors (K, n, n)."""
    return cast(Array, one_by_one(jnp.linalg.cholesky, matrices))


@inverse_and_log_det.defjvp
def _inverse_and_log_det_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    inverse, log_det = inverse_and_log_det(*primals)
    tangent = symmetrize(tangents[0])  # as the factorisation reads its argument
    slope = -matmul(matmul(inverse, tangent), inverse)
    return (inverse, log_det), (slope, jnp.sum(inverse * tangent, axis=(-2, -1)))


@jax.custom_jvp
def inverses_along_last(matrices: Array) -> tuple[Array, Array]:
    """Inverses (n, n, B) and log-determinants (B,) of many small symmetric positive definite matrices (n, n, B).

    Matrices lie along the last axis, so that every operation of one elimination is a long vector; NaN for others.
    """
    size = matrices.shape[0]
    index = jnp.arange(size)
    unit = jax.lax.rsqrt(jnp.diagonal(matrices).T)
    # of unit diagonal: pivots are at most 1
    correlations = matrices * unit[:, None] * unit[None]

    def pivot(rest: Array, number: Array | int) -> tuple[Array, Array]:
        column = jax.lax.dynamic_index_in_dim(rest, number, 0, keepdims=False)
        square = jax.lax.dynamic_index_in_dim(column, number, 0, keepdims=False)
        return (column - (index == number)[:, None]) * jax.lax.rsqrt(square)[None], square

    def eliminate(number: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        """A sweep is an update of rank 1: A - v v' / d with v = column - e and d its pivot, but for 2 at the pivot."""
        rest, column, square, log_det = state
        rest = rest - column[:, None] * column[None]
        return rest, *pivot(rest, jnp.minimum(number + 1, size - 1)), log_det + jnp.log(square)

    start = correlations, *pivot(correlations, 0), jnp.zeros_like(matrices[0, 0])
    rest, _, _, log_det = jax.lax.fori_loop(0, size, eliminate, start)
    inverses = (2 * jnp.eye(size, dtype=rest.dtype)[:, :, None] - rest) * unit[:, None] * unit[None]
    return inverses, log_det - 2 * jnp.sum(jnp.log(unit), axis=0)


@inverses_along_last.defjvp
def _inverses_along_last_jvp(primals: tuple[Array], tangents: tuple[Array]) -> Any:
    inverses, log_det = inverses_along_last(*primals)
    tangent = (tangents[0] + jnp.swapaxes(tangents[0], 0, 1)) / 2
    slope = -einsum("ijb,jkb,klb->ilb", inverses, tangent, inverses)
    return (inverses, log_det), (slope, jnp.sum(inverses * tangent, axis=(0, 1)))
