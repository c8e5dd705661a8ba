"""Answers of a fitted estimator: clusters, densities, outliers, latent means, draws and criteria."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from flax_hmog.analysis.criteria import InformationCriteria
from flax_hmog.inference.missing import impute
from flax_hmog.model.checks import check_size
from flax_hmog.sklearn.arguments import precision, seed_of
from flax_hmog.sklearn.fitted import FittedModel


class FittedMixture(ClassNamePrefixFeaturesOutMixin, TransformerMixin, FittedModel):  # type: ignore[misc]
    """The methods of a fitted `HMoG`."""

    def predict(self, X: Any) -> np.ndarray:
        """The most probable cluster of every row.

        Args:
            X: rows (N, D).

        Returns:
            Clusters (N,), int; -1 for rows of the background.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> (model.predict(x) == model.labels_).all().item()
            True
        """
        X = self._rows(X)
        output = self._inferred(X)
        return self._clusters(X, output, self._probabilities(output))

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of every cluster for every row, given that it is not of the background.

        Args:
            X: rows (N, D).

        Returns:
            Probabilities (N, clusters), which sum to 1.

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
        """The log-density of every row, in nats; that of clusters and background, where there is one.

        Columns that were constant in the fit carry none, so that fits of all sizes, and folds, compare.

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
        return np.array(self._densities(X, self._inferred(X)), X.dtype)

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

    def background_proba(self, X: Any) -> np.ndarray:
        """The probability that a row is of the background, and not of a cluster; 0 for a model without one.

        Args:
            X: rows (N, D).

        Returns:
            Probabilities (N,).

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, background=True, random_state=0).fit(x)
            >>> model.background_proba(x + 1000.0).min().item()
            1.0
        """
        X = self._rows(X)
        probabilities: np.ndarray = np.exp(-np.logaddexp(0, self._log_odds(X, self._inferred(X))))
        return probabilities

    def outlier_scores(self, X: Any) -> np.ndarray:
        """The share of the model's own draws that are at most as likely as each row: near 0 for outliers.

        Draws of the model have scores that are uniform between 0 and 1, so that a threshold is the share of good rows
        that it rejects. There are 10,000 draws of the clusters, the same for every call; below 1e-4, scores are those
        that the tail of the model goes on with. Rows with missing values are compared by what they show.

        Args:
            X: rows (N, D).

        Returns:
            Scores (N,), from 0 to 1.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> bool(model.outlier_scores(x + 100.0).max() < 1e-3)  # far from all that the model expects
            True
        """
        return self._outlier_scores(self._rows(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """The evidence that rows are no outliers, less `offset_`: below 0 for outliers, as of scikit-learn's detectors.

        With a background it is the log-odds of the clusters against it, otherwise the logarithm of `outlier_scores`.
        `contamination="auto"` has an offset at even odds, or at what is less likely than all 10,000 draws; a share has
        the offset below which so many rows of the fit lie.

        Args:
            X: rows (N, D).

        Returns:
            Evidence (N,).

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> bool((model.decision_function(x + 100.0) < 0).all())
            True
        """
        X = self._rows(X)
        evidence: np.ndarray = self._evidence(X, self._inferred(X)) - self.offset_
        return evidence

    def predict_outliers(self, X: Any) -> np.ndarray:
        """-1 for outliers and 1 for all other rows: `predict` of scikit-learn's detectors.

        Args:
            X: rows (N, D).

        Returns:
            (N,), int.

        Example:
            >>> from flax_hmog.sklearn import HMoG
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.predict_outliers(x + 100.0).tolist() == [-1] * 12
            True
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

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
        """Rows drawn from the clusters of the model.

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
    def _n_features_out(self) -> int:
        return int(self.natural_.interaction.shape[1])

    def _criteria(self, X: Any, sample_weight: Any) -> InformationCriteria:
        X = self._rows(X)
        return self._criteria_of(X, self._inferred(X), sample_weight)
