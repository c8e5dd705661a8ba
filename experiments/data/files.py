"""Arrays in files: npy (memory-mapped), npz (dense, or a CSR matrix as scipy saves it) and h5ad."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

ROWS, LABELS = ("X", "x", "data"), ("y", "labels")  # names under which an npz may hold them
CSR = {"data", "indices", "indptr", "shape"}


@dataclasses.dataclass(frozen=True)
class File:
    """What a file holds.

    Attributes:
        rows: (N, D) array, memory-mapped or not, or CSR matrix.
        labels: (N,) integers, or None.
        n_train: number of leading rows that are for training, where the file says so.
        image_shape: of a row, where rows were images.
    """

    rows: Any
    labels: np.ndarray | None
    n_train: int | None
    image_shape: tuple[int, ...] | None


def find_file(path: str | None, folder: Path) -> Path:
    """A file by its path, or by its name in the folder of the data sets.

    Raises:
        ValueError: if there is none.
    """
    if path is None:
        raise ValueError("load: `data.path` must name a file; got None. Give --data.path FILE.npy, .npz or .h5ad.")
    for candidate in (Path(path), folder / path):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"load: `data.path` must be a file; got {path}, which is neither there nor in {folder}. "
        "Give --data.path or --data.folder."
    )


def read_file(path: Path, labels: str | None = None) -> File:
    """Rows and labels of a file.

    Args:
        path: .npy, memory-mapped; .npz with `X` (N, ...) or the parts of a CSR matrix, and optionally `y` (N,) and
            `n_train`; or .h5ad, which needs the package anndata.
        labels: an .npy file of labels (N,), or the column of `obs` in an .h5ad; None takes what the file holds.

    Raises:
        ValueError: for another kind of file, or one without rows.
    """
    if labels is not None and path.suffix != ".h5ad" and not Path(labels).is_file():
        raise ValueError(f"read_file: `data.labels` must be an .npy file; got {labels}, which is not there. Check it.")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".h5ad": _read_h5ad}
    if path.suffix not in readers:
        raise ValueError(f"read_file: `path` must end in one of {sorted(readers)}; got {path.name}. Convert it.")
    try:
        file = readers[path.suffix](path, labels)
    except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"read_file: {path} must be a readable {path.suffix} file; got {type(error).__name__}: {error}. "
            "Copy it again."
        ) from error
    rows, image_shape = file.rows, file.image_shape
    if not hasattr(rows, "tocsr") and rows.ndim > 2:
        rows, image_shape = rows.reshape(rows.shape[0], -1), rows.shape[1:]
    if len(rows.shape) != 2 or not rows.shape[0]:
        raise ValueError(f"read_file: {path} must hold rows (N, D); got shape {rows.shape}. Reshape them.")
    if rows.dtype.kind not in "biuf":
        raise ValueError(f"read_file: {path} must hold real numbers; got dtype {rows.dtype}. Convert it first.")
    if file.n_train is not None and not 0 < file.n_train < rows.shape[0]:
        raise ValueError(
            f"read_file: `n_train` in {path} must lie in 1 .. {rows.shape[0] - 1}; got {file.n_train}. "
            "Leave rows for a test part, or leave it out for a random split."
        )
    if file.labels is not None and file.labels.shape != (rows.shape[0],):
        raise ValueError(
            f"read_file: labels must have shape ({rows.shape[0]},); got {file.labels.shape}. Give one for each row."
        )
    labels_or_names = file.labels
    if labels_or_names is not None and labels_or_names.dtype.kind not in "biu":
        labels_or_names = np.unique(labels_or_names.astype(str), return_inverse=True)[1]
    return dataclasses.replace(file, rows=rows, image_shape=image_shape, labels=labels_or_names)


def _read_npy(path: Path, labels: str | None) -> File:
    return File(_load(path, mmap_mode="r"), _load(labels) if labels else None, None, None)


def _read_npz(path: Path, labels: str | None) -> File:
    with _load(path) as parts:
        names = set(parts.files)
        rows_name = next((name for name in ROWS if name in names), None)
        if names >= CSR:
            index = parts["indices"].astype(np.int32)
            rows: Any = csr_matrix((parts["data"], index, parts["indptr"]), shape=tuple(parts["shape"]))
        elif rows_name is not None:
            rows = parts[rows_name]
        else:
            raise ValueError(
                f"read_file: {path} must hold one of {ROWS}, or a CSR matrix ({', '.join(sorted(CSR))}); got "
                f"{sorted(names)}. Save it with numpy.savez(path, X=..., y=...) or scipy.sparse.save_npz."
            )
        found = next((parts[name] for name in LABELS if name in names), None)
        n_train = int(parts["n_train"]) if "n_train" in names else None
    return File(rows, _load(labels) if labels else found, n_train, None)


def _read_h5ad(path: Path, labels: str | None) -> File:
    try:
        from anndata import read_h5ad
    except ImportError:
        raise ValueError(
            f"read_file: {path.name} must be read by the package anndata, which is not installed. "
            'Install it: pip install "flax-hmog[h5ad]".'
        ) from None
    table = read_h5ad(path)
    rows = table.X.tocsr() if hasattr(table.X, "tocsr") else np.asarray(table.X)
    if labels is None:
        return File(rows, None, None, None)
    if labels not in table.obs:
        raise ValueError(
            f"read_file: `data.labels` must be a column of obs; got {labels!r}. Choose one of {list(table.obs)}."
        )
    return File(rows, np.asarray(table.obs[labels]), None, None)


def _load(path: str | Path, **options: Any) -> Any:
    """`np.load`, which calls files of another kind pickled."""
    try:
        return np.load(path, **options)
    except ValueError as error:
        raise OSError(f"{path} is no array of numpy's ({error})") from error
