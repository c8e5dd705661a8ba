"""From a table in a file to clusters in another: what the commands `hmog fit` and `hmog predict` do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_hmog.data.columns import Columns, choose_columns, listed, rows_of
from flax_hmog.data.files import read_file
from flax_hmog.data.tables import SUFFIXES, UNNAMED, read_frame
from flax_hmog.model.optional import require
from flax_hmog.model_file import load, save
from flax_hmog.selection.table import Selection
from flax_hmog.sklearn.arguments import check_contamination
from flax_hmog.sklearn.choice import choose
from flax_hmog.sklearn.estimator import HMoG
from flax_hmog.sklearn.summary import notes_of

WRITTEN = (".csv", ".parquet", ".h5ad")


def fit_table(
    path: Path,
    *,
    n_clusters: int | None = None,
    lat_dim: int | None = None,
    out: Path | None = None,
    assignments: Path | None = None,
    identifier: str | None = None,
    one_hot: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    layer: str | None = None,
    obsm: str | None = None,
    random_state: int = 0,
    say: Callable[[str], None] = print,
    **arguments: Any,
) -> HMoG:
    """Fit a model to the table of a file, and write the model and the clusters of its rows.

    Args:
        path: .csv, .parquet, .npy, .npz or .h5ad.
        n_clusters: number of clusters; None for those that the rows show.
        lat_dim: number of factors; None for that with the least BIC.
        out: file of the model, .npz.
        assignments: file of the clusters of the rows, .csv, .parquet or, of an .h5ad, .h5ad.
        identifier: column that names the rows; None for the first that can.
        one_hot: columns of text to take for categories.
        leave_out: columns that take no part.
        layer: of an .h5ad, instead of X.
        obsm: of an .h5ad, instead of X.
        random_state: seed.
        say: told every decision.
        arguments: of `HMoG`.

    Returns:
        The model.

    Raises:
        ValueError: for a table or an argument that cannot be used.
    """
    _check_out(assignments, path)
    _check_folder(out)
    if out is not None and out.suffix != ".npz":
        raise ValueError(f"fit: `--out` must end in .npz; got {out}. Choose another.")
    check_contamination(arguments.get("contamination", "auto"))
    table = read_rows(path, layer, obsm)
    columns = choose_columns(table, identifier, one_hot, leave_out)
    rows = rows_of(table, columns)
    check_table(rows, n_clusters, lat_dim)
    for line in described(path, table, columns, rows):
        say(line)
    say("sizes, compared by BIC:")
    model = choose(rows, n_clusters, lat_dim, random_state=random_state, say=say, **arguments)
    model.feature_names_in_ = np.asarray(columns.features, object)
    outliers = int((model.predict_outliers(_named(rows, columns)) < 0).sum())
    say(f"{model.summary()!r}\n\n{outliers} of {len(rows)} rows are outliers")
    if out is not None:
        notes = notes_of(model) | {"table": dataclasses.asdict(columns)}
        save(model.natural_, out, clusters=model.cluster_of_component_, columns=columns.features, notes=notes)
        say(f"model: {out}")
    if assignments is not None:
        write(assigned(model, columns, table, rows), assignments, path)
        say(f"clusters of the rows: {assignments}")
    return model


def predict_table(
    model_path: Path,
    path: Path,
    out: Path | None,
    *,
    identifier: str | None = None,
    layer: str | None = None,
    obsm: str | None = None,
    each: bool = False,
    say: Callable[[str], None] = print,
) -> Any:
    """The clusters of the rows of a file by a model of `fit_table`, one line for each.

    Args:
        model_path: file of the model.
        path: file of rows, with the columns of the fit by name.
        out: file to write; None writes none.
        identifier: column that names the rows; None for that of the fit.
        layer: of an .h5ad, instead of X.
        obsm: of an .h5ad, instead of X.
        each: also the probability of every cluster.
        say: told what is written.

    Returns:
        The table of `assigned`.

    Raises:
        ValueError: for a file that cannot be used, or columns that are not there.
    """
    _check_out(out, path)
    model, table, columns = _loaded("predict", model_path, path, layer, obsm)
    if identifier is not None:
        if identifier not in table:
            names = listed([str(name) for name in table.columns])
            raise ValueError(f"predict: `id` must name a column; got {identifier!r}. Choose one of {names}.")
        columns = dataclasses.replace(columns, identifier=identifier)
    found = assigned(model, columns, table, rows_of(table, columns), each=each)
    if out is not None:
        write(found, out, path)
        say(f"{len(found)} rows: {out}")
    return found


def report_table(model_path: Path, path: Path, out: Path, *, layer: str | None = None, obsm: str | None = None) -> Path:
    """Write the page of a model of `fit_table` on the rows of a file, which their identifiers name.

    Args:
        model_path: file of the model.
        path: file of rows, with the columns of the fit by name.
        out: file of the page.
        layer: of an .h5ad, instead of X.
        obsm: of an .h5ad, instead of X.

    Returns:
        The path of the page.

    Raises:
        ValueError: for a file that cannot be used, or columns that are not there.
    """
    _check_folder(out)
    model, table, columns = _loaded("report", model_path, path, layer, obsm)
    rows = _named(rows_of(table, columns), columns)
    if columns.identifier in table:
        rows.index = require("pandas", "train").Index(table[columns.identifier], name=columns.identifier)
    return model.report(out, rows, title=f"{path.name}, clustered by a hierarchical mixture of Gaussians")


def describe_table(model_path: Path) -> str:
    """The contents of a file of `fit_table`, `HMoG.save` or `Selection.save`, in lines."""
    if "selection" in load(model_path).notes:
        return str(Selection.load(model_path))
    model, columns = HMoG.load(model_path), columns_of(model_path)
    lines = [str(model)]
    if columns is not None:
        lines += ["", f"identifier {columns.identifier}", f"columns {', '.join(columns.features)}"]
        lines += [f"left out {name}: {why}" for name, why in columns.left_out.items()]
    return "\n".join(lines)


def _loaded(
    command: str, model_path: Path, path: Path, layer: str | None, obsm: str | None
) -> tuple[HMoG, Any, Columns]:
    """A model, the table of a file, and the roles of its columns."""
    model = HMoG.load(model_path).set_params(missing="nan")
    table, columns = read_rows(path, layer, obsm, command=command), columns_of(model_path)
    if columns is None:  # a model of `HMoG.save`
        columns = Columns(None, tuple(getattr(model, "feature_names_in_", map(str, table.columns))))
    return model, table, columns


def columns_of(model_path: Path) -> Columns | None:
    """The columns of the table that a model was fitted to, or None for one of arrays."""
    about = load(model_path).notes.get("table")
    if about is None:
        return None
    tuples = {name: tuple(values) for name, values in about["categories"].items()}
    words = {name: tuple(values) for name, values in about["words"].items()}
    return Columns(about["identifier"], tuple(about["numbers"]), tuples, words, about["left_out"])


def read_rows(path: Path, layer: str | None = None, obsm: str | None = None, *, command: str = "fit") -> Any:
    """A file as a table of pandas; rows of an .h5ad have their names, those of arrays columns x0, x1 and so on."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{command}: `rows` must be a file; got {path}, which {found}. Check the path.")
    if path.suffix in SUFFIXES:
        table = read_frame(path)
        table = table if type(table.index).__name__ == "RangeIndex" else table.reset_index()
        return table.rename(columns={UNNAMED: "row", **{name: str(name) for name in table.columns if name != UNNAMED}})
    pandas, file = require("pandas", "train"), read_file(path, layer=layer, obsm=obsm)
    rows = file.rows.toarray() if hasattr(file.rows, "toarray") else np.asarray(file.rows)
    table = pandas.DataFrame(rows, columns=file.column_names or [f"x{i}" for i in range(rows.shape[1])])
    if path.suffix == ".h5ad":
        table.insert(0, "obs_names", list(require("anndata", "h5ad").read_h5ad(path, backed="r").obs_names))
    return table


def check_table(rows: np.ndarray, n_clusters: int | None = None, lat_dim: int | None = None) -> None:
    """ValueError for rows (N, F) that no model, or none of these sizes, can be fitted to."""
    sizes = ("clusters", n_clusters, len(rows), "rows"), ("lat-dim", lat_dim, rows.shape[1], "columns")
    for option, value, most, what in sizes:
        if value is not None and value > most:
            raise ValueError(f"fit: `--{option}` must be at most the {most} {what}; got {value}. Lower it.")
    if len(rows) < 2:
        raise ValueError(f"fit: the table must have at least 2 rows; got {len(rows)}. Add rows.")
    if not (np.fmin.reduce(rows, axis=0) < np.fmax.reduce(rows, axis=0)).any():
        raise ValueError(
            f"fit: the table must have a column of numbers that vary; got {rows.shape[1]} columns that are constant. "
            "Add columns."
        )


def described(path: Path, table: Any, columns: Columns, rows: np.ndarray) -> list[str]:
    """The plan of a fit, one decision in a line."""
    with np.errstate(invalid="ignore"):
        constant = np.nanmin(rows, axis=0) == np.nanmax(rows, axis=0)
    missing = np.isnan(rows)
    still = [name for name, is_constant in zip(columns.features, constant, strict=True) if is_constant]
    lines = [f"{path.name}: {table.shape[0]} rows, {table.shape[1]} columns"]
    lines += [f"  identifier   {columns.identifier or 'none; rows are numbered from 0'}"]
    lines += [f"  numbers      {len(columns.numbers)}: {listed(columns.numbers)}"]
    lines += [f"  categories   {name}: {listed(values)}" for name, values in columns.categories.items()]
    if missing.any():
        share = f"{missing.mean():.2%} of the entries, in {int(missing.any(axis=1).sum())} rows"
        lines += [f"  missing      {share}; rows are judged by what they show"]
    lines += [f"  as missing   {name}: {listed(words)}" for name, words in columns.words.items()]
    lines += [f"  constant     {listed(still)}; carried along"] if still else []
    two = [name for name, column in zip(columns.features, rows.T, strict=True) if has_two_values(column)]
    two = [name for name in two if name in columns.numbers]
    lines += [f"  two values   {listed(two)}; may be taken for clusters, unless --leave-out names them"] if two else []
    lines += [f"  left out     {name}: {why}" for name, why in columns.left_out.items()]
    return [*lines, "  units        every column has its own, by median and typical distance from it"]


def has_two_values(column: np.ndarray) -> bool:
    """True for a column (N,) with two different entries beside NaN."""
    known = column[~np.isnan(column)]
    return len(known) > 2 and len(np.unique(known)) == 2


def assigned(model: HMoG, columns: Columns, table: Any, rows: np.ndarray, *, each: bool = False) -> Any:
    """One line for every row: identifier, cluster, its probability, the second choice, outlier score and factors.

    Identifiers keep their name, but one that an answer has: then it is "row". Rows of the background are of cluster
    -1, and their probability is that of the background. With `each` there are columns p0, p1 and so on of the
    probabilities of all clusters.
    """
    pandas = require("pandas", "train")
    X = _named(rows, columns)
    aside, clusters = model.background_proba(X), model.predict(X)
    every = np.column_stack([(1 - aside)[:, None] * model.predict_proba(X), aside])
    numbers = np.arange(len(rows))
    probability = every[numbers, clusters]  # of -1 the last column
    others = every.copy()
    others[numbers, clusters] = -1
    second = others.argmax(axis=1)
    label, shown = "row", numbers
    if columns.identifier is not None and columns.identifier in table:
        label, shown = columns.identifier, table[columns.identifier].to_numpy()
    found = {
        "cluster": clusters,
        "probability": probability,
        "second_cluster": np.where(second == every.shape[1] - 1, -1, second),
        "second_probability": others.max(axis=1),
        "outlier_score": model.outlier_scores(X),
        "is_outlier": model.predict_outliers(X) < 0,
    }
    latent = model.transform(X)
    found |= {f"factor_{i}": latent[:, i] for i in range(latent.shape[1])}
    found |= {f"p{k}": every[:, k] for k in range(every.shape[1] - 1)} if each else {}
    return pandas.DataFrame({"row" if label in found else label: shown, **found})


def write(found: Any, out: Path, source: Path) -> None:
    """Write the table of `assigned`; to an .h5ad beside all that the source holds, in `obs` and `obsm`."""
    try:
        if out.suffix == ".csv":
            found.to_csv(out, index=False, float_format="%.7g")
        elif out.suffix == ".parquet":
            found.to_parquet(out, index=False)
        else:
            data = require("anndata", "h5ad").read_h5ad(source)
            factors = [name for name in found.columns if name.startswith("factor_")]
            for name in (
                "cluster",
                "probability",
                "second_cluster",
                "second_probability",
                "outlier_score",
                "is_outlier",
            ):
                data.obs[f"hmog_{name}"] = found[name].to_numpy()
            data.obs["hmog_cluster"] = data.obs["hmog_cluster"].astype("category")
            data.obsm["X_hmog"] = found[factors].to_numpy()
            data.write_h5ad(out)
    except OSError as error:
        raise ValueError(
            f"predict: `--out` must be a file that can be written to; got {error}. Choose another."
        ) from None


def _named(rows: np.ndarray, columns: Columns) -> Any:
    return require("pandas", "train").DataFrame(rows, columns=list(columns.features))


def _check_folder(out: Path | None) -> None:
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"fit: `--out` must lie in a folder that is there; got {out}. Make the folder.")


def _check_out(out: Path | None, source: Path) -> None:
    if out is None:
        return
    _check_folder(out)
    if out.suffix not in WRITTEN or (out.suffix == ".h5ad" and source.suffix != ".h5ad"):
        raise ValueError(
            f"predict: `--out` must end in .csv, .parquet or, for rows of an .h5ad, .h5ad; got {out}. Choose another."
        )
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"predict: `--out` must be another file than the rows; got {out}. Choose another.")
