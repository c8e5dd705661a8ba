"""Answers of a fitted estimator: clusters, densities, latent means, draws and criteria."""

from __future__ import annotations

from typing import Any, cast

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from flax_hmog.analysis.clusters import cluster_prototypes, merged_responsibilities
from flax_hmog.analysis.criteria import InformationCriteria, criteria_of
from flax_hmog.data.containers import is_table
from flax_hmog.inference.missing import impute
from flax_hmog.inference.padded import ModelOfFewSizes
from flax_hmog.inference.posterior import HMoGOutput, sample
from flax_hmog.model.checks import check_size
from flax_hmog.model.conversions import natural_to_moments
from flax_hmog.model.coordinates import Moments, Natural
from flax_hmog.sklearn.arguments import check_columns, precision, seed_of

LEAST_ROWS = 64  # that are computed at once, so that a row does not round otherwise by itself than among others
DRAWS = 10_000  # of the model, whose log-densities say how unlikely a row is


class FittedMixture(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The methods of a fitted `HMoG`, from its model `natural_` and the cluster of each component."""

    natural_: Natural
    cluster_of_component_: np.ndarray | None
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

    def predict(self, X: Any) -> np.ndarray:
        """The most probable cluster of every row.

        Args:
            X: rows (N, D).

        Returns:
            Clusters (N,), int.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> (model.predict(x) == model.labels_).all().item()
            True
        """
        clusters: np.ndarray = self.predict_proba(X).argmax(axis=1)
        return clusters

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of every cluster for every row.

        Args:
            X: rows (N, D).

        Returns:
            Probabilities (N, clusters).

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.predict_proba(x).shape
            (12, 3)
        """
        X = self._rows(X)
        return self._probabilities(self._inferred(X)).astype(X.dtype, copy=False)

    def transform(self, X: Any) -> np.ndarray:
        """The posterior mean of the factors, E[y | x].

        Args:
            X: rows (N, D).

        Returns:
            Latent means (N, lat_dim).

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.transform(x).shape
            (12, 2)
        """
        X = self._rows(X)
        return np.array(self._inferred(X).latent_mean, X.dtype)  # which may be written to

    def inverse_transform(self, X: Any) -> np.ndarray:
        """The rows that are expected for given factors, W y + b.

        Args:
            X: factors (N, lat_dim).

        Returns:
            Rows (N, D), in units of the data.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.inverse_transform(model.transform(x)).shape
            (12, 4)
        """
        check_is_fitted(self)
        latent, moments = np.asarray(X), self._moments
        if latent.ndim != 2 or latent.shape[1] != self._n_features_out:
            raise ValueError(
                f"inverse_transform: `X` must have shape (N, {self._n_features_out}); got {latent.shape}. Give what "
                "transform returns."
            )
        rows: np.ndarray = latent @ np.asarray(moments.loadings).T + np.asarray(moments.bias)
        return rows

    def score_samples(self, X: Any) -> np.ndarray:
        """The log-density of every row, in nats.

        Args:
            X: rows (N, D).

        Returns:
            Log-densities (N,).

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.score_samples(x).shape
            (12,)
        """
        X = self._rows(X)
        return np.array(self._inferred(X).log_density, X.dtype)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """The mean log-density of rows, in nats: higher is better.

        Args:
            X: rows (N, D).
            y: ignored.
            sample_weight: weights (N,).

        Returns:
            The mean.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> bool(model.score(x) == model.score_samples(x).astype(float).mean())
            True
        """
        return float(np.average(self.score_samples(X).astype(np.float64), weights=sample_weight))

    def outlier_scores(self, X: Any) -> np.ndarray:
        """The share of the model's own draws that are at most as likely as each row: near 0 for outliers.

        Draws of the model have scores that are uniform between 0 and 1, so that a threshold is the share of good rows
        that it rejects. Among 10,000 draws, which are the same for every call, the lowest score is 1e-4. A row with
        missing values is compared with draws that lack the same ones: a pass over the draws for every such pattern.

        Args:
            X: rows (N, D).

        Returns:
            Scores (N,), in (0, 1].

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> bool(model.outlier_scores(x + 100.0).max() < 1e-3)  # far from all that the model expects
            True
        """
        X = self._rows(X)
        densities, scores = self._inferred(X).log_density.astype(np.float64), np.empty(len(X))
        patterns, numbers = np.unique(np.isnan(X), axis=0, return_inverse=True)
        for number, gaps in enumerate(patterns):
            here = numbers.reshape(-1) == number
            scores[here] = 1 + np.searchsorted(self._levels(gaps), densities[here], side="right")
        return scores / (1 + DRAWS)

    def impute(self, X: Any) -> np.ndarray:
        """Rows whose missing entries are what the model expects, given those that are there.

        `flax_hmog.impute(model.natural_, X)` has their standard deviations and draws too.

        Args:
            X: rows (N, D), NaN where missing.

        Returns:
            Rows (N, D), those entries that are there as they were.

        Raises:
            ValueError: for full noise.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> gaps = np.where(np.arange(48).reshape(12, 4) % 7 == 0, np.nan, x)
            >>> model = HMoG(n_components=3, lat_dim=1, missing="nan", random_state=0).fit(gaps)
            >>> bool(np.isfinite(model.impute(gaps)).all())
            True
        """
        X = self._rows(X)
        with precision(self.natural_.interaction.dtype):
            return np.array(impute(self.natural_, X).mean, X.dtype)

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Rows drawn from the model.

        Args:
            n_samples: number of rows.

        Returns:
            Rows (n_samples, D), and the cluster of each (n_samples,).

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> rows, clusters = model.sample(5)
            >>> rows.shape, clusters.shape
            ((5, 4), (5,))
        """
        check_is_fitted(self)
        check_size("n_samples", n_samples)
        rows, components = self._sampled(n_samples, seed_of(self.random_state))
        merged = self.cluster_of_component_
        return rows, components if merged is None else merged[components]

    def aic(self, X: Any, *, sample_weight: Any = None) -> float:
        """Akaike's criterion of this model on rows: lower is better.

        Args:
            X: rows (N, D), those of the fit.
            sample_weight: weights (N,), as numbers of rows.

        Returns:
            The criterion.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.aic(x) < model.bic(x) <= model.icl(x)
            True
        """
        return self._criteria(X, sample_weight).aic

    def bic(self, X: Any, *, sample_weight: Any = None) -> float:
        """The Bayesian information criterion of this model on rows: lower is better.

        Args:
            X: rows (N, D), those of the fit.
            sample_weight: weights (N,), as numbers of rows.

        Returns:
            The criterion.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.aic(x) < model.bic(x) <= model.icl(x)
            True
        """
        return self._criteria(X, sample_weight).bic

    def icl(self, X: Any, *, sample_weight: Any = None) -> float:
        """The integrated completed likelihood, BIC with the entropy of the assignments: lower is better.

        Args:
            X: rows (N, D), those of the fit.
            sample_weight: weights (N,), as numbers of rows.

        Returns:
            The criterion.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.aic(x) < model.bic(x) <= model.icl(x)
            True
        """
        return self._criteria(X, sample_weight).icl

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
    def _n_features_out(self) -> int:
        return int(self.natural_.interaction.shape[1])

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
        """Rows (N, D) of float64 or float32."""
        allows = self.missing == "nan"
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

    def _levels(self, gaps: np.ndarray) -> np.ndarray:
        """Log-densities of draws without the columns `gaps` (D,), in increasing order (DRAWS,)."""
        if "draws" not in self._cache:
            self._cache["draws"] = self._sampled(DRAWS, 0)[0]
        if not gaps.any() and "levels" in self._cache:
            return cast(np.ndarray, self._cache["levels"])
        drawn = self._inferred(np.where(gaps, np.nan, self._cache["draws"]))
        levels: np.ndarray = np.sort(drawn.log_density.astype(np.float64))
        if not gaps.any():
            self._cache["levels"] = levels
        return levels

    def _criteria(self, X: Any, sample_weight: Any) -> InformationCriteria:
        output = self._inferred(self._rows(X))
        with precision(self.natural_.interaction.dtype):
            return criteria_of(self.natural_, output, sample_weight)
