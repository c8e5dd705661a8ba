"""A fitted `HMoG` as a short table, and as what a file of `flax_hmog.save` holds beside the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from flax_hmog.analysis.criteria import InformationCriteria
from flax_hmog.em.options import PseudoCounts
from flax_hmog.model_file import load
from flax_hmog.sklearn.background import Background
from flax_hmog.sklearn.outliers import DRAWS

MOST_COLUMNS = 3  # that a cluster is described by
LEAST_DISTANCE = 0.5  # standard deviations from the mean of all rows, of such a column
ROWS_SHOWN = 30


@dataclasses.dataclass(frozen=True)
class Summary:
    """A fit as a table, printed or in rows.

    Attributes:
        heading: the model and its criteria, one line each.
        clusters: a dict for each cluster, the largest first.

    Example:
        >>> from flax_hmog.sklearn import HMoG
        >>> from flax_hmog.toy import x
        >>> summary = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x).summary()
        >>> list(summary.rows()[0])
        ['cluster', 'components', 'rows', 'weight', 'certainty', 'distinguished by']
    """

    heading: tuple[str, ...]
    clusters: tuple[dict[str, Any], ...]

    def rows(self) -> list[dict[str, Any]]:
        """The table, one dict for each cluster, the largest first."""
        return [dict(row) for row in self.clusters]

    def __repr__(self) -> str:
        cells = [[_cell(value) for value in row.values()] for row in self.clusters[:ROWS_SHOWN]]
        table = [list(self.clusters[0]), *cells]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)]
        lines = [
            "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in table
        ]
        left_out = len(self.clusters) - ROWS_SHOWN
        return "\n".join([*self.heading, "", *lines, *([f"... and {left_out} more"] if left_out > 0 else [])])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def counted(count: float, what: str) -> str:
    """A count with its noun, "1 row" and "2 rows"."""
    return f"{count:g} {what}" + ("" if count == 1 else "s")


def summary_of(model: Any) -> Summary:
    """`Summary` of a fitted `HMoG`."""
    weights, merged = model.weights_.astype(np.float64), model.cluster_of_component_
    clusters = np.arange(len(weights)) if merged is None else merged
    count, criteria = len(model.cluster_sizes_), model.criteria_
    names = getattr(model, "feature_names_in_", [f"x{i}" for i in range(model.n_features_in_)])
    described = distinguishing_columns(model, weights, names)
    rows = [
        {
            "cluster": c,
            "components": int((clusters == c).sum()),
            "rows": float(model.cluster_sizes_[c]),
            "weight": float(weights[clusters == c].sum()),
            "certainty": float(model.cluster_certainties_[c]),
            "distinguished by": described[c],
        }
        for c in np.argsort(-model.cluster_sizes_, kind="stable").tolist()
    ]
    steps = counted(model.n_iter_, "step")
    end = f"converged after {steps}" if model.converged_ else f"not converged, {steps}"
    kind = "wild ones left out" if model.background_ is None else "of the background"
    without = f" ({len(model.left_out_)} {kind})" if len(model.left_out_) else ""
    sizes = f"{counted(count, 'cluster')} of {counted(len(weights), 'component')}"
    factors = f"{counted(model.loadings_.shape[1], 'factor')} of {counted(model.n_features_in_, 'column')}"
    heading = (
        f"{sizes}, {factors}; {end}",
        f"{counted(criteria.n_samples, 'row')}{without}, {counted(criteria.n_parameters, 'parameter')}",
        f"log-likelihood {criteria.log_likelihood:.7g}, BIC {criteria.bic:.7g}, ICL {criteria.icl:.7g}",
    )
    return Summary(heading, tuple(rows))


def distinguishing_columns(model: Any, weights: np.ndarray, names: Any) -> list[str]:
    """For each cluster the columns whose mean is farthest from that of all rows, in units of the data.

    Distances are in standard deviations of the column under the model, and stand in brackets.
    """
    centers, means, moments = model.cluster_centers_, model.means_, model._moments
    loadings, entries = (np.asarray(array, np.float64) for array in (moments.loadings, moments.covariances.entries))
    overall = weights @ means
    within = np.einsum("dl,k,klm,dm->d", loadings, weights, entries, loadings, optimize=True)
    variance = within + model.noise_variance_ + weights @ (means - overall) ** 2
    distances = (centers - overall) / np.sqrt(variance)
    described = []
    for center, distance in zip(centers, distances, strict=True):
        columns = np.argsort(-np.abs(distance), kind="stable")[:MOST_COLUMNS]
        parts = [
            f"{names[d]} {center[d]:.4g} ({distance[d]:+.1f})" for d in columns if abs(distance[d]) > LEAST_DISTANCE
        ]
        described.append(", ".join(parts))
    return described


def notes_of(model: Any) -> dict[str, Any]:
    """All that a file holds of a fitted `HMoG` beside its model: values of JSON."""
    arguments = {
        name: {"PseudoCounts": dataclasses.asdict(value)} if isinstance(value, PseudoCounts) else value
        for name, value in model.get_params(deep=False).items()
    }
    return {
        "arguments": {name: _plain(value) for name, value in arguments.items() if _is_json(value)},
        "classes": None if model.classes_ is None else model.classes_.tolist(),
        "objective_history": np.asarray(model.objective_history_, np.float64).tolist(),
        "converged": bool(model.converged_),
        "background": None if model.background_ is None else _listed(dataclasses.asdict(model.background_)),
        "offset": model.offset_,
        "bounds": [
            [None if np.isnan(v) else v for v in bound.tolist()] for bound in (model.data_min_, model.data_max_)
        ],
        "left_out": model.left_out_.tolist(),
        "cluster_sizes": model.cluster_sizes_.tolist(),
        "cluster_certainties": _known(model.cluster_certainties_),
        "criteria": {name: _plain(value) for name, value in dataclasses.asdict(model.criteria_).items()},
    }


def _known(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(_plain(value))
    except TypeError:
        return False
    return True


def contents_of(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the `HMoG` of a file, and its attributes.

    Raises:
        ValueError: for a file that is missing, damaged or holds no estimator.
    """
    saved = load(path)
    notes = saved.notes
    if "arguments" not in notes:
        raise ValueError(
            f"load: `path` must be a file that HMoG.save wrote; got {path}, a model without an estimator. "
            "Use flax_hmog.load."
        )
    arguments = dict(notes["arguments"])
    if isinstance(arguments.get("regularizer"), dict):
        arguments["regularizer"] = PseudoCounts(**arguments["regularizer"]["PseudoCounts"])
    history = np.asarray(notes["objective_history"])
    background = notes.get("background")  # which files of before do not have
    if background is not None:
        background = Background(background["share"], *(np.asarray(background[name]) for name in ("center", "unit")))
    bounds = {}
    if "bounds" in notes:
        bounds = {f"data_{name}_": np.asarray(notes["bounds"][i], float) for i, name in enumerate(("min", "max"))}
    attributes: dict[str, Any] = bounds | {
        "natural_": saved.natural,
        "cluster_of_component_": saved.clusters,
        "classes_": None if notes["classes"] is None else np.asarray(notes["classes"]),
        "objective_history_": history,
        "lower_bound_": float(history[-1]),
        "converged_": notes["converged"],
        "n_iter_": len(history) - 1,
        "n_features_in_": saved.natural.interaction.shape[0],
        "background_": background,
        "offset_": notes.get("offset", -float(np.log1p(DRAWS))),
        "left_out_": np.asarray(notes["left_out"], int),
        "cluster_sizes_": np.asarray(notes["cluster_sizes"]),
        "cluster_certainties_": np.asarray(notes["cluster_certainties"], np.float64),
        "criteria_": InformationCriteria(**notes["criteria"]),
        "_cache": {},
        "_learnt": None,
    }
    if saved.columns is not None:
        attributes["feature_names_in_"] = np.asarray(saved.columns, object)
    return arguments, attributes
