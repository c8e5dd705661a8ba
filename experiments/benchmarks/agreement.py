"""Choice among starts without labels: by the agreement of their clusters, and by the objective; scored by labels.

    python -m experiments.benchmarks.agreement [--paths satimage.npz texture.npz] [--lat-dim 15]

scikit-learn's digits always; files as those of `experiments.benchmarks.merging`. Four components for each class, merged
to as many clusters as classes.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from experiments.benchmarks.merging import labelled_rows
from flax_hmog.analysis import clustering_metrics, fit_agreement
from flax_hmog.sklearn import HMoG


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare ways to choose among starts.

    Args:
        paths: .npz files beside scikit-learn's digits.
        seeds: starts, a multiple of `group`.
        group: of so many starts one is chosen.
        rows: as many are drawn from larger sets.
        lat_dim: number of factors; None for the default.
    """

    paths: tuple[Path, ...] = ()
    seeds: int = 20
    group: int = 5
    rows: int = 4000
    lat_dim: int | None = None


def main(args: Args) -> None:
    """Print a table with a line for each data set."""
    title = f"ACC of {args.seeds} starts, and of one chosen of {args.group}; rank correlations with it"
    table = Table("data", "of a start", "by agreement", "by objective", "agreement", "objective", title=title)
    for name, x, y in [("digits", *load_digits(return_X_y=True)), *((p.stem, *labelled_rows(p)) for p in args.paths)]:
        part = np.random.default_rng(0).permutation(len(x))[: args.rows]
        table.add_row(name, *compare(x[part].astype(np.float32), y[part], args))
    Console(width=120).print(table)


def compare(x: np.ndarray, y: np.ndarray, args: Args) -> list[str]:
    """The cells of one data set: (N, D) rows and their labels (N,)."""
    n_classes, given = len(np.unique(y)), {} if args.lat_dim is None else {"lat_dim": min(args.lat_dim, x.shape[1])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EM at its last step, and overfitting
        fits = [
            HMoG(4 * n_classes, n_clusters=n_classes, random_state=seed, **given).fit(x) for seed in range(args.seeds)
        ]
    accuracy = np.array([clustering_metrics(y, fit.labels_)["accuracy"] for fit in fits])
    agreement, objective = fit_agreement([fit.labels_ for fit in fits]), np.array([fit.lower_bound_ for fit in fits])
    groups = np.arange(args.seeds).reshape(-1, args.group)
    agreed = [accuracy[group[agreement[np.ix_(group, group)].sum(axis=1).argmax()]] for group in groups]
    likely = [accuracy[group[objective[group].argmax()]] for group in groups]
    correlations = [spearmanr(score, accuracy).statistic for score in (agreement.sum(axis=1), objective)]
    return [
        f"{accuracy.mean():.3f} ± {accuracy.std():.3f}",
        *(f"{np.mean(chosen):.3f}" for chosen in (agreed, likely)),
        *(f"{correlation:.2f}" for correlation in correlations),
    ]


if __name__ == "__main__":
    main(tyro.cli(Args))
