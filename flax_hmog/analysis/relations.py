"""Figures of how clusters relate: to each other, and to known labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.cluster import hierarchy

from flax_hmog.analysis import style
from flax_hmog.analysis.clusters import check_linkage
from flax_hmog.analysis.inputs import as_array, as_images, as_labels, as_names
from flax_hmog.analysis.metrics import contingency_table
from flax_hmog.model.checks import door, public
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NUMBERS = 24  # columns of a table that still have room for numbers


@public
def plot_dendrogram(
    linkage: npt.ArrayLike,
    *,
    labels: Samples | None = None,
    names: Sequence[str] | None = None,
    prototypes: Samples | None = None,
    image_shape: tuple[int, ...] | None = None,
    distance_name: str = "Distance at which they merge",
    title: str = "Hierarchy of the components",
) -> Figure:
    """The hierarchy of the components as a tree that grows to the right.

    Args:
        linkage: (K - 1, 4), from `cluster_hierarchy`.
        labels: the cluster of each component (K,), from `merge_clusters`: branches within one cluster share a colour.
        names: of the components (K,); their numbers by default.
        prototypes: (K, D), from `cluster_prototypes`, drawn as images beside the leaves; needs `image_shape`.
        image_shape: (height, width) or (height, width, 3) with product D.
        distance_name: name of the horizontal axis, with its unit: "Bhattacharyya distance [nats]" for the hierarchy
            of a model, "1 - co-assignment" for that of responsibilities.
        title: title of the figure.

    Returns:
        The figure, with one axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: if `linkage` is no hierarchy or the shapes do not match.

    Example:
        >>> from flax_hmog.analysis import cluster_hierarchy
        >>> figure = plot_dendrogram(cluster_hierarchy([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    """
    linkage = check_linkage(linkage)
    count = len(linkage) + 1
    names = as_names(names, count)
    clusters, numbers = None, None
    if labels is not None:
        clusters, numbers = np.unique(as_labels("labels", labels, count), return_inverse=True)
    images = None
    if prototypes is not None:
        images = as_images(as_array("prototypes", prototypes, 2, "(K, D)"), image_shape or ())
    size = float(np.clip(12 / count, 0.17, 0.36))
    figure = style.new_figure(style.WIDTH, size * count + 1.3)
    axes = figure.subplots()
    leaves = _draw_tree(axes, linkage, numbers)
    style.decorate(axes, title=title, xlabel=distance_name)
    axes.spines["left"].set_visible(False)
    thumbnail = 72 * size * 0.9 if images is not None else 0
    axes.set_yticks(10 * np.arange(count) + 5, [names[leaf] for leaf in leaves])
    axes.tick_params(axis="y", length=0, pad=thumbnail + 5, labelsize=min(style.SMALL + 1, 72 * size * 0.75))
    if images is not None:
        _draw_thumbnails(axes, images[leaves], thumbnail)
    if clusters is not None and numbers is not None:
        _draw_brackets(axes, numbers[leaves], clusters)
    return figure


@public
def plot_contingency(
    labels: Samples,
    assignments: Samples,
    *,
    label_names: Sequence[str] | None = None,
    cluster_names: Sequence[str] | None = None,
    title: str = "Samples by cluster and label",
) -> Figure:
    """Counts of samples by cluster (rows) and known label (columns), coloured by the share of the cluster.

    Rows are ordered by their most frequent label, so that clusters of one label stand together.

    Args:
        labels: known labels (N,).
        assignments: clusters (N,).
        label_names: names of the labels that occur, in sorted order.
        cluster_names: names of the clusters that occur, in sorted order.
        title: title of the figure.

    Returns:
        The figure: the table, and the colour bar.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the shapes do not match.

    Example:
        >>> figure = plot_contingency(["a", "a", "b"], [1, 1, 0])
    """
    counts, clusters, known = contingency_table(labels, assignments)
    columns = as_names(known if label_names is None else label_names, known.size, argument="label_names")
    named = clusters if cluster_names is None else cluster_names
    rows = as_names(named, clusters.size, argument="cluster_names")
    order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
    counts, totals = counts[order], counts.sum(axis=1)[order]
    height = float(np.clip(12 / len(rows), 0.2, 0.36))
    figure = style.new_figure(style.WIDTH, height * len(rows) + 1.6)
    axes = figure.subplots()
    shown = axes.imshow(100 * counts / totals[:, None], cmap=style.SEQUENTIAL, vmin=0, vmax=100, aspect="auto")
    names = [f"{rows[row]}  (n = {total:,})" for row, total in zip(order, totals, strict=True)]
    _matrix_axes(axes, names, columns, title=title, xlabel="Label", ylabel="Cluster")
    if counts.shape[1] <= MAX_NUMBERS:
        size = min(style.SMALL + 1, 72 * height * 0.65)
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = counts[row, column] > 0.55 * totals[row]
            axes.text(
                column,
                row,
                f"{counts[row, column]:,}",
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else style.INK,
            )
    style.add_colorbar(figure, shown, axes, "Share of the cluster [%]")
    return figure


@public
def plot_co_assignment(
    matrix: Samples,
    *,
    linkage: npt.ArrayLike | None = None,
    names: Sequence[str] | None = None,
    title: str = "Co-assignment of the components",
) -> Figure:
    """Co-assignment of components as a heat map whose colours follow the square root.

    Args:
        matrix: (K, K), from `co_assignment`.
        linkage: (K - 1, 4), from `cluster_hierarchy`: rows and columns are put in the order of its leaves.
        names: of the components (K,); their numbers by default.
        title: title of the figure.

    Returns:
        The figure: the matrix, and the colour bar.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the shapes do not match.

    Example:
        >>> from flax_hmog.analysis import co_assignment
        >>> figure = plot_co_assignment(co_assignment([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    """
    matrix = as_array("matrix", matrix, 2, "(K, K)")
    count = len(matrix)
    named = as_names(names, count)
    if matrix.shape != (count, count) or (linkage is not None and np.shape(linkage) != (count - 1, 4)):
        raise ValueError(
            f"{door()}: `matrix` must have shape (K, K) and `linkage` (K - 1, 4); got {matrix.shape} and "
            f"{None if linkage is None else np.shape(linkage)}. Make both from the same model."
        )
    order = np.arange(count) if linkage is None or count == 1 else hierarchy.leaves_list(check_linkage(linkage))
    figure = style.new_figure(style.WIDTH, 7.4)
    axes = figure.subplots()
    norm = require("matplotlib.colors", "plots").PowerNorm(0.5, vmin=0, vmax=1)
    shown = axes.imshow(matrix[np.ix_(order, order)], cmap=style.SEQUENTIAL, norm=norm)
    named = [named[k] for k in order]
    _matrix_axes(axes, named, named, title=title, xlabel="Component", ylabel="Component")
    axes.tick_params(labelsize=min(style.SMALL + 1, 300 / count))
    style.add_colorbar(figure, shown, axes, "Co-assignment")
    return figure


def _matrix_axes(axes: Axes, rows: list[str], columns: list[str], *, title: str, xlabel: str, ylabel: str) -> None:
    """Names of rows and columns, columns on top."""
    style.decorate(axes, title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(False)
    axes.set_yticks(np.arange(len(rows)), rows)
    axes.xaxis.set_label_position("top")
    upright = len(columns) > 25 or max(map(len, columns)) * len(columns) > 80
    axes.set_xticks(np.arange(len(columns)), columns, rotation=90 if upright else 0)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    if len(rows) > 20:
        axes.tick_params(axis="y", labelsize=style.SMALL)


def _draw_tree(axes: Axes, linkage: np.ndarray, numbers: np.ndarray | None) -> np.ndarray:
    """Draw the branches; return the components in the order of the leaves, the first at height 5, the next at 15."""
    count = len(linkage) + 1
    if count == 1:
        axes.set_ylim(0, 10)
        return np.zeros(1, int)
    members = {k: [k] for k in range(count)}
    colours = {}
    for merge, (left, right) in enumerate(linkage[:, :2].astype(int)):
        members[count + merge] = members[left] + members[right]
        inside = set() if numbers is None else set(numbers[members[count + merge]])
        colours[count + merge] = style.color(inside.pop()) if len(inside) == 1 else style.MUTED
    tree = hierarchy.dendrogram(linkage, no_plot=True, link_color_func=colours.__getitem__)
    for depths, heights, colour in zip(tree["dcoord"], tree["icoord"], tree["color_list"], strict=True):
        axes.plot(depths, heights, color=colour, linewidth=1.6, solid_joinstyle="round")
    for place, leaf in enumerate(tree["leaves"]):
        if numbers is not None and np.sum(numbers == numbers[leaf]) == 1:
            merge = int(np.argwhere(linkage[:, :2] == leaf)[0, 0])
            height = 10 * place + 5
            axes.plot([0, linkage[merge, 2]], [height, height], color=style.color(numbers[leaf]), linewidth=1.6)
    axes.set_ylim(10 * count, 0)
    first, last = linkage[0, 2], linkage[-1, 2] or 1.0
    # the stems of the leaves carry no information, unless there is nothing else
    start = 0 if first < last / 2 or first == last else first - (last - first) / 4
    axes.set_xlim(start, last + 0.02 * (last - start))
    return np.array(tree["leaves"])


def _draw_thumbnails(axes: Axes, images: np.ndarray, size: float) -> None:
    """An image of `size` points left of each leaf."""
    boxes = require("matplotlib.offsetbox", "plots")
    low, high = images.min(), images.max()
    images = (images - low) / ((high - low) or 1.0)
    for index, image in enumerate(images):
        box = boxes.OffsetImage(image, zoom=size / max(image.shape[:2]), cmap="gray", interpolation="nearest")
        box.image.set_clim(0, 1)
        place = boxes.AnnotationBbox(
            box,
            (0, 10 * index + 5),
            (-2 - size / 2, 0),
            xycoords=axes.get_yaxis_transform(),
            frameon=False,
            pad=0,
            boxcoords="offset points",
            annotation_clip=False,
        )
        axes.add_artist(place)


def _draw_brackets(axes: Axes, numbers: np.ndarray, clusters: np.ndarray) -> None:
    """A bar in the colour of the cluster right of its leaves, with its name."""
    transform = axes.get_yaxis_transform()
    starts = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]])
    for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
        number = numbers[start]
        axes.plot(
            [1.02, 1.02],
            [10 * start + 2, 10 * stop - 2],
            color=style.color(number),
            linewidth=3,
            transform=transform,
            clip_on=False,
        )
        axes.text(
            1.035,
            5 * (start + stop),
            f"cluster {clusters[number]}",
            color=style.text_color(number),
            fontsize=style.TEXT,
            va="center",
            transform=transform,
        )
