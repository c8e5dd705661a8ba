"""Tables in files, read by pandas: columns of numbers are the rows' columns, one of any kind may hold the labels."""

from __future__ import annotations

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)
SUFFIXES = (".csv", ".parquet")
LINES, SNIFFED = 50, 100_000  # lines and cells that tell how a .csv is written
Identifier = tuple[str, Any]
"""Name and values (N,) of what names the rows."""
UNNAMED = "Unnamed: 0"  # as pandas calls a first column without a name, which holds numbers or names of the rows


def read_table(path: Path, labels: str | None) -> tuple[np.ndarray, Any, tuple[str, ...], Identifier | None]:
    """Rows (N, D), the column of labels or None, the names of the columns (D,), and what names the rows, if anything.

    Columns of text and a first one without a name, as row numbers have none, are left out, with a message in the log;
    missing numbers are NaN. Rows are named by an index, by that first column, or else by the first column of text in
    which no two rows share a value.

    Args:
        path: a .csv whose first line names the columns, or a .parquet.
        labels: the column of labels.

    Raises:
        ValueError: without pandas (and pyarrow), for a column that is not there, or one of numbers and text.
    """
    table = read_frame(path)
    identifier = index_of(table)
    names = [str(name) for name in table.columns]
    if path.suffix == ".csv" and (names[:1] == [UNNAMED] != [labels] or type(table.index).__name__ != "RangeIndex"):
        logger.warning("%s: the first column, which has no name, is left out", path)
        if identifier is None:
            identifier = "row", table[UNNAMED].to_numpy()
        table = table.drop(columns=UNNAMED, errors="ignore")
        names = [name for name in names if name != UNNAMED]
    found = None
    if labels is not None:
        if labels not in names:
            raise ValueError(
                f"read_file: `data.labels` must be a column of {path}; got {labels!r}. Choose one of {_some(names)}."
            )
        found = table.iloc[:, names.index(labels)]
    kept, left_out, columns = [], [], []
    for number, name in enumerate(names):
        if name == labels:
            continue
        column = _numbers(path, name, table.iloc[:, number])
        if column is None:
            left_out.append(name)
            text = table.iloc[:, number]
            if identifier is None and not is_nested(text) and text.notna().all() and text.is_unique:
                identifier = name, text.to_numpy()
        else:
            kept.append(name)
            columns.append(column)
    if left_out:
        logger.warning("%s: columns without numbers are left out: %s", path, _some(left_out))
    if not columns:
        raise ValueError(f"read_file: {path} must have columns of numbers; got {_some(names)}. Encode them as numbers.")
    return np.column_stack(columns), found, tuple(kept), identifier


def index_of(table: Any) -> Identifier | None:
    """The index of a table of pandas, or the `obs_names` of an AnnData, with its name; None where it only counts."""
    index: Any = getattr(table, "obs_names", getattr(table, "index", None))
    if not hasattr(index, "to_numpy") or type(index).__name__ == "RangeIndex":
        return None
    return str(index.name or ("index" if hasattr(table, "index") else "obs_names")), index.to_numpy()


def read_frame(path: Path) -> Any:
    """A table of pandas with all that is in the file.

    Raises:
        ValueError: without pandas (and pyarrow), or for a file that is no table with names and rows.
    """
    table = _read(path)
    if not len(table):
        raise ValueError(f"read_file: {path} must have rows below the names of its columns; got none. Add rows.")
    names = [str(name) for name in table.columns if name != UNNAMED]
    if path.suffix == ".csv" and names and all(_is_number(name) for name in names):
        raise ValueError(
            f"read_file: the first line of {path} must name the columns; got {', '.join(names[:4])}. "
            "Add a line of names."
        )
    return table


def _read(path: Path) -> Any:
    try:
        import pandas as pd

        if path.stat().st_size == 0:
            raise ValueError("an empty file")
        return pd.read_csv(path, **_dialect(path, pd)) if path.suffix == ".csv" else pd.read_parquet(path)
    except ImportError:
        packages = "pandas" if path.suffix == ".csv" else "pandas and pyarrow"
        raise ValueError(
            f"read_file: {path.name} must be read by {packages}; got no such package. "
            f"Install it: pip install {packages.replace(' and', '')}."
        ) from None
    except ValueError as error:  # pandas' and pyarrow's parser errors are ValueErrors
        remedy = "Copy it again." if path.suffix != ".csv" else "Correct it, or copy it again."
        remedy = "Save it as UTF-8." if isinstance(error, UnicodeDecodeError) else remedy
        got = f"{type(error).__name__}: {str(error).strip()}"
        raise ValueError(f"read_file: {path} must be a readable {path.suffix} file; got {got}. {remedy}") from error


def _dialect(path: Path, pd: Any) -> dict[str, Any]:
    """The separator of a .csv, its decimal sign, and its columns of numerals with leading zeros, which are text."""
    with path.open(encoding="utf-8-sig") as file:
        lines = list(itertools.islice(file, LINES))
    separator = max(",;\t|", key=lines[0].count)
    options: dict[str, Any] = {"sep": separator}
    if separator != "," and any(re.search(r"\d,\d", line) for line in lines[1:]):
        options["decimal"] = ","
    if separator != ",":
        decimal = " and decimals by ','" if "decimal" in options else ""
        logger.warning("%s: columns are separated by %r%s", path, separator, decimal)
    count = max(SNIFFED // (lines[0].count(separator) + 1), 20)
    head = pd.read_csv(path, dtype=str, nrows=count, **options)
    return options | {"dtype": {name: str for name in head.columns if is_code(head[name])}}


def is_code(column: Any) -> bool:
    """True for text of numerals of which some begin with a zero, as customers and post codes have them."""
    text = column.dropna()
    return (
        bool(len(text))
        and bool(text.map(lambda value: isinstance(value, str) and value.isdecimal()).all())
        and any(len(value) > 1 and value.startswith("0") for value in text)
    )


def is_nested(column: Any) -> bool:
    """True for a column of lists, records or other values that hold several."""
    return column.dtype == object and any(isinstance(value, list | dict | set | tuple | np.ndarray) for value in column)


def _numbers(path: Path, name: str, column: Any) -> np.ndarray | None:
    """A column as numbers, NaN where missing; None for text."""
    import pandas as pd

    if column.isna().all():
        return None
    if pd.api.types.is_numeric_dtype(column.dtype):
        missing = bool(column.isna().any())
        return column.to_numpy(dtype=np.float64, na_value=np.nan) if missing else np.asarray(column.to_numpy())
    if is_nested(column) or is_code(column):
        return None
    parsed = pd.to_numeric(column, errors="coerce")
    as_numbers: np.ndarray = parsed.to_numpy(dtype=np.float64, na_value=np.nan)
    is_text = np.isnan(as_numbers) & ~column.isna().to_numpy()
    if is_text.all() or pd.api.types.is_datetime64_any_dtype(column.dtype):
        return None
    if is_text.any():
        if np.isnan(as_numbers).mean() > 0.5:
            return None
        row = int(is_text.argmax())
        raise ValueError(
            f"read_file: column {name!r} of {path} must hold numbers; got {column.iloc[row]!r} in row {row} (counted "
            "from 0). Correct it, or leave the column out."
        )
    return as_numbers


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (" and so on" if len(names) > 10 else "")
