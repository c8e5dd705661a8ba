"""The command `hmog`: train a model, report on it, predict with it, export it, and say what a run holds."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# XLA's CPU factorisations share OpenBLAS with scipy, whose threads fight those of XLA; read when scipy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from rich.console import Console

from flax_hmog.data.files import File, read_file
from flax_hmog.data.tables import Identifier
from flax_hmog.inference.posterior import infer
from flax_hmog.recipe.config import Experiment
from flax_hmog.recipe.describe import describe_run
from flax_hmog.recipe.options import parse_experiment
from flax_hmog.recipe.plan import print_plan
from flax_hmog.recipe.presets import PRESETS
from flax_hmog.recipe.report import report_run
from flax_hmog.recipe.saved import restore_run, run_columns
from flax_hmog.recipe.tables import ABOUT as ABOUT_FIT
from flax_hmog.recipe.tables import (
    add_column_options,
    add_fit_options,
    describe_command,
    fit_command,
    predict_command,
    report_command,
    select_of_file,
    sweep_of_file,
)
from flax_hmog.recipe.train import run
from flax_hmog.selection.command import ABOUT as ABOUT_SELECT
from flax_hmog.selection.command import ABOUT_SWEEP, add_select_options, add_sweep_options
from flax_hmog.training import export, write_program
from flax_hmog.training.processes import STOPPED, Stopped, StopRequest, connect, is_first
from flax_hmog.training.programs import keep_programs
from flax_hmog.training.restoring import Restored

HELP = """\
Cluster rows of numbers by a hierarchical mixture of Gaussians: factors explain the data linearly, and the factors come
from a mixture. Every row gets the probability of every cluster, and a density.

  hmog fit customers.csv --out model.npz --assignments clusters.csv
                                                      a table: its clusters, outliers and factors, nothing to prepare
  hmog predict model.npz new.csv --out clusters.csv   the same for new rows
  hmog report model.npz customers.csv                 a page with the clusters, their members and a map: model.html

  hmog train digits                                   a first run, on scikit-learn's digits (a minute)
  hmog report runs/digits                             its scores and figures: runs/digits/report.html
  hmog train file --data.path rows.csv --model.lat-dim 10 --model.n-components 20 --workdir runs/mine
  hmog predict runs/mine new.csv --out clusters.csv   the cluster of every new row
  hmog export runs/mine program                       one program from raw rows to clusters, for serving with jax alone
  hmog select rows.csv --n-components 2,4,8 --lat-dim 1,2,4
                                                      which numbers of components and factors, without labels
  hmog sweep rows.csv --storage study.log             many sizes, by Optuna; several processes share the file
  hmog describe runs/mine                             what the folder, or a model of hmog fit, holds

Rows are .npy, .npz, .csv, .parquet or .h5ad files. A run that was interrupted goes on by the same command. Compiled
programs are kept in a cache folder of yours (JAX_COMPILATION_CACHE_DIR; JAX_ENABLE_COMPILATION_CACHE=false: none).
"""
TRAIN = f"""\
Train: {", ".join(PRESETS)}, each followed by its options (`hmog train file --help` lists all of them).

  digits     scikit-learn's handwritten digits, five seeds
  synthetic  rows drawn from a known model
  file       your own rows: --data.path FILE

The run goes to --workdir; what is there already is resumed. Exit status 75: told to stop, and has saved.
"""
BLOCK_ROWS = 1024  # that a prediction reads at once
PREDICTED = ("cluster", "probability", "log_density")


def main(
    arguments: list[str] | None = None, experiments: Mapping[str, Experiment] = PRESETS, prog: str = "hmog train"
) -> int:
    """The command line.

    Args:
        arguments: those after the command; None takes those of the process.
        experiments: experiments by name.
        prog: the command that trains, for its help.

    Returns:
        The exit status: 0; 1 for what cannot be done, with one line that says why; 75 for a run that was told to stop
        and has saved. Arguments that cannot be read end the process with 2.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    keep_programs()
    if "train" in arguments[:1] or "--allow-import" in arguments:  # classes of a user's own may lie here
        sys.path.append(os.getcwd())
    try:
        if arguments[:1] == ["train"] and arguments[1:2] and arguments[1] in experiments:
            return train(experiments[arguments[1]], arguments[2:], f"{prog} {arguments[1]}")
        options = _parser().parse_args(arguments)
        options.command(options)
    except (ValueError, ImportError) as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def train(default: Experiment, arguments: list[str], prog: str) -> int:
    """Train as the options say.

    Args:
        default: the experiment, which options change.
        arguments: the options.
        prog: the command, for its help.

    Returns:
        The exit status: 0, or 75 for a run that was told to stop and has saved.

    Raises:
        ValueError: for a run that cannot be, or has failed.
        ImportError: without the extra `train`.
    """
    console = Console()
    config = parse_experiment(default, arguments, prog)
    try:
        connect(**dataclasses.asdict(config.processes))
        if config.dry_run:
            print_plan(config, console)
            return 0
        run(config, console, StopRequest(), command=shlex.join([*prog.split(), *arguments]))
    except Stopped:
        console.print(f"stopped and saved in {config.workdir}; the same command goes on from there")
        return STOPPED
    if is_first():
        console.print(f"done; scores and figures: hmog report {config.workdir}")
    return 0


def _parser() -> argparse.ArgumentParser:
    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("hmog", description=HELP, **style)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: object, description: str, *, of_a_run: str | None = "") -> argparse.ArgumentParser:
        summary = description.partition("\n")[0]
        added = commands.add_parser(name, help=summary, description=description, **style)
        added.set_defaults(command=command)
        if of_a_run is not None:
            added.add_argument("run", type=Path, help="folder of the run, as --workdir of hmog train" + of_a_run)
        return added

    add_fit_options(add("fit", fit_command, ABOUT_FIT, of_a_run=None))
    selected = add("select", select_of_file, ABOUT_SELECT, of_a_run=None)
    add_column_options(selected)
    add_select_options(selected)
    swept = add("sweep", sweep_of_file, ABOUT_SWEEP, of_a_run=None)
    add_column_options(swept)
    add_sweep_options(swept)
    add("train", None, TRAIN, of_a_run=None).add_argument("name", choices=list(PRESETS), help="what to train on")
    or_file = ", or a file of hmog fit"
    about = "Scores, figures and a page: of a run from its checkpoints, of a model of hmog fit from rows."
    report = add("report", _report, about, of_a_run=or_file)
    report.add_argument(
        "rows", type=Path, nargs="?", help="with a model of hmog fit: the file of its rows, or of others"
    )
    report.add_argument("--out", type=Path, help="with a model of hmog fit: the page; without it, beside the model")
    report.add_argument("--layer", help="of an .h5ad, instead of X")
    report.add_argument("--obsm", help="of an .h5ad, instead of X")
    _add_import(report)
    about = "The cluster of every row of a file, one line per row under a header."
    predict = add("predict", _predict, about, of_a_run=or_file)
    predict.add_argument("rows", type=Path, help=".npy, .npz, .csv, .parquet or .h5ad, raw as in training")
    predict.add_argument(
        "--out",
        type=Path,
        help="file of comma-separated values; without it, the terminal. With a "
        "model of hmog fit also .parquet, and .h5ad for rows of an .h5ad",
    )
    predict.add_argument(
        "--id", help="column that names the rows, with a model of hmog fit; without it, that of the fit"
    )
    predict.add_argument("--probabilities", action="store_true", help="also the probability of each cluster")
    predict.add_argument("--labels", help="column that is no input; a run on named columns finds them by name")
    predict.add_argument("--layer", help="of an .h5ad, instead of X")
    predict.add_argument("--obsm", help="of an .h5ad, instead of X")
    _add_choice(predict)
    exported = add("export", _export, "One program from raw rows to clusters, for any batch size (docs/serving.md).")
    exported.add_argument("out", type=Path, help="file of the program")
    _add_choice(exported)
    about = "Data, models, scores, times and command of a run; clusters and columns of a model of hmog fit."
    add("describe", _describe, about, of_a_run=or_file)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, help="which seed; without it, the one of the best model")
    parser.add_argument("--stage", help="em, differentiable, differentiable-2, ...; without it, the best")
    _add_import(parser)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-import",
        action="store_true",
        help="import the encoder and heads that the run names, if they are not of flax_hmog; this runs their code",
    )


def _restored(options: argparse.Namespace) -> Restored:
    return restore_run(options.run, seed=options.seed, stage=options.stage, allow_import=options.allow_import)


def _say_origin(model: Restored) -> None:
    """The seed, the stage and the step of a model, beside what goes to the standard output."""
    print(f"model: {model.origin}", file=sys.stderr)


def _report(options: argparse.Namespace) -> None:
    if options.run.suffix == ".npz":
        report_command(options)
        return
    if options.rows is not None:
        raise ValueError(f"report: `rows` must be left out for a run, which knows its own; got {options.rows}.")
    report_run(options.run, allow_import=options.allow_import)


def _predict(options: argparse.Namespace) -> None:
    if options.run.suffix == ".npz":
        predict_command(options)
        return
    if options.id is not None:
        raise ValueError(
            f"predict: `--id` must be left out for a run, which names rows by their index or first column of different "
            f"texts; got {options.id!r}."
        )
    model = _restored(options)
    if not options.rows.is_file():
        raise ValueError(f"predict: `rows` must be a file; got {options.rows}, which is not there. Check the path.")
    if options.out is not None and options.out.exists() and options.out.samefile(options.rows):
        raise ValueError(f"predict: `--out` must be another file than the rows; got {options.out}. Choose another.")
    file = read_file(options.rows, options.labels, layer=options.layer, obsm=options.obsm)
    if file.image_shape is not None and model.preprocessing is not None:
        model.preprocessing(
            np.zeros((1, *file.image_shape), np.float32)
        )  # images of another shape have as many columns
    rows = _rows_of(file, run_columns(options.run))
    lines = predictions(model, rows, file.identifier, each=options.probabilities)
    lines = itertools.chain([next(lines)], lines)  # rows that do not fit are found before a file is replaced
    if options.out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
        _say_origin(model)
        return
    try:
        with options.out.open("w", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows(lines)
    except OSError as error:
        raise ValueError(
            f"predict: `--out` must be a file that can be written to; got {error}. Choose another."
        ) from None
    print(f"{rows.shape[0]} rows: {options.out}")
    _say_origin(model)


def _rows_of(file: File, names: list[str] | None) -> Any:
    """The rows of a file, all finite, with the columns that a run was trained on, by name where both have names."""
    rows, found = file.rows, file.column_names
    if names is not None and found is not None and list(found) != names:
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"predict: `rows` must have the run's columns; got {file.source} without numbers in {missing[0]!r}, "
                f"{len(missing)} of {len(names)} missing. Name the columns as in training."
            )
        rows, found = rows[:, [found.index(name) for name in names]], tuple(names)
    for start in range(0, rows.shape[0], BLOCK_ROWS):
        bad = np.argwhere(~np.isfinite(_dense(rows[start : start + BLOCK_ROWS])))
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"predict: `rows` must be finite; got a missing or infinite value in row {start + row}, counted from "
                f"0, and column {found[column] if found else column!r} of {file.source}. Drop or impute such rows."
            )
    return rows


def _dense(block: Any) -> np.ndarray:
    return block.toarray() if hasattr(block, "toarray") else np.asarray(block)


def predictions(
    model: Restored, rows: Any, identifier: Identifier | None = None, *, each: bool = False
) -> Iterator[list[Any]]:
    """The header and then a line for each row: its identifier, cluster, probability and log-density in nats.

    Where components are merged to clusters, the most probable component is there too.

    Args:
        model: of `restore`.
        rows: raw rows (N, D), an array or a CSR matrix.
        identifier: name and values (N,) of what names the rows; None for their numbers from 0.
        each: also the probability of every cluster, in columns "p0" and so on.
    """
    natural, is_merged = model.head.apply(model.variables, method="natural"), model.clusters is not None
    title, names = ("row", range(rows.shape[0])) if identifier is None else identifier
    for start in range(0, rows.shape[0], BLOCK_ROWS):
        components = infer(natural, model.features(_dense(rows[start : start + BLOCK_ROWS])))
        output = model.merged(components)
        probabilities = np.exp(np.asarray(output.log_responsibilities))
        found = [np.argmax(probabilities, axis=1), probabilities.max(axis=1), np.asarray(output.log_density)]
        if start == 0:
            columns = [f"p{k}" for k in range(probabilities.shape[1])] if each else []
            answers = [*PREDICTED, *(["component"] if is_merged else []), *columns]
            yield ["row" if title in answers else title, *answers]
        found += [np.argmax(np.asarray(components.log_responsibilities), axis=1)] if is_merged else []
        found += list(probabilities.T) if each else []
        for name, *values in zip(names[start : start + BLOCK_ROWS], *found, strict=True):
            yield [name, *(int(v) if v.dtype.kind == "i" else f"{v:.7g}" for v in values)]


def _export(options: argparse.Namespace) -> None:
    model = _restored(options)
    write_program(export(model), options.out)
    _say_origin(model)
    print(f"program: {options.out}")


def _describe(options: argparse.Namespace) -> None:
    if options.run.suffix == ".npz":
        describe_command(options)
        return
    print(describe_run(options.run))


if __name__ == "__main__":
    sys.exit(main())
