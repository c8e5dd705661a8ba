"""Fits of the estimator, with a background or without, and what they say of the rows."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from flax_hmog.analysis.merging import merge_components
from flax_hmog.analysis.metrics import fit_agreement
from flax_hmog.data.labels import encode_labels
from flax_hmog.em.batches import Learnt
from flax_hmog.em.fit import fit_em
from flax_hmog.em.options import PseudoCounts, Regularizer
from flax_hmog.em.result import EMResult
from flax_hmog.heads.modules import AnalyticHMoG
from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.coordinates import Natural
from flax_hmog.sklearn.answers import FittedMixture
from flax_hmog.sklearn.arguments import check_sizes, precision, seed_of, seeds_of
from flax_hmog.sklearn.background import FitBeside, fit_beside
from flax_hmog.sklearn.outliers import DRAWS

FEWEST_FITS = 3  # that can agree
FEW_FACTORS, MOST_FACTORS = 10, 20  # where their number is not said
ROWS_PER_FACTOR = 4  # distinct ones, at least: among fewer, all rows are equally far from each other along the factors


class Fits(FittedMixture):
    """The parts of `fit` and `partial_fit`; arguments and attributes are those of `HMoG`."""

    n_components: int
    n_clusters: int | None
    lat_dim: int | Literal["auto"]
    noise: str
    regularizer: PseudoCounts | Regularizer | Literal["auto"] | None
    column_units: Any
    init: Any
    n_init: int
    max_iter: int
    tol: float
    warm_start: bool
    semi_supervised: bool
    background: bool
    contamination: float | Literal["auto"]
    random_state: Any
    verbose: bool
    _learnt: Learnt | None  # of `partial_fit`

    @property
    def _n_sought(self) -> int:
        """Number of components, of which there are as many as clusters at least."""
        return max(self.n_components, self.n_clusters or 1)

    def _head(self, X: np.ndarray, lat_dim: int) -> AnalyticHMoG:
        return AnalyticHMoG(lat_dim, self._n_sought, obs_dim=X.shape[1], obs_rep=self.noise, param_dtype=X.dtype)

    def _found(
        self,
        X: np.ndarray,
        y: Any,
        weights: np.ndarray | None,
        before: EMResult | None = None,
        *,
        seed: int | None = None,
    ) -> EMResult:
        """The fit of rows, from its starts or from where another one ended; with a seed from one start."""
        check_sizes(self, X.shape[1])
        lat_dim = default_factors(X, weights, self._n_sought) if self.lat_dim == "auto" else self.lat_dim
        previous: Natural | None = getattr(self, "natural_", None) if self.warm_start else None
        init = previous if before is None else before.natural
        regularizer = PseudoCounts() if self.regularizer == "auto" else self.regularizer
        with precision(X.dtype):
            return fit_em(
                self._head(X, lat_dim),
                X,
                jax.random.key(seed_of(self.random_state) if seed is None else seed),
                weights=weights,
                labels=y if self.semi_supervised else None,
                init=self.init if init is None else init,
                regularizer=regularizer if before is None else before.regularizer,
                column_units=self.column_units,
                n_restarts=self.n_init if init is None and seed is None else 1,
                max_steps=self.max_iter,
                tolerance=self.tol,
                missing=self.missing,
                progress=bool(self.verbose),
            )

    def _found_beside(self, X: np.ndarray, y: Any, weights: np.ndarray | None) -> FitBeside:
        """The fit of rows with a background."""
        known = np.zeros(len(X), bool)
        if self.semi_supervised and y is not None:
            known = encode_labels(y)[0] >= 0
        fit: Any = partial(self._found, X, y)

        def log_density(natural: Natural) -> np.ndarray:
            self.natural_, self._cache = natural, {}
            return np.asarray(self._inferred(X).log_density)

        with precision(X.dtype):
            return fit_beside(X, weights, known, fit, log_density, self.tol)

    def _best_found(self, X: np.ndarray, y: Any, weights: np.ndarray | None) -> EMResult:
        """The best of the starts: of several that are merged, the one whose clusters agree most with the others'."""
        check_sizes(self, X.shape[1])
        goes_on = self.warm_start and hasattr(self, "natural_")
        if self.n_clusters is None or self.n_init < FEWEST_FITS or goes_on:
            return self._found(X, y, weights)
        fits, said = [], []
        for seed in seeds_of(self.random_state, self.n_init):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fits.append(self._found(X, y, weights, seed=seed))
            said.append(caught)
        best = int(fit_agreement([self._merged(X, found, self.n_clusters) for found in fits]).sum(axis=1).argmax())
        for warning in said[best]:  # of the others none is of interest
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return fits[best]

    def _merged(self, X: np.ndarray, found: EMResult, n_clusters: int) -> np.ndarray:
        """Merged clusters of the rows under a fit (N,), which becomes that of the estimator."""
        self._keep(found.natural, found.objective_history, found.converged, found.classes)
        output = self._inferred(X)
        self.cluster_of_component_ = merge_components(output.log_responsibilities, n_clusters)
        clusters: np.ndarray = self._probabilities(output).argmax(axis=1)
        return clusters

    def _keep(self, natural: Natural, history: np.ndarray, converged: bool, classes: tuple[str, ...] | None) -> None:
        """The attributes that a fit has, but for those of the rows."""
        self.natural_, self._cache = natural, {}
        self.cluster_of_component_ = self.background_ = None
        self.classes_ = None if classes is None else np.asarray(classes)
        self.objective_history_ = history
        self.lower_bound_ = float(history[-1])
        self.converged_ = converged
        self.n_iter_ = len(history) - 1

    def _describe(
        self,
        X: np.ndarray,
        output: HMoGOutput,
        weights: np.ndarray | None,
        left_out: tuple[int, ...],
        before: np.ndarray | None = None,
    ) -> None:
        """The attributes of the rows, from the output of the model for them, and from the bounds of batches before."""
        probabilities = self._probabilities(output)
        share = np.ones(len(probabilities)) if weights is None else weights.astype(np.float64)
        share[list(left_out)] = 0
        self.labels_ = self._clusters(X, output, probabilities)
        inside = X[(share > 0) & (self.labels_ >= 0)]
        bounds = np.full((1, X.shape[1]), np.nan) if before is None else before
        self.data_min_ = np.fmin.reduce(np.concatenate([bounds[:1], inside]), axis=0)
        self.data_max_ = np.fmax.reduce(np.concatenate([bounds[-1:], inside]), axis=0)
        self.left_out_ = np.flatnonzero(self.labels_ < 0) if self.background else np.asarray(left_out, int)
        self.criteria_ = self._criteria_of(X, output, share)
        if self.contamination == "auto":
            self.offset_ = 0.0 if self.background else -float(np.log1p(DRAWS))
        else:
            self.offset_ = float(np.quantile(self._evidence(X, output), self.contamination))
        count, inside = probabilities.shape[1], self.labels_ >= 0
        self.cluster_sizes_ = np.bincount(self.labels_[inside], share[inside], count)
        sums = np.bincount(self.labels_[inside], (share * probabilities.max(axis=1))[inside], count)
        empty = self.cluster_sizes_ == 0
        self.cluster_certainties_ = np.where(empty, np.nan, sums / np.where(empty, 1, self.cluster_sizes_))


def default_factors(X: np.ndarray, weights: np.ndarray | None, n_components: int) -> int:
    """The number of factors of rows (N, D) where none is said: more than a few where components have rows for them."""
    rows = X if weights is None else X[weights > 0]
    # distinct ones are counted, as a weight stands for copies; in the first ones, as that is enough of them
    distinct: int = len(np.unique(rows[: 2 * MOST_FACTORS * max(n_components, 50)], axis=0))
    most = min(MOST_FACTORS, max(FEW_FACTORS, distinct // (2 * n_components)))
    return int(max(1, min(X.shape[1], most, distinct // ROWS_PER_FACTOR)))
