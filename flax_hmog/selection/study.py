"""`sweep`: many settings, drawn by Optuna where held-out densities are high; several processes share one study."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_hmog.em.options import EMOptions, PseudoCounts, chosen_options
from flax_hmog.model.checks import check_size, door, public
from flax_hmog.model.kinds import Array
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Samples
from flax_hmog.selection.compare import held_out_densities, rows_to_compare
from flax_hmog.selection.fits import Fits, Rows, Setting, digest

FIRST_TRIALS = 8  # that no other is compared with yet: none is given up


@public
def sweep(
    x: Samples,
    key: Array,
    *,
    storage: str | Path,
    n_trials: int = 40,
    n_components: tuple[int, int] = (2, 40),
    lat_dim: tuple[int, int] = (1, 10),
    obs_rep: Any = ("diagonal",),
    pseudo_samples: tuple[float, float] = (1.0, 100.0),
    weights: Samples | None = None,
    missing: str = "refuse",
    n_folds: int = 3,
    worker: int = 0,
    progress: bool = False,
    options: EMOptions = EMOptions(),
    **changes: object,
) -> Any:
    """Search sizes, noise and the strength of the regulariser for the highest held-out log-density, by Optuna.

    A trial is fitted without one fold of the rows after another, and given up where the mean so far is below the
    median of other trials. The study is kept in a file: the same call goes on from there, and calls in other processes
    share it, each with a number of its own. Trials that failed are kept, with their cause as `user_attrs["failure"]`.
    Held-out densities choose a density, and more components than there are clusters: compare the best few by `select`.

    Args:
        x: rows (N, D): an array or a table, in memory.
        key: PRNG key of starts, folds and proposals.
        storage: the file.
        n_trials: trials in the study when it is done, those of other processes included.
        n_components: least and largest K.
        lat_dim: least and largest L.
        obs_rep: kinds of noise, or one.
        pseudo_samples: least and largest `PseudoCounts.components`.
        weights: of the rows (N,).
        missing: "nan" takes NaN for missing values, as in `fit_em`.
        n_folds: parts of the rows, each held out once; at least 2.
        worker: number of this process among those that share the study.
        progress: show a progress bar.
        options: of the fits, as in `fit_em`; its regulariser apart from `components` is kept.
        changes: single options by name.

    Returns:
        The study, an `optuna.study.Study`: `best_params`, `best_value` in nats per row, `trials_dataframe()`.

    Raises:
        ImportError: without the extra `sweep`.
        TypeError, ValueError: for unusable rows or arguments, or a file with a study of other rows.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import x
        >>> file = tempfile.mkdtemp() + "/study.log"
        >>> study = sweep(x, jax.random.key(0), storage=file, n_trials=2, n_components=(1, 3), lat_dim=(1, 2))
        >>> len(study.trials), sorted(study.best_params)
        (2, ['lat_dim', 'n_components', 'obs_rep', 'pseudo_samples'])
    """
    optuna = require("optuna", "sweep")
    options = chosen_options("fit_em", options, changes)
    check_size("n_trials", n_trials)
    check_size("n_folds", n_folds, at_least=2)
    ranges = {"n_components": n_components, "lat_dim": lat_dim, "pseudo_samples": pseudo_samples}
    _check_ranges(ranges)
    kinds = (obs_rep,) if isinstance(obs_rep, str) else tuple(obs_rep)
    settings = [Setting(n_components[0], lat_dim[0], kind) for kind in kinds]
    rows, _, _ = rows_to_compare(x, weights, settings, key, options, missing, n_folds)
    optuna.logging.set_verbosity(logging.ERROR)  # a trial that failed is told by the study
    study = _study(optuna, Path(storage), rows, key, worker)

    def objective(trial: Any) -> float:
        setting = Setting(
            trial.suggest_int("n_components", *n_components, log=True),
            trial.suggest_int("lat_dim", *lat_dim),
            trial.suggest_categorical("obs_rep", kinds),
        )
        strength = trial.suggest_float("pseudo_samples", *pseudo_samples, log=True)
        given = options.regularizer if isinstance(options.regularizer, PseudoCounts) else PseudoCounts()
        regularizer = dataclasses.replace(given, components=strength)
        fits = Fits(rows, key, dataclasses.replace(options, regularizer=regularizer), None)
        try:
            return _score(optuna, trial, fits, setting)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("failure", f"{type(error).__name__}: {error}")
            raise

    states = optuna.trial.TrialState
    ended = states.COMPLETE, states.PRUNED, states.FAIL
    until = optuna.study.MaxTrialsCallback(n_trials, states=ended)
    left = n_trials - len(study.get_trials(deepcopy=False, states=ended))
    if left > 0:
        given = {"callbacks": [until], "catch": (Exception,), "show_progress_bar": progress}
        study.optimize(objective, n_trials=left, **given)
    return study


def _score(optuna: Any, trial: Any, fits: Fits, setting: Setting) -> float:
    """Mean held-out log-density; given up after a fold that is below the median."""
    rows, total, count = fits.rows, 0.0, 0.0
    for fold in range(int(rows.folds.max()) + 1):
        own, densities = held_out_densities(fits, setting, fold)
        total, count = total + float(rows.weights[own] @ densities), count + float(rows.weights[own].sum())
        trial.report(total / count, fold)
        if trial.should_prune():
            raise optuna.TrialPruned
    return total / count


def _study(optuna: Any, path: Path, rows: Rows, key: Array, worker: int) -> Any:
    """The study of a file, for these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    storage = optuna.storages.JournalStorage(backend)
    found = [summary.study_name for summary in storage.get_all_studies()]
    seed = np.random.SeedSequence([*np.asarray(jax.random.key_data(key)).tolist(), worker, len(found)])
    study = optuna.create_study(
        storage=storage,
        study_name="sweep",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=int(seed.generate_state(1)[0])),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST_TRIALS),
    )
    own = digest(rows.x, rows.weights, rows.folds)
    if study.user_attrs.get("rows", own) != own:
        raise ValueError(
            f"{door()}: `storage` must be a new file or hold a study of the same rows; got {path}, of others. Give "
            "another file."
        )
    study.set_user_attr("rows", own)
    return study


def _check_ranges(ranges: dict[str, tuple[Any, Any]]) -> None:
    for name, (least, largest) in ranges.items():
        if not 0 < least <= largest:
            raise ValueError(
                f"{door()}: `{name}` must be (least, largest), above 0; got {(least, largest)}. Swap them."
            )
