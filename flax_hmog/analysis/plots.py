"""Figures of a fitted model. Every function returns a `matplotlib.figure.Figure` and touches no global state.

Save one with `figure.savefig(path)`, show it as the last line of a notebook cell, or give it to `write_report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_hmog.analysis import style
from flax_hmog.analysis.inputs import as_array, as_groups, as_images, as_labels, as_names, check_choice
from flax_hmog.analysis.loadings import CanonicalLoadings, canonical_loadings, discriminant_axes
from flax_hmog.inference.posterior import latent_mean, posterior_hard_assignment
from flax_hmog.model.checks import public
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.typed import Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = ("discriminant", "canonical")


@public
def plot_objective(
    histories: Mapping[str, Samples],
    *,
    step_name: str = "EM step",
    quantity: str = "Penalised log-likelihood [nats per sample]",
    title: str = "Objective",
) -> Figure:
    """An objective over EM steps or epochs, one line per history, labelled at its end with its last value.

    Args:
        histories: one history (T,), as `EMResult.objective_history`, or a mapping from names to histories. Entries that
            are not finite leave a gap.
        step_name: unit of the horizontal axis, counted from 0.
        quantity: name of the vertical axis, with its unit.
        title: title of the figure.

    Returns:
        The figure, with one axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a history that is no vector.

    Example:
        >>> figure = plot_objective({"seed 0": [-3.0, -2.0, -1.9]})
    """
    named = dict(histories) if isinstance(histories, Mapping) else {"": histories}
    figure = style.new_figure(style.WIDTH, 4.2)
    axes = figure.subplots()
    ends = []
    for index, (name, history) in enumerate(named.items()):
        history = as_labels("histories", history, shape="(T,)").astype(float)
        steps = np.arange(history.size)
        marker = style.marker(index) if history.size <= 40 else ""
        axes.plot(steps, history, color=style.color(index), linewidth=1.8, marker=marker, markersize=4)
        last = int(np.flatnonzero(np.isfinite(history))[-1]) if np.isfinite(history).any() else 0
        value = f"{history[last]:#.4g}".rstrip(".")
        ends.append((steps[last], history[last], f"{name}: {value}" if name else value, style.text_color(index)))
    style.decorate(axes, title=title, xlabel=step_name, ylabel=quantity, grid=True)
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.01)
    _label_ends(axes, ends)
    return figure


@public
def plot_latent_space(
    natural: Natural,
    x: Samples,
    *,
    axes: str = "discriminant",
    groups: Samples | None = None,
    max_points: int = 5000,
    title: str = "Latent space",
) -> Figure:
    """Posterior means E[y | x] of samples along two axes of the latent space, coloured by cluster.

    Colours repeat after 10 clusters; markers then differ, and each cluster is named at the median of its samples.

    Args:
        natural: the model.
        x: observations (N, D).
        axes: "discriminant", the two that separate the components best (`discriminant_axes`), or "canonical", the two
            that explain most variance (`canonical_loadings`).
        groups: group of each sample, by colour (N,): merged clusters or known labels, some may be missing; None for
            the most probable component.
        max_points: of more samples, this many at even intervals are drawn.
        title: title of the figure.

    Returns:
        The figure, with one axes. With one latent dimension the groups are spread over rows.

    Raises:
        ImportError: without matplotlib.
        TypeError: if `natural` is of another coordinate type or `x` holds no real numbers.
        ValueError: for other axes, or if the shapes do not match.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> figure = plot_latent_space(natural, x)
    """
    check_choice("axes", axes, AXES)
    x = as_array("x", x, 2, "(N, D)")
    groups = None if groups is None else as_groups("groups", groups, len(x))
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), max_points)).round().astype(int))
    colours = np.asarray(posterior_hard_assignment(natural, x[chosen])) if groups is None else groups[chosen]
    names, group = np.unique(colours, return_inverse=True)
    points, labels = _latent_points(natural, x[chosen], axes)
    in_rows = points.shape[1] == 1
    if in_rows:
        heights = group + np.random.default_rng(0).uniform(-0.3, 0.3, group.shape)
        points, labels = np.column_stack([points, heights]), [*labels, "Cluster" if groups is None else "Group"]
    figure = style.new_figure(style.WIDTH, 6.4)
    panel = figure.subplots()
    for index in range(len(names)):
        mine = points[group == index]
        panel.scatter(
            mine[:, 0], mine[:, 1], s=12, color=style.color(index), marker=style.marker(index), alpha=0.55, linewidths=0
        )
    shown = "" if len(chosen) == len(x) else f" ({len(chosen):,} of {len(x):,} samples)"
    style.decorate(panel, title=title + shown, xlabel=labels[0], ylabel=labels[1])
    if in_rows:
        panel.set_yticks(np.arange(len(names)), [str(name) for name in names])
    else:
        _name_groups(panel, points, group, names)
    return figure


@public
def plot_prototypes(
    prototypes: Samples,
    *,
    image_shape: tuple[int, ...] | None = None,
    names: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    title: str = "Cluster prototypes",
) -> Figure:
    """Means of the clusters as images or bars, on one common scale.

    Args:
        prototypes: (K, D), from `cluster_prototypes`.
        image_shape: (height, width) or (height, width, 3) with product D: prototypes are drawn as images. None: as rows
            of a heat map of the differences from their average.
        names: of each (K,); their numbers by default.
        feature_names: names of the D columns of the heat map.
        title: title of the figure.

    Returns:
        The figure: one axes per image, or one for the heat map; and one for the colour bar.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the shapes do not match.

    Example:
        >>> from flax_hmog.analysis import cluster_prototypes
        >>> from flax_hmog.toy import natural
        >>> figure = plot_prototypes(cluster_prototypes(natural), image_shape=(2, 2))
    """
    prototypes = as_array("prototypes", prototypes, 2, "(K, D)")
    names = as_names(names, len(prototypes))
    if image_shape is not None:
        images = as_images(prototypes, image_shape)
        return style.image_grid(images, names, title=title, label="E[x | cluster]", diverging=False)
    rows = prototypes - prototypes.mean(axis=0)
    texts = {"title": title, "xlabel": "Column", "ylabel": "Cluster", "label": "Difference from the average"}
    return style.heat_rows(rows, names, _columns(feature_names, rows), **texts)


@public
def plot_loadings(
    canonical: CanonicalLoadings,
    *,
    image_shape: tuple[int, ...] | None = None,
    max_axes: int = 20,
    feature_names: Sequence[str] | None = None,
    title: str = "Canonical loadings",
) -> Figure:
    """Change of x per standard deviation of each canonical axis, with the share of variance it explains.

    Args:
        canonical: from `canonical_loadings`.
        image_shape: (height, width) with product D: loadings are drawn as images. None: as rows of a heat map.
        max_axes: largest number of axes drawn.
        feature_names: names of the D columns of the heat map.
        title: title of the figure.

    Returns:
        The figure: one axes per image, or one for the heat map; and one for the colour bar.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the shapes do not match.

    Example:
        >>> from flax_hmog.analysis import canonical_loadings
        >>> from flax_hmog.toy import natural
        >>> figure = plot_loadings(canonical_loadings(natural))
    """
    rows = canonical.loadings.T[:max_axes]
    names = [f"{axis + 1} ({100 * share:.2g} %)" for axis, share in enumerate(canonical.variance_shares[: len(rows)])]
    label = "Change of x per sd"
    if image_shape is not None:
        images = as_images(rows, image_shape[:2])
        return style.image_grid(images, names, title=title, label=label, diverging=True)
    texts = {"title": title, "xlabel": "Column", "ylabel": "Axis (share of variance)", "label": label}
    return style.heat_rows(rows, names, _columns(feature_names, rows), **texts)


def _columns(feature_names: Sequence[str] | None, rows: np.ndarray) -> list[str] | None:
    """Names of the columns (D,), or none."""
    if feature_names is None:
        return None
    return as_names(feature_names, rows.shape[1], argument="feature_names")


def _latent_points(natural: Natural, x: np.ndarray, axes: str) -> tuple[np.ndarray, list[str]]:
    """Posterior means (N, 1 or 2) along the first axes, and what these are."""
    n_axes = min(2, natural.interaction.shape[1])
    y = np.asarray(latent_mean(natural, x))
    if axes == "discriminant":
        names = [f"Discriminant axis {axis + 1} [sd within components]" for axis in range(n_axes)]
        return discriminant_axes(natural, n_axes).project(y), names
    canonical = canonical_loadings(natural)
    names = [
        f"Canonical axis {axis + 1} [sd], {100 * canonical.variance_shares[axis]:.2g} % of variance"
        for axis in range(n_axes)
    ]
    return canonical.axes.project(y)[:, :n_axes], names


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Text for each line right of the longest one, at the height of its end, moved apart where lines end together."""
    low, high = axes.get_ylim()
    ends = sorted((end for end in ends if np.isfinite(end[1])), key=lambda end: end[1])
    gap = 0.055 * (high - low)
    heights = np.array([end[1] for end in ends])
    for index in range(1, len(ends)):  # up from the lowest
        heights[index] = max(heights[index], heights[index - 1] + gap)
    for index in reversed(range(len(ends))):  # and back down from the top
        heights[index] = min(heights[index], high - gap * (len(ends) - 1 - index))
    for height, (_, _, text, colour) in zip(heights, ends, strict=True):
        axes.annotate(
            text,
            (max(end[0] for end in ends), height),
            (8, 0),
            xycoords="data",
            textcoords="offset points",
            color=colour,
            fontsize=style.TEXT,
            va="center",
            annotation_clip=False,
        )


def _name_groups(axes: Axes, points: np.ndarray, group: np.ndarray, names: np.ndarray) -> None:
    """The name of each group near the median of its points."""
    medians = np.array([np.median(points[group == index], axis=0) for index in range(len(names))])
    extent = np.ptp(points, axis=0) + 1e-12  # one sample has no extent
    positions = style.spread(medians, 0.035 * extent[0], 0.045 * extent[1])
    for index, (name, position) in enumerate(zip(names, positions, strict=True)):
        style.outlined(axes, position, str(name), color=style.text_color(index))
