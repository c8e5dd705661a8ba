"""Preprocessing that is fitted on training data and stored with the model.

A step is a small dataclass of arrays with a `fit`; a `Preprocessing` is a sequence of steps. All of them run on numpy
arrays and under `jit`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_hmog.data.containers import dense
from flax_hmog.model.checks import check_positive, check_size, door, may_miss, public
from flax_hmog.model.kinds import matmul
from flax_hmog.model.typed import Data, Rows

Blocks: TypeAlias = Callable[[], Any]
"""Gives an iterator over blocks (B, D) of this process's share of the training data, a new one at each call."""
Total: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Adds an array up over all processes."""
Gather: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Gives the arrays of all processes, stacked (P, ...)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """(x - offset) / scale, column by column.

    Attributes:
        offset: (D,), in units of the input.
        scale: (D,), positive, in units of the input.

    Example:
        >>> Affine.constant(2, offset=1.0, scale=2.0)(np.array([[1.0, 5.0]])).tolist()
        [[0.0, 2.0]]
    """

    offset: Any
    scale: Any
    name: ClassVar[str] = "affine"

    @classmethod
    @public
    def constant(cls, obs_dim: int, *, offset: float = 0.0, scale: float = 1.0) -> Affine:
        """The same offset and scale for every column."""
        check_positive("scale", scale, "Divide by a positive number.")
        return cls(np.full(obs_dim, offset, np.float32), np.full(obs_dim, scale, np.float32))

    @classmethod
    def standard(cls, blocks: Blocks, total: Total) -> Affine:
        """Means to 0 and standard deviations to 1; constant columns are only centred."""
        mean, variance, _ = _moments(blocks, total)
        return cls(mean.astype(np.float32), np.sqrt(np.where(variance > 0, variance, 1)).astype(np.float32))

    @classmethod
    def unit_range(cls, blocks: Blocks, gather: Gather) -> Affine:
        """The smallest entry of all columns to 0 and the largest to 1."""
        lower, upper, columns = np.inf, -np.inf, 0
        for block in blocks():
            lower, upper, columns = min(lower, block.min()), max(upper, block.max()), block.shape[-1]
        bounds = gather(np.array([lower, upper, columns], np.float64))
        offset, top = bounds[:, 0].min(), bounds[:, 1].max()
        return cls.constant(int(bounds[:, 2].max()), offset=offset, scale=top - offset if top > offset else 1.0)

    def __call__(self, x: Rows) -> Any:
        """Rows (..., D) of rows (..., D)."""
        return (x - _as_row(self.offset, x)) / _as_row(self.scale, x)


@dataclasses.dataclass(frozen=True, eq=False)
class SizeFactor:
    """Rows scaled to one total, as counts of single cells are; rows of zeros stay.

    Attributes:
        target: () total of every row afterwards.

    Example:
        >>> SizeFactor(np.float32(10.0))(np.array([[1.0, 3.0, 1.0]])).tolist()
        [[2.0, 6.0, 2.0]]
    """

    target: Any
    name: ClassVar[str] = "size_factor"

    @classmethod
    def mean(cls, blocks: Blocks, total: Total) -> SizeFactor:
        """The step that scales rows to the mean total of the training rows."""
        sums = np.zeros(2)
        for block in blocks():
            sums += np.asarray(block, np.float64).sum(), len(block)
        entries, rows = total(sums)
        return cls(np.float32(entries / rows))

    def __call__(self, x: Rows) -> Any:
        """Rows (..., D) of rows (..., D)."""
        sums = x.sum(axis=-1, keepdims=True)
        return x * (self.target / _namespace(x).where(sums > 0, sums, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Log1p:
    """log(1 + x), entry by entry.

    Example:
        >>> Log1p()(np.array([[0.0, 1.0]])).round(2).tolist()
        [[0.0, 0.69]]
    """

    name: ClassVar[str] = "log1p"

    def __call__(self, x: Rows) -> Any:
        """Rows (..., D) of rows (..., D)."""
        return _namespace(x).log1p(x)


@dataclasses.dataclass(frozen=True, eq=False)
class SelectColumns:
    """Some of the columns.

    Attributes:
        columns: (D',) int32, ascending.

    Example:
        >>> SelectColumns(np.array([0, 2]))(np.array([[1.0, 2.0, 3.0]])).tolist()
        [[1.0, 3.0]]
    """

    columns: Any
    name: ClassVar[str] = "select_columns"

    @classmethod
    @public
    def most_variable(cls, blocks: Blocks, total: Total, *, count: int) -> SelectColumns:
        """The `count` columns with the largest variance; all that vary, if they are fewer."""
        check_size("count", count)
        variance = _moments(blocks, total)[1]
        order = np.argsort(-variance, kind="stable")[: min(count, max(1, int((variance > 0).sum())))]
        return cls(np.sort(order).astype(np.int32))

    def __call__(self, x: Rows) -> Any:
        """Rows (..., D') of rows (..., D)."""
        return x[..., self.columns]


@dataclasses.dataclass(frozen=True, eq=False)
class Whiten:
    """Leading principal components, each with variance 1.

    Attributes:
        mean: (D,), in units of the input.
        axes: (D, D'), principal axes divided by the standard deviations along them.

    Example:
        >>> step = Whiten.principal(lambda: iter([np.eye(3)]), lambda total: total, count=2)
        >>> step(np.eye(3)).shape
        (3, 2)
    """

    mean: Any
    axes: Any
    name: ClassVar[str] = "whiten"

    @classmethod
    @public
    def principal(cls, blocks: Blocks, total: Total, *, count: int) -> Whiten:
        """The `count` leading components; fewer where the data have no more directions."""
        check_size("count", count)
        mean, _, rows = _moments(blocks, total)
        centered = ((np.asarray(block, np.float64) - mean) for block in blocks())
        covariance = total(sum(block.T @ block for block in centered)) / rows
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        keep = max(1, min(count, int((values > 1e-10 * values[0]).sum())))
        # the sign of an axis is arbitrary: its largest entry is made positive
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])
        axes = (vectors * signs)[:, :keep] / np.sqrt(np.maximum(values[:keep], np.finfo(np.float64).tiny))
        return cls(mean.astype(np.float32), axes.astype(np.float32))

    def __call__(self, x: Rows) -> Any:
        """Rows (..., D') of rows (..., D)."""
        centered = x - _as_row(self.mean, x)
        return matmul(centered, self.axes) if isinstance(x, jax.Array) else centered @ self.axes


Step: TypeAlias = Affine | SizeFactor | Log1p | SelectColumns | Whiten
STEPS: dict[str, Any] = {cls.name: cls for cls in (Affine, SizeFactor, Log1p, SelectColumns, Whiten)}


@dataclasses.dataclass(frozen=True, eq=False)
class Preprocessing:
    """Steps from raw data to the inputs of a model; `preprocessing(raw)` is float32.

    Attributes:
        steps: applied in this order.
        obs_dim: number of columns of the raw data.
        image_shape: (height, width) or (height, width, channels) where they are images, which are taken as such too.

    Example:
        >>> preprocessing = Preprocessing((Log1p(), Affine.constant(2, scale=2.0)), obs_dim=2)
        >>> preprocessing(np.zeros((1, 2))).tolist()
        [[0.0, 0.0]]
    """

    steps: tuple[Step, ...]
    obs_dim: int
    image_shape: tuple[int, ...] | None = None

    @public
    def __call__(self, raw: Data) -> Any:
        """Model inputs (..., D), float32, of raw data (..., obs_dim) or of images (..., H, W[, C]).

        Raises:
            ValueError: for another number of columns, or images of another shape.
        """
        given = as_rows(dense("raw", raw), self.image_shape)
        mixing = [step.name for step in self.steps if isinstance(step, SizeFactor | Whiten)]
        if may_miss() and mixing:
            raise ValueError(
                f'{door()}: `missing` must be "refuse" after preprocessing by {mixing[0]}, which mixes columns; got '
                '"nan". Fit a model to the columns themselves.'
            )
        if np.ndim(given) == 0 or np.shape(given)[-1] != self.obs_dim:
            images = "" if self.image_shape is None else f" or (..., {', '.join(map(str, self.image_shape))})"
            remedy = f"Give the {'images' if images else 'columns'} that the model was trained on."
            raise ValueError(
                f"Preprocessing: `raw` must have shape (..., {self.obs_dim}){images}; got {np.shape(given)}. {remedy}"
            )
        x = jnp.asarray(given, jnp.float32) if isinstance(given, jax.Array) else np.asarray(given, np.float32)
        for step in self.steps:
            x = step(x)
        return x

    def __post_init__(self) -> None:
        for step in self.steps:
            if STEPS.get(getattr(step, "name", "")) is not type(step):
                raise TypeError(
                    f"Preprocessing: `steps` must be of {', '.join(cls.__name__ for cls in STEPS.values())}; got "
                    f"{step!r}. Others could not be restored: apply them before."
                )

    def then(self, step: Step) -> Preprocessing:
        """One step more."""
        return dataclasses.replace(self, steps=(*self.steps, step))

    def describe(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        images = {} if self.image_shape is None else {"image_shape": list(self.image_shape)}
        return {"obs_dim": self.obs_dim, "steps": [step.name for step in self.steps]} | images

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the steps, as {"0/offset": ...}."""
        return {
            f"{number}/{name}": np.asarray(value)
            for number, step in enumerate(self.steps)
            for name, value in vars(step).items()
        }


def rebuild_preprocessing(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> Preprocessing:
    """The preprocessing with this description and these arrays."""
    steps = [
        STEPS[name](**{field.name: arrays[f"{number}/{field.name}"] for field in dataclasses.fields(STEPS[name])})
        for number, name in enumerate(description["steps"])
    ]
    shape = description.get("image_shape")
    return Preprocessing(tuple(steps), description["obs_dim"], shape and tuple(shape))


def as_rows(given: Any, image_shape: tuple[int, ...] | None) -> Any:
    """Images (..., *image_shape) as rows (..., D), one channel with an axis or without; all others as they are."""
    if image_shape is None:
        return given
    for shape in (image_shape, (*image_shape, 1)):
        leading = np.ndim(given) - len(shape)
        if leading >= 0 and np.shape(given)[leading:] == shape:
            return given.reshape(*np.shape(given)[:leading], math.prod(shape))
    return given


def _moments(blocks: Blocks, total: Total) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean (D,), variance (D,) and number of rows over all processes, in float64."""
    count, first = 0.0, 0.0
    for block in blocks():
        count, first = count + len(block), first + np.asarray(block, np.float64).sum(axis=0)
    sums = total(np.concatenate([np.asarray(first), [count]]))
    rows, mean = sums[-1], sums[:-1] / sums[-1]
    second = sum(((np.asarray(block, np.float64) - mean) ** 2).sum(axis=0) for block in blocks())
    return mean, total(np.asarray(second)) / rows, rows


def _namespace(x: Any) -> Any:
    return jnp if isinstance(x, jax.Array) else np


def _as_row(values: ArrayLike, x: Any) -> np.ndarray:
    """Values of columns (D,) with as many dimensions as x."""
    return np.asarray(values).reshape((1,) * (x.ndim - 1) + (-1,))
