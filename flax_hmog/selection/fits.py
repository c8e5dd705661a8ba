"""The fits of a selection: which there are, how they run, and the folder in which those that are finished are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.data.framing import share_bounds
from flax_hmog.em.fit import Fit, fit_em
from flax_hmog.em.options import EMOptions
from flax_hmog.em.padding import padded_sizes
from flax_hmog.em.result import ConvergenceWarning, OverfitWarning, WildRowsWarning
from flax_hmog.heads.modules import AnalyticHMoG
from flax_hmog.model.checks import check_size, door
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.kinds import Array
from flax_hmog.model_file import load, write_model

MANIFEST = "selection.json"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: K, L and the kind of noise."""

    n_components: int
    lat_dim: int
    obs_rep: str

    def head(self, obs_dim: int) -> AnalyticHMoG:
        """The head of this setting."""
        return AnalyticHMoG(self.lat_dim, self.n_components, obs_dim=obs_dim, obs_rep=self.obs_rep)

    def __str__(self) -> str:
        return f"K = {self.n_components}, L = {self.lat_dim}, {self.obs_rep} noise"


@dataclasses.dataclass(frozen=True)
class Found:
    """A finished fit.

    Attributes:
        natural: the model.
        objective: penalised log-likelihood per row.
        converged: True if EM has converged.
        seconds: of processor time.
    """

    natural: Natural
    objective: float
    converged: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that settings are compared on.

    Attributes:
        x: rows (N, D'), of the columns that are compared.
        weights: (N,), that sum to the number of rows they stand for.
        folds: the fold of each row (N,).
        missing: as in `fit_em`.
        columns: True for the columns (D,) that vary in all training parts; densities of others compare with none, as
            pseudo-samples alone bound them.
        given: rows (N, D) of all columns.
    """

    x: np.ndarray
    weights: np.ndarray
    folds: np.ndarray
    missing: str
    columns: np.ndarray
    given: np.ndarray


class Fits:
    """Fits of settings to rows, each run once: those in the folder are read.

    Args:
        rows: the rows.
        key: PRNG key of the call.
        options: of the fits.
        workdir: the folder, or None.
    """

    def __init__(self, rows: Rows, key: Array, options: EMOptions, workdir: str | Path | None) -> None:
        self.rows, self.key, self.options = rows, key, options
        self.folder = None if workdir is None else Path(workdir)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_folder(self.folder / MANIFEST)

    def of_all(self, setting: Setting, seed: int) -> Found:
        """The fit to all rows with a seed."""
        return self._found(setting, f"seed{seed}", None, seed)

    def without(self, setting: Setting, fold: int) -> Found:
        """The fit to the rows outside a fold."""
        return self._found(setting, f"without{fold}", self.rows.folds != fold, fold)

    def failure(self, setting: Setting) -> str | None:
        """The cause for which a fit of the setting has failed before."""
        path = self._path(setting, "failed.json")
        return json.loads(path.read_text())["cause"] if path is not None and path.exists() else None

    def failed(self, setting: Setting, cause: str) -> None:
        """Keep the cause for which a fit of the setting has failed."""
        path = self._path(setting, "failed.json")
        if path is not None:
            _write(path, {"cause": cause})

    def _found(self, setting: Setting, role: str, chosen: np.ndarray | None, seed: int) -> Found:
        path = self._path(setting, f"{role}.npz")
        if path is not None and path.exists():
            kept = load(path)
            return Found(kept.natural, **kept.notes)
        x, weights = self._training(setting, chosen)
        found = self.fit(setting, x, weights, seed)
        if path is not None:
            write_model(found.natural, path, notes={name: v for name, v in vars(found).items() if name != "natural"})
        return found

    def fit(self, setting: Setting, x: np.ndarray, weights: np.ndarray, seed: int) -> Found:
        """A fit of rows (N, D)."""
        key, start = jax.random.fold_in(self.key, seed), time.process_time()
        with warnings.catch_warnings():
            for known in (ConvergenceWarning, OverfitWarning, WildRowsWarning):  # the table shows what they say
                warnings.simplefilter("ignore", known)
            head = setting.head(x.shape[1])
            options = options_of(setting.obs_rep, self.options, self.rows.x)
            result = fit_em(head, x, key, weights=weights, options=options, missing=self.rows.missing)
        notes: dict[str, Any] = {
            "objective": float(result.objective_history[-1]),
            "converged": result.converged,
            "seconds": time.process_time() - start,
        }
        return Found(result.natural, **notes)

    def _training(self, setting: Setting, chosen: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        x, weights = self.rows.x, self.rows.weights
        if chosen is None:
            return x, weights
        if (count := int((weights[chosen] > 0).sum())) < setting.n_components:
            raise ValueError(
                f"{door()}: `n_components` must be at most the rows of a training part; got {setting.n_components} for "
                f"{count} rows. Lower it, or raise n_folds."
            )
        if padded_sizes(len(x), x.shape[1], setting.lat_dim, setting.n_components) is None:
            return x[chosen], weights[chosen]
        return x, np.where(chosen, weights, 0)  # of the same size, and so without programs of their own

    def _path(self, setting: Setting, name: str) -> Path | None:
        stem = f"{setting.obs_rep}-K{setting.n_components}-L{setting.lat_dim}"
        return None if self.folder is None else self.folder / f"{stem}-{name}"

    def _check_folder(self, path: Path) -> None:
        """Write what the fits depend on to the folder; ValueError where the folder is that of others."""
        own = {
            "rows": digest(self.rows.x, self.rows.weights, self.rows.folds),
            "key": np.asarray(_key_data(self.key)).tolist(),
            "options": repr(self.options),
            "missing": self.rows.missing,
        }
        if not path.exists():
            _write(path, own)
            return
        kept = json.loads(path.read_text())
        differ = [name for name, value in own.items() if kept.get(name) != value]
        if differ:
            raise ValueError(
                f"{door()}: `workdir` must be empty or hold fits of the same call; got {path.parent}, with other "
                f"{' and '.join(differ)}. Give another folder, or delete this one."
            )


def settings_of(n_components: Any, lat_dim: Any, obs_rep: Any) -> list[Setting]:
    """All combinations, without repeats; ValueError for sizes below 1, or none."""
    numbers = {name: _several(value) for name, value in (("n_components", n_components), ("lat_dim", lat_dim))}
    for name, values in numbers.items():
        for value in values:
            check_size(name, value)
    each = itertools.product(_several(obs_rep), numbers["lat_dim"], numbers["n_components"])
    settings = list(dict.fromkeys(Setting(int(k), int(l), str(rep)) for rep, l, k in each))
    if not settings:
        raise ValueError(
            f"{door()}: `n_components`, `lat_dim` and `obs_rep` must name at least one setting; got none. Name some."
        )
    return settings


def wild_rows_of(
    settings: list[Setting], x: np.ndarray, weights: Any, key: Array, options: EMOptions
) -> Iterator[tuple[int, ...]]:
    """The numbers of the rows that a fit of each kind of noise leaves out; raises as `fit_em` for unusable rows."""
    for rep in dict.fromkeys(setting.obs_rep for setting in settings):
        fit = Fit(Setting(1, 1, rep).head(x.shape[1]), x, key, weights, None, options_of(rep, options, x))
        yield tuple(fit.source.framing.wild)


def options_of(obs_rep: str, options: EMOptions, x: np.ndarray) -> EMOptions:
    """The options of a fit: "auto" units are those of columns for full noise too, as they are for diagonal noise."""
    by_column = obs_rep == "full" and options.column_units == "auto" and not share_bounds(x)
    return dataclasses.replace(options, column_units="own") if by_column else options


def _several(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str | int | np.integer) else tuple(value)


def _key_data(key: Array) -> Array:
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def digest(*arrays: np.ndarray) -> str:
    """A digest of arrays with their dtypes and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2))
    part.replace(path)
