"""A fitted model of the estimator: its parameters in units of the data, and rows on their way through it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from flax_hmog.analysis.clusters import cluster_prototypes, merged_responsibilities
from flax_hmog.analysis.criteria import InformationCriteria, criteria_of, of_columns
from flax_hmog.data.containers import is_table
from flax_hmog.inference.padded import ModelOfFewSizes
from flax_hmog.inference.posterior import HMoGOutput, sample
from flax_hmog.model.conversions import natural_to_moments
from flax_hmog.model.coordinates import Moments, Natural
from flax_hmog.sklearn.arguments import check_columns, precision
from flax_hmog.sklearn.background import Background
from flax_hmog.sklearn.outliers import draws, ranks, tail_probabilities

LEAST_ROWS = 64  # that are computed at once, so that a row does not round otherwise by itself than among others


class FittedModel(BaseEstimator):  # type: ignore[misc]
    """The parameters of a fitted `HMoG`, and inference with its model `natural_`, clusters and background."""

    natural_: Natural
    cluster_of_component_: np.ndarray | None
    background_: Background | None
    offset_: float
    data_min_: np.ndarray
    data_max_: np.ndarray
    missing: str
    _cache: dict[str, Any]  # what follows from the model and is computed once; no part of a pickle

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if "natural_" not in state:
            return state
        # arrays of numpy keep float64 wherever they are read
        state |= {"_cache": {}, "natural_": jax.tree.map(np.asarray, state["natural_"])}
        learnt = state.get("_learnt")
        return state if learnt is None else state | {"_learnt": learnt.on_host()}

    @property
    def weights_(self) -> np.ndarray:
        """Weights of the components (n_components,)."""
        return np.asarray(self._moments.weights)

    @property
    def means_(self) -> np.ndarray:
        """Means of the components (n_components, D), in units of the data."""
        with precision(self.natural_.interaction.dtype):
            return cluster_prototypes(self.natural_)

    @property
    def covariances_(self) -> np.ndarray:
        """Covariances of the components (n_components, D, D), in units of the data."""
        moments = self._moments
        loadings = np.asarray(moments.loadings)
        spread: np.ndarray = loadings @ np.asarray(moments.covariances.entries) @ loadings.T
        spread += np.asarray(moments.noise.dense())
        return spread

    @property
    def loadings_(self) -> np.ndarray:
        """Loadings W (D, lat_dim): the columns of `inverse_transform`."""
        return np.asarray(self._moments.loadings)

    @property
    def noise_variance_(self) -> np.ndarray:
        """Variances of what the factors do not explain (D,)."""
        return np.asarray(self._moments.noise.diagonal())

    @property
    def cluster_centers_(self) -> np.ndarray:
        """Means of the clusters (clusters, D), in units of the data."""
        with precision(self.natural_.interaction.dtype):
            return cluster_prototypes(self.natural_, labels=self.cluster_of_component_)

    @property
    def _moments(self) -> Moments:
        check_is_fitted(self)
        with precision(self.natural_.interaction.dtype):
            moments: Moments = jax.tree.map(np.asarray, natural_to_moments(self.natural_))
            return moments  # of numpy, which keeps float64 everywhere

    def _rows(self, X: Any) -> np.ndarray:
        """Checked rows (N, D) for a fitted model."""
        check_is_fitted(self)
        return self._checked(X, reset=False)

    def _checked(self, X: Any, **options: Any) -> np.ndarray:
        """Rows (N, D) of float64 or float32; of an AnnData those of its `X`, under the names of its variables."""
        if hasattr(type(X), "collect") and not hasattr(type(X), "__array__"):
            raise TypeError(
                f"HMoG: `X` must be a table in memory; got {type(X).__name__}. Give what its `collect` returns."
            )
        allows = self.missing == "nan"
        X = X.to_df() if hasattr(type(X), "var_names") and hasattr(type(X), "to_df") else X
        if is_table(X) and hasattr(X, "columns"):
            check_columns(X, allows)
        finite = "allow-nan" if allows else True
        given = {"dtype": [np.float64, np.float32], "ensure_all_finite": finite}
        return cast(np.ndarray, validate_data(self, X, **given, **options))

    def _inferred(self, X: np.ndarray) -> HMoGOutput:
        """`HMoGOutput` of numpy arrays, in the precision of the fit."""
        with precision(self.natural_.interaction.dtype):
            if "model" not in self._cache:
                self._cache["model"] = ModelOfFewSizes(self.natural_, LEAST_ROWS)
            output: HMoGOutput = self._cache["model"](X, self.missing)
            return output

    def _probabilities(self, output: HMoGOutput) -> np.ndarray:
        """Probabilities of the clusters (N, clusters), in float64."""
        responsibilities = np.exp(output.log_responsibilities.astype(np.float64))
        if self.cluster_of_component_ is not None:
            responsibilities = merged_responsibilities(responsibilities, self.cluster_of_component_)
        probabilities: np.ndarray = responsibilities / responsibilities.sum(axis=1, keepdims=True)
        return probabilities

    def _sampled(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and their components."""
        with precision(self.natural_.interaction.dtype):
            x, _, z = sample(self.natural_, jax.random.key(seed), n)
            return np.array(x), np.array(z)

    def _clusters(self, X: np.ndarray, output: HMoGOutput, probabilities: np.ndarray) -> np.ndarray:
        """The cluster of every row (N,), -1 for the background."""
        clusters: np.ndarray = probabilities.argmax(axis=1)
        if self.background_ is not None:
            clusters[self._log_odds(X, output) < 0] = -1
        return clusters

    def _log_odds(self, X: np.ndarray, output: HMoGOutput) -> np.ndarray:
        """Log-odds (N,) that rows are not of the background."""
        if self.background_ is None:
            return np.full(len(X), np.inf)
        return self.background_.log_odds(X, np.asarray(output.log_density))

    def _densities(self, X: np.ndarray, output: HMoGOutput) -> np.ndarray:
        """Log-densities of rows (N,), with the background; of the columns that varied in the fit."""
        clusters, background = np.asarray(output.log_density), self.background_
        if self._varying is not None:
            X = X[:, self._varying]
            with precision(self.natural_.interaction.dtype):
                if "varying" not in self._cache:
                    self._cache["varying"] = ModelOfFewSizes(self._compared, LEAST_ROWS)
                clusters = np.asarray(self._cache["varying"](X, self.missing).log_density)
            background = background and background.of_columns(self._varying)
        return clusters if background is None else background.mixed(X, clusters)

    @property
    def _varying(self) -> np.ndarray | None:
        """True for the columns that varied in the fit; None where all did, or none."""
        if not hasattr(self, "data_min_"):  # of a former version
            return None
        varying: np.ndarray = self.data_min_ < self.data_max_
        return None if varying.all() or not varying.any() else varying

    @property
    def _compared(self) -> Natural:
        """The model of the columns that varied, by which sizes are compared."""
        return self.natural_ if self._varying is None else of_columns(self.natural_, self._varying)

    def _evidence(self, X: np.ndarray, output: HMoGOutput) -> np.ndarray:
        """`decision_function` before the offset (N,)."""
        if self.background_ is not None:
            return self._log_odds(X, output)
        evidence: np.ndarray = np.log(np.maximum(self._outlier_scores(X), np.finfo(np.float64).tiny))
        return evidence

    def _outlier_scores(self, X: np.ndarray) -> np.ndarray:
        given = self.weights_.astype(np.float64), self.means_, self._inferred
        if "draws" not in self._cache:
            drawn = draws(self._moments, self.natural_.interaction.dtype)
            self._cache["draws"] = np.sort(tail_probabilities(drawn, *given))
        return ranks(tail_probabilities(X, *given), self._cache["draws"])

    def _criteria_of(self, X: np.ndarray, output: HMoGOutput, sample_weight: Any) -> InformationCriteria:
        densities: Any = self._densities(X, output).astype(output.log_density.dtype)
        with precision(self.natural_.interaction.dtype):
            found = criteria_of(self._compared, dataclasses.replace(output, log_density=densities), sample_weight)
        extra = self.background_ is not None  # its share
        return dataclasses.replace(found, n_parameters=found.n_parameters + extra)
