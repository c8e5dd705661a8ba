"""The commands of `hmog` on tables and models of tables; what they do is in `flax_hmog.sklearn.tables`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from flax_hmog.data.columns import choose_columns, rows_of
from flax_hmog.model.optional import require
from flax_hmog.selection.command import select_command, sweep_command

ABOUT = """\
Cluster the rows of a table, in one go: from a file to a file with one line for each row.

Columns of numbers take part, in any units; text is left out and said, or taken by --one-hot; a column of names or
numbers of the rows is carried along. Empty cells are missing values, and rows are judged by what they show. Wild
rows take no cluster. Numbers of factors and components are chosen by BIC; components that overlap are merged to
clusters.
"""


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """Add the file of a table, and what its columns are."""
    parser.add_argument("rows", type=Path, help=".csv, .parquet, .npy, .npz or .h5ad")
    parser.add_argument("--id", help="column that names the rows; without it, the first whose values do")
    many: Any = {"action": "append", "default": [], "metavar": "COLUMN"}
    parser.add_argument("--one-hot", help="column of text to take for categories, or all; may be repeated", **many)
    parser.add_argument("--leave-out", help="column that takes no part; may be repeated", **many)
    parser.add_argument("--layer", help="of an .h5ad, instead of X")
    parser.add_argument("--obsm", help="of an .h5ad, instead of X")


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fit_command`."""
    add_column_options(parser)
    parser.add_argument("--clusters", type=_number, metavar="N", help="number of clusters, or auto (default)")
    parser.add_argument("--lat-dim", type=_number, metavar="N", help="number of factors, or auto (default)")
    parser.add_argument("--out", type=Path, help="file of the model, .npz, for hmog predict, HMoG.load and numpy")
    parser.add_argument(
        "--assignments", type=Path, help="file of the rows' clusters: .csv, .parquet, or .h5ad for rows of an .h5ad"
    )
    parser.add_argument(
        "--contamination", type=float, help="share of the rows to call outliers; without it, as they are"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the starts; 0 by default")


def _number(text: str) -> int | None:
    """A number, None for auto."""
    if text == "auto":
        return None
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a number from 1 or auto; got {text!r}")
    return int(text)


def _tables() -> Any:
    require("pandas", "train")
    require("sklearn.base", "cluster")
    from flax_hmog.sklearn import tables  # takes a second

    return tables


def fit_command(options: argparse.Namespace) -> None:
    """Fit a model to the table of a file."""
    _tables().fit_table(
        options.rows,
        n_clusters=options.clusters,
        lat_dim=options.lat_dim,
        out=options.out,
        assignments=options.assignments,
        identifier=options.id,
        one_hot=options.one_hot,
        leave_out=options.leave_out,
        layer=options.layer,
        obsm=options.obsm,
        random_state=options.seed,
        contamination="auto" if options.contamination is None else options.contamination,
    )


def select_of_file(options: argparse.Namespace) -> None:
    """Compare sizes of models on the table of a file."""
    rows, names = _rows_to_compare(options)
    select_command(rows, options, names)


def sweep_of_file(options: argparse.Namespace) -> None:
    """Search sizes of models on the table of a file."""
    rows, _ = _rows_to_compare(options)
    sweep_command(rows, options)


def _rows_to_compare(options: argparse.Namespace) -> tuple[np.ndarray, list[str]]:
    """Rows of a file that are not far from all others, and the names of the columns that vary."""
    tables = _tables()
    from flax_hmog.sklearn.background import scattered

    table = tables.read_rows(options.rows, options.layer, options.obsm, command="select")
    columns = choose_columns(table, options.id, options.one_hot, options.leave_out)
    rows = rows_of(table, columns)
    tables.check_table(rows)
    print(*tables.described(options.rows, table, columns, rows)[:-1], sep="\n")
    wild = scattered(rows, np.ones(len(rows)))
    print(f"  wild         {int(wild.sum())} rows far from all others; left out, as is what is constant")
    rows = rows[~wild]
    varies = np.nanmin(rows, axis=0) < np.nanmax(rows, axis=0)
    return rows[:, varies], [name for name, is_kept in zip(columns.features, varies, strict=True) if is_kept]


def predict_command(options: argparse.Namespace) -> None:
    """Write or print the clusters of the rows of a file by a model of `hmog fit`."""
    given = {"identifier": options.id, "layer": options.layer, "obsm": options.obsm, "each": options.probabilities}
    found = _tables().predict_table(options.run, options.rows, options.out, **given)
    if options.out is None:
        found.to_csv(sys.stdout, index=False, float_format="%.7g")


def report_command(options: argparse.Namespace) -> None:
    """Write the page of a model of `hmog fit` on the rows of a file."""
    if options.rows is None:
        raise ValueError(
            "report: `rows` must be a file of rows for a model of hmog fit; got none. Give it: hmog report "
            f"{options.run} ROWS.csv."
        )
    out = options.run.with_suffix(".html") if options.out is None else options.out
    print(f"report: {_tables().report_table(options.run, options.rows, out, layer=options.layer, obsm=options.obsm)}")


def describe_command(options: argparse.Namespace) -> None:
    """Print what a model of `hmog fit` holds."""
    print(_tables().describe_table(options.run))
