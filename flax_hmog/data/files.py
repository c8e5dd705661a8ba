"""Arrays in files: npy (memory-mapped), npz (dense, or a sparse matrix as scipy saves it), h5ad, csv and parquet."""

from __future__ import annotations

import dataclasses
import functools
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flax_hmog.data.labels import encode_labels
from flax_hmog.data.tables import SUFFIXES, Identifier, index_of, read_table
from flax_hmog.model.checks import public
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Samples

ROWS, LABELS = ("X", "x", "data"), ("y", "labels")  # names under which an npz may hold them
CSR = {"data", "indices", "indptr", "shape"}  # as written by hand; scipy writes `format` as well
SPARSE = {"data", "format", "shape"}


@dataclasses.dataclass(frozen=True)
class File:
    """Contents of a file.

    Attributes:
        rows: (N, D) array, memory-mapped or not, or CSR matrix.
        labels: (N,) integers, -1 where unknown if there are `class_names`; or None.
        n_train: number of leading rows that are for training, where the file says so.
        image_shape: of a row, where rows were images.
        class_names: of the labels, where they are no integers or some are unknown.
        column_names: of the columns, where the file says so.
        identifier: name and values (N,) of what names the rows, where the file says so.
        title: name of the data in a report.
        source: path of the file, where there is one.

    Example:
        >>> File(np.ones((3, 2)), np.arange(3), title="Three rows").rows.shape
        (3, 2)
    """

    rows: Any
    labels: Any = None
    n_train: int | None = None
    image_shape: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    column_names: tuple[str, ...] | None = None
    identifier: Identifier | None = None
    title: str = "The data"
    source: str | None = None


def find_file(path: str | None, folder: Path) -> Path:
    """A file by its path, or by its name in the folder of the data sets.

    Raises:
        ValueError: if there is none.
    """
    if path is None:
        raise ValueError(
            "load: `data.path` must name a file; got None. Give --data.path FILE.npy, .npz, .h5ad, .csv or .parquet."
        )
    for candidate in (Path(path), folder / path):
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"load: `data.path` must be a file; got {path}, which is neither there nor in {folder}. "
        "Give --data.path or --data.folder."
    )


@public
def read_file(path: Path, labels: str | None = None, *, layer: str | None = None, obsm: str | None = None) -> File:
    """Rows and labels of a file.

    Args:
        path: .npy, memory-mapped; .npz with `X` (N, ...) or a sparse matrix as scipy saves it, and optionally `y` (N,)
            and `n_train`; .h5ad, which needs the package anndata; .csv or .parquet, which need pandas.
        labels: an .npy file of labels (N,), or the column of `obs` in an .h5ad, or of a table; None takes what the file
            holds.
        layer: of an .h5ad, instead of `X`.
        obsm: of an .h5ad, instead of `X`.

    Raises:
        ValueError: for another kind of file, or one without rows.
    """
    if labels is not None and path.suffix in (".npy", ".npz") and not Path(labels).is_file():
        raise ValueError(f"read_file: `data.labels` must be an .npy file; got {labels}, which is not there. Check it.")
    if (layer or obsm) and path.suffix != ".h5ad":
        raise ValueError(
            f"read_file: `data.layer` and `data.obsm` must be None but for .h5ad; got {layer or obsm!r} for "
            f"{path.name}. Leave them out."
        )
    readers: dict[str, Any] = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".h5ad": functools.partial(_read_h5ad, layer, obsm),
    }
    readers |= dict.fromkeys(SUFFIXES, _read_table)
    if path.suffix not in readers:
        raise ValueError(f"read_file: `path` must end in one of {sorted(readers)}; got {path.name}. Convert it.")
    try:
        file = readers[path.suffix](path, labels)
    except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"read_file: {path} must be a readable {path.suffix} file; got {type(error).__name__}: {error}. "
            "Copy it again."
        ) from error
    return dataclasses.replace(_checked(path, file), title=path.name, source=str(path))


def _checked(path: Path, file: File) -> File:
    """Contents of a file as rows (N, D) with a label each.

    Raises:
        ValueError: naming the file, if it does not.
    """
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
            f"read_file: labels must have shape ({rows.shape[0]},); got {file.labels.shape} for {path}. "
            "Give one for each row."
        )
    labels, class_names = (None, None) if file.labels is None else _coded(path, file.labels)
    return dataclasses.replace(file, rows=rows, image_shape=image_shape, labels=labels, class_names=class_names)


def _coded(path: Path, labels: Samples) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Labels as integers: as they are, or -1 where unknown beside the names of the classes."""
    codes, known, names = encode_labels(labels, argument=f"labels of {path}")
    if names is None and not known.all():
        values, codes[known] = np.unique(codes[known], return_inverse=True)
        names = tuple(map(str, values.tolist()))
    return codes, names


def _read_npy(path: Path, labels: str | None) -> File:
    return File(_load(path, mmap_mode="r"), _load(labels) if labels else None)


def _read_table(path: Path, labels: str | None) -> File:
    rows, found, names, identifier = read_table(path, labels)
    return File(rows, found, column_names=names, identifier=identifier)


def _read_npz(path: Path, labels: str | None) -> File:
    with _load(path) as parts:
        names = set(parts.files)
        rows_name = next((name for name in ROWS if name in names), None)
        if (
            names >= SPARSE
        ):  # the formats share names: without `format` a CSC matrix would pass for its transpose in CSR
            rows: Any = _load_sparse(path)
        elif names >= CSR:
            index = parts["indices"].astype(np.int32)
            rows = require("scipy.sparse", "cluster").csr_matrix(
                (parts["data"], index, parts["indptr"]), shape=tuple(parts["shape"])
            )
        elif rows_name is not None:
            rows = parts[rows_name]
        else:
            raise ValueError(
                f"read_file: {path} must hold one of {ROWS}, or a sparse matrix as scipy saves it; got "
                f"{sorted(names)}. Save it with numpy.savez(path, X=..., y=...) or scipy.sparse.save_npz."
            )
        found = next((parts[name] for name in LABELS if name in names), None)
        n_train = int(parts["n_train"]) if "n_train" in names else None
    return File(rows, _load(labels) if labels else found, n_train)


def _keys(held: Any) -> list[str]:
    """The names of layers or embeddings; anndata 0.13 has `X` among its layers, under None."""
    return sorted(key for key in held if key is not None)


def _read_h5ad(layer: str | None, obsm: str | None, path: Path, labels: str | None) -> File:
    try:
        from anndata import read_h5ad
    except ImportError:
        raise ValueError(
            f"read_file: {path.name} must be read by the package anndata, which is not installed. "
            'Install it: pip install "flax-hmog[h5ad]".'
        ) from None
    table = read_h5ad(path)
    matrix, names = table.X, table.var_names
    for option, key, held in (("layer", layer, table.layers), ("obsm", obsm, table.obsm)):
        if key is not None and key not in held:
            raise ValueError(f"read_file: `data.{option}` must be in {path}; got {key!r}. Choose one of {_keys(held)}.")
        if key is not None:
            matrix, names = held[key], table.var_names if option == "layer" else None
    if matrix is None:
        raise ValueError(
            f"read_file: {path} must have X; got none. Give --data.layer, one of {_keys(table.layers)}, or "
            f"--data.obsm, one of {_keys(table.obsm)}."
        )
    rows = matrix.tocsr() if hasattr(matrix, "tocsr") else np.asarray(matrix)
    found = None
    if labels is not None:
        if labels not in table.obs:
            raise ValueError(
                f"read_file: `data.labels` must be a column of obs; got {labels!r}. Choose one of {list(table.obs)}."
            )
        found = table.obs[labels]
    columns = None if names is None else tuple(map(str, names))
    return File(rows, found, column_names=columns, identifier=index_of(table))


def _load_sparse(path: Path) -> Any:
    """A sparse matrix saved by scipy, in any of its formats, as CSR."""
    try:
        return require("scipy.sparse", "cluster").load_npz(path).tocsr()
    except (ValueError, NotImplementedError) as error:
        raise OSError(f"it is no sparse matrix of scipy's ({error})") from error


def _load(path: str | Path, **options: Any) -> Any:
    """`np.load`, which calls files of another kind pickled."""
    try:
        return np.load(path, **options)
    except ValueError as error:
        raise OSError(f"{path} is no array of numpy's ({error})") from error
