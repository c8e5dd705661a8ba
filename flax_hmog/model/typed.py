"""Types of what functions take, and `jit` that keeps the type of its function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar, overload

import jax
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.typing import ArrayLike

P = ParamSpec("P")
R = TypeVar("R")


class HasShape(Protocol):
    """An array of any library, a table, a sparse matrix, a file that is read by blocks."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""


Samples: TypeAlias = ArrayLike | HasShape | Sequence[object]
"""Observations (..., D), weights or labels: whatever numpy makes an array of, a table, a sparse matrix."""
Data: TypeAlias = Samples | Iterable[Samples]
"""Observations (N, D) as `Samples`, or a collection of batches (B, D) that can be iterated repeatedly."""
Rows: TypeAlias = np.ndarray | Array
"""Rows on the host or on a device."""
Block: TypeAlias = tuple[Array, Array, Array | None]
"""Rows (B, D), sample weights (B,), labels (B,) or None."""
Inputs: TypeAlias = Rows | jax.ShapeDtypeStruct
"""Inputs of a module, or their shape and dtype."""
Tree: TypeAlias = Any
"""A pytree of arrays."""
Floats: TypeAlias = npt.NDArray[np.float64]
"""Numbers in numpy's float64."""
Variables: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Collections of a linen module's variables by their names."""


@overload
def jit(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def jit(*, static_argnames: str | Sequence[str]) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def jit(function: Any = None, /, **options: Any) -> Any:
    """`jax.jit`, with the type of what it compiles."""
    return partial(jax.jit, **options) if function is None else jax.jit(function)
