"""`select` as a command: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from flax_hmog.selection.compare import select
from flax_hmog.selection.plot import plot_selection
from flax_hmog.selection.table import Selection

FILE_WIDTH = 120  # of output that goes to no terminal

ABOUT = """\
Compare numbers of components and factors and kinds of noise, without labels.

One table of held-out log-density, BIC, ICL, entropy, a linear probe and the agreement of seeds; and the setting that
they recommend, or on what they disagree. docs/choosing.md explains the columns.
"""


def add_select_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `select_command`."""
    parser.add_argument("--n-components", type=_numbers, required=True, metavar="2,4,8", help="numbers of components")
    parser.add_argument("--lat-dim", type=_numbers, required=True, metavar="1,2,4", help="numbers of factors")
    parser.add_argument("--noise", type=_names, default=("diagonal",), metavar="KIND,...", help="diagonal, scale, full")
    parser.add_argument("--clusters", type=int, metavar="N", help="number that components are merged to")
    parser.add_argument("--seed", type=int, default=0, help="of starts and folds; 0 by default")
    parser.add_argument(
        "--workdir", type=Path, help="folder in which fits are kept: the same command goes on from there"
    )
    parser.add_argument("--out", type=Path, help="file of the recommended model and the table, .npz")
    parser.add_argument("--figure", type=Path, help="file of the figure, .png, .pdf or .svg")


def select_command(
    rows: np.ndarray, options: argparse.Namespace, columns: Sequence[str] | None = None, console: Console | None = None
) -> Selection:
    """Select by options, print the table, and write what they ask for.

    Args:
        rows: (N, D); NaN is a missing value.
        options: of `add_select_options`.
        columns: names of the columns (D,).
        console: to print on.

    Returns:
        `Selection`.

    Raises:
        ValueError: as `select`.
    """
    given: dict[str, Any] = {"missing": "nan"} if np.isnan(rows).any() else {}
    found = select(
        rows, jax.random.key(options.seed),
        n_components=options.n_components, lat_dim=options.lat_dim, obs_rep=options.noise, n_clusters=options.clusters,
        workdir=options.workdir, progress=True, columns=columns, **given,
    )  # fmt: skip
    wide = None if sys.stdout.isatty() else FILE_WIDTH
    (console or Console(width=wide)).print(found, highlight=False)
    if options.out is not None:
        found.save(options.out)
    if options.figure is not None:
        plot_selection(found).savefig(options.figure)
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
