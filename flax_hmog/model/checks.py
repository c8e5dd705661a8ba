"""Checks of arguments in public functions. Checks of values are skipped for tracers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from flax_hmog.model.typed import jit

MISSING = ("refuse", "nan")
MISSING_VALUES = (
    'Give missing="nan" to fits and inference for missing values, or drop these rows; rescale entries too large for '
    "the dtype."
)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
OUTSIDE = "flax_hmog"
_DOOR = ContextVar("door", default=OUTSIDE)
_MAY_MISS = ContextVar("may_miss", default=False)


def door() -> str:
    """The name that errors carry: of the public function that was entered first."""
    return _DOOR.get()


def may_miss() -> bool:
    """True within a function that was told `missing="nan"`: NaN is a missing entry there."""
    return _MAY_MISS.get()


@contextmanager
def allowing(missing: str) -> Iterator[None]:
    """Rows are taken with missing entries here, or not, as the argument `missing` of a public function says."""
    if missing not in MISSING:
        raise ValueError(f'{door()}: `missing` must be one of {MISSING}; got {missing!r}. Use "nan" to take NaN.')
    token = _MAY_MISS.set(missing == "nan")
    try:
        yield
    finally:
        _MAY_MISS.reset(token)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors carry this name here; with `OUTSIDE` that of the next public function, as in what a user hands in."""
    token, before = _DOOR.set(name), _MAY_MISS.set(_MAY_MISS.get() and name != OUTSIDE)
    try:
        yield
    finally:
        _MAY_MISS.reset(before)
        _DOOR.reset(token)


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function that users call: the first one entered gives errors its name.

    A method's name has that of its class before it; a call and a constructor have the name of the class. Errors of a
    constructor name the class in any case, since arguments are those of the class. Not for generators. The argument
    `missing` holds for all that the function calls.
    """
    name, owner = function.__name__, function.__qualname__.rpartition(".")[0]
    is_method, is_constructor = owner and not owner.endswith("<locals>"), name in ("__init__", "__post_init__")
    suffix = "" if name.startswith("__") else f".{name}"

    @functools.wraps(function)
    def entered(*args: P.args, **kwargs: P.kwargs) -> R:
        token = None
        if _DOOR.get() is OUTSIDE or is_constructor:
            cls = args[0] if is_method else None
            cls = cls if isinstance(cls, type) else type(cls)
            token = _DOOR.set(f"{cls.__name__}{suffix}" if is_method else name)
        try:
            if "missing" not in kwargs:
                return function(*args, **kwargs)
            with allowing(str(kwargs["missing"])):
                return function(*args, **kwargs)
        finally:
            if token is not None:
                _DOOR.reset(token)

    return entered


def public_methods(cls: type[T]) -> type[T]:
    """Mark the methods of a class that users call, and its constructor."""
    for name, method in list(vars(cls).items()):
        if inspect.isfunction(method) and (name in ("__call__", "__post_init__") or not name.startswith("_")):
            setattr(cls, name, public(method))
    return cls


def is_concrete(*trees: object) -> bool:
    """True if all leaves hold values: none is a tracer."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def check_precision(dtype: DTypeLike | None) -> None:
    """ValueError for a head in float64 where JAX would silently compute in float32."""
    if dtype is not None and jnp.dtype(dtype) == np.float64 != jax.dtypes.canonicalize_dtype(np.float64):
        raise ValueError(
            f"{door()}: `param_dtype` must be float32 while JAX computes in 32 bits; got float64. Switch 64 bits on at "
            'the start of the program: jax.config.update("jax_enable_x64", True).'
        )


def check_outside_transformations(**arguments: object) -> None:
    """TypeError unless all arguments hold values: a loop on the host cannot run inside of `jit`, `vmap` or `grad`."""
    for argument, value in arguments.items():
        is_tree = isinstance(value, jax.Array | list | tuple) or dataclasses.is_dataclass(value)
        if is_tree and not is_concrete(value):
            raise TypeError(
                f"{door()}: `{argument}` must hold values; got a tracer of jit, vmap or grad. Call {door()} outside of "
                "them, in a loop over keys or data sets; inside, em_step is a step of EM."
            )


def check_type(argument: str, value: object, expected: type, remedy: str) -> None:
    """TypeError unless `value` is an instance of `expected`."""
    if not isinstance(value, expected):
        raise TypeError(f"{door()}: `{argument}` must be {expected.__name__}; got {type(value).__name__}. {remedy}")


def check_float_dtype(argument: str, dtype: DTypeLike | None) -> str | None:
    """The name of a float dtype; None for None. ValueError for another one."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f'{door()}: `{argument}` must be a float dtype or None; got {dtype!r}. Use "bfloat16" or None.'
        )
    return str(found.name)


def check_size(argument: str, value: Any, *, at_most: int | None = None, at_least: int = 1) -> None:
    """ValueError unless `value` is a whole number within the bounds."""
    bound = "" if at_most is None else f" and at most {at_most}"
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        raise ValueError(
            f"{door()}: `{argument}` must be a whole number of at least {at_least}{bound}; got {value!r}. "
            f"Choose {argument} within these bounds."
        )


def check_interval(argument: str, value: Any) -> None:
    """ValueError unless `value` is a pair 0 < lower < upper of finite numbers."""
    valid = isinstance(value, Sequence) and len(value) == 2 and 0 < value[0] < value[1] < float("inf")
    if not valid:
        raise ValueError(
            f"{door()}: `{argument}` must be a pair 0 < lower < upper; got {value!r}. Give both bounds, as (1e-6, 1e6)."
        )


def check_shape(argument: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """ValueError unless `value` has exactly this shape."""
    if np.shape(value) != shape:
        raise ValueError(
            f"{door()}: `{argument}` must have shape {shape}; got {np.shape(value)}. "
            "Check the dimensions against those of the model."
        )


def check_finite(
    argument: str,
    x: Array,
    remedy: str = MISSING_VALUES,
    *,
    row_numbers: np.ndarray | None = None,
    or_nan: bool = False,
) -> None:
    """ValueError if any entry is not finite (or NaN, where that is allowed), with the count and the first row."""
    if not is_concrete(x):
        return
    with jax.ensure_compile_time_eval():
        x = jnp.where(jnp.isnan(x), 0, x) if or_nan else x
        if bool(_all_finite(x)):
            return
        # on the devices, since the rows may be spread over processes, all of which must raise
        bad = ~jnp.isfinite(x).reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
        count, row = int(jnp.sum(bad)), int(jnp.argmax(jnp.any(bad, axis=-1)))
    raise ValueError(
        f"{door()}: `{argument}` must be finite in {x.dtype}; got {count} entries that are not, "
        f"the first in row {row if row_numbers is None else int(row_numbers[row])}. {remedy}"
    )


@jit
def _all_finite(x: Array) -> Array:
    # 0 x is NaN for what is not finite; a sum runs at the speed of memory, a logical reduction at a third of it
    return jnp.all(jnp.isfinite(jnp.sum(0 * jnp.atleast_1d(x), axis=-1)))


ASYMMETRY = 1e-3  # of the largest entry, which rounding does not explain


def check_positive_definite(argument: str, matrices: Array | np.ndarray, remedy: str) -> None:
    """ValueError naming the first matrix (..., n, n) that is not positive definite, with its smallest eigenvalue."""
    if not is_concrete(matrices):
        return
    stack = np.asarray(matrices, np.float64).reshape(-1, *matrices.shape[-2:])
    gap = np.abs(stack - np.swapaxes(stack, -1, -2))
    if gap.size and np.isfinite(gap).all() and gap.max() > ASYMMETRY * np.abs(stack).max():
        entry = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
        raise ValueError(
            f"{door()}: `{argument}` must be symmetric; got entries that differ by {gap.max():.3g} across the "
            f"diagonal, at {entry}. Give the whole matrix, not a triangle of it."
        )
    for index, matrix in enumerate(stack):
        try:
            if not np.isfinite(matrix).all():
                raise np.linalg.LinAlgError
            np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            smallest = np.linalg.eigvalsh(matrix)[0] if np.isfinite(matrix).all() else np.nan
            where = f"component {index} has" if matrices.ndim > 2 else "it has"
            raise ValueError(
                f"{door()}: `{argument}` must be positive definite; {where} smallest eigenvalue "
                f"{smallest:.3g}. {remedy}"
            ) from None


def check_positive(argument: str, values: ArrayLike, remedy: str) -> None:
    """ValueError unless every entry is positive and finite."""
    if is_concrete(values):
        flat = np.asarray(values).reshape(-1)
        bad = ~((flat > 0) & np.isfinite(flat))
        if bad.any():
            first = int(bad.argmax())
            raise ValueError(
                f"{door()}: `{argument}` must be positive; got {flat[first]:.3g} at entry {first}. {remedy}"
            )
