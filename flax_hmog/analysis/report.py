"""A report in one html file that needs nothing else: no network and no scripts; in light and dark, on any screen."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import importlib.resources
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flax_hmog.model.optional import require
from flax_hmog.model.typed import Samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESOLUTION = 160  # dots per inch of embedded figures


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        rows: one mapping per row, from column names to values. A pair (mean, sd) is shown as mean ± sd, with the digits
            that the sd supports; None as an empty cell.
        caption: text above it.

    Example:
        >>> table = Table([{"method": "EM", "NMI": (0.85, 0.04)}], caption="Test split, mean and standard deviation")
    """

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of a report.

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
class Section:
    """A section of a report.

    Attributes:
        heading: its title.
        text: paragraphs, separated by blank lines.
        tables: shown below the text.
        pictures: shown below the tables.

    Example:
        >>> section = Section("Scores", text="On the test split.", tables=[Table([{"NMI": 0.85}])])
    """

    heading: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def write_report(path: str | os.PathLike[str], title: str, sections: Sequence[Section], *, summary: str = "") -> Path:
    """Write a report as one self-contained html file. Texts are escaped: none is read as html.

    Args:
        path: of the file; folders are made, an existing file is replaced.
        title: title of the report.
        sections: its sections, in order; headings are listed at the top.
        summary: the findings in a few sentences, above the first section.

    Returns:
        The path.

    Raises:
        ImportError: without jinja2.
        TypeError: for a section that is no `Section`, or a table or picture that is none.
        ValueError: for a report without sections, or a picture without alternative text.

    Example:
        >>> import tempfile
        >>> table = Table([{"method": "EM", "NMI": (0.85, 0.04)}], caption="Test split")
        >>> write_report(Path(tempfile.mkdtemp()) / "report.html", "Digits", [Section("Scores", tables=[table])]).name
        'report.html'
    """
    jinja = require("jinja2", "report")
    _check_sections(sections)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja.StrictUndefined}
    template = importlib.resources.files("flax_hmog.analysis").joinpath("report.html").read_text(encoding="utf-8")
    html = (
        jinja.Environment(**options)
        .from_string(template)
        .render(
            title=title,
            summary=_paragraphs(summary),
            sections=[_section(number, section) for number, section in enumerate(sections, 1)],
            version=importlib.metadata.version("flax-hmog"),
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


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
    if isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)):
        return _plus_minus(float(value[0]), float(value[1]))
    if not _is_number(value):
        return str(value)
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, int):
        return f"{number:,}"
    if np.isfinite(number) and abs(number) >= 1e4:
        return f"{number:,.0f}" if abs(number) < 1e9 else f"{number:.3e}"
    return f"{number:.4g}"


def _plus_minus(mean: float, sd: float) -> str:
    """Mean ± sd, both to the second significant digit of the sd; very large or small ones with powers of ten."""
    if not (np.isfinite(mean) and np.isfinite(sd) and sd > 0):
        return f"{format_cell(mean)} ± {format_cell(sd)}"
    decimals = max(0, 1 - int(np.floor(np.log10(sd))))
    if decimals > 6 or max(abs(mean), sd) >= 1e6:
        return f"{mean:.4g} ± {sd:.2g}"
    return f"{mean:,.{decimals}f} ± {sd:,.{decimals}f}"


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and (
        isinstance(value, int | float | np.number) or (hasattr(value, "dtype") and np.ndim(value) == 0)
    )


def _check_sections(sections: Sequence[Section]) -> None:
    """The right types, and alternative text for every picture."""
    if len(sections) == 0:
        raise ValueError("write_report: `sections` must hold at least one Section; got none. Give it something to say.")
    for section in sections:
        parts: list[tuple[Any, type]] = [(section, Section)]
        if isinstance(section, Section):
            parts += [(table, Table) for table in section.tables] + [(pic, Picture) for pic in section.pictures]
        for part, kind in parts:
            if not isinstance(part, kind):
                raise TypeError(
                    f"write_report: `sections` must be made of Section, Table and Picture; got {type(part).__name__} "
                    f"where {kind.__name__} belongs. Wrap it."
                )
        for picture in section.pictures:
            if not picture.alt.strip():
                raise ValueError(
                    f"write_report: `alt` must say what a picture shows; got nothing in section {section.heading!r}. "
                    "Describe it in a sentence."
                )


def _section(number: int, section: Section) -> dict[str, Any]:
    """The values that the template reads of a section."""
    name = re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-")
    return {
        "anchor": f"{number}-{name}",
        "heading": section.heading,
        "paragraphs": _paragraphs(section.text),
        "tables": [_table(table) for table in section.tables if table.rows],
        "pictures": [
            {"data": _png(pic.figure), "caption": pic.caption, "alt": pic.alt, "width": _width(pic.figure)}
            for pic in section.pictures
        ],
    }


def _table(table: Table) -> dict[str, Any]:
    """Columns in the order in which they first occur, and cells as text; columns of numbers are aligned right."""
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    columns, cells = [], []
    for name in names:
        values = [row.get(name) for row in table.rows]
        numeric = all(value is None or _is_number(value) or isinstance(value, tuple) for value in values)
        columns.append((name, numeric))
        cells.append([(text, numeric) for text in _format_column(values)])
    return {"caption": table.caption, "columns": columns, "rows": list(zip(*cells, strict=True))}


def _format_column(values: Sequence[Any]) -> list[str]:
    """Cells of one column: with equal decimals where these show at least 2 digits of each number."""
    sizes = [abs(float(value)) for value in values if isinstance(value, float | np.floating) and value != 0]
    plain = all(value is None or isinstance(value, float | np.floating) for value in values)
    if plain and sizes and np.isfinite(sizes).all() and max(sizes) < 1e4:
        decimals = max(0, 3 - int(np.floor(np.log10(max(sizes)))))
        if decimals <= 6 and min(sizes) >= 10.0 ** (1 - decimals):
            return ["" if value is None else f"{value:.{decimals}f}" for value in values]
    return [format_cell(value) for value in values]


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _png(figure: Figure) -> str:
    """The figure as base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION, facecolor="white", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _width(figure: Figure) -> int:
    """Width at which the figure's text has its nominal size, in css pixels."""
    return cast(int, round(96 * figure.get_size_inches()[0]))
