"""Where accelerated fits end beside plain ones from the same keys: objectives, and clusters scored by labels.

    python -m experiments.benchmarks.objectives --folder FOLDER [--names digits usps] [--seeds 5]

FOLDER holds mnist/ and fashion_mnist/ with their files as published, and usps_9298.npz, optdigits.npz and pbmc4k.npz,
each with `X` (or the parts of a CSR matrix) and `y`; digits are scikit-learn's. Components are merged to as many
clusters as there are classes, and scored on the fitted rows; "plain, as far" goes on to the objective of the
accelerated fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from experiments.images import IDX_FILES, read_idx
from flax_hmog import AnalyticHMoG, EMState, Natural, PseudoCounts, fit_em, infer
from flax_hmog.analysis import clustering_metrics, merge_components, merged_responsibilities
from flax_hmog.data.files import read_file

ROWS, MAX_STEPS = 12_000, 400


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data and a model of them.

    Attributes:
        read: gives rows (N, D) and labels (N,), from the folder.
        head: sizes and kind of noise.
        counts: strength of the regulariser.
        tolerance: nats.
    """

    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    head: AnalyticHMoG
    counts: PseudoCounts
    tolerance: float = 0.01


def of_images(name: str) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    """Reads the first images, between 0 and 1."""

    def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        images, labels = (read_idx(folder / name / file)[:ROWS] for file in IDX_FILES["train"])
        return images.reshape(len(images), -1).astype(np.float32) / 255, labels

    return read


def of_file(name: str) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    """Reads rows, from 0 to 1."""

    def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        file = np.load(folder / name)
        rows = file["X"].reshape(len(file["X"]), -1)
        return (rows / rows.max()).astype(np.float32), file["y"]

    return read


def of_cells(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-counts of equal totals, in columns of unit variance."""
    file = read_file(folder / "pbmc4k.npz")
    counts = np.asarray(file.rows.toarray(), np.float32)
    rows = np.log1p(counts * (counts.sum(axis=1).mean() / counts.sum(axis=1, keepdims=True)))
    return (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-6), file.labels


def of_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, between 0 and 1."""
    rows, labels = load_digits(return_X_y=True)
    return (rows / 16).astype(np.float32), labels


SHARE = PseudoCounts(noise_share=0.01)
FULL = PseudoCounts(components=0.2, noise_floor=0.005, noise_share=1.0)
PROBLEMS = {
    "mnist": Problem(of_images("mnist"), AnalyticHMoG(30, 100), SHARE, 0.05),
    "fashion_mnist": Problem(of_images("fashion_mnist"), AnalyticHMoG(30, 100), SHARE, 0.05),
    "usps": Problem(of_file("usps_9298.npz"), AnalyticHMoG(30, 100), SHARE),
    "optdigits": Problem(of_file("optdigits.npz"), AnalyticHMoG(20, 80), SHARE),
    "pbmc4k": Problem(of_cells, AnalyticHMoG(10, 40), dataclasses.replace(SHARE, components=10)),
    "digits": Problem(of_digits, AnalyticHMoG(10, 40, obs_rep="full"), FULL, 0.001),
}


def main(folder: Path = Path(), names: tuple[str, ...] = tuple(PROBLEMS), seeds: int = 5) -> None:
    """Fit, and print a table.

    Args:
        folder: where the files are.
        names: data sets.
        seeds: starts of each.
    """
    title = f"mean over {seeds} seeds, and standard deviation"
    table = Table("data", "fit", "objective", "steps", "NMI", "ACC", title=title)
    for name in names:
        x, labels = PROBLEMS[name].read(folder)
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in range(seeds):
            for kind, natural, history in fits(PROBLEMS[name], x, jax.random.key(seed)):
                found.setdefault(kind, []).append((history[-1], len(history) - 1, *scores(natural, x, labels)))
        for kind, values in found.items():
            (objective, steps, nmi, accuracy), spread = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
            table.add_row(
                f"{name} {x.shape}", kind, f"{objective:.3f} ± {spread[0]:.3f}", f"{steps:.0f}",
                f"{nmi:.3f} ± {spread[2]:.3f}", f"{accuracy:.3f} ± {spread[3]:.3f}",
            )  # fmt: skip
    Console(width=160).print(table)


def fits(problem: Problem, x: np.ndarray, key: jax.Array) -> Iterator[tuple[str, Natural, Sequence[float]]]:
    """Plain and accelerated fits of one tolerance, and a plain one that goes on to the objective of the second."""
    options: dict[str, Any] = {"regularizer": problem.counts, "max_steps": MAX_STEPS}
    for kind in ("plain", "accelerated"):
        fit = fit_em(problem.head, x, key, tolerance=problem.tolerance, accelerate=kind == "accelerated", **options)
        yield kind, fit.natural, fit.objective_history.tolist()
    target, reached = fit.objective_history[-1], EMState()

    def on_step(state: EMState) -> None:
        nonlocal reached
        if state.natural is not None:
            reached = state
        if max(state.history, default=np.inf) >= target:
            raise StopIteration

    with contextlib.suppress(StopIteration):
        fit_em(problem.head, x, key, tolerance=-np.inf, accelerate=False, on_step=on_step, **options)
    yield "plain, as far", reached.top, reached.history


def scores(natural: Natural, x: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """NMI and ACC of the components of a model, merged to as many clusters as there are classes."""
    logs = np.asarray(infer(natural, x).log_responsibilities)
    clusters = merge_components(logs, len(np.unique(labels)))
    found = clustering_metrics(labels, merged_responsibilities(np.exp(logs), clusters).argmax(axis=1))
    return found["nmi"], found["accuracy"]


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.benchmarks.objectives")
