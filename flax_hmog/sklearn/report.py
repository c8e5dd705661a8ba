"""The page of a fitted `HMoG` and rows."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from flax_hmog.analysis.elements import Picture, Section, Table
from flax_hmog.analysis.page import model_sections, page_images, selection_section
from flax_hmog.analysis.plots import plot_objective
from flax_hmog.analysis.portrait import Subject, portray
from flax_hmog.analysis.report import write_report
from flax_hmog.data.labels import as_vector, is_known
from flax_hmog.data.tables import Identifier
from flax_hmog.sklearn.arguments import precision


def write_page(
    model: Any,
    path: str | Path,
    rows: np.ndarray,
    y: Any,
    *,
    title: str,
    image_shape: tuple[int, ...] | None,
    selection: Any,
    identifier: Identifier | None,
) -> Path:
    """Write the page of a fitted `HMoG`, as `HMoG.report` says."""
    names = getattr(model, "feature_names_in_", None)
    columns = None if names is None else tuple(map(str, names))
    merged, natural = model.cluster_of_component_, model.natural_
    subject = Subject(
        infer=model._inferred,
        read=lambda numbers: rows[numbers],
        numbers=np.arange(len(rows)),
        clusters=np.arange(natural.posterior_location.shape[0]) if merged is None else merged,
        labels=None if y is None else _as_text(y, len(rows)),
        identifier=identifier,
        column_names=columns,
        image_shape=image_shape,
    )
    with precision(natural.interaction.dtype):
        portrait = portray(subject)
        sections = list(model_sections(portrait, natural, input_names=columns, image_shape=image_shape))
    if selection is not None:
        sections.append(selection_section(selection.rows, selection.recommended, selection.reasons))
    summary = [*model.summary().heading[:1], ""]
    if not model.converged_:
        summary.append("EM has not converged in the steps that it was given.")
    if len(model.left_out_):
        summary.append(f"Wild rows, which took no part in the fit: {_numbers(model.left_out_)}.")
    sections += [_fit(model), _card(model, rows)]
    images = page_images(portrait, image_shape)
    return write_report(path, title, sections, summary="\n".join(summary), images=images)


def _as_text(y: Any, count: int) -> np.ndarray:
    """Labels as text, "" where there is none."""
    labels = as_vector(y)
    if labels.shape != (count,):
        raise ValueError(f"report: `y` must have shape ({count},); got {labels.shape}. Give one label for each row.")
    return np.where(is_known(labels), labels.astype(str), "")


def _numbers(rows: np.ndarray, most: int = 30) -> str:
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(map(str, rows[:most].tolist())) + more


def _fit(model: Any) -> Section:
    criteria, count = model.criteria_, model.criteria_.n_samples
    row = {
        "steps": model.n_iter_,
        "converged": model.converged_,
        "rows": float(count) if count % 1 else int(count),
        "log-likelihood [nats]": float(criteria.log_likelihood),
        "parameters": criteria.n_parameters,
        "AIC": float(criteria.aic),
        "BIC": float(criteria.bic),
        "ICL": float(criteria.icl),
    }
    figure = plot_objective(model.objective_history_, title="")
    picture = Picture(figure, "Penalised log-likelihood per row, best of the starts", "A curve of the objective of EM")
    return Section("Fit", tables=[Table([row], "Criteria on the rows of the fit")], pictures=[picture])


def _card(model: Any, rows: np.ndarray) -> Section:
    now = datetime.datetime.now(datetime.UTC)
    card = {
        "model": repr(model),
        "rows of this page": f"{rows.shape[0]:,} of {rows.shape[1]:,} columns, {rows.dtype}",
        "their SHA-256": hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest(),
        "written": f"{now:%Y-%m-%d %H:%M} UTC",
    }
    table = [{"entry": name, "value": value} for name, value in card.items()]
    return Section(
        "Model card", "The model lists the arguments that were changed.", tables=[Table(table, "Model card")]
    )
