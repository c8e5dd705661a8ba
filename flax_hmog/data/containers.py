"""Containers of rows, recognised by their attributes, without importing the library that they come from.

Two kinds: what is in memory becomes a numpy or jax array in its own dtype (`in_memory`); sparse matrices, files and
whatever else has `shape`, `dtype` and row slices are read block by block (`is_read_by_blocks`, `read_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.model.checks import MISSING_VALUES, door, may_miss

BY_BLOCKS = (
    "Use infer_blocks(natural, data), fit_em or fit_online_em, which read it block by block; or give an array of it, "
    "as .toarray() or [:], where it fits in memory."
)
NEAR_ROWS = 64  # wanted rows that lie so near each other in a file are read by one slice
INDEX_ROWS = 1000  # rows that a file is asked for at once by their numbers


def unwrapped(value: Any) -> Any:
    """The matrix of an AnnData object, in memory or backed by its file: its `X`. Anything else as it is."""
    if not (hasattr(type(value), "obs_names") and hasattr(type(value), "X")):
        return value
    if value.X is None:
        raise TypeError(
            f"{type(value).__name__}: `X` must hold rows; got None. Give one of its layers {list(value.layers)} or of "
            f"its obsm {list(value.obsm)}."
        )
    return value.X


def is_table(value: object) -> bool:
    """True for objects with named columns: frames of pandas and polars, tables of pyarrow."""
    kind, columns = type(value), ("items", "get_columns", "itercolumns")
    return hasattr(kind, "shape") and not hasattr(kind, "dtype") and any(hasattr(kind, name) for name in columns)


def is_jax_sparse(value: object) -> bool:
    """True for a sparse matrix of jax.experimental.sparse."""
    return hasattr(type(value), "nse") and hasattr(type(value), "todense")


def is_read_by_blocks(value: object) -> bool:
    """True if rows are read by blocks: memory maps, sparse matrices, and objects with row slices that are no arrays.

    The latter are arrays of h5py, zarr and dask, the matrix of a backed AnnData, and objects of one's own with `shape`,
    `dtype` and row slices.
    """
    value = unwrapped(value)
    if isinstance(value, np.memmap) or hasattr(type(value), "tocsr"):
        return True
    if isinstance(value, jax.Array | np.ndarray | np.generic) or is_table(value) or is_jax_sparse(value):
        return False
    kind = type(value)
    in_memory = ("__dlpack__", "__array_interface__", "to_numpy", "numpy")
    return (
        all(hasattr(value, name) for name in ("shape", "dtype"))
        and hasattr(kind, "__getitem__")
        and not any(hasattr(kind, name) for name in in_memory)
    )


def is_array(value: object) -> bool:
    """True for rows in memory that are no list: arrays, tables, tensors, and the sparse matrices of jax."""
    return is_jax_sparse(value) or any(
        hasattr(value, name) for name in ("shape", "__array__", "__dlpack__", "to_numpy")
    )


def is_in_blocks(value: object) -> bool:
    """True for rows of which functions of (natural, x) see a block at a time.

    What is read by blocks, and collections of batches; a list is an array here.
    """
    if is_read_by_blocks(value):
        return not isinstance(value, np.memmap) or value.ndim == 2
    is_other = isinstance(value, list | tuple | str | bytes | Iterator | Mapping) or is_array(unwrapped(value))
    return isinstance(value, Iterable) and not is_other


def read_rows(rows: Any, index: slice | np.ndarray) -> np.ndarray:
    """Rows (B, D) of what is read by blocks, dense, in its own dtype.

    Args:
        rows: memory map, sparse matrix with fast rows, or what has row slices.
        index: a slice with bounds from 0, or ascending numbers without repeats.

    Returns:
        Numpy array.
    """
    if isinstance(index, slice) or isinstance(rows, np.ndarray) or hasattr(type(rows), "tocsr"):
        return _dense(rows[index])
    if hasattr(type(rows), "oindex") or hasattr(type(rows), "to_memory"):  # zarr, backed AnnData
        by_number = rows.oindex if hasattr(type(rows), "oindex") else rows
        starts = range(0, len(index), INDEX_ROWS)
        parts = [_dense(by_number[index[start : start + INDEX_ROWS]]) for start in starts]
    else:
        parts = [_dense(rows[piece[0] : piece[-1] + 1])[piece - piece[0]] for piece in _near(index)]
    return np.concatenate(parts) if parts else _dense(rows[0:0])


def _near(index: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of ascending numbers that one slice reads: none reads more than some thousand rows."""
    for start in range(0, len(index), INDEX_ROWS):
        piece = index[start : start + INDEX_ROWS]
        yield from np.split(piece, np.flatnonzero(np.diff(piece) > NEAR_ROWS) + 1)


def _dense(block: Any) -> np.ndarray:
    return np.asarray(block.toarray() if hasattr(block, "toarray") else block)


def in_memory(argument: str, value: object) -> Any:
    """Numbers as a numpy or jax array, in their own dtype; nothing that is missing passes for a number.

    Where entries may be missing (`may_miss`), those that are become NaN.

    Args:
        argument: name of the argument, for messages.
        value: array, masked array, list, table, AnnData, or what has `__array__` or `__dlpack__`.

    Returns:
        The array. One that holds no numbers comes back as it is, for others to refuse.

    Raises:
        TypeError: for a sparse matrix or a file, which are not arrays, or columns that hold no numbers.
        ValueError: for masked or missing entries, or rows that differ in length.
    """
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ma.MaskedArray):
        return _unmasked(argument, value)
    value = unwrapped(value)
    if isinstance(value, np.ndarray):
        return value if value.dtype != object else _numbers(argument, value)
    if is_jax_sparse(value):
        raise TypeError(
            f"{door()}: `{argument}` must be an array, or a scipy sparse matrix where these are taken; got "
            f"{_what(value)}. Give {argument}.todense(), or the same entries as a scipy.sparse.csr_matrix to fit_em."
        )
    if is_read_by_blocks(value):
        raise TypeError(f"{door()}: `{argument}` must be an array in memory; got {_what(value)}. {BY_BLOCKS}")
    if is_table(value):
        return _from_table(argument, value)
    if isinstance(value, list | tuple) and any(isinstance(entry, np.ma.MaskedArray) for entry in value):
        return _unmasked(argument, np.ma.stack([np.ma.asarray(entry) for entry in value]))
    array = _as_array(argument, value)
    return array if array.dtype != object else _numbers(argument, array)


def dense(argument: str, value: object) -> Any:
    """`in_memory`, or all rows of what is read by blocks: for batches and raw data that are small."""
    return read_rows(unwrapped(value), slice(None)) if is_read_by_blocks(value) else in_memory(argument, value)


def is_missing(entry: object) -> bool:
    """True if an entry of an object array is missing: None, NaN, NA of pandas, NaT, numpy's masked."""
    if entry is None or entry is np.ma.masked or type(entry).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return bool(entry != entry)
    except (TypeError, ValueError):
        return False


def _what(value: Any) -> str:
    """Type and shape, for messages."""
    return f"{type(value).__name__} of shape {tuple(value.shape)}"


def _as_array(argument: str, value: object) -> Any:
    """Numpy's view of an object; jax's where it lies on an accelerator."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{door()}: `{argument}` must be an array; got rows that differ: {error}. Pad them.") from None
    except (TypeError, RuntimeError, BufferError) as error:  # tensors on an accelerator, or with a gradient
        try:
            return jnp.from_dlpack(value)
        except Exception:  # what each library raises
            raise TypeError(
                f"{door()}: `{argument}` must be an array; got {type(value).__name__}, which gives none: {error}. "
                "Convert it to a numpy array."
            ) from None


def _unmasked(argument: str, value: np.ma.MaskedArray) -> np.ndarray:
    mask = np.ma.getmaskarray(value)
    if mask.any() and may_miss():
        return np.where(mask, np.nan, value.data)
    if mask.any():
        _refuse_missing(argument, mask, "masked entries")
    return value.data


def _refuse_missing(argument: str, missing: np.ndarray, what: str) -> None:
    row = int(missing.reshape(len(missing), -1).any(axis=1).argmax()) if missing.ndim else 0
    raise ValueError(
        f"{door()}: `{argument}` must hold no missing values; got {int(missing.sum())} {what}, the first in row {row}. "
        f"{MISSING_VALUES}"
    )


def _numbers(argument: str, array: np.ndarray) -> np.ndarray:
    """Object arrays, as of nullable columns and lists with None, as numbers."""
    if array.ndim == 0 or not array.size:
        return array
    missing = np.frompyfunc(is_missing, 1, 1)(array).astype(bool)
    if missing.any() and may_miss():
        array = np.where(missing, np.nan, array)
    elif missing.any():
        _refuse_missing(argument, missing, "that are (None, NaN or NA)")
    first = array.flat[0]
    if array.ndim == 1 and hasattr(first, "__len__") and not isinstance(first, str | bytes):  # a column of lists
        return cast(np.ndarray, in_memory(argument, list(array)))
    if all(hasattr(type(entry), "__float__") for entry in array.flat):
        return array.astype(np.float64)
    return array


def _from_table(argument: str, table: Any) -> np.ndarray:
    """The columns of a table side by side."""
    if hasattr(type(table), "items"):
        columns = [column for _, column in table.items()]
    else:
        columns = list(table.get_columns() if hasattr(type(table), "get_columns") else table.itercolumns())
    names = list(table.column_names if hasattr(type(table), "column_names") else table.columns)
    if all(isinstance(getattr(column, "dtype", None), np.dtype) for column in columns):
        whole = np.asarray(table)  # without a copy, where the table is one array
        if whole.dtype.kind in "biuf":
            return whole
    arrays = []
    for name, column in zip(names, columns, strict=True):
        values = in_memory(f"{argument}[{str(name)!r}]", column)
        if values.dtype.kind not in "biuf" or values.ndim != 1:
            held = getattr(column, "dtype", values.dtype) if values.ndim == 1 else "lists"
            raise TypeError(
                f"{door()}: `{argument}` must hold real numbers in every column; got {held} in column {name!r}. "
                "Leave this column out, or encode it as numbers."
            )
        if values.dtype.kind == "f" and np.isnan(values).any() and not may_miss():
            _refuse_missing(f"{argument}[{str(name)!r}]", np.isnan(values), "that are (NaN or null)")
        arrays.append(values)
    return np.column_stack(arrays) if arrays else np.empty(table.shape)
