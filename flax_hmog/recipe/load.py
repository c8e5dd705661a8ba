"""Data sets by name: scikit-learn's digits, a synthetic one, files, and those that are registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flax_hmog.data.files import File, find_file, read_file
from flax_hmog.model.optional import require
from flax_hmog.recipe.config import Data
from flax_hmog.recipe.parts import Dataset, split_parts
from flax_hmog.recipe.template import imported

Shape = tuple[int, int, int, tuple[int, ...] | None]
KEPT, KEPT_BYTES = "rows.npz", 250_000_000  # file of rows that were in memory, and how much is kept
SYNTHETIC = {"count": 6000, "obs_dim": 24, "lat_dim": 4, "n_components": 6}


def load(data: Data, seed: int, file: File | None = None) -> Dataset:
    """The data set of an experiment; where it has no split of its own, one that follows from the seed.

    Args:
        data: which, and how much of it.
        seed: of the split and of the rows that are kept.
        file: result of `read_data`, if there is one already.

    Raises:
        ValueError: for files that are missing or not as they should be, or fewer training rows than asked for.
    """
    file = read_data(data) if file is None else file
    parts: dict[str, Any] = split_parts(file.rows, file.labels, file.n_train, data.test_share, seed, file.class_names)
    if data.rows is not None:
        train = parts["train"]
        drawn = np.random.default_rng(seed).choice(len(train), _kept_rows(data, len(train)), replace=False)
        parts["train"] = dataclasses.replace(train, index=train.index[np.sort(drawn)])
    about: dict[str, Any] = {
        name: getattr(file, name) for name in ("image_shape", "column_names", "identifier", "source")
    }
    return Dataset(data.title or file.title, **parts, **about)


def read_data(data: Data) -> File:
    """Rows and labels of a data set, before they are split.

    Raises:
        ValueError: for an unknown name, and files that are missing or not as they should be.
    """
    if data.name in DATA_SETS:
        return DATA_SETS[data.name](data)
    file = imported("load: `data.name`", data.name, f"one of {', '.join(DATA_SETS)}, or ")(data)
    if not isinstance(file, File):
        raise ValueError(
            f"load: `data.name` must name a function that returns flax_hmog.recipe.File; {data.name} gave a "
            f"{type(file).__name__}. Return File(rows, labels)."
        )
    return file


def data_shape(data: Data) -> Shape:
    """Training rows, test rows, columns and image shape of the raw data; those of `SHAPES` need not be there for it."""
    if data.name in SHAPES:
        train, test, obs_dim, image_shape = SHAPES[data.name]
        return _kept_rows(data, train), test, obs_dim, image_shape
    dataset = load(data, 0)
    return len(dataset.train), len(dataset.test), dataset.obs_dim, dataset.image_shape


def _kept_rows(data: Data, count: int) -> int:
    """Number of training rows that are kept."""
    if data.rows is not None and data.rows > count:
        raise ValueError(
            f"load: `data.rows` must be at most the {count} training rows; got {data.rows}. Lower it or leave it out."
        )
    return data.rows or count


def _read_digits(data: Data) -> File:
    rows, labels = require("sklearn.datasets", "train").load_digits(return_X_y=True)
    return File(rows, labels, image_shape=(8, 8), title="Handwritten digits")


def _read_own(data: Data) -> File:
    path = find_file(data.path, Path(data.folder))
    return read_file(path, data.labels, layer=data.layer, obsm=data.obsm)


def _read_synthetic(data: Data) -> File:
    return File(*synthetic_rows(), title="A synthetic HMoG")


def synthetic_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D) float32 and labels (N,) of a fixed HMoG with well separated clusters: the truth is known."""
    rng = np.random.default_rng(0)
    count, obs_dim, lat_dim, n_components = SYNTHETIC.values()
    means = 4 * rng.standard_normal((n_components, lat_dim))
    loadings = rng.standard_normal((obs_dim, lat_dim)) / 2
    labels = rng.integers(n_components, size=count)
    latent = means[labels] + rng.standard_normal((count, lat_dim))
    noise = rng.standard_normal((count, obs_dim)) * np.linspace(0.5, 1.5, obs_dim)
    return (latent @ loadings.T + noise).astype(np.float32), labels


def _read_kept(data: Data) -> File:
    path = Path(data.folder) / KEPT
    if not path.is_file():
        raise ValueError(
            f"load: the rows of this run must be in {path}, where `fit_clusterer` leaves out more than "
            f"{KEPT_BYTES // 10**6} MB; got none. Save them: numpy.savez(path, X=x)."
        )
    return dataclasses.replace(read_file(path), title="The data")


def keep_rows(folder: Path, dataset: Dataset) -> None:
    """Write rows that were in memory beside their run, for its report, unless they are many or there already."""
    rows, path = dataset.train.rows, folder / KEPT
    if path.exists() or (rows.data.nbytes if hasattr(rows, "tocsr") else rows.nbytes) > KEPT_BYTES:
        return
    if hasattr(rows, "tocsr"):
        require("scipy.sparse", "train").save_npz(path, rows)
    else:
        np.savez(path, X=rows.reshape(rows.shape[0], *(dataset.image_shape or (-1,))))


DATA_SETS: dict[str, Callable[[Data], File]] = {
    "digits": _read_digits,
    "synthetic": _read_synthetic,
    "file": _read_own,
    "memory": _read_kept,
}
"""What reads a data set, by its name; add to it what `data.name` is to know besides."""
SHAPES: dict[str, Shape] = {}
"""Shapes of data sets as `data_shape` gives them, where they are known before the data are there."""
