"""Where samples come from: arrays on devices, files larger than memory, sparse matrices, streams of batches.

A source gives the same blocks at every pass, all of one shape, so that nothing is compiled twice.
"""

from __future__ import annotations

import math
from functools import partial
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.checks import check_observations, check_shape
from flax_hmog.conversions import with_prior
from flax_hmog.coordinates import check_natural
from flax_hmog.covariances import Array
from flax_hmog.inference import HMoGOutput, infer
from flax_hmog.frames import Frame, has_more_digits
from flax_hmog.rows import on_host, row_shards
from flax_hmog.statistics import check_weights, effective_weights

BLOCK_BYTES = 2**26  # of the rows that are brought to the device at once
SAMPLE_FLOATS = 2**27  # of the rows that an initialisation looks at, where not all are in memory
SAMPLE_ROWS = 20_000

Block: TypeAlias = tuple[Array, Array, Array | None]
"""Rows (B, D), sample weights (B,), labels (B,) or None."""


def is_on_disk_or_sparse(data: Any) -> bool:
    """Whether rows are brought to the device block by block: memory-mapped arrays and scipy's sparse matrices."""
    return isinstance(data, np.memmap) or hasattr(data, "tocsr")


def infer_blocks(natural: Any, data: Any) -> HMoGOutput:
    """`infer` for data larger than memory, or sparse: rows are brought to the device block by block.

    Args:
        natural: the model.
        data: observations (N, D): a memory-mapped array (`numpy.load(path, mmap_mode="r")`), a scipy sparse matrix or
            an array.

    Returns:
        `HMoGOutput` of numpy arrays.

    Raises:
        TypeError, ValueError: as `infer`.
    """
    caller = "infer_blocks"
    check_natural(caller, natural)
    rows = data if is_on_disk_or_sparse(data) else np.asarray(data)
    natural = with_prior(natural, caller)
    source = RowsInBlocks(caller, rows, natural.interaction.shape[0], natural.interaction.dtype, None, None)
    parts = [jax.tree.map(np.asarray, infer(natural, x)) for x, _, _ in source.blocks()]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: source.count], *parts)


class Framing:
    """How rows enter a fit: in the frame that it computes in, and without those that are far from all others.

    Attributes:
        frame: what a model must have to take the rows for rows of x.
        wild: numbers of the rows left out so far.
    """

    def __init__(self, frame: Frame, dtype: Any, max_distance: float, by_column: bool, exact: bool) -> None:
        self.full, self.exact = frame, exact
        self.frame = frame.applied() if exact else frame
        self.dtype, self.max_distance, self.by_column = dtype, max_distance, by_column
        self.wild: set[int] = set()

    def rows(self, raw: Any, x: Array, weights: Array, numbers: np.ndarray) -> tuple[Array, Array]:
        """Rows (B, D) and their weights (B,), those of wild rows 0.

        Args:
            raw: the rows as they came.
            x: the rows in the working dtype.
            weights: their weights.
            numbers: their numbers among all rows (B,).
        """
        if self.exact:
            x = jnp.asarray(self.full.inward_on_host(raw), self.dtype)
        wild = _wild_rows(self.frame, x, weights, self.max_distance, self.by_column)
        if bool(jnp.any(wild)):
            self.wild.update(numbers[on_host(wild)].tolist())
            x, weights = _without_rows(self.frame, x, weights, wild)
        return x, weights


@partial(jax.jit, static_argnames="by_column")
def _wild_rows(frame: Frame, x: Array, weights: Array, max_distance: Array | float, by_column: bool) -> Array:
    """Whether rows (B, D) count, but have an entry (or, with one unit, are as a whole) too far from the origin (B,)."""
    rows = jnp.abs(frame.inward(x))
    distance = jnp.max(rows, axis=-1)
    if not by_column:
        top = jnp.maximum(distance, 1)
        distance = top * jnp.sqrt(jnp.mean((rows / top[:, None]) ** 2, axis=-1))
    return (distance > max_distance) & (weights > 0)


@jax.jit
def _without_rows(frame: Frame, x: Array, weights: Array, wild: Array) -> tuple[Array, Array]:
    """The rows that are left out lie at the origin, as a weight of 0 alone would not hide a square that overflows."""
    return jnp.where(wild[:, None], frame.origin[None], x), jnp.where(wild, 0, weights)


class RowsOnDevice:
    """An array, with weights and labels: one block, sharded or not."""

    def __init__(
        self, caller: str, data: Any, obs_dim: int | None, dtype: Any, weights: Any, labels: Any, n_components: int
    ) -> None:
        self.x = check_observations(caller, data, obs_dim, dtype, argument="data")
        check_rows(caller, self.x)
        self.count, self.obs_dim = self.x.shape
        self.data: Any = data
        self.weights = _effective(caller, weights, self.count, self.x.dtype)
        self.labels = check_labels(caller, labels, (self.count,), n_components)
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
        devices = 1 if shards is None else math.prod(shards[0].shape[name] for name in shards[1])
        for index, is_real in _batches(order, size):
            x, weights, labels = _take((self.x, self.weights, self.labels), index, is_real)
            yield (x if size % devices else jax.device_put(x, self.x.sharding)), weights, labels


class RowsInBlocks:
    """Rows of a file or of a sparse matrix, with weights and labels; only a block is on the device at a time."""

    def __init__(
        self, caller: str, data: Any, obs_dim: int | None, dtype: Any, weights: Any, labels: Any, n_components: int = 1
    ) -> None:
        self.caller, self.dtype = caller, dtype
        self.rows = data.tocsr() if hasattr(data, "tocsr") else data
        check_rows(caller, self.rows)
        if obs_dim not in (None, data.shape[1]):
            check_observations(caller, np.empty((0, data.shape[1]), dtype), obs_dim, dtype, argument="data")
        self.count, self.obs_dim = data.shape
        self.framing: Framing | None = None
        self.weights: Any = np.asarray(_effective(caller, weights, self.count, dtype))
        self.labels = check_labels(caller, labels, (self.count,), n_components)
        self.total_weight = float(np.sum(self.weights))
        self.size = min(self.count, max(1, BLOCK_BYTES // (jnp.dtype(dtype).itemsize * max(1, self.obs_dim))))

    def use_frame(self, framing: Framing) -> None:
        """Give rows that a model with `framing.frame` takes for rows of x; those too far count nothing."""
        self.framing = framing

    def host_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and weights that the initialisation looks at as they came, on the host."""
        index = self._sampled()
        return self._dense(index), self.weights[index]

    def blocks(self) -> Iterator[Block]:
        """The blocks of one pass; the last one is filled up with rows of weight 0."""
        for start in range(0, self.count, self.size):
            yield self._block(slice(start, start + self.size), self.size)

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

    def _block(self, index: Any, size: int) -> Block:
        dense, numbers = self._dense(index), np.arange(self.count)[index]
        x = check_observations(self.caller, dense, self.obs_dim, self.dtype, argument="data", row_numbers=numbers)
        weights = self.weights[index]
        if self.framing is not None:
            x, weights = self.framing.rows(dense, x, jnp.asarray(weights), numbers)
        pad = lambda a: jnp.pad(jnp.asarray(a), [(0, size - x.shape[0])] + [(0, 0)] * (np.ndim(a) - 1))  # noqa: E731
        labels = None if self.labels is None else pad(self.labels[index])
        return pad(x), pad(weights), labels

    def _dense(self, index: Any) -> np.ndarray:
        rows = self.rows[index]
        return np.asarray(rows.toarray() if hasattr(rows, "toarray") else rows)


class Stream:
    """A collection of batches that can be iterated repeatedly."""

    count = None
    total_weight = 0.0  # not known before the first pass ends

    def __init__(self, caller: str, batches: Iterable, obs_dim: int | None, dtype: Any) -> None:
        self.caller, self.data, self.dtype, self.width = caller, batches, dtype, obs_dim
        self.framing: Framing | None = None

    @property
    def obs_dim(self) -> int:
        """D of the data."""
        return self.width or self.sample()[0].shape[1]

    def use_frame(self, framing: Framing) -> None:
        """Give rows that a model with `framing.frame` takes for rows of x; those too far count nothing."""
        self.framing = framing

    def host_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and weights that the initialisation looks at, on the host."""
        x, weights, _ = self.sample()
        return np.asarray(x), np.asarray(weights)

    def blocks(self) -> Iterator[Block]:
        """The batches of one pass; those shorter than the longest so far are filled up with rows of weight 0."""
        rows, seen, width = 0, 0, self.width
        for batch in self.data:
            dense = batch.toarray() if hasattr(batch, "toarray") else batch
            x = check_observations(self.caller, dense, width, self.dtype, argument="data")
            if x.ndim != 2 or not x.shape[0]:
                raise ValueError(
                    f"{self.caller}: `data` must hold batches (B, D); got {x.shape}. Give whole batches of rows."
                )
            width = x.shape[1]
            weights = jnp.ones(x.shape[0], x.dtype)
            if self.framing is not None:
                x, weights = self.framing.rows(dense, x, weights, np.arange(seen, seen + x.shape[0]))
            rows, seen = max(rows, x.shape[0]), seen + x.shape[0]
            missing = rows - x.shape[0]
            yield jnp.pad(x, ((0, missing), (0, 0))), jnp.pad(weights, (0, missing)), None
        if not rows:
            raise ValueError(f"{self.caller}: `data` must hold at least one batch; got none. Check the collection.")

    def sample(self) -> Block:
        """Rows and weights that the initialisation looks at: the first ones."""
        parts, count = [], 0
        for x, weights, _ in self.blocks():
            parts.append((x, weights))
            count += x.shape[0]
            if count >= min(SAMPLE_ROWS, SAMPLE_FLOATS // x.shape[1]):
                break
        return jnp.concatenate([x for x, _ in parts]), jnp.concatenate([w for _, w in parts]), None

    def batches(self, order: np.ndarray, size: int) -> Iterator[Block]:
        """The batches as they come."""
        return self.blocks()


Source: TypeAlias = RowsOnDevice | RowsInBlocks | Stream


def as_source(caller: str, head: Any, data: Any, weights: Any, labels: Any) -> Source:
    """The source for what a user gives as data.

    Raises:
        TypeError: for data that cannot be read twice.
        ValueError: for unusable data, or weights or labels of a stream.
    """
    if is_on_disk_or_sparse(data):
        return RowsInBlocks(caller, data, head.obs_dim, head.param_dtype, weights, labels, head.n_components)
    if hasattr(data, "shape"):
        return RowsOnDevice(caller, data, head.obs_dim, head.param_dtype, weights, labels, head.n_components)
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        raise TypeError(
            f"{caller}: `data` must be an array or a collection of batches that can be iterated repeatedly; got "
            f"{type(data).__name__}. EM reads the data once per step: give a list or an object with __iter__."
        )
    if weights is not None or labels is not None:
        raise ValueError(
            f"{caller}: `weights` and `labels` must come with an array or a file; got a stream of batches. Give one."
        )
    return Stream(caller, data, head.obs_dim, head.param_dtype)


def _effective(caller: str, weights: Any, count: int, dtype: Any) -> Array:
    """Sample weights (N,) that sum to the number of samples; ones if None."""
    checked = check_weights(caller, weights, (count,), dtype)
    return checked if weights is None else effective_weights(checked)


def check_rows(caller: str, x: Any) -> None:
    """ValueError unless x is (N, D) with N > 0."""
    if len(x.shape) != 2 or not x.shape[0]:
        raise ValueError(f"{caller}: `data` must have shape (N, D); got {x.shape}. Reshape it to one row per sample.")


def check_labels(caller: str, labels: Any, shape: tuple[int, ...], n_components: int) -> Array | None:
    """Known components as int32, -1 where unknown; None if none are given.

    Raises:
        ValueError: for another shape, or anything but integers from -1 to K - 1.
    """
    if labels is None:
        return None
    check_shape(caller, "labels", labels, shape)
    values = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    # on the devices, since the rows may be spread over processes, all of which must raise
    least, largest = values.min().item(), values.max().item()
    if values.dtype.kind not in "iu" or least < -1 or largest >= n_components:
        raise ValueError(
            f"{caller}: `labels` must be integers from -1 (unknown) to {n_components - 1}; got {values.dtype} from "
            f"{least} to {largest}. Number the known components from 0."
        )
    return jnp.asarray(values, jnp.int32)


def _batches(order: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(order), size):
        index = order[start : start + size]
        missing = size - len(index)
        yield np.pad(index, (0, missing)), np.arange(size) < len(index)


@jax.jit
def _take(block: Block, index: Array, is_real: Array) -> Block:
    x, weights, labels = jax.tree.map(lambda a: jnp.take(a, index, axis=0), block)
    return x, jnp.where(is_real, weights, 0), labels
