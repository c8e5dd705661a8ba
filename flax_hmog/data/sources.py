"""Sources of samples (arrays, tables, files, sparse matrices, streams), whose blocks have one shape: compiled once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from flax_hmog.data.containers import dense, is_array, is_in_blocks, is_read_by_blocks, read_rows, unwrapped
from flax_hmog.data.framing import Framing
from flax_hmog.data.labels import check_labels
from flax_hmog.data.rows import (
    as_rows,
    check_given,
    check_weights,
    effective_weights,
    enter,
    on_host,
)
from flax_hmog.data.shards import Shards, row_shards
from flax_hmog.model.checks import check_precision, door, is_concrete
from flax_hmog.model.coordinates import Natural, Prepared
from flax_hmog.model.frames import has_more_digits
from flax_hmog.model.kinds import Array
from flax_hmog.model.prepared import prepare
from flax_hmog.model.typed import Block, Data, HasShape, Samples, jit

BLOCK_BYTES = 2**26  # of the rows that are brought to the device at once
SAMPLE_FLOATS = 2**27  # of the rows that an initialisation looks at, where not all are in memory
SAMPLE_ROWS = 20_000


class RowsOnDevice:
    """An array, with weights and labels: one block, sharded or not."""

    def __init__(
        self,
        data: Data,
        obs_dim: int | None,
        dtype: DTypeLike,
        weights: Samples | None,
        labels: Samples | None,
        n_components: int,
    ) -> None:
        self.data = check_given(data, obs_dim, argument="data")
        self.x = as_rows(self.data, dtype, argument="data", in_place=True)
        check_rows(self.x)
        self.count, self.obs_dim = self.x.shape
        self.weights = _effective(weights, self.count, self.x.dtype)
        self.labels, self.classes = check_labels(labels, (self.count,), n_components)
        self.total_weight = float(jnp.sum(self.weights))

    def use_frame(self, framing: Framing) -> None:
        """Give rows that a model with `framing.frame` takes for rows of x; those too far count nothing."""
        self.framing = framing
        self.x, weights = framing.rows(self.data, self.x, self.weights, np.arange(self.count))
        if framing.wild:
            self.weights = effective_weights(weights)
            self.total_weight = float(jnp.sum(self.weights))

    def host_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows and weights as they came, on the host."""
        rows = self.data if has_more_digits(self.data, self.x.dtype) else self.x
        return on_host(rows), on_host(self.weights)

    def blocks(self) -> Iterator[Block]:
        """The blocks of one pass."""
        yield self.x, self.weights, self.labels

    def sample(self) -> Block:
        """Rows, weights and labels that the initialisation looks at: all."""
        return self.x, self.weights, self.labels

    def batches(self, order: np.ndarray, size: int) -> Iterator[Block]:
        """Batches of `size` rows in this order; the last one is filled up with rows of weight 0."""
        shards = row_shards(self.x)
        is_split = shards is not None and size % math.prod(shards[0].shape[name] for name in shards[1]) == 0
        for index, is_real in _batches(order, size):
            x, weights, labels = _take((self.x, self.weights, self.labels), index, is_real)
            yield (jax.device_put(x, self.x.sharding) if is_split else x), weights, labels


class RowsInBlocks:
    """Rows of a file or of a sparse matrix, with weights and labels; only a block is on the device at a time.

    On the host a block has the dtype of the data; it is converted on its way to the device.
    """

    def __init__(
        self,
        data: Data,
        obs_dim: int | None,
        dtype: DTypeLike,
        weights: Samples | None = None,
        labels: Samples | None = None,
        n_components: int = 1,
        argument: str = "data",
    ) -> None:
        self.dtype, self.argument = dtype, argument
        rows = unwrapped(data)
        check_rows(rows, argument)
        check_given(np.empty((0, rows.shape[1]), rows.dtype), obs_dim, argument=argument)
        self.rows = rows.tocsr() if hasattr(type(rows), "tocsr") else rows
        self.count, self.obs_dim = map(int, rows.shape)
        self.framing: Framing = None  # type: ignore[assignment]  # until `use_frame`
        self.weights: Any = np.asarray(_effective(weights, self.count, dtype))
        self.labels, self.classes = check_labels(labels, (self.count,), n_components)
        self.total_weight = float(np.sum(self.weights))
        self.is_checked = np.zeros(self.count, bool)  # rows that were seen to be finite
        self.size = min(self.count, max(1, BLOCK_BYTES // (jnp.dtype(dtype).itemsize * max(1, self.obs_dim))))

    def use_frame(self, framing: Framing) -> None:
        """Give rows that a model with `framing.frame` takes for rows of x; those too far count nothing."""
        self.framing = framing

    def host_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and weights that the initialisation looks at as they came, on the host."""
        index = self._sampled()
        return np.asarray(self._given(index)), self.weights[index]

    def blocks(self) -> Iterator[Block]:
        """The blocks of one pass; the last one is filled up with rows of weight 0."""
        for start in range(0, self.count, self.size):
            yield self._block(slice(start, min(start + self.size, self.count)), self.size)

    def given(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows of one pass in their own dtype, on the host, and their numbers, block by block."""
        for start in range(0, self.count, self.size):
            index = slice(start, min(start + self.size, self.count))
            yield self._given(index), np.arange(self.count)[index]

    def sample(self) -> Block:
        """Rows, weights and labels that the initialisation looks at: evenly spaced ones."""
        index = self._sampled()
        return self._block(index, len(index))

    def _sampled(self) -> np.ndarray:
        count = min(self.count, SAMPLE_ROWS, max(1, SAMPLE_FLOATS // self.obs_dim))
        return np.linspace(0, self.count - 1, count).astype(int)

    def batches(self, order: np.ndarray, size: int) -> Iterator[Block]:
        """Batches of `size` rows in this order; the last one is filled up with rows of weight 0."""
        for start in range(0, len(order), size):
            yield self._block(np.sort(order[start : start + size]), size)

    def _block(self, index: slice | np.ndarray, size: int) -> Block:
        given, numbers = self._given(index), np.arange(self.count)[index]
        is_finite = bool(self.is_checked[index].all())
        x = as_rows(given, self.dtype, argument=self.argument, row_numbers=numbers, is_finite=is_finite)
        self.is_checked[index] = True
        weights = self.weights[index]
        if self.framing is not None:
            x, weights = self.framing.rows(given, x, jnp.asarray(weights), numbers)
        missing = size - x.shape[0]
        pad: Callable[[Any], Array] = lambda a: jnp.pad(jnp.asarray(a), [(0, missing)] + [(0, 0)] * (np.ndim(a) - 1))  # noqa: E731
        labels = None if self.labels is None else pad(self.labels[index])
        return pad(x), pad(weights), labels

    def _given(self, index: slice | np.ndarray) -> Any:
        """Rows with these numbers in their own dtype."""
        return check_given(read_rows(self.rows, index), self.obs_dim, argument=self.argument)


class Stream:
    """A collection of batches that can be iterated repeatedly."""

    count = None
    n_rows = 0  # until the initialisation has read them
    total_weight = 0.0  # not known before the first pass ends
    classes = None
    is_checked = False  # once a pass has seen that all rows are finite

    def __init__(
        self, batches: Iterable[Samples], obs_dim: int | None, dtype: DTypeLike, argument: str = "data"
    ) -> None:
        self.data, self.dtype, self.width, self.argument = batches, dtype, obs_dim, argument
        self.framing: Framing = None  # type: ignore[assignment]  # until `use_frame`

    @property
    def obs_dim(self) -> int:
        """D of the data."""
        if self.width is None:
            self.width = next(iter(self.given()))[0].shape[1]
        return self.width

    def use_frame(self, framing: Framing) -> None:
        """Give rows that a model with `framing.frame` takes for rows of x; those too far count nothing."""
        self.framing = framing

    def host_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and weights that the initialisation looks at, on the host."""
        rows, _ = self._sampled
        return rows, np.ones(len(rows), self.dtype)

    def blocks(self) -> Iterator[Block]:
        """The batches of one pass; those shorter than the longest so far are filled up with rows of weight 0."""
        rows = 0
        for batch, numbers in self.given():
            x = as_rows(batch, self.dtype, argument=self.argument, row_numbers=numbers, is_finite=self.is_checked)
            weights = jnp.ones(x.shape[0], x.dtype)
            if self.framing is not None:
                x, weights = self.framing.rows(_on_host(batch), x, weights, numbers)
            rows = max(rows, x.shape[0])
            missing = rows - x.shape[0]
            yield jnp.pad(x, ((0, missing), (0, 0))), jnp.pad(weights, (0, missing)), None
        self.is_checked = True

    def sample(self) -> Block:
        """Rows and weights that the initialisation looks at, as `host_sample`."""
        given, numbers = self._sampled
        x = as_rows(given, self.dtype, argument=self.argument, row_numbers=numbers)
        weights = jnp.ones(x.shape[0], x.dtype)
        if self.framing is not None:
            x, weights = self.framing.rows(given, x, weights, numbers)
        return x, weights, None

    @functools.cached_property
    def _sampled(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows in their own dtype, or some of the whole pass, each equally likely, and their numbers.

        Which they are follows from the numbers of the rows alone, and they keep their order.
        """
        parts, kept, numbers = [], np.empty(0), np.empty(0, np.int64)
        rng = np.random.default_rng(0)
        for batch, index in self.given():
            limit = max(1, min(SAMPLE_ROWS, SAMPLE_FLOATS // batch.shape[1]))
            rows = _on_host(batch)
            new = max(0, min(limit - len(numbers), len(rows)))
            if new:
                parts.append(rows[:new].copy())
                numbers = np.concatenate([numbers, index[:new]])
            if new == len(rows):
                continue
            # row i takes the place of one that is kept with probability limit / (i + 1) (Vitter 1985, algorithm R)
            place = rng.integers(0, index[new:] + 1)
            is_taken = place < limit
            kept = np.concatenate(parts) if len(parts) > 1 else parts[0]
            kept = kept.astype(np.result_type(kept, rows), copy=False)
            kept[place[is_taken]], numbers[place[is_taken]] = rows[new:][is_taken], index[new:][is_taken]
            parts = [kept]
        self.n_rows = int(index[-1]) + 1
        kept = np.concatenate(parts)
        order = np.argsort(numbers)
        return kept[order], numbers[order]

    def batches(self, order: np.ndarray, size: int) -> Iterator[Block]:
        """The batches as they come."""
        return self.blocks()

    def given(self) -> Iterator[tuple[Any, np.ndarray]]:
        """The batches (B, D) of one pass in their own dtype, and the numbers of their rows (B,)."""
        width, count = self.width, 0
        for batch in self.data:
            x = check_batch(batch, width, self.argument)
            width = x.shape[1]
            yield x, np.arange(count, count + x.shape[0])
            count += x.shape[0]
        if not count:
            raise ValueError(
                f"{door()}: `{self.argument}` must hold at least one batch; got none. Check the collection."
            )


Source: TypeAlias = RowsOnDevice | RowsInBlocks | Stream


def as_source(
    data: Any,
    obs_dim: int | None,
    dtype: DTypeLike,
    weights: Samples | None = None,
    labels: Samples | None = None,
    n_components: int = 1,
    *,
    argument: str = "data",
    on_device: bool = True,
) -> Source:
    """The source for what a user gives as data; with `on_device` False, arrays are read by blocks too.

    Raises:
        TypeError: for data that cannot be read twice, or are no arrays of numbers.
        ValueError: for unusable data, or weights or labels of a stream.
    """
    check_precision(dtype)
    if is_read_by_blocks(data):
        return RowsInBlocks(data, obs_dim, dtype, weights, labels, n_components, argument)
    data = unwrapped(data)
    if is_array(data) and on_device:
        return RowsOnDevice(data, obs_dim, dtype, weights, labels, n_components)
    if is_array(data):
        rows = np.asarray(check_given(data, None, argument=argument))
        return RowsInBlocks(rows, obs_dim, dtype, weights, labels, n_components, argument)
    if isinstance(data, Iterator | Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            f"{door()}: `{argument}` must be an array or a collection of batches that can be iterated repeatedly; got "
            f"{type(data).__name__}. EM reads the data once per step: give a list or an object with __iter__."
        )
    if weights is not None or labels is not None:
        raise ValueError(
            f"{door()}: `weights` and `labels` must come with an array or a file; got a stream of batches. Give one."
        )
    return Stream(data, obs_dim, dtype, argument)


def entered(
    natural: Natural | Prepared, x: Data, weights: Samples | None = None, *, argument: str = "x", on_device: bool = True
) -> Iterator[tuple[Any, Array, Shards, Any, int | None]]:
    """The arguments of a compiled function of (natural, x) for rows of any kind: of all, or of one block at a time.

    Inside of transformations a model is a tracer, and x has to be an array.

    Yields:
        Model, rows (..., D), shards; of blocks also the weights of their rows (B,) and the number of these, as the last
        block is filled up with rows of weight 0.
    """
    if on_device and not (is_in_blocks(x) and is_concrete(natural)):
        yield *enter(natural, x), weights, None
        return
    model, size = prepare(natural), 0
    obs_dim, dtype = model.natural.interaction.shape[0], model.natural.interaction.dtype
    source: Any = as_source(x, obs_dim, dtype, weights, argument=argument, on_device=False)
    for given, numbers in source.given():
        at, rows, shards = enter(model, given, argument, numbers)
        size, count = max(size, rows.shape[0]), rows.shape[0]
        share = np.ones(count, dtype) if weights is None else source.weights[numbers]
        if count < size:
            rows, share = jnp.pad(rows, ((0, size - count), (0, 0))), np.pad(share, (0, size - count))
        yield at, rows, shards, share, count


def _effective(weights: Samples | None, count: int, dtype: DTypeLike) -> Array:
    """Sample weights (N,) that sum to the number of samples; ones if None."""
    checked = check_weights(weights, (count,), dtype)
    return checked if weights is None else effective_weights(checked)


def check_batch(batch: object, obs_dim: int | None, argument: str) -> Any:
    """A batch (B, D) of a stream in its own dtype; sparse ones become dense.

    Raises:
        TypeError: for a pair, a dict or anything else that is no array of numbers.
        ValueError: for another shape.
    """
    has_shape = lambda entry: len(getattr(entry, "shape", ())) > 1  # noqa: E731
    if isinstance(batch, Mapping) or (isinstance(batch, list | tuple) and any(map(has_shape, batch))):
        held = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        shapes = ", ".join(f"{key!r}: {getattr(entry, 'shape', type(entry).__name__)}" for key, entry in held)
        first = next(iter(batch)) if isinstance(batch, Mapping) else 0
        raise TypeError(
            f"{door()}: `{argument}` must hold batches (B, D) of rows alone; got {type(batch).__name__} with {shapes}. "
            f"Give an object whose __iter__ yields the rows of each, as `batch[{first!r}]`; labels go with an array, "
            "as `labels`."
        )
    x = check_given(dense(argument, batch), None, argument=argument)
    remedy = "Give whole batches of rows."
    if x.ndim == 1:
        remedy = "Join single rows to one array: numpy.stack(data), or numpy.asarray(data) for lists of numbers."
    elif x.ndim > 2:
        remedy = "Flatten what a row holds: batch.reshape(len(batch), -1)."
    if x.ndim != 2 or not x.shape[0]:
        raise ValueError(f"{door()}: `{argument}` must hold batches (B, D); got {x.shape}. {remedy}")
    return check_given(x, obs_dim, argument=argument)


def check_rows(x: HasShape, argument: str = "data") -> None:
    """ValueError unless x is (N, D) with N > 0."""
    if len(x.shape) != 2 or not x.shape[0]:
        raise ValueError(
            f"{door()}: `{argument}` must have shape (N, D); got {x.shape}. Reshape it to one row per sample."
        )


def _on_host(batch: object) -> np.ndarray:
    """A batch as numpy, on every process."""
    if isinstance(batch, jax.Array) and not batch.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(batch, tiled=True))
    return np.asarray(batch)


def _batches(order: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(order), size):
        index = order[start : start + size]
        missing = size - len(index)
        yield np.pad(index, (0, missing)), np.arange(size) < len(index)


@jit
def _take(block: Block, index: np.ndarray, is_real: np.ndarray) -> Block:
    x, weights, labels = jax.tree.map(lambda a: jnp.take(a, index, axis=0), block)
    return x, jnp.where(is_real, weights, 0), labels
