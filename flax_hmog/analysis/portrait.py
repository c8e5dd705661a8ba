"""Clusters as the rows show them: sizes, members and a sample, small enough to be kept beside the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from flax_hmog.analysis.affinity import component_affinity
from flax_hmog.analysis.clusters import as_membership
from flax_hmog.analysis.pictures import LARGEST, as_bytes
from flax_hmog.data.labels import is_known
from flax_hmog.data.tables import Identifier

BLOCK_ROWS, BLOCK_ENTRIES = 4096, 2**22  # that are read at once, at most
MOST_ROWS = 100_000  # that are looked at, at even intervals of more
SAMPLED = 3000  # of them that are kept one by one, beside the members of clusters
MEMBERS = {"typical": 6, "doubtful": 3, "atypical": 3}  # of each cluster
COLUMNS_KEPT = 4  # of a sampled row: those that are farthest from the average
BINS = 20  # of the certainty
SMALL_SHARE = 0.05  # of a cluster's rows, below which a component is not typical of it
LOWEST = 20  # rows of lowest density
LONGEST = 60  # characters of an identifier
OPTIONAL = ("pictures", "identifiers")
CAPPING_ROWS = (
    2048  # whose quantiles of 1 and 99 % bound a column: values beyond by more than their distance are capped
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """Rows, and the model that explains them.

    Attributes:
        infer: `HMoGOutput` of the components for raw rows (B, D), as arrays of numpy.
        read: raw rows (B, D), dense, by their numbers from 0 to N - 1; NaN where an entry is missing.
        numbers: number of each row in its source (N,).
        clusters: cluster of each component (K,).
        labels: known labels as text (N,), "" where there is none; None without labels.
        identifier: name and values (N,) of what names the rows; None for their numbers.
        fitted: True for the rows that the model was fitted to (N,); None for all.
        column_names: (D,), or None.
        image_shape: of a row, where rows are images.
    """

    infer: Callable[[np.ndarray], Any]
    read: Callable[[np.ndarray], np.ndarray]
    numbers: np.ndarray
    clusters: np.ndarray
    labels: np.ndarray | None = None
    identifier: Identifier | None = None
    fitted: np.ndarray | None = None
    column_names: tuple[str, ...] | None = None
    image_shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Portrait:
    """The picture that rows give of K components in C clusters.

    Rows of the sample (M,) are members of clusters and an even choice.

    Attributes:
        about: "rows", how many were looked at, "of", out of how many, and "labels", "columns" and "identifier", their
            names or None.
        clusters: cluster of each component (K,).
        cluster_rows: number of rows in each cluster (C,).
        component_rows: number of rows of which a component is the most probable (K,).
        cluster_certainty: mean probability of the cluster over its rows (C,); NaN without rows.
        component_certainty: the same of components (K,).
        cluster_means: mean of the raw columns over the rows of a cluster (C, D).
        column_means: over all rows (D,), wild values capped.
        column_sds: standard deviations of the raw columns (D,), wild values capped.
        certainty: rows by the probability of their cluster (BINS,).
        shared: sum of p(i | x) p(j | x) over rows (C, C).
        affinity: of `component_affinity` over the rows of the fit (K, K).
        counts: rows by cluster and label (C, labels), no columns without labels.
        typical: places in the sample of rows with the highest density, of the cluster's components in turn (C, 6); -1
            for none.
        doubtful: of rows whose cluster is least probable (C, 3).
        atypical: of rows with the lowest density (C, 3).
        row: number of a row in its source (M,).
        even: True for the rows that are an even choice of all (M,).
        cluster: of a row (M,).
        component: of a row (M,).
        probability: of its cluster (M,).
        second: the cluster that is next probable (M,).
        log_density: log p(x) in nats (M,).
        latent: E[y | x] (M, L).
        label: number of its label (M,), -1 for none.
        columns: numbers of the columns in which a row is farthest from the average (M, 4); none for images.
        values: of these columns (M, 4).
        pictures: rows as pictures (M, h, w) or (M, h, w, 3), uint8; None unless they are images.
        identifiers: of the rows, as text (M,); None where their numbers name them.
    """

    about: dict[str, Any]
    clusters: np.ndarray
    cluster_rows: np.ndarray
    component_rows: np.ndarray
    cluster_certainty: np.ndarray
    component_certainty: np.ndarray
    cluster_means: np.ndarray
    column_means: np.ndarray
    column_sds: np.ndarray
    certainty: np.ndarray
    shared: np.ndarray
    affinity: np.ndarray
    counts: np.ndarray
    typical: np.ndarray
    doubtful: np.ndarray
    atypical: np.ndarray
    row: np.ndarray
    even: np.ndarray
    cluster: np.ndarray
    component: np.ndarray
    probability: np.ndarray
    second: np.ndarray
    log_density: np.ndarray
    latent: np.ndarray
    label: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    pictures: np.ndarray | None
    identifiers: np.ndarray | None = None

    @property
    def is_merged(self) -> bool:
        """True if any cluster has several components."""
        return len(self.cluster_rows) < len(self.clusters)

    @property
    def names(self) -> np.ndarray:
        """Identifiers of rows, or their numbers, as text (M,)."""
        return self.row.astype(str) if self.identifiers is None else self.identifiers

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by name, as `from_arrays` takes them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["about"] = np.array(json.dumps(self.about))
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Portrait:
        """The portrait of these arrays."""
        names = [field.name for field in dataclasses.fields(cls)]
        fields: dict[str, Any] = {name: arrays[name] for name in names if name not in ("about", *OPTIONAL)}
        fields |= {name: arrays.get(name) for name in OPTIONAL}
        return cls(about=json.loads(str(arrays["about"])), **fields)


def portray(subject: Subject) -> Portrait:
    """Look at the rows of a subject: all of them, or MOST_ROWS at even intervals, and once more at a sample."""
    rows = _evenly(len(subject.numbers), MOST_ROWS)
    sums, each = _Sums(subject), dict[str, list[np.ndarray]]()
    for numbers in _blocks(rows, sums.width):
        for name, values in sums.add(numbers, subject.read(numbers)).items():
            each.setdefault(name, []).append(values)
    seen = {name: np.concatenate(parts) for name, parts in each.items()}
    members = _members(seen, sums.component_rows, sums.cluster_rows)
    even = _evenly(len(rows), SAMPLED)
    lowest = np.argsort(seen["log_density"], kind="stable")[:LOWEST]
    chosen = np.unique(np.concatenate([even, lowest, *(places[places >= 0] for places in members.values())]))
    place = np.full(len(rows) + 1, -1)  # so that -1 stays
    place[chosen] = np.arange(len(chosen))
    names, label, counts = _labels(subject, rows, seen["cluster"], len(sums.cluster_rows))
    sample = {name: values[chosen] for name, values in seen.items()}
    named = None if subject.column_names is None else list(subject.column_names)
    identifier, identifiers = None, None
    if subject.identifier is not None:
        identifier, values = subject.identifier
        identifiers = np.array([str(value)[:LONGEST] for value in values[rows[chosen]]])
    return Portrait(
        about={
            "rows": len(rows),
            "of": len(subject.numbers),
            "labels": names,
            "columns": named,
            "identifier": identifier,
        },
        clusters=np.asarray(subject.clusters),
        counts=counts,
        row=np.asarray(subject.numbers)[rows[chosen]],
        even=np.isin(chosen, even),
        label=label[chosen],
        identifiers=identifiers,
        **{kind: place[places] for kind, places in members.items()},
        **sample,
        **sums.results(),
        **_details(subject, rows[chosen], sums),
    )


def _evenly(count: int, most: int) -> np.ndarray:
    """At most so many of `count` numbers, at even intervals."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _blocks(rows: np.ndarray, width: int) -> Iterator[np.ndarray]:
    size = min(BLOCK_ROWS, max(BLOCK_ENTRIES // width, 1))
    yield from (rows[start : start + size] for start in range(0, len(rows), size))


class _Sums:
    """Sums over blocks of rows."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.membership = subject, as_membership(subject.clusters, len(subject.clusters))
        n_components, n_clusters = self.membership.shape
        self.cluster_rows, self.component_rows = np.zeros(n_clusters, int), np.zeros(n_components, int)
        self.cluster_sum, self.component_sum = np.zeros(n_clusters), np.zeros(n_components)
        self.certainty, self.shared = np.zeros(BINS, int), np.zeros((n_clusters, n_clusters))
        self.affinity = np.zeros((n_components, n_components))
        self.low, self.high = _caps(subject)
        self.width = len(self.low)
        self.origin: Any = None  # about which squares are taken
        self.total: Any = 0.0
        self.known: Any = 0.0
        self.capped: Any = 0.0
        self.squares: Any = 0.0

    def add(self, numbers: np.ndarray, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Take note of a block; returns what there is to say of each of its rows."""
        output = self.subject.infer(raw)
        log_r = np.asarray(output.log_responsibilities, np.float64)
        r = np.exp(log_r)
        p = r @ self.membership
        cluster, component, each = p.argmax(axis=1), r.argmax(axis=1), np.arange(len(r))
        probability = np.minimum(p[each, cluster], 1)
        self.cluster_rows += np.bincount(cluster, minlength=p.shape[1])
        self.component_rows += np.bincount(component, minlength=r.shape[1])
        self.cluster_sum += np.bincount(cluster, probability, p.shape[1])
        self.component_sum += np.bincount(component, r[each, component], r.shape[1])
        self.certainty += np.histogram(probability, BINS, (0, 1))[0]
        self.shared += p.T @ p
        fitted = slice(None) if self.subject.fitted is None else self.subject.fitted[numbers]
        if r.shape[1] > 1 and len(log_r[fitted]):
            self.affinity += component_affinity(log_r[fitted])
        self._add_columns(cluster, np.asarray(raw, np.float64))
        p[each, cluster] = -1
        return {
            "cluster": cluster,
            "component": component,
            "probability": probability,
            "second": p.argmax(axis=1),
            "log_density": np.asarray(output.log_density, np.float64),
        }

    def _add_columns(self, cluster: np.ndarray, raw: np.ndarray) -> None:
        """Sums of the columns that are there, by cluster."""
        if self.origin is None:
            self.origin = np.clip(np.nan_to_num(raw[0]), self.low, self.high)
        known = ~np.isnan(raw)
        mine = np.eye(len(self.cluster_rows))[cluster].T
        self.total = self.total + mine @ np.where(known, raw - self.origin, 0)
        self.known = self.known + mine @ known
        gap = np.where(known, np.clip(raw, self.low, self.high) - self.origin, 0)
        self.capped, self.squares = self.capped + gap.sum(axis=0), self.squares + np.sum(gap**2, axis=0)

    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations (D,), wild values capped."""
        count = np.maximum(self.known.sum(axis=0), 1)
        mean = self.capped / count
        return self.origin + mean, np.sqrt(np.maximum(self.squares / count - mean**2, 0))

    def results(self) -> dict[str, np.ndarray]:
        """Those attributes of a portrait that are sums."""
        means, sds = self.columns()
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "cluster_rows": self.cluster_rows,
                "component_rows": self.component_rows,
                "cluster_certainty": self.cluster_sum / self.cluster_rows,
                "component_certainty": self.component_sum / self.component_rows,
                "cluster_means": self.origin + self.total / self.known,
                "column_means": means,
                "column_sds": sds,
                "certainty": self.certainty,
                "shared": self.shared,
                "affinity": self.affinity,
            }


def _caps(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (D,) that values keep unless they are wild; none for images and for columns of nearly always one value."""
    width = subject.read(np.arange(1)).shape[1]
    most = min(CAPPING_ROWS, max(BLOCK_ENTRIES // width, 100))
    raw = np.asarray(subject.read(_evenly(len(subject.numbers), most)), np.float64)
    known = np.where(np.isnan(raw).all(axis=0), 0, raw)
    low, high = (np.nanquantile if np.isnan(known).any() else np.quantile)(known, [0.01, 0.99], axis=0)
    room = np.where((high > low) & (subject.image_shape is None), high - low, np.inf)
    return low - room, high + room


def _members(
    seen: Mapping[str, np.ndarray], component_rows: np.ndarray, cluster_rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Places of the rows that show each cluster, by kind (C, count); -1 for none."""
    density, component, cluster = seen["log_density"], seen["component"], seen["cluster"]
    order = np.lexsort((-density, component))  # of each component the rows with the highest density come first
    starts = np.flatnonzero(np.r_[True, np.diff(component[order]) > 0])
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    is_small = component_rows[component] < SMALL_SHARE * cluster_rows[cluster]
    orders = {
        "typical": np.lexsort((-component_rows[component], rank, is_small)),
        "doubtful": np.argsort(seen["probability"], kind="stable"),
        "atypical": np.argsort(density, kind="stable"),
    }
    members = {}
    for kind, count in MEMBERS.items():
        found = np.full((len(cluster_rows), count), -1)
        by_cluster = orders[kind][np.argsort(cluster[orders[kind]], kind="stable")]
        for number in range(len(cluster_rows)):
            first = np.searchsorted(cluster[by_cluster], number)
            mine = by_cluster[first : first + count]
            mine = mine[cluster[mine] == number]
            found[number, : len(mine)] = mine
        members[kind] = found
    return members


def _labels(
    subject: Subject, rows: np.ndarray, cluster: np.ndarray, n_clusters: int
) -> tuple[list[str] | None, np.ndarray, np.ndarray]:
    """Names of the labels that occur, the number of each row's (N,), and counts by cluster and label (C, labels)."""
    if subject.labels is None:
        return None, np.full(len(rows), -1), np.zeros((n_clusters, 0), int)
    labels = subject.labels[rows]
    known = is_known(labels)
    names = sorted(set(labels[known].tolist()), key=lambda name: (len(name), name) if name.isdigit() else (99, name))
    number = {name: place for place, name in enumerate(names)}
    label = np.array([number.get(name, -1) for name in labels.tolist()])
    counts = np.bincount(cluster[known] * len(names) + label[known], minlength=n_clusters * len(names))
    return names, label, counts.reshape(n_clusters, len(names))


def _details(subject: Subject, rows: np.ndarray, sums: _Sums) -> dict[str, Any]:
    """Latent means of the sample, and its rows as pictures or by their most unusual columns."""
    means, sds = sums.columns()
    latent, columns, values, pictures = [], [], [], []
    for numbers in _blocks(rows, sums.width):
        raw = np.asarray(subject.read(numbers), np.float64)
        latent.append(np.asarray(subject.infer(subject.read(numbers)).latent_mean, np.float32))
        if subject.image_shape is not None:
            pictures.append(raw.astype(np.float32))
            continue
        gaps = np.nan_to_num(np.abs(raw - means) / np.where(sds > 0, sds, np.inf), nan=-1.0)
        columns.append(np.argsort(-gaps, axis=1, kind="stable")[:, :COLUMNS_KEPT])
        values.append(np.take_along_axis(raw, columns[-1], axis=1))
    none: list[Any] = [np.zeros((0, COLUMNS_KEPT))]
    return {
        "latent": np.concatenate(latent),
        "columns": np.concatenate(columns or none).astype(np.int32),
        "values": np.concatenate(values or none),
        "pictures": as_bytes(np.concatenate(pictures), cast(Any, subject.image_shape), LARGEST) if pictures else None,
    }
