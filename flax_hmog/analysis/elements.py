"""Elements of a report: sections with texts, tables, figures, galleries and maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_hmog.model.typed import Samples


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table that shows more than a value.

    Attributes:
        value: number or text, by which the table is sorted, filtered and written to csv.
        pictures: numbers of those images of the report that stand in it.
        group: number of the cluster, shown by its colour and as a button that chooses it; None for a plain cell.
        shade: strength of the background, from 0 to 1.

    Example:
        >>> cell = Cell("rows 4, 7", pictures=(0, 1))
    """

    value: Any
    pictures: Sequence[int] = ()
    group: int | None = None
    shade: float = 0.0


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a report, which sorts, filters, and is downloaded as csv.

    Attributes:
        rows: one mapping per row, from column names to values, some in a `Cell`. A pair (mean, sd) is shown as
            mean ± sd, with the digits that the sd supports; None as an empty cell.
        caption: text above it.
        folded: True to show the caption alone until it is opened.

    Example:
        >>> table = Table([{"method": "EM", "NMI": (0.85, 0.04)}], caption="Test split, mean and standard deviation")
    """

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of a report, in the colours of its page.

    Attributes:
        figure: a matplotlib figure.
        caption: text below it.
        alt: description for readers who cannot see it.

    Example:
        >>> from flax_hmog.analysis import plot_objective
        >>> picture = Picture(plot_objective({"seed 0": [-3.0, -2.0]}), "Objective by step", alt="A line that rises")
    """

    figure: Any
    caption: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Small images with names, as many beside each other as there is room for.

    Attributes:
        images: (n, h, w) or (n, h, w, 3), uint8.
        names: one below each image.
        caption: text below all of them.
        groups: number of each one's cluster (n,), or None.

    Example:
        >>> gallery = Gallery(np.zeros((2, 8, 8), np.uint8), ["first", "second"], "Two images")
    """

    images: np.ndarray
    names: Sequence[str]
    caption: str = ""
    groups: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Map:
    """Points in a plane of axes to choose from; each says what it is, and a cluster is chosen with a click.

    Attributes:
        axes: coordinates of the points (M,) by the name of the axis; the first two are shown first.
        groups: number of each point's cluster (M,).
        details: values (M,) by their name, shown of the point below the pointer.
        caption: text below it.
        alt: description for readers who cannot see it.
        colors: further numbers (M,) and their names by which points can be coloured, by what they are.
        pictures: number of the image of the report that shows each point (M,), or None.

    Example:
        >>> points = Map({"x": [0.0, 1.0], "y": [0.0, 2.0]}, [0, 1], {"row": [0, 1]}, "Two rows", "A map of two rows")
    """

    axes: Mapping[str, Samples]
    groups: Samples
    details: Mapping[str, Sequence[Any]]
    caption: str
    alt: str
    colors: Mapping[str, tuple[Samples, Sequence[str]]] = dataclasses.field(default_factory=dict)
    pictures: Samples | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a report: its text, then maps, tables, galleries and pictures.

    Attributes:
        heading: its title.
        text: paragraphs, separated by blank lines.
        tables: tables.
        pictures: figures.
        maps: maps.
        galleries: galleries.

    Example:
        >>> section = Section("Scores", text="On the test split.", tables=[Table([{"NMI": 0.85}])])
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    maps: Sequence[Map] = ()
    galleries: Sequence[Gallery] = ()


def mean_and_sd(values: Samples) -> tuple[float, float]:
    """Mean and sample standard deviation (over n - 1) of at least two values, as a cell of a `Table`.

    Args:
        values: numbers (n,), for example of a metric over seeds.

    Returns:
        The mean and the standard deviation.

    Raises:
        ValueError: for fewer than two values.

    Example:
        >>> mean_and_sd([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"mean_and_sd: `values` must have shape (n,) with n > 1; got {array.shape}. Run more seeds.")
    return float(array.mean()), float(array.std(ddof=1))


def format_cell(value: Any) -> str:
    """A value by itself as text: 4 significant digits, thousands separated, (mean, sd) as mean ± sd.

    >>> [format_cell(value) for value in (12345, 0.98765, 123456.7, 1.5e-7, None, True, "a")]
    ['12,345', '0.9877', '123,457', '1.5e-07', '', 'yes', 'a']
    >>> format_cell((0.85312, 0.0123)), format_cell((1234.5, 56.7)), format_cell((-59344312, 118568033))
    ('0.853 ± 0.012', '1,234 ± 57', '-5.934e+07 ± 1.2e+08')
    """
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value)):
        return _plus_minus(float(value[0]), float(value[1]))
    if not is_number(value):
        return str(value)
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, int):
        return f"{number:,}"
    if np.isfinite(number) and abs(number) >= 1e4:
        return f"{number:,.0f}" if abs(number) < 1e9 else f"{number:.3e}"
    return f"{number:.4g}"


def format_column(values: Sequence[Any]) -> list[str]:
    """Cells of one column: with equal decimals where these show at least 2 digits of each number."""
    sizes = [abs(float(value)) for value in values if isinstance(value, float | np.floating) and value != 0]
    plain = all(value is None or isinstance(value, float | np.floating) for value in values)
    if plain and sizes and np.isfinite(sizes).all() and max(sizes) < 1e4:
        decimals = max(0, 3 - int(np.floor(np.log10(max(sizes)))))
        if decimals <= 6 and min(sizes) >= 10.0 ** (1 - decimals):
            return ["" if value is None else f"{value:.{decimals}f}" for value in values]
    return [format_cell(value) for value in values]


def is_number(value: Any) -> bool:
    """True for a number; not for a truth value."""
    return not isinstance(value, bool) and (
        isinstance(value, int | float | np.number) or (hasattr(value, "dtype") and np.ndim(value) == 0)
    )


def _plus_minus(mean: float, sd: float) -> str:
    """Mean ± sd, both to the second significant digit of the sd; very large or small ones with powers of ten."""
    if not (np.isfinite(mean) and np.isfinite(sd) and sd > 0):
        return f"{format_cell(mean)} ± {format_cell(sd)}"
    decimals = max(0, 1 - int(np.floor(np.log10(sd))))
    if decimals > 6 or max(abs(mean), sd) >= 1e6:
        return f"{mean:.4g} ± {sd:.2g}"
    return f"{mean:,.{decimals}f} ± {sd:,.{decimals}f}"
