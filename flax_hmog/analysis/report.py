"""A report in one html file that needs nothing else and asks for nothing: in light and dark, on any screen."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from flax_hmog.analysis import style
from flax_hmog.analysis.elements import Cell, Gallery, Map, Picture, Section, Table, format_column, is_number
from flax_hmog.analysis.pictures import Sheet, sheet, svg
from flax_hmog.model.optional import require

GRID = 10_000  # steps of a map's axis
BEYOND = 0.01  # share of the points on either side that does not widen a map, but for the medians of clusters
# shapes of the clusters in a box of 16 x 16, in the order of `style.MARKERS`
MARKS = (
    "M14 8A6 6 0 1 1 2 8A6 6 0 1 1 14 8Z", "M3 3H13V13H3Z", "M8 1.5L15 14H1Z", "M8 1L15 8L8 15L1 8Z",
    "M8 14.5L1 2H15Z", "M6 1H10V6H15V10H10V15H6V10H1V6H6Z",
    "M4 1L8 5L12 1L15 4L11 8L15 12L12 15L8 11L4 15L1 12L5 8L1 4Z",
    "M1.5 8L14 1V15Z",
)  # fmt: skip
KINDS = (("tables", Table), ("pictures", Picture), ("maps", Map), ("galleries", Gallery))


def write_report(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    summary: str = "",
    images: np.ndarray | None = None,
) -> Path:
    """Write a report as one self-contained html file. Texts are escaped: none is read as html.

    Args:
        path: of the file; folders are made, an existing file is replaced.
        title: title of the report.
        sections: its sections, in order; headings are listed at the top.
        summary: the findings in a few sentences, above the first section.
        images: (n, h, w) or (n, h, w, 3), uint8, which cells of tables and points of maps name by their numbers.

    Returns:
        The path.

    Raises:
        ImportError: without jinja2 or matplotlib.
        TypeError: for a section that is no `Section`, or a part of it that is none.
        ValueError: for a report without sections, or a picture or map without alternative text.

    Example:
        >>> import tempfile
        >>> table = Table([{"method": "EM", "NMI": (0.85, 0.04)}], caption="Test split")
        >>> write_report(Path(tempfile.mkdtemp()) / "report.html", "Digits", [Section("Scores", tables=[table])]).name
        'report.html'
    """
    jinja = require("jinja2", "report")
    _check_sections(sections)
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja.StrictUndefined}
    files = importlib.resources.files("flax_hmog.analysis")
    parts = {name: files.joinpath(f"report.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    own = None if images is None or not len(images) else sheet(images)
    html = (
        jinja.Environment(**options)
        .from_string(parts["html"])
        .render(
            title=title,
            summary=_paragraphs(summary),
            sections=[_section(number, section, own) for number, section in enumerate(sections, 1)],
            images=own,
            style=parts["css"],
            script=parts["js"],
            light=style.PALETTE,
            dark=style.DARK_PALETTE,
            marks=MARKS,
            version=importlib.metadata.version("flax-hmog"),
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _check_sections(sections: Sequence[Section]) -> None:
    """The right types, and alternative text for every picture and map."""
    if len(sections) == 0:
        raise ValueError("write_report: `sections` must hold at least one Section; got none. Give it something to say.")
    for section in sections:
        parts: list[tuple[Any, type]] = [(section, Section)]
        if isinstance(section, Section):
            parts += [(part, kind) for name, kind in KINDS for part in getattr(section, name)]
        for part, kind in parts:
            if not isinstance(part, kind):
                raise TypeError(
                    f"write_report: `sections` must be made of Section, Table, Picture, Map and Gallery; got "
                    f"{type(part).__name__} where {kind.__name__} belongs. Wrap it."
                )
        for alt in [part.alt for part in section.pictures] + [part.alt for part in section.maps]:
            if not alt.strip():
                raise ValueError(
                    f"write_report: `alt` must say what a picture shows; got nothing in section {section.heading!r}. "
                    "Describe it in a sentence."
                )


def _section(number: int, section: Section, images: Sheet | None) -> dict[str, Any]:
    """The values that the template reads of a section."""
    name = re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-")
    anchor = f"{number}-{name}"
    return {
        "anchor": anchor,
        "heading": section.heading,
        "paragraphs": _paragraphs(section.text),
        "tables": [_table(table, images) for table in section.tables if table.rows],
        "maps": [{"caption": m.caption, "alt": m.alt, "data": _map(m, images)} for m in section.maps],
        "galleries": [_gallery(gallery) for gallery in section.galleries if len(gallery.images)],
        "pictures": [
            {
                "svg": svg(pic.figure, f"f{number}-{place}"),
                "caption": pic.caption,
                "alt": pic.alt,
                "width": _width(pic.figure),
            }
            for place, pic in enumerate(section.pictures)
        ],
    }


def _table(table: Table, images: Sheet | None) -> dict[str, Any]:
    """Columns in the order in which they first occur, and cells as text; columns of numbers are aligned right."""
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    columns, cells = [], []
    for name in names:
        given = [row.get(name) for row in table.rows]
        values = [cell.value if isinstance(cell, Cell) else cell for cell in given]
        numeric = all(value is None or is_number(value) or isinstance(value, tuple) for value in values)
        columns.append((name, numeric))
        texts = format_column(values)
        cells.append([_cell(*found, numeric, images) for found in zip(given, values, texts, strict=True)])
    groups = [next((c.group for c in row.values() if isinstance(c, Cell) and c.group is not None), None)
              for row in table.rows]  # fmt: skip
    rows = list(zip(groups, zip(*cells, strict=True), strict=True))
    return {"caption": table.caption, "folded": table.folded, "columns": columns, "rows": rows}


def _cell(given: Any, value: Any, text: str, numeric: bool, images: Sheet | None) -> dict[str, Any]:
    exact = value[0] if isinstance(value, tuple) else value
    cell = given if isinstance(given, Cell) else Cell(value)
    places = [images.place(number) for number in cell.pictures] if images is not None else []
    sort = "" if exact is None or not numeric else f"{float(exact):.12g}"
    return {"text": text, "numeric": numeric, "sort": sort, "pictures": places, "group": cell.group,
            "shade": round(100 * cell.shade)}  # fmt: skip


def _gallery(gallery: Gallery) -> dict[str, Any]:
    """The sheet of its images, and what stands below each."""
    own = sheet(gallery.images)
    groups: Sequence[int | None] = [None] * len(gallery.names) if gallery.groups is None else gallery.groups
    items = [(own.place(n), name, group) for n, (name, group) in enumerate(zip(gallery.names, groups, strict=True))]
    return {"sheet": own, "pieces": items, "caption": gallery.caption}


def _map(given: Map, images: Sheet | None) -> str:
    """The map as the script reads it, as JSON that is safe inside a page."""
    colors = {name: {"values": _ints(values), "names": list(names)} for name, (values, names) in given.colors.items()}
    data: dict[str, Any] = {
        "axes": [
            _axis(name, np.asarray(values, np.float64), np.asarray(given.groups)) for name, values in given.axes.items()
        ],
        "groups": _ints(given.groups),
        "details": {name: list(values) for name, values in given.details.items()},
        "colors": colors,
        "pictures": None
        if given.pictures is None or images is None
        else [images.place(number) for number in _ints(given.pictures)],
    }
    text = json.dumps(data, separators=(",", ":"), default=functools.partial(np.ndarray.item))
    return text.replace("<", "\\u003c")


def _ints(values: Any) -> list[int]:
    return cast(list[int], np.asarray(values, int).tolist())


def _axis(name: str, values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Points as whole numbers of steps along an axis; a few that lie far out stand at its ends."""
    centers = [np.median(values[groups == group]) for group in np.unique(groups)]
    low, high = np.quantile(values, [BEYOND, 1 - BEYOND])
    low, high = min(low, *centers), max(high, *centers)
    room = 0.2 * (high - low) or 1.0
    low, high = max(values.min(), low - room), min(values.max(), high + room)
    if low == high:
        low, high = low - 1, high + 1
    steps = (GRID * (np.clip(values, low, high) - low) / (high - low)).round()
    beyond = int(np.sum((values < low) | (values > high)))
    return {"name": name, "low": float(low), "high": float(high), "beyond": beyond, "values": _ints(steps)}


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _width(figure: Any) -> int:
    """Width at which the figure's text has its nominal size, in css pixels."""
    return cast(int, round(96 * figure.get_size_inches()[0]))
