"""Data sets by name: scikit-learn's digits, synthetic ones, images by tensorflow-datasets, and files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import Data
from experiments.data.files import find_file, read_file
from experiments.data.images import IMAGES, load_images
from experiments.data.parts import Dataset, split_parts

SYNTHETIC = {"count": 6000, "obs_dim": 24, "lat_dim": 4, "n_components": 6}


def load(data: Data, seed: int) -> Dataset:
    """The data set of an experiment; where it has no split of its own, one that follows from the seed.

    Raises:
        ValueError: for files that are missing or not as they should be, or fewer training rows than asked for.
    """
    whole = _load_whole(data, seed)
    if data.rows is None:
        return whole
    drawn = np.random.default_rng(seed).choice(len(whole.train), _kept_rows(data, len(whole.train)), replace=False)
    return dataclasses.replace(whole, train=dataclasses.replace(whole.train, index=whole.train.index[np.sort(drawn)]))


def _kept_rows(data: Data, count: int) -> int:
    """How many of the training rows are kept."""
    if data.rows is not None and data.rows > count:
        raise ValueError(
            f"load: `data.rows` must be at most the {count} training rows; got {data.rows}. Lower it or leave it out."
        )
    return data.rows or count


def _load_whole(data: Data, seed: int) -> Dataset:
    if data.name == "digits":
        from sklearn.datasets import load_digits

        rows, labels = load_digits(return_X_y=True)
        parts = split_parts(rows, labels, None, data.test_share, seed)
        return Dataset("Handwritten digits", **parts, image_shape=(8, 8))
    if data.name == "synthetic":
        rows, labels = synthetic()
        return Dataset("A synthetic HMoG", **split_parts(rows, labels, None, data.test_share, seed))
    if data.name in IMAGES:
        rows, labels, n_train = load_images(
            data.name, Path(data.folder), Path(data.downloads) if data.downloads else None
        )
        parts = split_parts(rows, labels, n_train, data.test_share, seed)
        return Dataset(IMAGES[data.name].title, **parts, image_shape=IMAGES[data.name].shape)
    path = find_file(data.path, Path(data.folder))
    file = read_file(path, data.labels, layer=data.layer, obsm=data.obsm)
    parts = split_parts(file.rows, file.labels, file.n_train, data.test_share, seed, file.class_names)
    about: dict[str, Any] = {"image_shape": file.image_shape, "column_names": file.column_names, "source": str(path)}
    return Dataset(data.title or path.name, **parts, **about)


def data_shape(data: Data) -> tuple[int, int, int, tuple[int, ...] | None]:
    """Training rows, test rows, columns and image shape of the raw data; image sets need not be there for it."""
    if data.name in IMAGES:
        images = IMAGES[data.name]
        return _kept_rows(data, images.n_train), images.n_test, int(np.prod(images.shape)), images.shape
    dataset = load(data, 0)
    return len(dataset.train), len(dataset.test), dataset.obs_dim, dataset.image_shape


def synthetic() -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D) float32 and labels (N,) of a fixed HMoG with well separated clusters: the truth is known."""
    rng = np.random.default_rng(0)
    count, obs_dim, lat_dim, n_components = SYNTHETIC.values()
    means = 4 * rng.standard_normal((n_components, lat_dim))
    loadings = rng.standard_normal((obs_dim, lat_dim)) / 2
    labels = rng.integers(n_components, size=count)
    latent = means[labels] + rng.standard_normal((count, lat_dim))
    noise = rng.standard_normal((count, obs_dim)) * np.linspace(0.5, 1.5, obs_dim)
    return (latent @ loadings.T + noise).astype(np.float32), labels
