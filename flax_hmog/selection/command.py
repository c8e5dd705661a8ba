"""`select` and `sweep` as commands: their options, and what they print and write."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from flax_hmog.selection.compare import select
from flax_hmog.selection.plot import plot_selection
from flax_hmog.selection.study import sweep
from flax_hmog.selection.table import Selection

SHOWN_TRIALS = 5
FILE_WIDTH = 120  # of output that goes to no terminal

ABOUT = """\
Compare numbers of components and factors and kinds of noise, without labels.

One table of held-out log-density, BIC, ICL, entropy, a linear probe and the agreement of seeds; and the setting that
they recommend, or on what they disagree. docs/choosing.md explains the columns.
"""

ABOUT_SWEEP = """\
Search numbers of components and factors, noise and regulariser for the highest held-out log-density, by Optuna.

Several processes may share the file of the study. Compare the best few by hmog select.
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


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sweep_command`."""
    parser.add_argument("--storage", type=Path, required=True, help="file of the study: the same command goes on there")
    parser.add_argument("--n-trials", type=int, default=40, help="trials of all processes; 40 by default")
    parser.add_argument("--n-components", type=_range, default=(2, 40), metavar="2:40", help="least and largest")
    parser.add_argument("--lat-dim", type=_range, default=(1, 10), metavar="1:10", help="least and largest")
    parser.add_argument("--noise", type=_names, default=("diagonal",), metavar="KIND,...", help="diagonal, scale, full")
    parser.add_argument("--seed", type=int, default=0, help="of starts, folds and proposals; 0 by default")
    parser.add_argument("--worker", type=int, default=0, help="number of this process among those that share the file")


def sweep_command(rows: np.ndarray, options: argparse.Namespace) -> None:
    """Sweep by options, and print the best trials, those that failed, and what to do next.

    Args:
        rows: (N, D); NaN is a missing value.
        options: of `add_sweep_options`.

    Raises:
        ValueError: as `sweep`.
    """
    given: dict[str, Any] = {"missing": "nan"} if np.isnan(rows).any() else {}
    study = sweep(
        rows, jax.random.key(options.seed), storage=options.storage, n_trials=options.n_trials,
        n_components=options.n_components, lat_dim=options.lat_dim, obs_rep=options.noise, worker=options.worker,
        progress=True, **given,
    )  # fmt: skip
    counts = Counter(trial.state.name.lower() for trial in study.trials)
    print("trials: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    complete = sorted((trial for trial in study.trials if trial.state.name == "COMPLETE"), key=lambda t: -t.value)
    for trial in complete[:SHOWN_TRIALS]:
        size = trial.params
        print(
            f"  {trial.value:.4f} nats per row: K = {size['n_components']}, L = {size['lat_dim']}, {size['obs_rep']} "
            f"noise, {size['pseudo_samples']:.3g} pseudo-samples"
        )
    for trial in study.trials:
        if "failure" in trial.user_attrs:
            print(f"  trial {trial.number} failed: {trial.user_attrs['failure']}")
    sizes = [sorted({t.params[name] for t in complete[:SHOWN_TRIALS]}) for name in ("n_components", "lat_dim")]
    components, factors = (",".join(map(str, each)) for each in sizes)
    print(f"compare these by hmog select --n-components {components} --lat-dim {factors}")


def _range(text: str) -> tuple[int, int]:
    least, colon, largest = text.partition(":")
    return int(least), int(largest if colon else least)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, as 2,4,8; got {text!r}") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
