"""Changes of data that leave a fit as it is, and what differs: `python -m experiments.benchmarks.invariance`.

Question: is a fit the same when rows, blocks, devices, origin, units, weights or names of labels are others, of which
clusters know nothing? Each change is made to 400 samples of four clusters (7 columns, 3 factors), and the fit compared
with that of the samples as they were: the largest difference of a responsibility, and of a log-density per column after
the Jacobian of the change, over seeds. `starts` are warm starts of the fits with diagonal noise.

    python -m experiments.benchmarks.invariance                       # 5 seeds, 6 minutes on 2 cores
    python -m experiments.benchmarks.invariance --seeds 1 --changes "origin 1e8" "whole 1e-20"
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import scipy.sparse
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
    EMResult,
    SymmetricHMoG,
    WarmStartWarning,
    fit_em,
    fit_online_em,
    infer,
    warm_start,
)
from flax_hmog.data import sources

ROWS, FEWER, OBS_DIM, LAT_DIM, COMPONENTS, DEVICES = 400, 248, 7, 3, 4, 8
NOISES = ("scale", "diagonal", "full")
STARTS: dict[str, Callable[[], Any]] = {
    "Differentiable full": lambda: DifferentiableHMoG(LAT_DIM, COMPONENTS, OBS_DIM, pst_rep="full"),
    "Differentiable diagonal": lambda: DifferentiableHMoG(LAT_DIM, COMPONENTS, OBS_DIM, pst_rep="diagonal"),
    "Symmetric full": lambda: SymmetricHMoG(LAT_DIM, COMPONENTS, OBS_DIM, lat_rep="full"),
    "Analytic": lambda: AnalyticHMoG(LAT_DIM, COMPONENTS, OBS_DIM),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Samples of clusters that are far apart, and the model that they come from.

    Attributes:
        x: rows (N, D) float64, each a float32.
        labels: their components (N,).
        weights: of no common factor (N,).
        means: of the clusters (K, D).
        covariances: of the clusters (K, D, D).
        seed: what it was drawn from.
    """

    x: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    seed: int

    @classmethod
    def of(cls, noise: str, seed: int) -> Problem:
        """The problem with this kind of noise."""
        rng = np.random.default_rng(seed)
        corners = np.array([[1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]])
        means = 5 * corners + rng.normal(size=(COMPONENTS, LAT_DIM))
        roots = 0.3 * rng.normal(size=(COMPONENTS, LAT_DIM, LAT_DIM)) + np.eye(LAT_DIM)
        loadings = np.linalg.qr(rng.normal(size=(OBS_DIM, LAT_DIM)))[0]
        spread = np.full(OBS_DIM, 0.5) if noise == "scale" else rng.uniform(0.3, 0.8, OBS_DIM)
        turn = np.linalg.qr(rng.normal(size=(OBS_DIM, OBS_DIM)))[0] if noise == "full" else np.eye(OBS_DIM)
        mix = turn * spread[None]
        labels = rng.permutation(np.arange(ROWS) % COMPONENTS)
        y = means[labels] + np.einsum("nij,nj->ni", roots[labels], rng.normal(size=(ROWS, LAT_DIM)))
        x = y @ loadings.T + rng.normal(size=(ROWS, OBS_DIM)) @ mix.T + rng.normal(size=OBS_DIM)
        x = x.astype(np.float32).astype(np.float64)
        offset = (x - y @ loadings.T).mean(axis=0)
        covariances = loadings @ roots @ roots.swapaxes(1, 2) @ loadings.T + mix @ mix.T
        return cls(x, labels, rng.uniform(0.3, 3, ROWS), means @ loadings.T + offset, covariances, seed)

    @property
    def rng(self) -> np.random.Generator:
        """Random numbers of a change."""
        return np.random.default_rng(self.seed + 1000)

    @property
    def known(self) -> np.ndarray:
        """Labels of a tenth of the rows, -1 elsewhere (N,)."""
        return np.where(self.rng.random(ROWS) < 0.1, self.labels, -1)


@dataclasses.dataclass(frozen=True)
class Change:
    """The same samples twice, and the comparison of outputs for them.

    Attributes:
        data: the changed data for a fit.
        rows: the changed rows for inference, in the order of `before` (N, D).
        before: the rows as they were (N, D).
        options: of the fit to the changed data.
        options_before: of the fit to the rows as they were.
        log_volume: log p(x) of the rows as they were is that of the changed ones plus this.
        order: component k of the fit before is component order[k] of the other.
        block_rows: rows of a block that is brought to the device, where not all are.
    """

    data: Any
    rows: np.ndarray
    before: np.ndarray
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    options_before: dict[str, Any] = dataclasses.field(default_factory=dict)
    log_volume: float = 0.0
    order: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(COMPONENTS))
    block_rows: int | None = None


def affine(p: Problem, unit: Any = 1.0, offset: float = 0.0, **options: Any) -> Change:
    """Other units, and another origin."""
    rows = p.x * unit + offset
    volume = float(np.log(np.broadcast_to(unit, OBS_DIM)).sum())
    return Change(rows, rows, p.x, options, options, log_volume=volume)


def rows_in_another_order(p: Problem) -> Change:
    """Rows in another order."""
    order = p.rng.permutation(ROWS)
    weights = {"weights": p.weights}
    return Change(p.x[order], p.x, p.x, {"weights": p.weights[order]}, weights)


def memory_map(p: Problem) -> Change:
    """A file, of which 100 rows at a time are brought to the device."""
    with TemporaryDirectory() as folder:
        np.save(path := Path(folder) / "x.npy", p.x)
        data = np.load(path, mmap_mode="r")  # the file outlives its name
    return Change(data, p.x, p.x, block_rows=100)


def stream(p: Problem) -> Change:
    """Batches of unequal length, one cluster after another."""
    order = np.argsort(p.labels, kind="stable")
    return Change(np.split(p.x[order], [100, 180]), p.x, p.x)


def sparse(p: Problem) -> Change:
    """A sparse matrix against the same as an array; most of its entries are not 0, as 0 is a value like others."""
    return Change(scipy.sparse.csr_array(p.x), p.x, p.x, block_rows=100)


def devices(p: Problem) -> Change:
    """Rows over eight devices against one."""
    mesh = jax.make_mesh((DEVICES,), ("data",))
    data = jax.device_put(np.float32(p.x), NamedSharding(mesh, PartitionSpec("data")))
    return Change(data, p.x, p.x)


def padding(p: Problem) -> Change:
    """Wild rows of weight 0 at the end."""
    rest = 1e6 * p.rng.normal(size=(ROWS - FEWER, OBS_DIM))
    data, weights = np.concatenate([p.x[:FEWER], rest]), np.r_[p.weights[:FEWER], np.zeros(ROWS - FEWER)]
    return Change(data, p.x[:FEWER], p.x[:FEWER], {"weights": weights}, {"weights": p.weights[:FEWER]})


def repetition(p: Problem) -> Change:
    """Rows repeated in place of weights 1 and 2."""
    counts = np.ones(FEWER, int)
    counts[p.rng.permutation(FEWER)[: ROWS - FEWER]] = 2
    data = p.rng.permutation(np.repeat(p.x[:FEWER], counts, axis=0))
    return Change(data, p.x[:FEWER], p.x[:FEWER], {}, {"weights": counts})


def common_factor(p: Problem, factor: float) -> Change:
    """Weights times a factor."""
    return Change(p.x, p.x, p.x, {"weights": factor * p.weights}, {"weights": p.weights})


def columns_in_another_order(p: Problem) -> Change:
    """Columns in another order."""
    order = p.rng.permutation(OBS_DIM)
    return Change(p.x[:, order], p.x[:, order], p.x)


def rotation(p: Problem) -> Change:
    """All rows turned."""
    turn = np.linalg.qr(p.rng.normal(size=(OBS_DIM, OBS_DIM)))[0]
    return Change(p.x @ turn, p.x @ turn, p.x)


def other_numbers(p: Problem, hidden: int = 0) -> Change:
    """Known labels by other numbers; none of the first `hidden` classes known."""
    order = np.array([2, 0, 3, 1])
    order[:hidden].sort()  # components of which nothing is known keep their order
    known = np.where(p.known < hidden, -1, p.known)
    renumbered = np.where(known >= 0, order[known], -1)
    return Change(p.x, p.x, p.x, {"labels": renumbered}, {"labels": known}, order=order)


def names(p: Problem) -> Change:
    """Known labels by names, which sort in another order."""
    order = np.array([2, 0, 3, 1])
    text = np.array(["T cell", "B cell", "ten", "NK cell"], object)  # sorted: B, NK, T, ten
    labels = [text[k] if k >= 0 else None for k in p.known]
    return Change(p.x, p.x, p.x, {"labels": labels}, {"labels": p.known}, order=order)


CHANGES: dict[str, Callable[[Problem], Change]] = {
    "rows in another order": rows_in_another_order,
    "memory map": memory_map,
    "batches by class": stream,
    "sparse matrix": sparse,
    "eight devices": devices,
    "rows of weight 0": padding,
    "origin 1e7": lambda p: affine(p, offset=1e7),
    "origin 1e8": lambda p: affine(p, offset=1e8),
    "whole 1e-20": lambda p: affine(p, 1e-20),
    "whole 60,000": lambda p: affine(p, 6e4),
    "whole 1e12": lambda p: affine(p, 1e12),
    "columns over 1e12": lambda p: affine(p, np.logspace(-6, 6, OBS_DIM), column_units="own"),
    "rotation": rotation,
    "weights by 1e-6": lambda p: common_factor(p, 1e-6),
    "weights by 1/N": lambda p: common_factor(p, 1 / ROWS),
    "weights by 1e6": lambda p: common_factor(p, 1e6),
    "rows repeated": repetition,
    "columns in another order": columns_in_another_order,
    "labels by other numbers": other_numbers,
    "two classes by other numbers": lambda p: other_numbers(p, hidden=2),
    "labels by name": names,
}
"""What a fit does not depend on."""

ONLY_FOR = {"columns over 1e12": ("diagonal",), "rotation": ("scale", "full")}
"""Kinds of noise that a change says nothing of are left out: there the model itself is another one."""

NOT_ONLINE = (
    "rows in another order",
    "memory map",
    "batches by class",
    "sparse matrix",
    "rows of weight 0",
    "rows repeated",
)
"""Online EM takes a step after every batch: other batches are another computation."""


def fit(
    problem_data: Any, noise: str, options: dict[str, Any], *, online: bool = False, dtype: str = "float32"
) -> EMResult:
    """The fit that is compared."""
    head = AnalyticHMoG(LAT_DIM, COMPONENTS, obs_rep=noise, param_dtype=dtype)
    given = {"weights": None, "labels": None} | options
    if online:
        return fit_online_em(head, problem_data, jax.random.key(0), batch_size=100, passes=2, **given)
    return fit_em(head, problem_data, jax.random.key(0), **given)


def fit_both(change: Change, noise: str, **options: Any) -> tuple[EMResult, EMResult]:
    """The fit to the samples as they were, and to the changed ones."""
    before = fit(change.before, noise, change.options_before, **options)
    size = sources.BLOCK_BYTES
    try:
        if change.block_rows is not None:
            itemsize = np.dtype(options.get("dtype", "float32")).itemsize
            sources.BLOCK_BYTES = change.block_rows * OBS_DIM * itemsize
        return before, fit(change.data, noise, change.options, **options)
    finally:
        sources.BLOCK_BYTES = size


def deviations(change: Change, before: Any, after: Any) -> tuple[float, float]:
    """Largest difference of responsibilities, and of log-densities per column.

    Args:
        change: what was changed.
        before: output for the rows as they were (`HMoGOutput`).
        after: output for the changed rows.
    """
    order = change.order
    apart = np.exp(np.asarray(after.log_responsibilities)[:, order]) - np.exp(np.asarray(before.log_responsibilities))
    lifted = np.asarray(after.log_density, np.float64) + change.log_volume - np.asarray(before.log_density, np.float64)
    return float(np.abs(apart).max()), float(np.abs(lifted).max()) / change.before.shape[1]


def started(head: Any, result: EMResult, x: np.ndarray) -> Any:
    """Output of a head that is started from a fit, or None with a warning that it cannot hold the fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            variables, _ = warm_start(head, result.natural, x)
        except ValueError:
            return None
    if any(issubclass(warning.category, WarmStartWarning) for warning in caught):
        return None
    return head.apply(variables, x)


@dataclasses.dataclass(frozen=True)
class Config:
    """The comparison.

    Attributes:
        changes: names of `CHANGES`.
        seeds: problems.
    """

    changes: tuple[str, ...] = tuple(CHANGES)
    seeds: int = 5


def main(config: Config) -> None:
    """Print a table: the largest deviation of responsibilities, and of log-densities per column."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    began, columns = time.perf_counter(), (*NOISES, "online", *STARTS)
    table = Table("what is changed", *columns)
    for name in config.changes:
        cells: dict[str, list] = {column: [] for column in columns}
        for seed in range(config.seeds):
            for column, found in of_one_change(name, seed).items():
                cells[column].append(found)
        table.add_row(name, *map(text_of, cells.values()))
    table.caption = "responsibilities / log-density per column; -: another model; warning: the head cannot hold it"
    console = Console(width=200)
    console.print(table)
    versions = f"jax {jax.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}"
    console.print(f"{config.seeds} seeds, {time.perf_counter() - began:.0f} s, float32; {versions}")


def of_one_change(name: str, seed: int) -> dict[str, tuple[float, float] | None]:
    """The deviations in each column; None where a head warns that it cannot hold the fit."""
    found: dict[str, tuple[float, float] | None] = {}
    for noise in ONLY_FOR.get(name, NOISES):
        change = CHANGES[name](Problem.of(noise, seed))
        fits = fit_both(change, noise)
        found[noise] = deviations(change, *of_models(fits, change))
        if noise != "diagonal":
            continue
        if name not in NOT_ONLINE:
            found["online"] = deviations(change, *of_models(fit_both(change, noise, online=True), change))
        for start, make in STARTS.items():
            said = [started(make(), *given) for given in zip(fits, (change.before, change.rows), strict=True)]
            found[start] = None if None in said else deviations(change, *said)
    return found


def of_models(fits: tuple[EMResult, EMResult], change: Change) -> tuple[Any, Any]:
    """Outputs of both fits for their rows."""
    return infer(fits[0].natural, change.before), infer(fits[1].natural, change.rows)


def text_of(found: list[tuple[float, float] | None]) -> str:
    """The largest of the deviations over seeds."""
    kept = [pair for pair in found if pair is not None]
    if len(kept) < len(found):
        return "warning"
    return f"{max(a for a, _ in kept):.0e} / {max(b for _, b in kept):.0e}" if kept else "-"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="tyro")
    main(tyro.cli(Config, description=__doc__))
