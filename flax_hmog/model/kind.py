"""The interface of a kind of matrix, and the kinds by name: a new one is added here."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, TypeAlias, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flax_hmog.model.checks import check_positive, door
from flax_hmog.model.typed import Rows

Array: TypeAlias = jax.Array
T = TypeVar("T")

_PYTREES: list[type] = []
_TOLD: list[Callable[[type], None]] = []


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose fields are the children of a JAX pytree, but for those marked static.

    Fields with `init=False` are children too; `dataclasses.replace` drops them.

    JAX takes the structures of two classes with the same fields for equal, and `jit` may then run what it compiled for
    the other one. Classes of which a function is given either need a static field that differs, as kinds have `name`.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    if all(field.init for field in fields):
        jax.tree_util.register_dataclass(made)
    else:
        _register_with_derived(made, tuple(field.name for field in fields))
    _PYTREES.append(made)
    for function in _TOLD:
        function(made)
    return made


def _register_with_derived(cls: type, names: tuple[str, ...]) -> None:
    """`register_dataclass` for a class without static fields, whose constructor does not take all fields."""
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)
    children = operator.attrgetter(*names)

    def unflatten(_: None, values: Iterable[Any]) -> Any:
        new: Any = object.__new__(cls)
        new.__dict__.update(zip(names, values, strict=True))
        return new

    jax.tree_util.register_pytree_with_keys(
        cls, lambda value: (zip(keys, children(value), strict=True), None), unflatten, lambda v: (children(v), None)
    )


def for_each_pytree(function: Callable[[type], None]) -> None:
    """Call `function` with every class that `pytree` has made, and will make."""
    _TOLD.append(function)
    for cls in _PYTREES:
        function(cls)


class Kind(abc.ABC):
    """Symmetric positive definite matrices of one structure: the base class of all kinds.

    A covariance, precision or second moment is an instance of its kind, and whatever depends on the structure is a
    method of it. So a kind of one's own is one class, registered by `register_kind`, with `entries` as its field and
    the abstract methods of this class. The others are defined here for entries on the diagonal, one each or shared;
    `register_kind` names those that a kind with other entries must define too.

    All methods take leading batch dimensions. Warm starts and analysis hold entries as numpy arrays in float64, so that
    what is annotated `Any` should compute in numpy where it is given numpy.

    Attributes:
        entries: array of shape `(..., *shape(n))`. Without it the instance only names the kind, as in
            `obs_rep=Diagonal()`. Other fields are static.
        name: value of `obs_rep` and its like for the kind; `register_kind` sets it.
        is_diagonal: all matrices of the kind are diagonal.
        is_isotropic: all are multiples of the identity.

    Example:
        >>> from flax_hmog import Diagonal
        >>> isinstance(Diagonal(jnp.ones(3)), Kind), Diagonal.name, Diagonal.is_isotropic
        (True, 'diagonal', False)
    """

    entries: Any
    name: ClassVar[str]
    is_diagonal: ClassVar[bool] = True
    is_isotropic: ClassVar[bool] = False

    @staticmethod
    @abc.abstractmethod
    def shape(dim: int) -> tuple[int, ...]:
        """Shape of `entries` for one matrix of dimension `dim`."""

    @classmethod
    @abc.abstractmethod
    def project(cls, matrix: Array) -> Self:
        """Restriction of dense (..., n, n) to this kind."""

    @classmethod
    @abc.abstractmethod
    def project_product(cls, left: Array, right: Array) -> Self:
        """Restriction of `left @ right.T` to this kind, for (..., n, m) factors."""

    @classmethod
    @abc.abstractmethod
    def second_moment(cls, rows: Array, weights: Array) -> Self:
        """sum_i weights_i rows_i rows_i' in this kind, for rows (B, n)."""

    @classmethod
    @abc.abstractmethod
    def from_diagonal(cls, diagonals: Rows) -> Self:
        """Restriction to this kind of the diagonal matrices with diagonals (..., n)."""

    @abc.abstractmethod
    def diagonal(self) -> Any:
        """The diagonals (..., n)."""

    @abc.abstractmethod
    def inverse(self) -> Self:
        """The inverse, of the same kind."""

    @abc.abstractmethod
    def cholesky(self) -> Self:
        """Lower factor F with F F' equal to the matrix, of the same kind; NaN where it is not positive definite."""

    @abc.abstractmethod
    def log_det(self) -> Array:
        """Logarithm of the determinant (...); NaN where a matrix is not positive definite."""

    @abc.abstractmethod
    def times(self, columns: Array) -> Any:
        """Matrix @ columns, for columns (n, m)."""

    @abc.abstractmethod
    def rows_times(self, rows: Array) -> Any:
        """Rows @ matrix, for rows (B, n)."""

    @abc.abstractmethod
    def lower_solve(self, columns: Array) -> Any:
        """F^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""

    @abc.abstractmethod
    def upper_solve(self, columns: Array) -> Array:
        """F'^-1 columns, for a factor F that `cholesky` returned and columns (n, m)."""

    @abc.abstractmethod
    def scaled(self, columns: Rows) -> Self:
        """A M A for A = diag(columns) (n,), whose entries are all equal for an isotropic kind."""

    @abc.abstractmethod
    def weighted(self, weights: Array) -> Self:
        """Each matrix of the batch times its weight (...)."""

    @abc.abstractmethod
    def floored(self, share: float) -> Self:
        """One matrix, its eigenvalues raised to `share` times their average where they are below."""

    def sized(self, dim: int) -> Self:
        """The same with dimension n = `dim`, where `entries` leave it open; of another size as it is."""
        return self

    def dense(self) -> Any:
        """The matrices (..., n, n)."""
        return diagonal_matrices(self.diagonal())

    def product(self, other: Self) -> Self:
        """Matrix product with another of the same kind; it need not be symmetric."""
        return dataclasses.replace(self, entries=self.entries * other.entries)  # type: ignore[type-var]

    def whitened(self, covariance: Kind) -> Self:
        """F^-1 M F'^-1 for a batch of matrices (K,) and one covariance F F' of the same kind, or a diagonal one."""
        return dataclasses.replace(self, entries=self.entries / covariance.entries[None])  # type: ignore[type-var]

    def symmetrized(self) -> Self:
        """The average of the matrix and its transpose."""
        return self

    def check(self, argument: str, remedy: str) -> None:
        """ValueError that names the argument unless the matrices are positive definite."""
        check_positive(argument, self.entries, remedy)

    @classmethod
    def from_leaf(cls, leaf: Array, dim: int, interval: tuple[float, float], floor: float) -> Self:
        """Smooth map of any real numbers `(..., *shape(dim))` onto matrices.

        Args:
            leaf: the numbers, trainable leaves of a head.
            dim: n.
            interval: open interval of the entries of the diagonal.
            floor: smallest eigenvalue of the correlations.
        """
        return cls(bounded(leaf, interval)).sized(dim)  # type: ignore[call-arg]

    @classmethod
    def inverse_from_leaf(cls, leaf: Array, dim: int, interval: tuple[float, float], floor: float) -> Self:
        """The inverse of `from_leaf`."""
        return cls.from_leaf(leaf, dim, interval, floor).inverse()

    def leaf(self, interval: tuple[float, float], floor: float) -> np.ndarray:
        """The leaf of this, in numpy; what `from_leaf` cannot reach goes to the edge."""
        return unbounded(self.entries, interval)

    @classmethod
    def leaf_axes(cls, axis: str) -> tuple[str | None, ...]:
        """Logical names of the axes of a leaf: the first is `axis`, as a name may stand once."""
        rank = len(cls.shape(1))
        return (axis, *[None] * rank)[:rank]

    @classmethod
    def packed_size(cls, dim: int) -> int:
        """Number of distinct entries of a matrix."""
        return math.prod(cls.shape(dim))

    def pack(self) -> Array:
        """Distinct entries (..., packed size), in the order of the flat layout."""
        batch = self.entries.ndim - len(self.shape(1))
        shape = self.entries.shape
        return cast(Array, self.entries.reshape(*shape[:batch], math.prod(shape[batch:])))

    @classmethod
    def unpack(cls, packed: Array, dim: int) -> Self:
        """The matrices of distinct entries (..., packed size)."""
        return cls(packed.reshape(*packed.shape[:-1], *cls.shape(dim))).sized(dim)  # type: ignore[call-arg]

    @classmethod
    def natural_factor(cls, dim: int) -> np.ndarray:
        """Factor (packed size,) that makes natural parameters theta of a precision P: theta . s(x) = -1/2 x' P x."""
        size = cls.packed_size(dim)
        return np.full(size, -dim / (2 * size))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.entries, dtype)


Rep: TypeAlias = type[Kind]
RepLike: TypeAlias = "str | Kind | Rep"
"""A kind by its name, an instance or its class."""
K = TypeVar("K", bound=Rep)

REPS: dict[str, Rep] = {}
OF_THE_DIAGONAL = (
    "dense", "product", "whitened", "symmetrized", "check", "from_leaf", "leaf", "natural_factor",
)  # fmt: skip
"""Methods of `Kind` that hold for entries of the diagonal alone."""


@dataclass_transform(frozen_default=True)
def register_kind(name: str) -> Callable[[K], K]:
    """Decorator that adds a kind: heads, fits, checkpoints and errors know it by this name from then on.

    It makes the class a frozen dataclass and a pytree. A checkpoint holds the name, so the class has to be registered
    before it is restored.

    Args:
        name: value of `obs_rep`, `pst_rep` and `lat_rep` for the kind.

    Returns:
        The decorator.

    Raises:
        TypeError: for a class that is no `Kind`, or lacks methods.
        ValueError: for a name that is taken.

    Example:
        >>> @register_kind("banded")  # without the methods of `Kind`
        ... class Banded(Kind):
        ...     entries: Any = None
        Traceback (most recent call last):
        TypeError: register_kind: `Banded` must define all that its entries need; got no cholesky, diagonal, ...
    """

    def register(cls: K) -> K:
        if not (isinstance(cls, type) and issubclass(cls, Kind)):
            raise TypeError(f"register_kind: `cls` must be a subclass of Kind; got {cls!r}. Derive it from Kind.")
        lacking = sorted(cls.__abstractmethods__)
        if not cls.is_diagonal:
            lacking += [method for method in OF_THE_DIAGONAL if not _defines(cls, method)]
        if lacking:
            raise TypeError(
                f"register_kind: `{cls.__name__}` must define all that its entries need; got no {', '.join(lacking)}. "
                "Define them, as Kind says."
            )
        taken = REPS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"register_kind: `name` must be new; got {name!r}, which is {taken.__qualname__}. Choose another one."
            )
        # a field, as structures of pytrees tell classes apart by their static fields
        cls.__annotations__ = inspect.get_annotations(cls) | {"name": str}
        cls.name = dataclasses.field(default=name, kw_only=True, repr=False, metadata={"static": True})
        REPS[name] = pytree(cls)
        return cls

    return register


def _defines(cls: Rep, method: str) -> bool:
    """True if a class overrides a method of `Kind`."""
    return any(method in vars(base) for base in cls.__mro__[: cls.__mro__.index(Kind)])


def as_rep(rep: RepLike, *, argument: str = "rep") -> Rep:
    """Resolve a kind given by class, instance or name.

    Raises:
        ValueError: for anything else, with the choices.
    """
    kind = REPS.get(rep.lower()) if isinstance(rep, str) else rep if isinstance(rep, type) else type(rep)
    if kind is None or kind not in REPS.values():
        choices = ", ".join(f'"{name}" ({kind.__name__})' for name, kind in REPS.items())
        raise ValueError(f"{door()}: `{argument}` must be one of {choices}; got {rep!r}. Give the name or the class.")
    return kind


def trace_product(left: Kind, right: Kind) -> Array:
    """tr(left' right) () of two matrices, of any kinds."""
    if left.is_diagonal or right.is_diagonal:
        return jnp.sum(left.diagonal() * right.diagonal())
    return jnp.sum(left.dense() * right.dense())


def diagonal_matrices(diagonals: Rows) -> Any:
    """Matrices (..., n, n) with these diagonals (..., n), of numpy or JAX."""
    if isinstance(diagonals, np.ndarray):
        return diagonals[..., None] * np.eye(diagonals.shape[-1])
    columns = jnp.broadcast_to(diagonals[..., None], (*diagonals.shape, diagonals.shape[-1]))
    return columns * identity_like(columns)


def identity_like(matrix: Array) -> Array:
    """Identity matrices of the shape and dtype of `matrix` (..., n, n)."""
    return jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)


def fill_sizes(owner: object, beside: object, *fields: str) -> None:
    """Tell kinds in fields of a frozen dataclass their dimension, the last of an array (..., n) beside them."""
    for dim in getattr(beside, "shape", ())[-1:]:
        for field in fields:
            if isinstance(kind := getattr(owner, field), Kind):
                object.__setattr__(owner, field, kind.sized(dim))


def bounded(leaf: Array, interval: tuple[float, float]) -> Array:
    """Smooth map of real numbers onto (lower, upper): exp(middle + h tanh(leaf / h)) in logarithms; 0 to the middle."""
    lower, upper = (math.log(bound) for bound in interval)
    middle, half = (upper + lower) / 2, (upper - lower) / 2
    return jnp.exp(middle + half * jnp.tanh(leaf / half))


def unbounded(value: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Inverse of `bounded`, in numpy; what lies outside goes to the edge."""
    lower, upper = (math.log(bound) for bound in interval)
    middle, half = (upper + lower) / 2, (upper - lower) / 2
    edge = 1 - 1e-6
    return cast(np.ndarray, half * np.arctanh(np.clip((np.log(value) - middle) / half, -edge, edge)))
