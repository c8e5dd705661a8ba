"""Columns of a table by their part in an analysis: identifier, numbers, categories, and what is left out and why."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_hmog.data.tables import is_code, is_nested

MOST_CATEGORIES = 20  # of a column of text that may be taken for categories
MOST_WORDS = 5  # different ones among the numbers of a column, as "unknown" or "-"
SHOWN = 8  # names in a line


@dataclasses.dataclass(frozen=True)
class Columns:
    """Roles of columns, by name.

    Attributes:
        identifier: the column that names the rows, or None.
        numbers: columns of numbers.
        categories: values of the columns of text that become columns of 0 and 1, one for each value.
        words: words in columns of numbers, which count as missing.
        left_out: columns that take no part, and why.

    Example:
        >>> Columns(None, ("age",), {"city": ("Bern", "Oslo")}).features
        ('age', 'city=Bern', 'city=Oslo')
    """

    identifier: str | None
    numbers: tuple[str, ...]
    categories: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns of a model."""
        return (*self.numbers, *(f"{name}={value}" for name, values in self.categories.items() for value in values))


def choose_columns(
    table: Any, identifier: str | None = None, one_hot: Sequence[str] = (), leave_out: Sequence[str] = ()
) -> Columns:
    """The roles of the columns of a table.

    Numbers take part, those in text too; a constant column does no harm. Text is left out unless `one_hot` names it, or
    is the identifier where no two rows share a value, as is a count of the rows. A second count of them, dates and
    empty columns are left out.

    Args:
        table: of pandas.
        identifier: name of the identifier, where it is known.
        one_hot: columns to take for categories; "all" takes all of at most 20 values.
        leave_out: columns to leave out.

    Raises:
        ValueError: for names of no column, or a table without numbers.
    """
    names = [str(name) for name in table.columns]
    for argument, given in (("id", [identifier]), ("one_hot", one_hot), ("leave_out", leave_out)):
        for name in given:
            if name not in (None, "all", *names):
                raise ValueError(f"fit: `{argument}` must name a column; got {name!r}. Choose one of {listed(names)}.")
    numbers: list[str] = []
    categories: dict[str, tuple[str, ...]] = {}
    words: dict[str, tuple[str, ...]] = {}
    left_out = dict.fromkeys(leave_out, "as asked")
    for position, name in enumerate(names):
        column = table.iloc[:, position]
        if name == identifier or name in left_out:
            continue
        if is_nested(column):
            left_out[name] = "lists or records"
            continue
        parsed, others = as_numbers(column)
        is_numeric = (
            not is_code(column)
            and bool(np.isfinite(parsed).any())
            and len(others) <= MOST_WORDS
            and not is_date(column)
        )
        if name in one_hot or (one_hot and "all" in one_hot and is_text(column) and not is_numeric):
            values = tuple(sorted(map(str, column.dropna().unique())))
            if values and (len(values) <= MOST_CATEGORIES or name in one_hot):
                categories[name] = values
                continue
        if is_numeric and is_count(column):
            if identifier is None:
                identifier = name
            else:
                left_out[name] = "a count of the rows"
        elif is_numeric:
            numbers.append(name)
            words |= {name: others} if others else {}
        elif identifier is None and is_text(column) and column.notna().all() and column.is_unique:
            identifier = name
        else:
            left_out[name] = reason(name, column)
    if not numbers and not categories:
        raise ValueError(
            f"fit: the table must have columns of numbers; got {listed(names)}. Encode them as numbers, or take "
            "--one-hot all."
        )
    return Columns(identifier, tuple(numbers), categories, words, left_out)


def rows_of(table: Any, columns: Columns) -> np.ndarray:
    """Rows (N, F) of numbers with the features of `columns`, NaN where an entry is missing; found by name.

    Raises:
        ValueError: for a column that is not there, or is one of text where numbers were.
    """
    names, parts = [str(name) for name in table.columns], []
    for name in (*columns.numbers, *columns.categories):
        if name not in names:
            absent = [name for name in (*columns.numbers, *columns.categories) if name not in names]
            raise ValueError(
                f"predict: `rows` must have the columns of the model; got none named {name!r}, {len(absent)} of "
                f"{len(columns.numbers) + len(columns.categories)} missing. Name the columns as in the fit."
            )
        column = table.iloc[:, names.index(name)]
        if name in columns.categories:
            missing, text = column.isna().to_numpy(), column.astype(str).to_numpy()
            parts += [np.where(missing, np.nan, text == value) for value in columns.categories[name]]
            continue
        parsed, others = as_numbers(column)
        if len(others) > MOST_WORDS:
            raise ValueError(
                f"predict: column {name!r} must hold numbers; got {listed(others)}. Correct it, or fit without it."
            )
        if np.isinf(parsed).any():
            row = int(np.isinf(parsed).argmax())
            raise ValueError(
                f"fit: column {name!r} must hold finite numbers; got {parsed[row]} in row {row}, counted from 0. Leave "
                "the cell empty where it is missing."
            )
        parts.append(parsed)
    return np.column_stack(parts)


def as_numbers(column: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """A column as float64, NaN where missing, and the different words in it that are no numbers."""
    import pandas as pd

    if is_date(column):
        return np.full(len(column), np.nan), ()
    parsed = pd.to_numeric(column, errors="coerce")
    words = column[parsed.isna() & column.notna()]
    return parsed.to_numpy(dtype=np.float64, na_value=np.nan), tuple(sorted({str(word) for word in words.unique()}))


def is_text(column: Any) -> bool:
    """True for a column of text or categories."""
    import pandas as pd

    return bool(column.dtype == object or isinstance(column.dtype, pd.CategoricalDtype | pd.StringDtype))


def is_date(column: Any) -> bool:
    """True for a column of dates, times or durations."""
    return column.dtype.kind in "mM"


def is_count(column: Any) -> bool:
    """True for integers without gaps that occur once each, as numbers of rows and customers are."""
    return (
        column.dtype.kind in "iu"
        and len(column) > 1
        and column.is_unique
        and column.max() - column.min() + 1 == len(column)
    )


def reason(name: str, column: Any) -> str:
    """The reason for which a column takes no part."""
    if column.isna().all():
        return "empty"
    if is_date(column):
        return "dates"
    count, first = column.nunique(), str(column.dropna().iloc[0])
    if count == 1:
        return f"text, always {first!r}"
    if re.fullmatch(r"[-+]?[^\w\s]?\s?\d[\d.,' ]*\s?[^\w\s]?", first) and not first.isdecimal():
        return f"text of {count} values as {first!r}; write plain numbers to have it take part"
    return f"text of {count} values" + (f", which --one-hot {name} takes" if count <= MOST_CATEGORIES else "")


def listed(names: Sequence[str]) -> str:
    """The first names in a line."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
