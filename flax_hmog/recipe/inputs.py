"""Inputs of a model from raw rows, spread over the mesh: preprocessing, whole parts, shuffled batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from flax_hmog.model.optional import require
from flax_hmog.recipe.config import Data
from flax_hmog.recipe.parts import BLOCK_ROWS, Dataset, Part
from flax_hmog.training import Affine, Log1p, Preprocessing, SelectColumns, SizeFactor, Whiten, global_rows
from flax_hmog.training.mesh import rows_multiple
from flax_hmog.training.processes import gather

PREFETCHED = 4  # batches that are read ahead


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A data set as a model takes it.

    Attributes:
        dataset: the raw data.
        preprocessing: fitted on the training part.
        mesh: over which rows are spread.
    """

    dataset: Dataset
    preprocessing: Preprocessing
    mesh: Mesh

    @functools.cached_property
    def obs_dim(self) -> int:
        """Number of columns D of the inputs."""
        return cast(int, self.preprocessing(np.zeros((1, self.dataset.obs_dim), np.float32)).shape[1])

    @functools.cached_property
    def test_rows(self) -> tuple[jax.Array, jax.Array]:
        """The test part and its weights, as `rows` gives them."""
        return self.rows(self.dataset.test)

    def read(self, part: Part, numbers: slice | np.ndarray) -> np.ndarray:
        """Inputs (B, D) float32 of rows of a part, on the host."""
        return cast(np.ndarray, self.preprocessing(part.read(numbers)))

    def rows(self, part: Part, limit: int | None = None, seed: int = 0) -> tuple[jax.Array, jax.Array]:
        """All inputs of a part (N, D), or `limit` of them drawn by the seed, and their weights (N,), on the mesh.

        The rows are filled up with copies of weight 0 to a number that the mesh divides. Each process reads only its
        own.
        """
        count = min(len(part), limit or len(part))
        multiple = rows_multiple(self.mesh)
        total = -(-count // multiple) * multiple
        chosen = np.arange(count)
        if count < len(part):
            chosen = np.sort(np.random.default_rng(seed).choice(len(part), count, replace=False))
        numbers = chosen[np.minimum(np.arange(total), count - 1)]
        weights = (np.arange(total) < count).astype(np.float32)
        x = global_rows(self.mesh, (total, self.obs_dim), lambda rows: self._read_in_blocks(part, numbers[rows]))
        return x, global_rows(self.mesh, (total,), lambda rows: weights[rows])

    def _read_in_blocks(self, part: Part, numbers: np.ndarray) -> np.ndarray:
        out = np.empty((len(numbers), self.obs_dim), np.float32)
        for start in range(0, len(numbers), BLOCK_ROWS):
            out[start : start + BLOCK_ROWS] = self.read(part, numbers[start : start + BLOCK_ROWS])
        return out


class Batches:
    """Shuffled batches of the training part: batch `step` follows from seed and step alone.

    Every epoch has its own order; the rows that do not fill a last batch are left out of it. It is a random-access
    source of grain, so that batches are read ahead in a thread, and the position is one number.

    Args:
        inputs: the data.
        seed: of the order.
        size: rows of a batch, over all processes.
        epochs: number of epochs.
    """

    def __init__(self, inputs: Inputs, seed: int, size: int, epochs: int) -> None:
        self.inputs, self.part, self.seed, self.size = inputs, inputs.dataset.train, seed, size
        self.per_epoch = len(self.part) // size
        self.epochs = epochs
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def __getitem__(self, step: int) -> jax.Array:
        epoch, number = divmod(int(step), self.per_epoch)
        rows = self.order(epoch)[number * self.size : (number + 1) * self.size]
        inputs = self.inputs
        return global_rows(inputs.mesh, (self.size, inputs.obs_dim), lambda share: inputs.read(self.part, rows[share]))

    def _order(self, epoch: int) -> np.ndarray:
        # epochs count from 1: 0 is the warm start
        return np.random.default_rng((self.seed, epoch + 1)).permutation(len(self.part))

    def iterate(self, position: dict[str, Any] | None = None) -> Any:
        """The batches from a position (what `get_state` of the iterator gave) or from the first on."""
        grain = require("grain", "train")
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
        iterator = iter(grain.MapDataset.source(self).to_iter_dataset(options))
        if position is not None:
            iterator.set_state(position)
        return iterator


def even(count: int, most: int) -> np.ndarray:
    """Numbers of all rows, or of `most` of them at even intervals."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def input_dim(data: Data, obs_dim: int) -> int:
    """Columns of an input, from those of the raw data."""
    return min(obs_dim, data.columns or obs_dim, data.whitened or obs_dim)


def input_image_shape(data: Data, image_shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Image shape of an input: that of the raw data, where preprocessing leaves images with a background of 0."""
    is_changed = data.columns is not None or data.whitened is not None or data.scale == "standard"
    return None if is_changed else image_shape


def check_raw_rows(data: Data, dataset: Dataset) -> None:
    """ValueError for rows of either part that are missing, too large for float32, or have no logarithm.

    Each process looks at its share of the rows, in the order of the file; all raise.
    """
    rows, used = dataset.train.rows, np.zeros(dataset.train.rows.shape[0], bool)
    used[dataset.train.index] = used[dataset.test.index] = True
    if rows.dtype.kind != "f" and not (data.log1p and rows.dtype.kind == "i"):
        return
    process, processes = jax.process_index(), jax.process_count()
    found = np.array([0, np.inf, 0, 0])  # entries, first row, its column and value
    for start in range(len(used) * process // processes, len(used) * (process + 1) // processes, BLOCK_ROWS):
        block = rows[start : min(start + BLOCK_ROWS, len(used) * (process + 1) // processes)]
        is_sparse = hasattr(block, "tocsr")
        if not _unusable(data, block.data if is_sparse else block).any():
            continue
        dense = block.toarray() if is_sparse else np.asarray(block)
        bad = _unusable(data, dense) & used[start : start + len(dense), None]
        if bad.any():
            row, column = np.argwhere(bad)[0]
            first = found[1:] if found[0] else [start + row, column, dense[row, column]]
            found = np.array([found[0] + bad.sum(), *first], np.float64)
    parts = gather(found)
    count = int(parts[:, 0].sum())
    if count:
        row, column, value = parts[parts[:, 1].argmin(), 1:]
        raise ValueError(_raw_row_message(dataset, count, int(row), int(column), value))


def _unusable(data: Data, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(np.asarray(values).astype(np.float32))
    return bad | (np.asarray(values) <= -1) if data.log1p else bad


def _raw_row_message(dataset: Dataset, count: int, row: int, column: int, value: float) -> str:
    name = f" ({dataset.column_names[column]!r})" if dataset.column_names else ""
    part = "training" if row in dataset.train.index else "test"
    rule = "above -1 to take their logarithm (log1p)" if value <= -1 and np.isfinite(np.float32(value)) else "finite"
    return (
        f"prepare_inputs: the data must be {rule}; got {value} in column {column}{name} of row {row} of "
        f"{dataset.source or dataset.title}, counted from 0, in the {part} part, beside {count - 1} other such "
        "entries. Drop or impute these rows."
    )


def check_rows_vary(dataset: Dataset) -> None:
    """ValueError for training rows that are all the same; blocks are read until one differs, mostly the first."""
    first = dataset.train.read(slice(0, 1))
    if not any((block != first).any() for block in dataset.train.blocks(slice(None))):
        raise ValueError(
            f"run: the training rows must vary; got {dataset.obs_dim} columns of "
            f"{dataset.source or dataset.title} that are constant. Add columns."
        )


def prepare_inputs(data: Data, dataset: Dataset, mesh: Mesh) -> Inputs:
    """The inputs of a data set, their preprocessing fitted on the training part; each process reads only its share."""
    check_raw_rows(data, dataset)
    part, preprocessing = dataset.train, Preprocessing((), dataset.obs_dim, dataset.image_shape)
    process, count = jax.process_index(), jax.process_count()
    share = slice(len(part) * process // count, len(part) * (process + 1) // count)

    def blocks() -> Iterator[np.ndarray]:
        for block in part.blocks(share):
            yield preprocessing(block)

    def total(array: np.ndarray) -> np.ndarray:
        return cast(np.ndarray, gather(array).sum(axis=0))

    if data.size_factor:
        preprocessing = preprocessing.then(SizeFactor.mean(blocks, total))
    if data.log1p:
        preprocessing = preprocessing.then(Log1p())
    if data.columns is not None:
        preprocessing = preprocessing.then(SelectColumns.most_variable(blocks, total, count=data.columns))
    if data.scale == "range":
        preprocessing = preprocessing.then(Affine.unit_range(blocks, gather))
    elif data.scale == "standard":
        preprocessing = preprocessing.then(Affine.standard(blocks, total))
    if data.whitened is not None:
        preprocessing = preprocessing.then(Whiten.principal(blocks, total, count=data.whitened))
    return Inputs(dataset, preprocessing, mesh)
