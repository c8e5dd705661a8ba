"""Arguments of scikit-learn's kind: rows of a table, a random state, and the precision that rows ask for."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
from sklearn.utils import check_random_state

from flax_hmog.data.containers import in_memory
from flax_hmog.model.checks import allowing, check_size, named
from flax_hmog.model.kind import as_rep


def precision(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Computation in float64, for rows in float64; as it is otherwise."""
    return jax.enable_x64(True) if np.dtype(dtype) == np.float64 else contextlib.nullcontext()


def check_columns(X: Any, allows_missing: bool) -> None:
    """TypeError or ValueError, by name, for a column of a table that does not hold numbers in all rows, or its name."""
    names = list(map(str, X.columns))
    if len(set(names)) < len(names):
        several = max(names, key=names.count)
        raise ValueError(
            f"HMoG: `X` must have columns of different names; got {several!r} {names.count(several)} times. Rename one."
        )
    with named("HMoG"), allowing("nan" if allows_missing else "refuse"):
        rows = in_memory("X", X)
    if allows_missing:
        return
    missing = np.isnan(rows).sum(axis=0)
    if missing.any():
        column = int(missing.argmax())
        raise ValueError(
            f"HMoG: `X` must hold no missing values (NaN); got {missing[column]} in column "
            f'{list(X.columns)[column]!r}. Take missing="nan", impute them, or drop these rows.'
        )


def check_sizes(model: Any, columns: int) -> None:
    """ValueError or TypeError for arguments of `HMoG` that a fit would refuse under names of its own."""
    with named("HMoG"):
        check_size("n_components", model.n_components)
        if model.n_clusters is not None:
            check_size("n_clusters", model.n_clusters)
        if model.lat_dim != "auto":
            check_size("lat_dim", model.lat_dim, at_most=columns)
        check_size("n_init", model.n_init)
        check_size("max_iter", model.max_iter)
        as_rep(model.noise, argument="noise")
    if (
        isinstance(model.tol, bool)
        or not isinstance(model.tol, int | float | np.integer | np.floating)
        or not model.tol >= 0
    ):
        raise ValueError(f"HMoG: `tol` must be a number of at least 0; got {model.tol!r}. The default is 1e-3.")


def check_contamination(contamination: Any) -> None:
    """ValueError for what is neither "auto" nor a share of outliers, as scikit-learn's detectors take it."""
    if contamination == "auto" or (isinstance(contamination, float | np.floating) and 0 < contamination <= 0.5):
        return
    raise ValueError(
        f'HMoG: `contamination` must be a share up to 0.5 or "auto"; got {contamination!r}. Take "auto" where none is '
        "known."
    )


def seed_of(random_state: Any) -> int:
    """A seed of jax for any `random_state` of scikit-learn."""
    return seeds_of(random_state, 1)[0]


def seeds_of(random_state: Any, count: int) -> list[int]:
    """So many seeds, as as many calls of `seed_of` with one generator give them."""
    return [int(seed) for seed in check_random_state(random_state).randint(np.iinfo(np.int32).max, size=count)]
