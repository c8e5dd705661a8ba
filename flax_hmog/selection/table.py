"""The table of a selection: the scores of every setting, and what they recommend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np

from flax_hmog.model.checks import public
from flax_hmog.model.coordinates import Natural
from flax_hmog.model_file import load, save
from flax_hmog.selection.fits import Setting

SHOWN = {
    "n_components": "K",
    "lat_dim": "L",
    "obs_rep": "noise",
    "held_out": "held-out",
    "behind": "behind",
    "bic": "BIC",
    "icl": "ICL",
    "entropy": "entropy",
    "generalisation": "probe",
    "agreement": "seeds",
    "clusters_in_use": "clusters",
    "seconds": "CPU s",
}
FULL_WIDTH, LESS = 100, ("entropy", "seconds")  # characters of a line with all columns, and those that go first


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of one setting; None where there is none, as of all but the failure where a fit failed.

    Attributes:
        n_components: K.
        lat_dim: L.
        obs_rep: kind of noise.
        held_out: mean log-density of rows under models that were fitted without them, nats per row.
        held_out_error: its standard error over rows.
        behind: by how much it is below the best setting of the table, row by row.
        behind_error: standard error of this difference, which is smaller than that of either.
        log_likelihood: of all rows under the model of all rows, nats.
        n_parameters: of the model (`n_parameters`).
        bic: -2 log-likelihood + parameters log rows; the lower the better.
        icl: BIC + 2 rows entropy.
        entropy: mean entropy of the assignments to clusters, nats per row.
        entropies: the same with 1, 2, ... K clusters, merged so that it falls most.
        generalisation: kappa of the clusters and of what a linear probe says that has learnt them on other rows.
        agreement: mean adjusted Rand index of the clusters of models from different seeds.
        clusters_in_use: number of clusters that are the most probable one of some row.
        converged: True if all fits have.
        seconds: of processor time for its fits.
        failure: the cause, where a fit failed; None otherwise.

    Example:
        >>> str(Scores(3, 2, "diagonal", failure="ValueError: too few rows").setting)
        'K = 3, L = 2, diagonal noise'
    """

    n_components: int
    lat_dim: int
    obs_rep: str
    held_out: float | None = None
    held_out_error: float | None = None
    behind: float | None = None
    behind_error: float | None = None
    log_likelihood: float | None = None
    n_parameters: int = 0
    bic: float | None = None
    icl: float | None = None
    entropy: float | None = None
    entropies: tuple[float, ...] = ()
    generalisation: float | None = None
    agreement: float | None = None
    clusters_in_use: int = 0
    converged: bool = False
    seconds: float | None = None
    failure: str | None = None

    @property
    def setting(self) -> Setting:
        """K, L and kind of noise."""
        return Setting(self.n_components, self.lat_dim, self.obs_rep)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Result of `select`: a table of settings, and what it recommends.

    Attributes:
        rows: `Scores` of every setting.
        recommended: number of the recommended one among them.
        agrees: True if the criteria agree on it.
        reasons: why it is recommended, and on what criteria disagree: sentences.
        natural: its model, of all rows.
        clusters: the cluster of each of its components (K,).
        assignments: clusters of the rows (N,) under it; -1 for rows that were left out. None after `load`.
        left_out: numbers of the wild rows, which took no part.
        columns: names of the columns (D,), or None.

    Example:
        >>> import jax
        >>> from flax_hmog import select
        >>> from flax_hmog.toy import x
        >>> selection = select(x, jax.random.key(0), n_components=(1, 3), lat_dim=1)
        >>> selection.best.n_components
        3
    """

    rows: tuple[Scores, ...]
    recommended: int
    agrees: bool
    reasons: tuple[str, ...]
    natural: Natural
    clusters: np.ndarray
    assignments: np.ndarray | None = None
    left_out: tuple[int, ...] = ()
    columns: tuple[str, ...] | None = None

    @property
    def best(self) -> Scores:
        """The scores of the recommended setting."""
        return self.rows[self.recommended]

    def table(self) -> dict[str, list[Any]]:
        """The table as columns, for example for pandas.DataFrame."""
        names = [field.name for field in dataclasses.fields(Scores)]
        return {name: [getattr(row, name) for row in self.rows] for name in names}

    @public
    def save(self, path: str | Path) -> None:
        """Save the recommended model and the table to one .npz file, which is also one of `flax_hmog.load`.

        Args:
            path: of the file.

        Example:
            >>> import jax, tempfile
            >>> from flax_hmog import select
            >>> from flax_hmog.toy import x
            >>> selection = select(x, jax.random.key(0), n_components=(1, 3), lat_dim=1)
            >>> path = tempfile.mkdtemp() + "/selection.npz"
            >>> selection.save(path)
            >>> Selection.load(path).rows == selection.rows
            True
        """
        names = "recommended", "agrees", "reasons", "left_out"
        notes = {name: getattr(self, name) for name in names} | {"rows": [dataclasses.asdict(row) for row in self.rows]}
        save(self.natural, path, clusters=self.clusters, columns=self.columns, notes={"selection": notes})

    @classmethod
    @public
    def load(cls, path: str | Path) -> Selection:
        """The selection of a file that `save` wrote, but for the clusters of its rows.

        Args:
            path: of the file.

        Returns:
            `Selection`.

        Raises:
            ValueError: for a file that is missing, damaged or holds no selection.

        Example:
            >>> import jax, tempfile
            >>> from flax_hmog import select
            >>> from flax_hmog.toy import x
            >>> selection = select(x, jax.random.key(0), n_components=(1, 3), lat_dim=1)
            >>> path = tempfile.mkdtemp() + "/selection.npz"
            >>> selection.save(path)
            >>> Selection.load(path).best.n_components
            3
        """
        saved = load(path)
        if "selection" not in saved.notes or saved.clusters is None:
            raise ValueError(
                f"load: `path` must be a file that Selection.save wrote; got {path}, a model alone. Use flax_hmog.load."
            )
        notes = saved.notes["selection"]
        return cls(
            rows=tuple(Scores(**row | {"entropies": tuple(row["entropies"])}) for row in notes["rows"]),
            recommended=notes["recommended"],
            agrees=notes["agrees"],
            reasons=tuple(notes["reasons"]),
            natural=saved.natural,
            clusters=saved.clusters,
            left_out=tuple(notes["left_out"]),
            columns=saved.columns,
        )

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """The table and its verdict, for rich."""
        from rich.table import Table

        left_out = set() if len({row.obs_rep for row in self.rows}) > 1 else {"obs_rep"}
        left_out |= set(LESS) if options.max_width < FULL_WIDTH else set()
        shown = {name: heading for name, heading in SHOWN.items() if name not in left_out}
        table = Table("", *shown.values(), box=None, pad_edge=False)
        for number, row in enumerate(self.rows):
            style = "bold" if number == self.recommended else "dim" if row.failure else ""
            table.add_row("*" if number == self.recommended else "", *cells(row, shown), style=style)
        yield table
        yield ""
        yield from self.reasons

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(self, highlight=False)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def cells(row: Scores, names: Iterable[str]) -> list[str]:
    """The cells of these columns of a row in the printed table; the cause of a failure in place of the first score."""
    sizes = {"n_components": str(row.n_components), "lat_dim": str(row.lat_dim), "obs_rep": row.obs_rep}
    if row.failure is not None:
        return [*(size for name, size in sizes.items() if name in names), f"failed: {row.failure}"]
    digits = 3 if cast(float, row.held_out_error) < 1 else 1
    given = sizes | {
        "held_out": f"{row.held_out:.{digits}f} ± {row.held_out_error:.{digits}f}",
        "behind": f"{row.behind:.{digits}f} ± {row.behind_error:.{digits}f}" if row.behind else "best",
        "bic": f"{row.bic:.0f}",
        "icl": f"{row.icl:.0f}",
        "seconds": f"{row.seconds:.2f}",
    }
    return [given.get(name) or _cell(getattr(row, name)) for name in names]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
