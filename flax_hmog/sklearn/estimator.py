"""`HMoG`, an estimator of scikit-learn: clusters, factors, densities and outliers of a table."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils.validation import _check_sample_weight, validate_data

from flax_hmog.analysis.merging import merge_components
from flax_hmog.em.fit import fit_em
from flax_hmog.em.options import PseudoCounts, Regularizer
from flax_hmog.em.result import EMResult
from flax_hmog.heads.modules import AnalyticHMoG
from flax_hmog.model.checks import check_size
from flax_hmog.model.coordinates import Natural
from flax_hmog.sklearn.fitted import FittedMixture, precision, seed_of

MOST_FACTORS = 10  # where their number is not said
ROWS_PER_FACTOR = 4  # distinct ones, at least: among fewer, all rows are equally far from each other along the factors


class HMoG(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, FittedMixture):  # type: ignore[misc]
    """Hierarchical mixture of Gaussians: factors that explain the columns, and clusters of these, fitted as one by EM.

    A row belongs to a component, p(z = k) = w_k; its factors are Gaussian within it, y ~ N(m_k, S_k); and the row is
    x = W y + b with noise of its own for every column. Nothing depends on the units of the columns, so that they need
    no scaling. Rows in float64 are fitted in float64, others in float32; wild rows take no part in the fit, with a
    warning.

    Args:
        n_components: number of components K; as many as clusters at least.
        n_clusters: number of clusters that the components are merged to; None for components as clusters.
        lat_dim: number of factors L, at most that of columns; "auto" takes half of the columns, at most 10 and at
            most a quarter of the distinct rows.
        noise: kind of noise: "diagonal", own variances of the columns; "scale", one for all; "full".
        regularizer: strength of the pseudo-samples that keep components from degenerating, in rows; "auto" takes
            `PseudoCounts()`, None none.
        column_units: as in `fit_em`: "own" where columns have units of their own, "common" for pixels and counts.
        init: "pca" or "fa".
        n_init: number of starts, of which the best is kept.
        max_iter: steps of EM at most.
        tol: gain of the mean log-density, in nats, below which EM has converged.
        warm_start: start from the model of the last fit.
        semi_supervised: take `y` of `fit` for the known components of the rows. By default it is ignored, as
            scikit-learn passes the true classes to `fit` wherever a score compares with them.
        random_state: seed, generator or None.
        verbose: show a progress bar.

    Attributes:
        natural_: the model, for all functions of flax_hmog.
        labels_: clusters of the rows of the fit (N,).
        cluster_of_component_: (n_components,), or None without a merge.
        classes_: names of the first components, where `y` had names; None otherwise.
        objective_history_: penalised mean log-density before the first step and after each.
        lower_bound_: the last of them.
        converged_: True if EM has converged.
        n_iter_: number of steps.
        n_features_in_: number of columns D.
        feature_names_in_: their names (D,), where X had names.

    Example:
        >>> from flax_hmog.toy import x
        >>> HMoG(n_components=3, lat_dim=2, random_state=0).fit_predict(x).shape
        (12,)
    """

    def __init__(
        self,
        n_components: int = 8,
        *,
        n_clusters: int | None = None,
        lat_dim: int | Literal["auto"] = "auto",
        noise: Literal["diagonal", "scale", "full"] = "diagonal",
        regularizer: PseudoCounts | Regularizer | Literal["auto"] | None = "auto",
        column_units: Literal["auto", "own", "common"] = "auto",
        init: Literal["pca", "fa"] = "pca",
        n_init: int = 1,
        max_iter: int = 200,
        tol: float = 1e-3,
        warm_start: bool = False,
        semi_supervised: bool = False,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.n_clusters = n_clusters
        self.lat_dim = lat_dim
        self.noise = noise
        self.regularizer = regularizer
        self.column_units = column_units
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.semi_supervised = semi_supervised
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> HMoG:
        """Fit the model by exact EM.

        Args:
            X: rows (N, D): an array or a table of numbers.
            y: known components (N,), -1 or None where unknown; only with `semi_supervised`.
            sample_weight: weights (N,).

        Returns:
            The estimator.

        Raises:
            ValueError: for unusable rows or arguments.

        Example:
            >>> from flax_hmog.toy import x
            >>> HMoG(n_components=3, lat_dim=2, random_state=0).fit(x).converged_
            True
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        if self.n_clusters is not None:
            check_size("n_clusters", self.n_clusters)
        n_components = max(self.n_components, self.n_clusters or 1)
        lat_dim = default_factors(X, weights) if self.lat_dim == "auto" else self.lat_dim
        previous: Natural | None = getattr(self, "natural_", None) if self.warm_start else None
        head = AnalyticHMoG(lat_dim, n_components, obs_rep=self.noise, param_dtype=X.dtype)
        with precision(X.dtype):
            found = fit_em(
                head,
                X,
                jax.random.key(seed_of(self.random_state)),
                weights=weights,
                labels=y if self.semi_supervised else None,
                init=self.init if previous is None else previous,
                regularizer=PseudoCounts() if self.regularizer == "auto" else self.regularizer,
                column_units=self.column_units,
                n_restarts=self.n_init if previous is None else 1,
                max_steps=self.max_iter,
                tolerance=self.tol,
                progress=bool(self.verbose),
            )
        self._keep(found)
        log_responsibilities = self._inferred(X).log_responsibilities
        if self.n_clusters is not None:
            self.cluster_of_component_ = merge_components(log_responsibilities, self.n_clusters)
        self.labels_ = self.predict(X)
        return self

    def _keep(self, found: EMResult) -> None:
        """The attributes that a fit has, but for those of the rows."""
        self.natural_, self._cache = found.natural, {}
        self.cluster_of_component_ = None
        self.classes_ = found.classes
        self.objective_history_ = found.objective_history
        self.lower_bound_ = float(found.objective_history[-1])
        self.converged_ = found.converged
        self.n_iter_ = len(found.objective_history) - 1

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def default_factors(X: np.ndarray, weights: np.ndarray | None) -> int:
    """The number of factors of rows (N, D) where none is said."""
    wanted: int = min(MOST_FACTORS, (X.shape[1] + 1) // 2)
    rows = X if weights is None else X[weights > 0]
    # distinct ones are counted, as a weight stands for copies; in the first few, as that is enough of them
    distinct: int = len(np.unique(rows[: 100 * MOST_FACTORS], axis=0))
    return max(1, min(wanted, distinct // ROWS_PER_FACTOR))
