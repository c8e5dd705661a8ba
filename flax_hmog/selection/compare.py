"""`select`: fits of several settings, their scores without labels, and what these recommend."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flax_hmog.analysis.clusters import merged_responsibilities
from flax_hmog.analysis.criteria import n_parameters
from flax_hmog.analysis.merging import merge_components
from flax_hmog.data.containers import in_memory, is_table
from flax_hmog.data.framing import share_bounds
from flax_hmog.data.rows import check_weights, effective_weights
from flax_hmog.em.options import EMOptions, PseudoCounts, chosen_options
from flax_hmog.em.result import WildRowsWarning
from flax_hmog.inference.padded import ModelOfFewSizes
from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.checks import check_size, door, public
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import Floats, Samples
from flax_hmog.selection.fits import Fits, Found, Rows, Setting, settings_of, wild_rows_of
from flax_hmog.selection.measures import Probe, adjusted_rand, folds_of, merge_entropies, weighted_entropy
from flax_hmog.selection.table import Scores, Selection
from flax_hmog.selection.verdict import verdict_of

LEAST_ROWS = 64  # that are scored at once
FOLD_SEED = 1


@public
def select(
    x: Samples,
    key: Array,
    *,
    n_components: Any,
    lat_dim: Any,
    obs_rep: Any = "diagonal",
    n_clusters: int | None = None,
    weights: Samples | None = None,
    missing: str = "refuse",
    n_seeds: int = 2,
    n_folds: int = 2,
    columns: Sequence[str] | None = None,
    workdir: str | Path | None = None,
    progress: bool = False,
    options: EMOptions = EMOptions(),
    **changes: object,
) -> Selection:
    """Compare numbers of components and factors and kinds of noise, without labels.

    Every setting is fitted to all rows, from several seeds, and to all rows without a fold, for each fold. The table
    has the held-out log-density, BIC and ICL, the entropy of the assignments, how well clusters are found again on
    other rows by a linear probe, and how well seeds agree; `Selection` says what these recommend, and where they
    disagree. docs/choosing.md explains the columns and what they are worth.

    Args:
        x: rows (N, D): an array or a table, in memory.
        key: PRNG key of starts and folds.
        n_components: numbers of components K, or one.
        lat_dim: numbers of factors L, or one.
        obs_rep: kinds of noise, or one: "diagonal", "scale", "full".
        n_clusters: number of clusters that components are merged to; None for components as clusters.
        weights: of the rows (N,).
        missing: "nan" takes NaN for missing values, as in `fit_em`.
        n_seeds: fits to all rows, of which the best is described; with 1 no seeds can agree.
        n_folds: parts of the rows, each held out once; at least 2.
        columns: names of the columns (D,), which the file of the selection carries; a table has its own.
        workdir: a folder in which every finished fit is kept: the same call goes on from there, with more settings
            where more are named. A setting that failed is not tried again.
        progress: show a progress bar.
        options: of the fits, as in `fit_em`.
        changes: single options by name.

    Returns:
        `Selection`.

    Raises:
        TypeError, ValueError: for unusable rows or arguments, or where no setting can be fitted.

    Example:
        >>> import jax
        >>> from flax_hmog.toy import x
        >>> selection = select(x, jax.random.key(0), n_components=(1, 3), lat_dim=(1, 2))
        >>> selection.best.n_components, len(selection.rows)
        (3, 4)
    """
    options = chosen_options("fit_em", options, changes)
    _check_options(options)
    check_size("n_seeds", n_seeds)
    check_size("n_folds", n_folds, at_least=2)
    settings = settings_of(n_components, lat_dim, obs_rep)
    if n_clusters is not None:
        check_size("n_clusters", n_clusters)
    rows, kept, left_out = rows_to_compare(x, weights, settings, key, options, missing, n_folds)
    if columns is None and is_table(x) and hasattr(x, "columns"):
        columns = x.columns
    fits, probe = Fits(rows, key, options, workdir), Probe(rows.x, rows.weights, rows.folds)
    compared = [_Compared(setting) for setting in settings]
    shown = (TextColumn("select"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*shown, TimeElapsedColumn(), disable=not progress) as bar:
        task = bar.add_task("", total=len(settings))
        for one in compared:
            bar.update(task, description=str(one.setting))
            one.run(fits, probe, n_clusters, n_seeds)
            bar.advance(task)
    scores = _beside_the_best(compared, rows.weights)
    number, agrees, reasons = verdict_of(scores, n_clusters, share_bounds(rows.x))
    best = compared[number]
    if not rows.columns.all():
        best.refit(fits, n_clusters)
    assignments = np.full(len(kept), -1)
    assignments[kept] = best.assignments
    return Selection(
        rows=scores,
        recommended=number,
        agrees=agrees,
        reasons=(*reasons, *_constants(rows.columns)),
        natural=cast(Natural, best.natural),
        clusters=cast(np.ndarray, best.clusters),
        assignments=assignments,
        left_out=left_out,
        columns=None if columns is None else tuple(map(str, columns)),
    )


class _Compared:
    """A setting, and what its fits give."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.scores = setting, Scores(**dataclasses.asdict(setting))
        self.natural: Natural | None = None
        self.clusters: np.ndarray | None = None  # of its components
        self.assignments: np.ndarray | None = None  # of the rows
        self.held_out: Floats | None = None  # log-densities of the rows
        self.seed = 0  # of the best fit

    def refit(self, fits: Fits, n_clusters: int | None) -> None:
        """Fit all columns, those that were not compared among them."""
        rows = fits.rows
        found = fits.fit(self.setting, rows.given, rows.weights, self.seed)
        output = ModelOfFewSizes(found.natural, LEAST_ROWS)(rows.given, rows.missing)
        self.natural, (self.clusters, probabilities) = found.natural, _clusters(output, n_clusters)
        self.assignments = probabilities.argmax(axis=1)

    def run(self, fits: Fits, probe: Probe, n_clusters: int | None, n_seeds: int) -> None:
        """Fit and score; what fails is kept with its cause."""
        cause = fits.failure(self.setting)
        if cause is None:
            try:
                self._score(fits, probe, n_clusters, n_seeds)
            except Exception as error:  # of any kind: memory, numbers, arguments that this setting alone breaks
                cause = f"{type(error).__name__}: {error}"
                fits.failed(self.setting, cause)
        if cause is not None:
            self.scores = dataclasses.replace(self.scores, failure=cause)

    def _score(self, fits: Fits, probe: Probe, n_clusters: int | None, n_seeds: int) -> None:
        rows, weights = fits.rows, fits.rows.weights
        of_all = [fits.of_all(self.setting, seed) for seed in range(n_seeds)]
        outputs = [_inferred(found, rows) for found in of_all]
        described = [_clusters(output, n_clusters) for output in outputs]
        best = max(range(n_seeds), key=lambda seed: of_all[seed].objective)
        clusters, probabilities = described[best]
        held_out, seconds, converged = np.empty(len(rows.x)), 0.0, True
        for fold in range(int(rows.folds.max()) + 1):
            found = fits.without(self.setting, fold)
            held_out[rows.folds == fold] = _held_out(found, rows, fold)
            seconds, converged = seconds + found.seconds, converged and found.converged
        assigned = [each.argmax(axis=1) for _, each in described]
        total, log_density = weights.sum(), outputs[best].log_density.astype(np.float64)
        log_likelihood, parameters = float(weights @ log_density), n_parameters(of_all[best].natural)
        bic, entropy = parameters * np.log(total) - 2 * log_likelihood, weighted_entropy(probabilities, weights)
        mean, error = _mean_and_error(held_out, weights)
        self.natural, self.clusters, self.seed = of_all[best].natural, clusters, best
        self.assignments, self.held_out = assigned[best], held_out
        self.scores = dataclasses.replace(
            self.scores,
            held_out=mean,
            held_out_error=error,
            log_likelihood=log_likelihood,
            n_parameters=parameters,
            bic=float(bic),
            icl=float(bic + 2 * total * entropy),
            entropy=entropy,
            entropies=merge_entropies(np.exp(outputs[best].log_responsibilities.astype(np.float64)), weights),
            generalisation=probe.score(assigned[best]),
            agreement=_agreement(assigned, weights),
            clusters_in_use=len(np.unique(assigned[best][weights > 0])),
            converged=converged and all(found.converged for found in of_all),
            seconds=seconds + sum(found.seconds for found in of_all),
        )


def _check_options(options: EMOptions) -> None:
    if not isinstance(options.init, str):
        raise ValueError(
            f'{door()}: `init` must be "pca" or "fa"; got {type(options.init).__name__}. Settings differ in size.'
        )
    if not isinstance(options.regularizer, PseudoCounts | None):
        raise ValueError(
            f"{door()}: `regularizer` must be PseudoCounts or None; got {type(options.regularizer).__name__}. "
            "Pseudo-samples have the size of one setting."
        )


def rows_to_compare(
    x: Samples, weights: Samples | None, settings: list[Setting], key: Array, options: EMOptions, missing: str,
    n_folds: int,
) -> tuple[Rows, np.ndarray, tuple[int, ...]]:  # fmt: skip
    """The rows that settings are compared on, the mask of these among all (N,), and the numbers of the wild ones."""
    given = np.asarray(in_memory("x", x))
    given = given if given.dtype.kind == "f" else given.astype(np.float64)
    wild = sorted({row for found in wild_rows_of(settings, given, weights, key, options) for row in found})
    share = np.asarray(check_weights(weights, given.shape[:1], np.float32))
    kept = share > 0
    kept[wild] = False
    if wild:
        warnings.warn(
            f"{door()}: {len(wild)} rows are left out, as an entry is more than `max_distance` = "
            f"{options.max_distance:g} typical distances from the median; the first is row {wild[0]}. Check them, or "
            "raise max_distance.",
            WildRowsWarning,
            stacklevel=4,
        )
    if (count := int(kept.sum())) < 2 * n_folds:
        raise ValueError(
            f"{door()}: `x` must have at least 2 rows for each fold; got {count}. Add rows, or lower n_folds."
        )
    effective = np.asarray(effective_weights(check_weights(share[kept], (count,), np.float32)), np.float64)
    folds, given = folds_of(count, n_folds, FOLD_SEED), given[kept]
    columns = np.all([varies(given[folds != fold]) for fold in range(n_folds)], axis=0)
    if not columns.any():
        raise ValueError(f"{door()}: `x` must have columns that vary outside every fold; got none. Add rows.")
    x = given if columns.all() else given[:, columns]
    return Rows(x, effective, folds, missing, columns, given), kept, tuple(wild)


def varies(x: np.ndarray) -> np.ndarray:
    """True for the columns (D,) of rows (N, D) with more than one value, of those that are not missing."""
    varies: np.ndarray = np.fmin.reduce(x, axis=0) < np.fmax.reduce(x, axis=0)
    return varies


def _constants(columns: np.ndarray) -> list[str]:
    """A sentence on columns that take no part, if any."""
    found = np.flatnonzero(~columns)
    if not len(found):
        return []
    return [
        f"{len(found)} of {len(columns)} columns are constant outside a fold, the first is {found[0]}: they have no "
        "part in densities and criteria, and the recommended model has them from a fit of its own."
    ]


def held_out_densities(fits: Fits, setting: Setting, fold: int) -> tuple[np.ndarray, Floats]:
    """The mask of the rows of a fold (N,), and their log-densities under the model of the others."""
    return fits.rows.folds == fold, _held_out(fits.without(setting, fold), fits.rows, fold)


def _held_out(found: Found, rows: Rows, fold: int) -> Floats:
    return np.asarray(_inferred(found, rows, rows.folds == fold).log_density, np.float64)


def _inferred(found: Found, rows: Rows, chosen: np.ndarray | slice = slice(None)) -> HMoGOutput:
    return ModelOfFewSizes(found.natural, LEAST_ROWS)(rows.x[chosen], rows.missing)


def _clusters(output: HMoGOutput, n_clusters: int | None) -> tuple[np.ndarray, Floats]:
    """The cluster of each component (K,), and the probabilities of the clusters (N, C)."""
    log_r = output.log_responsibilities.astype(np.float64)
    count = log_r.shape[1]
    if n_clusters is None or n_clusters >= count:
        return np.arange(count), np.exp(log_r)
    clusters = merge_components(log_r, n_clusters)
    return clusters, np.asarray(merged_responsibilities(np.exp(log_r), clusters), np.float64)


def _agreement(assigned: list[np.ndarray], weights: np.ndarray) -> float | None:
    """Mean adjusted Rand index of all pairs."""
    pairs = [adjusted_rand(one, other, weights) for i, one in enumerate(assigned) for other in assigned[:i]]
    known = [index for index in pairs if index is not None]
    return float(np.mean(known)) if known else None


def _mean_and_error(values: Floats, weights: np.ndarray) -> tuple[float, float]:
    """Weighted mean, and its standard error."""
    total = weights.sum()
    mean = float(weights @ values / total)
    return mean, float(np.sqrt(weights @ (values - mean) ** 2 / max(total - 1, 1) / total))


def _beside_the_best(compared: list[_Compared], weights: np.ndarray) -> tuple[Scores, ...]:
    """The scores of all settings, with what each is behind the one of the best held-out log-density."""
    usable = [one for one in compared if one.held_out is not None]
    if not usable:
        raise ValueError(
            f"{door()}: `n_components`, `lat_dim` and `obs_rep` must leave a setting that can be fitted; all failed, "
            f"{compared[0].setting} by {compared[0].scores.failure}. Mend the cause."
        )
    top = cast(Floats, max(usable, key=lambda one: cast(float, one.scores.held_out)).held_out)
    for one in usable:
        behind, error = _mean_and_error(top - cast(Floats, one.held_out), weights)
        one.scores = dataclasses.replace(one.scores, behind=behind, behind_error=error)
    return tuple(one.scores for one in compared)
