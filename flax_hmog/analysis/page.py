"""Sections of a report on one model: what `Portrait` holds, beside what follows from the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flax_hmog.analysis import style
from flax_hmog.analysis.clusters import cluster_hierarchy, cluster_prototypes
from flax_hmog.analysis.elements import Cell, Gallery, Map, Picture, Section, Table, format_cell
from flax_hmog.analysis.inputs import geometry
from flax_hmog.analysis.loadings import CanonicalLoadings, canonical_loadings, discriminant_axes
from flax_hmog.analysis.merging import information_hierarchy
from flax_hmog.analysis.pictures import LARGEST, as_bytes, diverging
from flax_hmog.analysis.plots import plot_loadings
from flax_hmog.analysis.portrait import BINS, LOWEST, Portrait
from flax_hmog.analysis.relations import plot_dendrogram
from flax_hmog.model.coordinates import Natural

MOST_AXES = 5  # of each kind that a map offers
MOST_FEATURES = 4  # that a cluster is described by
LEAST_DISTANCE = 0.5  # standard deviations from the average of all rows, of such a feature
MOST_COLUMNS = 60  # of a heat map
MOST_PAIRS = 30  # of clusters that share rows
LARGEST_PROTOTYPE = 64  # pixels
LARGEST_GAP = 3  # standard deviations, beyond which a heat map does not grow darker
CERTAIN = (0.5, 0.9)
CERTAINTIES = "probability below .5", "from .5 to .9", "above .9"


def model_sections(
    portrait: Portrait,
    natural: Natural,
    *,
    input_names: tuple[str, ...] | None = None,
    image_shape: tuple[int, ...] | None = None,
    has_encoder: bool = False,
) -> Iterator[Section]:
    """The sections on a model and its clusters, the clusters first.

    Args:
        portrait: of rows.
        natural: the model.
        input_names: of its inputs (D,), where they are columns of the data.
        image_shape: of its inputs, where they are images.
        has_encoder: True for a model of features, whose loadings say nothing of columns.
    """
    yield clusters_section(portrait)
    yield map_section(portrait, natural)
    yield uncertainty_section(portrait)
    if portrait.counts.size:
        yield labels_section(portrait)
    if len(portrait.clusters) > 1:
        yield tree_section(portrait, natural, image_shape)
    if not has_encoder:
        yield prototypes_section(portrait, natural, input_names, image_shape)
        yield loadings_section(natural, input_names, image_shape)


# Clusters


def clusters_section(portrait: Portrait) -> Section:
    """A table of the clusters, and one of their members."""
    about, is_image = portrait.about, portrait.pictures is not None
    order = np.argsort(-portrait.cluster_rows, kind="stable").tolist()
    features = distinguishing_features(portrait)
    rows = []
    for c in order:
        row: dict[str, Any] = {
            "cluster": Cell(c, group=c),
            "rows": int(portrait.cluster_rows[c]),
            "share [%]": 100 * float(portrait.cluster_rows[c]) / about["rows"],
            "certainty": _number(portrait.cluster_certainty[c]),
        }
        if is_image:
            row["mean"] = Cell("", pictures=[len(portrait.row) + c])
        else:
            row["distinguished by"] = features[c]
        for kind in ("typical", "doubtful", "atypical"):
            places = getattr(portrait, kind)[c]
            places = places[places >= 0]
            row[kind] = Cell(", ".join(portrait.names[places]), pictures=places.tolist() if is_image else ())
        if portrait.is_merged:
            row["components"] = ", ".join(map(str, np.flatnonzero(portrait.clusters == c)))
        rows.append(row)
    unit = (
        ""
        if is_image
        else " What distinguishes a cluster: the mean of a column over its rows, in the units that came in, and in "
        "brackets how far it is from the mean of all rows, in standard deviations of the column."
    )
    merged = ", each of one or several components of the mixture" if portrait.is_merged else ""
    column = about.get("identifier")
    named = f"named by {column!r} of the source" if column else "numbers of rows, counted from 0 in the source"
    text = (
        f"{len(order)} clusters{merged}, over {_rows(portrait)}. Certainty is the mean probability of a cluster over "
        f"its rows.{unit}"
        f"\n\nMembers are {named}: typical ones have the highest density, of each "
        "component in turn; doubtful ones the least probability of their cluster; atypical ones the lowest density. "
        "The button in front of a cluster dims everything else on this page."
    )
    return Section("Clusters", text, tables=[Table(rows, "Clusters by size"), _members_table(portrait, order)])


def page_images(portrait: Portrait, image_shape: tuple[int, ...] | None) -> np.ndarray | None:
    """Images of the page (M + C, ...): the rows of the sample, then the means of the clusters; None without images."""
    if portrait.pictures is None or image_shape is None:
        return None
    means = np.where(np.isnan(portrait.cluster_means), portrait.column_means, portrait.cluster_means)
    return np.concatenate([portrait.pictures, as_bytes(means, image_shape, LARGEST)])


def _members_table(portrait: Portrait, order: list[int]) -> Table:
    rows = []
    for c in order:
        for kind in ("typical", "doubtful", "atypical"):
            for place in getattr(portrait, kind)[c]:
                if place >= 0:
                    rows.append({"cluster": Cell(c, group=c), "member": kind} | row_details(portrait, int(place)))
    return Table(rows, "Members, row by row", folded=True)


def row_details(portrait: Portrait, place: int) -> dict[str, Any]:
    """The line of a row of the sample."""
    is_single = len(portrait.cluster_rows) == 1
    details: dict[str, Any] = {} if portrait.identifiers is None else {"identifier": str(portrait.names[place])}
    details |= {
        "row": int(portrait.row[place]),
        "probability": float(portrait.probability[place]),
        "next cluster": None if is_single else int(portrait.second[place]),
        "log p(x) [nats]": float(portrait.log_density[place]),
    }
    names = portrait.about["labels"]
    if names:
        details["label"] = names[portrait.label[place]] if portrait.label[place] >= 0 else None
    if portrait.pictures is None:
        details["farthest from average"] = unusual_columns(portrait, place)
    return details


def unusual_columns(portrait: Portrait, place: int) -> str:
    """The columns in which a row is farthest from the average, with its values."""
    pairs = zip(portrait.columns[place], portrait.values[place], strict=True)
    return ", ".join(_unbroken(f"{_column(portrait, d)} = {value:.4g}") for d, value in pairs if np.isfinite(value))


def distinguishing_features(portrait: Portrait) -> list[str]:
    """For each cluster the columns whose mean is farthest from that of all rows, in the units of the data."""
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = (portrait.cluster_means - portrait.column_means) / portrait.column_sds
    described = []
    for means, distance in zip(portrait.cluster_means, np.nan_to_num(distances, posinf=0.0, neginf=0.0), strict=True):
        columns = np.argsort(-np.abs(distance), kind="stable")[:MOST_FEATURES]
        parts = [
            _unbroken(f"{_column(portrait, d)} = {means[d]:.4g} ({distance[d]:+.1f})")
            for d in columns
            if abs(distance[d]) > LEAST_DISTANCE
        ]
        described.append(", ".join(parts))
    return described


def _unbroken(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _column(portrait: Portrait, d: int) -> str:
    names = portrait.about["columns"]
    return str(names[d]) if names else f"column {d}"


def _rows(portrait: Portrait) -> str:
    rows, of = portrait.about["rows"], portrait.about["of"]
    return f"{rows:,} rows" if rows == of else f"{rows:,} rows at even intervals of {of:,}"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# Map and uncertainty


def map_section(portrait: Portrait, natural: Natural) -> Section:
    """Rows along axes of the latent space."""
    shown = np.flatnonzero(portrait.even)
    latent = portrait.latent[shown]
    n_axes = min(MOST_AXES, latent.shape[1])
    coordinates = discriminant_axes(natural, n_axes).project(latent)
    canonical = canonical_loadings(natural)
    explained = canonical.axes.project(latent)
    axes = {f"Discriminant axis {a + 1} [sd within components]": coordinates[:, a] for a in range(n_axes)}
    names = _axis_names(canonical, n_axes)
    axes |= {f"Canonical axis {name} [sd]": explained[:, a] for a, name in enumerate(names)}
    axes["log p(x) [nats]"] = portrait.log_density[shown]
    if n_axes == 1:
        axes = dict(sorted(axes.items(), key=lambda axis: axis[0].startswith("Canonical")))
    details: dict[str, list[Any]] = {}
    for place in shown.tolist():
        found = {"cluster": int(portrait.cluster[place])} | row_details(portrait, place)
        for name, value in found.items():
            details.setdefault(name, []).append("" if value is None else _short(value))
    certainty = np.digitize(portrait.probability[shown], CERTAIN)
    colors: dict[str, Any] = {"certainty": (certainty, CERTAINTIES)}
    if portrait.about["labels"]:
        colors = {"label": (portrait.label[shown], portrait.about["labels"])} | colors
    left_out = "" if len(shown) == portrait.about["rows"] else f" {len(shown):,} rows are shown, at even intervals."
    caption = (
        "Posterior means E[y | x] of rows. Discriminant axes separate the clusters best, canonical ones explain most "
        f"variance.{left_out} The pointer shows a row, a click chooses its cluster."
    )
    alt = f"Scatter plot of {len(shown):,} rows in the latent space, by cluster."
    pictures = None if portrait.pictures is None else shown
    return Section("Map", maps=[Map(axes, portrait.cluster[shown], details, caption, alt, colors, pictures)])


def _axis_names(canonical: CanonicalLoadings, count: int) -> list[str]:
    return [f"{a + 1}, {100 * share:.2g} % of variance" for a, share in enumerate(canonical.variance_shares[:count])]


def _short(value: Any) -> Any:
    return format_cell(value) if isinstance(value, float) else value


def uncertainty_section(portrait: Portrait) -> Section:
    """The certainty of assignments, clusters that share rows, and rows that the model holds for least probable."""
    figure = style.new_figure(style.WIDTH, 3.2)
    axes = figure.subplots()
    edges = np.linspace(0, 1, BINS + 1)
    axes.bar(edges[:-1], portrait.certainty, width=0.9 / BINS, align="edge", color=style.color(4))
    axes.set_yscale("log")
    axes.set_ylim(0.5, None)
    axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    style.decorate(axes, xlabel="Probability of the row's cluster", ylabel="Rows, logarithmic", grid=True)
    axes.set_xlim(max(0.0, edges[np.flatnonzero(portrait.certainty)[0]] - 0.05), 1)
    total = portrait.certainty.sum()
    doubtful = int(portrait.certainty[: round(CERTAIN[1] * BINS)].sum())
    text = f"{doubtful:,} of {total:,} rows ({100 * doubtful / total:.3g} %) have a cluster of probability below .9."
    pairs = shared_pairs(portrait)
    tables = [Table(pairs, "Clusters that share rows: the expected number of rows that, drawn twice from their "
                           "probabilities, fall once into each")] if pairs else []  # fmt: skip
    lowest = np.argsort(portrait.log_density, kind="stable")[:LOWEST].tolist()
    rows = [{"cluster": Cell(int(portrait.cluster[p]), group=int(portrait.cluster[p]))} |
            row_details(portrait, p) for p in lowest]  # fmt: skip
    if portrait.pictures is not None:
        for row, place in zip(rows, lowest, strict=True):
            row["row"] = Cell(int(portrait.row[place]), pictures=[place])
    tables.append(Table(rows, f"The {len(rows)} rows of lowest density"))
    alt = f"Histogram of the probability of the cluster over {total:,} rows; {doubtful:,} of them are below .9"
    return Section("Uncertainty", text, tables=tables, pictures=[Picture(figure, "Certainty of the assignments", alt)])


def shared_pairs(portrait: Portrait) -> list[dict[str, Any]]:
    """Pairs of clusters by the rows that they share, the most first."""
    shared = np.triu(2 * portrait.shared, 1)
    order = np.argsort(-shared, axis=None, kind="stable")[:MOST_PAIRS]
    rows = []
    for a, b in zip(*np.unravel_index(order, shared.shape), strict=True):
        if shared[a, b] < 0.05:
            break
        of = 100 * shared[a, b] / max(min(portrait.cluster_rows[a], portrait.cluster_rows[b]), 1)
        rows.append({"cluster": Cell(int(a), group=int(a)), "and": int(b), "rows shared": float(shared[a, b]),
                     "share of the smaller [%]": float(of)})  # fmt: skip
    return rows


def labels_section(portrait: Portrait) -> Section:
    """Counts of labels in each cluster."""
    names, counts = portrait.about["labels"], portrait.counts
    order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1))).tolist()
    rows = []
    for c in order:
        total = max(int(counts[c].sum()), 1)
        cells = {name: Cell(int(n), shade=n / total) for name, n in zip(names, counts[c], strict=True)}
        rows.append({"cluster": Cell(c, group=c)} | {f"{name}": cell for name, cell in cells.items()})
    known = int(counts.sum())
    some = "" if known == portrait.about["rows"] else f" {known:,} of the {portrait.about['rows']:,} rows have a label."
    text = f"Labels played no part in the fit; they only stand beside it here.{some}"
    return Section("Beside the labels", text, tables=[Table(rows, "Rows by cluster and label")])


# The tree, prototypes and loadings


def tree_section(portrait: Portrait, natural: Natural, image_shape: tuple[int, ...] | None) -> Section:
    """The tree that made the clusters; without a merge, how far components are from each other."""
    labels = portrait.clusters
    images: dict[str, Any] = {}
    if image_shape is not None and len(portrait.clusters) <= 60:
        images = {"prototypes": cluster_prototypes(natural), "image_shape": image_shape}
    if portrait.is_merged:
        linkage, name = information_hierarchy(portrait.affinity, labels=labels), "Information lost so far [nats]"
        text = (
            "The components were merged so that the clusters keep the most information about each other: two "
            "components are neighbours where rows have one as their first choice and the other as their second. The "
            "tree merges the pair that loses least, first within the clusters and then these; colours and names at the "
            "right are those of the clusters."
        )
        caption = "Hierarchy of the merges"
    else:
        linkage, name = cluster_hierarchy(natural), "Bhattacharyya distance [nats]"
        text = "Every component is a cluster. The tree joins components that overlap (average linkage)."
        caption = "Hierarchy of the clusters"
    figure = plot_dendrogram(
        linkage, labels=labels if portrait.is_merged else None, distance_name=name, title="", **images
    )
    alt = f"Tree of the {len(labels)} components, which stand below each other as leaves; {len(linkage)} merges"
    return Section("How the clusters relate", text, pictures=[Picture(figure, caption, alt)])


def prototypes_section(
    portrait: Portrait, natural: Natural, names: tuple[str, ...] | None, image_shape: tuple[int, ...] | None
) -> Section:
    """Means of all components, as images or beside their average."""
    prototypes, clusters = cluster_prototypes(natural), portrait.clusters
    order = np.lexsort((np.arange(len(clusters)), clusters)).tolist()
    text = "The mean E[x | z] of every component of the mixture, in the space of the model's inputs."
    if image_shape is not None:
        images = as_bytes(prototypes[order], image_shape, LARGEST_PROTOTYPE)
        share = [f"{k} ({portrait.component_rows[k]:,})" for k in order]
        caption = "Components, by cluster; in brackets the rows of which they are the most probable"
        gallery = Gallery(images, share, caption, groups=[int(clusters[k]) for k in order])
        return Section("Prototypes", text, galleries=[gallery])
    share = portrait.component_rows / portrait.component_rows.sum()
    gaps = prototypes - share @ prototypes
    spread = np.sqrt(share @ gaps**2)
    noise = np.sqrt(geometry(natural).noise_variances)
    columns = np.sort(np.argsort(-spread / noise, kind="stable")[:MOST_COLUMNS])
    shown = "" if len(columns) == len(spread) else f" The {len(columns)} columns that differ most are shown."
    rows = np.clip(gaps / np.where(spread > 0, spread, 1), -LARGEST_GAP, LARGEST_GAP)[order][:, columns]
    called = [f"{k} in {clusters[k]}" if portrait.is_merged else str(k) for k in order]
    texts = {"title": "", "xlabel": "Column", "ylabel": "Component", "label": "Difference from the average"}
    figure = style.heat_rows(rows, called, [_named(names, d) for d in columns], **texts)
    alt = f"Heat map of {len(order)} components by {len(columns)} columns"
    caption = (
        "Differences of the components from the average row, in each column divided by their standard deviation over "
        f"rows; cut at {LARGEST_GAP}"
    )
    return Section("Prototypes", text + shown, pictures=[Picture(figure, caption, alt)])


def loadings_section(natural: Natural, names: tuple[str, ...] | None, image_shape: tuple[int, ...] | None) -> Section:
    """Canonical axes by the columns that load on them."""
    canonical = canonical_loadings(natural)
    text = (
        "Change of x per standard deviation of each canonical axis: factors in the one rotation in which they are "
        "uncorrelated and orthogonal, by the variance that they explain."
    )
    if image_shape is not None and len(image_shape) == 2:
        count = min(20, len(canonical.variance_shares))
        rows = canonical.loadings.T[:count].reshape(count, *image_shape)
        gallery = Gallery(diverging(rows), _axis_names(canonical, count), "Loadings: red is more, blue is less")
        return Section("Loadings", text, galleries=[gallery])
    noise = geometry(natural).noise_variances
    standardized = canonical.loadings / np.sqrt(np.sum(canonical.loadings**2, axis=1) + noise)[:, None]
    table = []
    for axis, share in enumerate(canonical.variance_shares):
        row: dict[str, Any] = {"axis": axis + 1, "share of variance [%]": 100 * float(share)}
        for sign, kind in ((1, "more of"), (-1, "less of")):
            loads = sign * standardized[:, axis]
            largest = [d for d in np.argsort(-loads, kind="stable")[:MOST_FEATURES] if loads[d] > 0]
            parts = [f"{_named(names, d)} {canonical.loadings[d, axis]:+.3g} ({sign * loads[d]:+.2f})" for d in largest]
            row[kind] = ", ".join(map(_unbroken, parts))
        table.append(row)
    text += " In brackets the same in standard deviations of the column, by which columns are chosen."
    tables = [Table(table, "Columns that load most on each axis")]
    if len(standardized) > MOST_COLUMNS:
        return Section("Loadings", text, tables=tables)
    called = [_named(names, d) for d in range(len(standardized))]
    figure = plot_loadings(dataclasses.replace(canonical, loadings=standardized), feature_names=called, title="")
    alt = f"Heat map of the loadings of {len(called)} columns on {len(table)} axes"
    caption = "Loadings in standard deviations of the columns"
    return Section("Loadings", text, tables=tables, pictures=[Picture(figure, caption, alt)])


def selection_section(rows: Sequence[Any], recommended: int, reasons: Sequence[str]) -> Section:
    """The settings that were compared, and the recommended one.

    Args:
        rows: scores of each, a dataclass or a mapping; what is a sequence or empty in all of them is left out.
        recommended: number of the recommended one.
        reasons: sentences.
    """
    given = [dict(row) if isinstance(row, Mapping) else dataclasses.asdict(row) for row in rows]
    names = [name for name in given[0] if any(isinstance(row[name], str | int | float) for row in given)]
    table = [
        {"recommended": "yes" if number == recommended else "", **{name.replace("_", " "): row[name] for name in names}}
        for number, row in enumerate(given)
    ]
    return Section("Selection", " ".join(reasons), tables=[Table(table, "Settings that were compared")])


def _named(names: tuple[str, ...] | None, d: int) -> str:
    return f"column {d}" if names is None else names[d]
