"""Style of the figures: one palette, one type scale, and elements that several of them draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from flax_hmog.model.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Paul Tol's "muted" colours and a blue, told apart with any colour vision, in an order that puts contrasts first;
# each has a contrast of 3 and more on white. Reports have a lighter one of each for dark screens.
PALETTE = (
    "#332288",
    "#c4566b",
    "#117733",
    "#b07a00",
    "#3a94bf",
    "#882255",
    "#2e9482",
    "#7f7f1f",
    "#aa4499",
    "#0062a8",
)
DARK_PALETTE = (
    "#8f85e0",
    "#e88a9a",
    "#4fb873",
    "#e0b04a",
    "#8ccbee",
    "#d0639b",
    "#57c4b2",
    "#bdbd5a",
    "#d583c6",
    "#4a9fe0",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
INK, MUTED, FAINT = "#222222", "#6b6b6b", "#d9d9d9"
TITLE, TEXT, SMALL = 12, 10, 8  # points
LONGEST = 32  # characters of a name below a heat map
WIDTH = 8.0  # inches
DIVERGING, SEQUENTIAL = "RdBu_r", "Blues"


def color(index: int) -> str:
    """Colour of a cluster; colours repeat after 10, markers tell those apart."""
    return PALETTE[index % len(PALETTE)]


def text_color(index: int) -> str:
    """The colour of a cluster, dark enough for text."""
    red, green, blue = (int(color(index)[start : start + 2], 16) for start in (1, 3, 5))
    shade = min(1.0, 110 / (0.3 * red + 0.59 * green + 0.11 * blue))
    return f"#{int(shade * red):02x}{int(shade * green):02x}{int(shade * blue):02x}"


def marker(index: int) -> str:
    """Marker of a cluster: together with `color` distinct for 80 clusters."""
    return MARKERS[index // len(PALETTE) % len(MARKERS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, free of pyplot's global state."""
    figures = require("matplotlib.figure", "plots")
    return cast("Figure", figures.Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white"))


def decorate(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = "", grid: bool = False) -> None:
    """Titles, labels and ticks in the house's type."""
    if title:
        axes.set_title(title, fontsize=TITLE, color=INK, loc="left", pad=10)
    axes.set_xlabel(xlabel, fontsize=TEXT, color=INK)
    axes.set_ylabel(ylabel, fontsize=TEXT, color=INK)
    axes.tick_params(labelsize=SMALL + 1, colors=MUTED, labelcolor=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    if grid:
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)


def bare(axes: Axes) -> None:
    """No ticks and no frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def add_colorbar(figure: Figure, mappable: Any, axes: Any, label: str) -> None:
    """A thin colour bar at the top right, with its quantity and unit."""
    bar = figure.colorbar(mappable, ax=axes, fraction=0.03, pad=0.02, aspect=30, anchor=(0.0, 1.0))
    bar.set_label(label, fontsize=TEXT, color=INK)
    bar.ax.tick_params(labelsize=SMALL + 1, length=3, colors=MUTED, labelcolor=INK)
    bar.outline.set_visible(False)


def outlined(axes: Axes, position: np.ndarray, text: str, **style: Any) -> None:
    """Text with a white outline, readable on top of data."""
    effects = require("matplotlib.patheffects", "plots")
    x, y = position
    label = axes.text(x, y, text, fontsize=TEXT, fontweight="bold", ha="center", va="center", zorder=5, **style)
    label.set_path_effects([effects.withStroke(linewidth=3, foreground="white")])


def spread(points: np.ndarray, width: float, height: float, rounds: int = 200) -> np.ndarray:
    """Positions (n, 2) near `points` at which boxes of this width and height overlap little, for labels."""
    box = np.array([width, height])
    # a point by itself: break ties so that coinciding labels know where to go
    position: np.ndarray = points + 1e-3 * box * np.stack(
        [np.cos(np.arange(len(points))), np.sin(np.arange(len(points)))], axis=1
    )
    for _ in range(rounds):
        gap = (position[:, None] - position[None]) / box
        overlap = np.maximum(1 - np.linalg.norm(gap, axis=-1), 0)
        np.fill_diagonal(overlap, 0)
        if not overlap.any():
            break
        unit = gap / np.maximum(np.linalg.norm(gap, axis=-1, keepdims=True), 1e-9)
        position = position + 0.3 * box * np.sum(overlap[..., None] * unit, axis=1)
    return position


def image_grid(images: np.ndarray, titles: Sequence[str], *, title: str, label: str, diverging: bool) -> Figure:
    """Images (n, h, w) or (n, h, w, 3) in a grid, on one common scale."""
    columns = min(len(images), 5 if len(images) <= 10 else 10)
    rows = -(-len(images) // columns)
    tall = images.shape[1] / images.shape[2]
    cell = min(WIDTH / columns, 1.6)
    figure = new_figure(max(cell * columns, 3.0) + 0.9, (0.93 * cell * min(tall, 3) + 0.27) * rows + 0.45)
    grid = figure.subplots(rows, columns, squeeze=False)
    low, high = float(images.min()), float(images.max())
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    if images.ndim == 4:
        images = (images - low) / ((high - low) or 1.0)
    shown = None
    for index, axes in enumerate(grid.flat):
        bare(axes)
        if index >= len(images):
            axes.set_visible(False)
            continue
        shown = axes.imshow(images[index], cmap=DIVERGING if diverging else "gray", vmin=low, vmax=high)
        axes.set_title(titles[index], fontsize=SMALL + 1, color=INK, pad=3)
    figure.suptitle(title, fontsize=TITLE, color=INK, x=0.01, ha="left")
    if images.ndim == 3:
        add_colorbar(figure, shown, grid, label)
    return figure


def heat_rows(
    rows: np.ndarray,
    row_names: Sequence[str],
    column_names: Sequence[str] | None,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    label: str,
) -> Figure:
    """Rows (n, D) as a heat map with 0 in white."""
    count, width = rows.shape
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in column_names or ()]
    longest = max(map(len, names), default=0)
    many = width > 12 or longest > 8
    room = 0.0 if not names else max(0.6, 0.06 * longest) if many else 0.6
    figure = new_figure(WIDTH, 1.6 + np.clip(0.3 * count, 1.6, 11) + room)  # the bar's label needs 1.6 inches
    axes = figure.subplots()
    limit = float(np.abs(rows).max()) or 1.0
    shown = axes.imshow(rows, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    decorate(axes, title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(False)
    axes.set_yticks(np.arange(count), row_names)
    if names:
        axes.set_xticks(np.arange(width), names, rotation=60 if many else 0, ha="right" if many else "center")
    add_colorbar(figure, shown, axes, label)
    return figure
