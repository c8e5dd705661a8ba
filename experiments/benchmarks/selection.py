"""`select` beside known labels, and its time on a small table.

    python -m experiments.benchmarks.selection [--data FOLDER] [--workdir FOLDER]
    python -m experiments.benchmarks.selection --only small

Sets: scikit-learn's iris, wine, breast cancer and digits, and those of FOLDER that are there: `uci/pendigits.npz`,
`uci/optdigits.npz`, `usps/usps_9298.npz` (`X`, `y`), `scrna/pbmc4k.npz`, `scrna/mouse_bladder.npz` (CSR counts, `y`);
of each 1,000 rows at random. Components are the clusters, no number of clusters is given. Printed for each set and
seed: the NMI of the recommended setting, of the best one of the table by the labels, and of those that a single
criterion takes.

Small: 1,000 x 8 rows of four clusters, K = 1 to 9 and all kinds of noise: processor seconds once all is compiled, and
the agreement with the clusters; as they are, with one cell of 1e6, and in units from 1 to 1e4.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
import scipy.sparse
import sklearn.datasets
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from flax_hmog import Scores, Selection, load, select
from flax_hmog.inference.padded import ModelOfFewSizes
from flax_hmog.training.programs import keep_programs

ROWS, GENES, WITHIN = 1000, 200, 0.02
KINDS = "scale", "diagonal", "full"
FEW: dict[str, Any] = {
    "n_components": (1, 2, 3, 4, 5, 6, 8),
    "lat_dim": (1, 2, 4),
    "obs_rep": KINDS,
}  # for three classes at most
MANY: dict[str, Any] = {"n_components": (5, 10, 15, 20, 32), "lat_dim": (2, 4, 8), "obs_rep": KINDS[:2]}
BUNDLED = "iris", "wine", "breast_cancer", "digits"
FILES = "uci/pendigits", "uci/optdigits", "usps/usps_9298", "scrna/pbmc4k", "scrna/mouse_bladder"
SMALL_K = range(1, 10)


def main(
    data: Path | None = None,
    workdir: Path | None = None,
    seeds: tuple[int, ...] = (0, 1),
    sets: tuple[str, ...] = (),
    only: str | None = None,
) -> None:
    """Print both tables.

    Args:
        data: folder of the sets that do not come with scikit-learn.
        workdir: folder in which finished fits are kept.
        seeds: of rows and fits.
        sets: those to take, by name; all that are there by default.
        only: "sets" or "small".
    """
    keep_programs()
    console = Console(width=160)
    if only != "small":
        with tempfile.TemporaryDirectory() as folder:
            console.print(labelled(workdir or Path(folder), dict(known(data, sets)), seeds))
    if only != "sets":
        console.print(small())


def labelled(
    workdir: Path, found: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]], seeds: tuple[int, ...]
) -> Table:
    """The sets."""
    columns = "set", "seed", "recommended", "NMI", "best by labels", "NMI", "BIC", "ICL", "held-out", "agree", "CPU s"
    table, near = Table(*columns, title="NMI of the setting that each criterion takes"), 0
    behind: list[list[float]] = []
    for name, read in found.items():
        rows, labels = read()
        for seed in seeds:
            chosen = np.random.default_rng(seed).permutation(len(rows))[:ROWS]
            x, y = rows[chosen].astype(np.float32), np.unique(labels[chosen], return_inverse=True)[1]
            folder, start = workdir / f"{Path(name).name}-{seed}", time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grid = FEW if y.max() < 3 else MANY
                selection = select(x, jax.random.key(seed), **grid, workdir=folder)
            seconds = time.process_time() - start
            nmi = [agreement(row, folder, x, y, selection.left_out) for row in selection.rows]
            best, own = int(np.argmax(nmi)), nmi[selection.recommended]
            near += nmi[best] - own <= WITHIN
            single = [nmi[taken(selection, field, sign)] for field, sign in (("bic", 1), ("icl", 1), ("held_out", -1))]
            behind.append([nmi[best] - value for value in (own, *single)])
            table.add_row(
                Path(name).name, str(seed), str(selection.best.setting), f"{own:.3f}",
                str(selection.rows[best].setting), f"{nmi[best]:.3f}", *(f"{value:.3f}" for value in single),
                "yes" if selection.agrees else "no", f"{seconds:.0f}",
            )  # fmt: skip
    means = "recommended {:.3f}, BIC {:.3f}, ICL {:.3f}, held-out {:.3f}".format(*np.mean(behind, axis=0))
    table.caption = f"{near} of {len(behind)} within {WITHIN} of the best by labels; behind it on average: {means}"
    return table


def taken(selection: Selection, field: str, sign: int) -> int:
    """Number of the setting that one criterion takes."""
    values = [getattr(row, field) for row in selection.rows]
    return int(np.argmin([np.inf if value is None else sign * value for value in values]))


def agreement(row: Scores, folder: Path, x: np.ndarray, y: np.ndarray, left_out: tuple[int, ...]) -> float:
    """NMI of the clusters of a setting, from its better fit to all rows; 0 for one that failed."""
    if row.failure is not None:
        return 0.0
    stem = f"{row.obs_rep}-K{row.n_components}-L{row.lat_dim}-seed"
    fits = [load(path) for path in sorted(folder.glob(f"{stem}[0-9].npz"))]
    model = ModelOfFewSizes(max(fits, key=lambda fit: fit.notes["objective"]).natural, 64)
    kept = np.delete(np.arange(len(x)), list(left_out))
    clusters = model(x[kept]).log_responsibilities.argmax(axis=1)
    return float(normalized_mutual_info_score(y[kept], clusters))


def known(
    data: Path | None, sets: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], tuple[np.ndarray, np.ndarray]]]]:
    """Names of the sets that are there, and functions that read them."""
    for name in BUNDLED:
        if not sets or name in sets:
            yield name, lambda name=name: bundled(name)  # type: ignore[misc]
    for file in FILES:
        path = None if data is None else data / f"{file}.npz"
        if path is not None and path.exists() and (not sets or Path(file).name in sets):
            yield file, lambda path=path: cells(path) if "scrna" in str(path) else images(path)  # type: ignore[misc]


def bundled(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels of scikit-learn's."""
    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return x / 16 if name == "digits" else x, y


def images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows from 0 to 1 and labels."""
    with np.load(path) as file:
        x, y = file["X"], file["y"]
    return x.reshape(len(x), -1) / x.max(), y


def cells(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of counts of the most variable genes, for cells of one size, and types."""
    with np.load(path) as file:
        parts = file["data"], file["indices"].astype(np.int32), file["indptr"]
        counts, y = scipy.sparse.csr_matrix(parts, shape=tuple(file["shape"])).toarray(), file["y"]
    sizes = counts.sum(axis=1, keepdims=True)
    x = np.log1p(counts * (sizes.mean() / sizes))
    return x[:, np.sort(np.argsort(-x.var(axis=0))[:GENES])], y


def small() -> Table:
    """The small table."""
    rng = np.random.default_rng(0)
    z = rng.integers(4, size=1000)
    x = (3 * rng.normal(size=(4, 8)))[z] + rng.normal(size=(1000, 2)) @ rng.normal(size=(2, 8))
    x += rng.normal(size=(1000, 8))
    wild = x.copy()
    wild[3, 5] = 1e6
    cases = {"as it is": x, "one cell of 1e6": wild, "units from 1 to 1e4": x * np.logspace(0, 4, 8)}
    title = f"1,000 x 8, K = 1 to 9, {', '.join(KINDS)} noise; load {os.getloadavg()[0]:.1f}"
    table = Table("rows", "L", "seeds", "fits", "CPU s", "recommended", "ARI", title=title)
    for name, rows in cases.items():
        for lat_dim, n_seeds in (((3,), 1), ((3,), 2), ((1, 2, 3, 4), 1)):
            given: Any = {"n_components": SMALL_K, "lat_dim": lat_dim, "obs_rep": KINDS, "n_seeds": n_seeds}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not table.row_count:  # programs are compiled once for all sizes
                    select(rows.astype(np.float32), jax.random.key(0), **given)
                start = time.process_time()
                selection = select(rows.astype(np.float32), jax.random.key(0), **given)
                seconds = time.process_time() - start
            assigned = cast(np.ndarray, selection.assignments)
            ari = adjusted_rand_score(z[assigned >= 0], assigned[assigned >= 0])
            cells = str(lat_dim), str(n_seeds), str(len(selection.rows) * (n_seeds + 2)), f"{seconds:.2f}"
            table.add_row(name, *cells, str(selection.best.setting), f"{ari:.3f}")
    return table


if __name__ == "__main__":
    tyro.cli(main)
