"""Rows and labels of a data set, read only where they are asked for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np

from flax_hmog.analysis.metrics import clustering_metrics
from flax_hmog.data.tables import Identifier
from flax_hmog.model.optional import require
from flax_hmog.model.typed import HasShape, Rows

BLOCK_ROWS = 1024  # read at once
SAMPLED_BLOCKS = 16  # that a fingerprint is taken of


@dataclasses.dataclass(frozen=True)
class Part:
    """Training or test rows.

    Attributes:
        rows: raw data (N0, D): an array, memory-mapped or not, or a scipy CSR matrix.
        labels: of all rows (N0,), for evaluation only, or None; -1 where unknown if there are `class_names`.
        index: which rows belong to this part (N,).
        class_names: of the labels, or None where these are integers and all known.
    """

    rows: Any
    labels: np.ndarray | None
    index: np.ndarray
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def part_labels(self) -> np.ndarray | None:
        """Labels of this part (N,)."""
        return None if self.labels is None else self.labels[self.index]

    @property
    def is_labelled(self) -> np.ndarray:
        """True for each row of this part whose label is known (N,)."""
        if self.labels is None:
            return np.zeros(len(self), bool)
        return np.ones(len(self), bool) if self.class_names is None else self.labels[self.index] >= 0

    @property
    def occurring_names(self) -> list[str] | None:
        """Names of the classes that occur among the labelled rows of this part, in the order of their numbers."""
        if self.class_names is None or self.labels is None:
            return None
        return [self.class_names[number] for number in np.unique(self.labels[self.index][self.is_labelled])]

    def agreement(self, assignments: Rows) -> dict[str, float]:
        """NMI, ARI and ACC of clusters (N,) of this part's rows with its labels; nothing where there are none.

        Rows whose label is unknown do not count; "labelled" says how many do, where some do not.
        """
        if self.labels is None:
            return {}
        is_labelled = self.is_labelled
        if is_labelled.any():
            metrics = clustering_metrics(self.labels[self.index][is_labelled], np.asarray(assignments)[is_labelled])
        else:
            metrics = dict.fromkeys(("nmi", "ari", "accuracy"), float("nan"))
        some_unknown = self.class_names is not None and bool((self.labels < 0).any())
        return metrics | {"labelled": int(is_labelled.sum())} if some_unknown else metrics

    def read(self, numbers: slice | np.ndarray) -> np.ndarray:
        """Raw rows (B, D), dense, by their numbers in this part: a slice or an array."""
        index = self.index[numbers]
        if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            rows = self.rows[index[0] : index[0] + len(index)]
        else:
            rows = self.rows[index]
        return rows.toarray() if hasattr(rows, "toarray") else np.asarray(rows)

    def blocks(self, share: slice) -> Iterator[np.ndarray]:
        """Raw rows of a share of this part, block by block."""
        start, stop, _ = share.indices(len(self))
        for first in range(start, stop, BLOCK_ROWS):
            yield self.read(slice(first, min(first + BLOCK_ROWS, stop)))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, split.

    Attributes:
        title: name of it in a report.
        train: rows to fit.
        test: rows to evaluate on.
        image_shape: of a row, where rows are images.
        column_names: of the columns, where they have any.
        identifier: name and values (N,) of what names the rows, where there is something.
        source: the file that holds the rows, if there is one.
    """

    title: str
    train: Part
    test: Part
    image_shape: tuple[int, ...] | None = None
    column_names: tuple[str, ...] | None = None
    identifier: Identifier | None = None
    source: str | None = None

    @property
    def obs_dim(self) -> int:
        """Number of columns of the raw data."""
        return cast(int, self.train.rows.shape[1])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the raw rows of both parts as the source holds them, and of the labels."""
        return self._sha256(range(0, self.train.rows.shape[0], BLOCK_ROWS))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the shape, of some blocks of rows and of the labels: cheap for files of any size."""
        starts = np.linspace(0, max(self.train.rows.shape[0] - BLOCK_ROWS, 0), SAMPLED_BLOCKS).astype(int)
        return f"{self.train.rows.shape} {self._sha256(sorted(set(starts.tolist())))}"

    def _sha256(self, starts: Iterable[int]) -> str:
        rows, labels, total = self.train.rows, self.train.labels, hashlib.sha256()
        for start in starts:
            block = rows[start : start + BLOCK_ROWS]
            arrays = (block.data, block.indices, block.indptr) if hasattr(block, "tocsr") else (block,)
            for array in arrays:
                total.update(np.ascontiguousarray(array).tobytes())
        if labels is not None:
            total.update(labels.astype(np.int64).tobytes())
        return total.hexdigest()


def split_parts(
    rows: HasShape,
    labels: np.ndarray | None,
    n_train: int | None,
    test_share: float,
    seed: int,
    class_names: tuple[str, ...] | None = None,
) -> dict[str, Part]:
    """Training and test part: the first `n_train` rows and the others, or a random split.

    All are for training if `test_share` is 0 and no `n_train` is given.
    """
    count = rows.shape[0]
    if n_train is None and test_share == 0:
        n_train = count
    if n_train is None and count < 2:
        raise ValueError(
            f"load: the data must have at least 2 rows, so that some are held out; got {count}. Add rows, or give "
            "--data.test-share 0."
        )
    if n_train is None:
        split = require("sklearn.model_selection", "train").train_test_split
        train, test = split(np.arange(count), test_size=test_share, random_state=seed)
    else:
        train, test = np.arange(n_train), np.arange(n_train, count)
    return {"train": Part(rows, labels, train, class_names), "test": Part(rows, labels, test, class_names)}
