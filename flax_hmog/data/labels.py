"""Known labels as integers: names, categories and missing ones, whatever they come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.data.containers import is_missing
from flax_hmog.model.checks import check_shape, door
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import Samples


def encode_labels(labels: Samples, *, argument: str = "labels") -> tuple[np.ndarray, np.ndarray, Any]:
    """Labels as integers, which of them are known, and the names of classes where labels were no integers.

    Unknown are None, NaN, NA of pandas, NaT, empty text, and masked entries. Integers stay as they are, -1 too; whole
    numbers as floats are integers, as a column of integers with missing ones becomes floats in pandas.

    Args:
        labels: (N,) list, array, masked array, column of a table, categorical.
        argument: name of the argument, for messages.

    Returns:
        Codes (N,) int64: the integers themselves, or positions in the names; -1 where unknown. Whether each is known
        (N,). Names of the classes that occur, sorted; None for integers.

    Raises:
        ValueError: for numbers and names among each other.
    """
    array = as_vector(labels)
    known = is_known(array)
    codes = np.full(array.shape, -1, np.int64)
    entries = of_one_kind(argument, array[known])
    if entries.dtype.kind == "f" and np.all(entries == np.trunc(entries)) and np.all(np.abs(entries) < 2**53):
        entries = entries.astype(np.int64)
    if entries.dtype.kind in "biu" or not entries.size:
        codes[known] = entries.astype(np.int64)
        return codes, known, None
    names, codes[known] = np.unique(entries.astype(str), return_inverse=True)
    return codes, known, tuple(names.tolist())


def check_labels(
    labels: Samples | None, shape: tuple[int, ...], n_components: int
) -> tuple[Array | None, tuple[str, ...] | None]:
    """Known components as int32, -1 where unknown, and the names of classes where labels are no integers.

    Integers are numbers of components, -1 where unknown. Names are numbered as they sort: class k is component k.
    Unknown beside them are None, NaN, NA of pandas, empty text and masked entries.

    Args:
        labels: (N,) as `encode_labels` takes them; None if none are known.
        shape: (N,).
        n_components: K.

    Returns:
        Codes (N,) or None; names or None.

    Raises:
        ValueError: for another shape, integers that are not from -1 to K - 1, or more than K names.
    """
    if labels is None:
        return None, None
    classes: tuple[str, ...] | None = None
    values: Any
    if isinstance(labels, jax.Array):
        values, kind = labels, labels.dtype
        check_shape("labels", labels, shape)
    else:
        vector = as_vector(labels)
        check_shape("labels", vector, shape)
        values, known, classes = encode_labels(vector)
        kind = vector.dtype if vector.dtype.kind == "b" or (vector.dtype.kind == "f" and known.all()) else values.dtype
    if classes is not None and kind.kind == "i" and len(classes) > n_components:
        shown = ", ".join(map(repr, classes[:3]))
        raise ValueError(
            f"{door()}: `labels` must name at most {n_components} classes, a component each; got {len(classes)}: "
            f"{shown} and so on. Raise n_components, or give None for rows whose class is not sought."
        )
    # on the devices, since the rows may be spread over processes, all of which must raise
    least, largest = values.min().item(), values.max().item()
    if kind.kind not in "iu" or least < -1 or largest >= n_components:
        raise ValueError(
            f"{door()}: `labels` must be integers from -1 (unknown) to {n_components - 1}; got {kind} from "
            f"{least} to {largest}. Number the known components from 0, or name them."
        )
    return jnp.asarray(values, jnp.int32), classes


def as_vector(labels: Any) -> np.ndarray:
    """Labels as a numpy array, nothing of them changed: in a list text and NaN stay apart, and masked is None."""
    if isinstance(labels, np.ma.MaskedArray):
        vector = labels.data.astype(object)
        vector[np.ma.getmaskarray(labels)] = None  # `filled(None)` would fill in numpy's own values, as 999999
        return vector if np.ma.getmaskarray(labels).any() else labels.data
    if isinstance(labels, list | tuple):
        return np.array(labels, object) if not _holds_numbers(labels) else np.asarray(labels)
    has_array = hasattr(type(labels), "__array__")  # `to_numpy` of pyarrow refuses to copy, which text needs
    return np.asarray(labels.to_numpy() if hasattr(type(labels), "to_numpy") and not has_array else labels)


def _holds_numbers(labels: Sequence[object]) -> bool:
    return all(isinstance(entry, int | float | np.number) and not isinstance(entry, bool) for entry in labels)


def is_known(array: np.ndarray) -> np.ndarray:
    """True for the entries of a vector that are labels, not missing values (N,)."""
    known = np.ones(array.shape, bool)
    if array.dtype.kind == "f":
        known = ~np.isnan(array)
    elif array.dtype.kind in "mM":
        known = ~np.isnat(array)
    elif array.dtype.kind in "SU":
        known = np.char.str_len(array) > 0
    elif array.dtype == object:
        # not by frompyfunc, under which some versions of numpy warn of the NaN that is looked at
        missing = (is_missing(entry) or (isinstance(entry, str | bytes) and not entry) for entry in array)
        known = ~np.fromiter(missing, bool, len(array))
    return known


def of_one_kind(argument: str, entries: np.ndarray) -> np.ndarray:
    """Labels that are known as an array that sorts: objects become integers, floats or text.

    Raises:
        ValueError: for numbers and names among each other.
    """
    if entries.dtype.kind not in "OS":
        return entries
    is_number = [isinstance(entry, int | float | np.number | np.bool_) for entry in entries.flat]
    if is_number and all(is_number):
        return np.array(entries.tolist())
    if any(is_number):
        kinds = sorted({type(entry).__name__ for entry in entries.flat})
        raise ValueError(
            f"{door()}: `{argument}` must be all numbers or all names; got {' and '.join(kinds)}. "
            "Convert all of them to text."
        )
    texts = [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in entries.tolist()]
    return np.array(texts, str)
