"""`HMoG`, an estimator of scikit-learn: clusters, factors, densities and outliers of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from sklearn.base import ClusterMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from flax_hmog.analysis.merging import merge_components
from flax_hmog.data.tables import index_of
from flax_hmog.em.batches import Learnt, learnt_from, next_batch
from flax_hmog.em.options import PseudoCounts, Regularizer
from flax_hmog.model.checks import allowing, named
from flax_hmog.model.optional import require
from flax_hmog.model_file import save
from flax_hmog.sklearn.arguments import check_contamination, precision
from flax_hmog.sklearn.fits import Fits
from flax_hmog.sklearn.outliers import DRAWS
from flax_hmog.sklearn.summary import Summary, contents_of, notes_of, summary_of


class HMoG(ClusterMixin, Fits):  # type: ignore[misc]
    """Hierarchical mixture of Gaussians: factors that explain the columns, and clusters of these, fitted as one by EM.

    A row belongs to a component, p(z = k) = w_k; its factors are Gaussian within it, y ~ N(m_k, S_k); and the row is
    x = W y + b with noise of its own for every column. Nothing depends on the units of the columns, so that they need
    no scaling. Rows in float64 are fitted in float64, others in float32; wild rows take no part in the fit, with a
    warning.

    Args:
        n_components: number of components K; as many as clusters at least.
        n_clusters: number of clusters that the components are merged to; None for components as clusters.
        lat_dim: number of factors L, at most that of columns; "auto" takes as many as columns, at most 10, or 20
            where components have twice as many rows, and at most a quarter of the distinct rows.
        noise: kind of noise: "diagonal", own variances of the columns; "scale", one for all; "full".
        regularizer: strength of the pseudo-samples that keep components from degenerating, in rows; "auto" takes
            `PseudoCounts()`, None none.
        column_units: as in `fit_em`: "own" where columns have units of their own, "common" for pixels and counts.
        init: "pca" or "fa".
        n_init: number of starts, of which the best is kept: that of the highest objective; of three or more with
            `n_clusters`, that whose merged clusters agree most with those of the others, unless there is a background.
        max_iter: steps of EM at most.
        tol: gain of the mean log-density, in nats, below which EM has converged.
        warm_start: start from the model of the last fit.
        semi_supervised: take `y` of `fit` for the known components of the rows. By default it is ignored, as
            scikit-learn passes the true classes to `fit` wherever a score compares with them.
        missing: "nan" takes NaN, NA and None for missing values, exactly: a row is judged by what it shows, and
            `impute` fills it; not with full noise. "refuse" names the column.
        background: True puts a broad background beside the clusters, which wild rows belong to instead of a component:
            Cauchy columns about the medians, its share learnt. `predict` gives -1 for its rows.
        contamination: share of the rows of the fit that `predict_outliers` takes for outliers, or "auto".
        random_state: seed, generator or None.
        verbose: show a progress bar.

    Attributes:
        natural_: the model, for all functions of flax_hmog.
        labels_: clusters of the rows of the fit (N,).
        cluster_sizes_: sum of the weights of the rows of each cluster.
        cluster_certainties_: mean probability of the cluster over its rows, NaN for one without rows.
        left_out_: numbers of the rows that belong to no cluster: wild rows, which took no part in the fit, or those of
            the background; sizes and certainties are without them, and so are criteria where there is no background.
        background_: `Background`: `share`, `center` and `unit`; None for a model without one.
        offset_: see `decision_function`.
        criteria_: `InformationCriteria` on the rows of the fit: `.bic`, `.aic`, `.icl`, `.log_likelihood`.
        data_min_: smallest value of each column in the fit (D,).
        data_max_: the largest (D,). A column where they are equal has no part in criteria and `score`.
        cluster_of_component_: (n_components,), or None without a merge.
        classes_: names of the first components (array), where `y` had names; None otherwise.
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
        missing: Literal["refuse", "nan"] = "refuse",
        background: bool = False,
        contamination: float | Literal["auto"] = "auto",
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
        self.missing = missing
        self.background = background
        self.contamination = contamination
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
        X = self._checked(X, ensure_min_samples=2)
        check_contamination(self.contamination)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        self._learnt = None
        left_out: tuple[int, ...] = ()
        if self.background:
            beside = self._found_beside(X, y, weights)
            self._keep(beside.found.natural, beside.objectives, beside.converged, beside.found.classes)
            self.background_ = beside.background
        else:
            found = self._best_found(X, y, weights)
            self._keep(found.natural, found.objective_history, found.converged, found.classes)
            left_out = found.left_out
        output = self._inferred(X)
        if self.n_clusters is not None:
            self.cluster_of_component_ = merge_components(output.log_responsibilities, self.n_clusters)
        self._describe(X, output, weights, left_out)
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> HMoG:
        """Learn from a batch: the first one is fitted as by `fit`, every later one is a step of online EM.

        The model is that of all batches, the newest counting more; a batch that is larger than the average takes a
        larger step. The first one decides origin and units, so that it should be typical and not small. Clusters are
        merged anew after every batch, by draws of the model, and may change their numbers. `labels_` and what
        `summary` shows are of this batch. After `fit`, batches start a model of their own.

        Args:
            X: rows (N, D).
            y: known components (N,), integers, -1 where unknown; only with `semi_supervised`.
            sample_weight: weights (N,).

        Returns:
            The estimator.

        Raises:
            ValueError: for unusable rows or arguments.

        Example:
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).partial_fit(x)
            >>> model.partial_fit(x).n_iter_ > model.fit(x).n_iter_
            True
        """
        if self.background:
            raise ValueError("partial_fit: `background` must be False; got True. Leave it out, or use fit.")
        learnt: Learnt | None = getattr(self, "_learnt", None)
        before = None if learnt is None else np.stack([self.data_min_, self.data_max_])
        X = self._checked(X, reset=learnt is None, ensure_min_samples=2)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        labels = y if self.semi_supervised else None
        if labels is not None and np.asarray(labels).dtype.kind not in "iu":
            raise ValueError(
                f"partial_fit: `y` must hold integers; got {np.asarray(labels).dtype}. Number the components alike in "
                "all batches, with -1 where unknown."
            )
        if learnt is None:
            found = self._found(X, y, weights)
            with precision(X.dtype), allowing(self.missing):
                head, key = self._head(X, found.natural.interaction.shape[1]), jax.random.key(0)
                given: Any = {"weights": weights, "labels": labels, "column_units": self.column_units}
                learnt = learnt_from(head, X, key, found, **given)
            self._keep(found.natural, found.objective_history, found.converged, None)
            left_out = found.left_out
        else:
            X = X.astype(learnt.head.param_dtype, copy=False)
            with precision(X.dtype), named("partial_fit"), allowing(self.missing):
                learnt, objective, left_out = next_batch(learnt, X, weights, labels)
                self._keep(learnt.natural, np.append(self.objective_history_, objective), False, None)
        self._learnt = learnt
        if self.n_clusters is not None:
            rows, _ = self._sampled(DRAWS, 0)
            self.cluster_of_component_ = merge_components(self._inferred(rows).log_responsibilities, self.n_clusters)
        self._describe(X, self._inferred(X), weights, left_out, before)
        return self

    def summary(self) -> Summary:
        """The last fit as a table: clusters, their size, certainty and distinguishing columns.

        Returns:
            `Summary`, which prints as a table; `rows()` of it is one for pandas.

        Example:
            >>> from flax_hmog.toy import x
            >>> HMoG(n_components=3, lat_dim=2, random_state=0).fit(x).summary().rows()[0]["rows"]
            4.0
        """
        check_is_fitted(self)
        return summary_of(self)

    def save(self, path: str | Path) -> None:
        """Save the fitted estimator to one .npz file, which numpy alone can score (docs/sklearn.md).

        The file has the model exactly, the arguments, and all attributes but `labels_`. A generator as `random_state`
        and a `Regularizer` are left at their defaults, and `partial_fit` begins anew: pickle has them.

        Args:
            path: of the file.

        Raises:
            sklearn.exceptions.NotFittedError: before `fit`.

        Example:
            >>> import tempfile
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> path = tempfile.mkdtemp() + "/model.npz"
            >>> model.save(path)
            >>> bool((HMoG.load(path).predict_proba(x) == model.predict_proba(x)).all())
            True
        """
        check_is_fitted(self)
        columns = getattr(self, "feature_names_in_", None)
        save(self.natural_, path, clusters=self.cluster_of_component_, columns=columns, notes=notes_of(self))

    @classmethod
    def load(cls, path: str | Path) -> HMoG:
        """The estimator of a file that `save` wrote: it answers exactly the same.

        Args:
            path: of the file.

        Returns:
            A fitted estimator.

        Raises:
            ValueError: for a file that is missing, damaged or holds no estimator.

        Example:
            >>> import tempfile
            >>> from flax_hmog.toy import x
            >>> path = tempfile.mkdtemp() + "/model.npz"
            >>> HMoG(n_components=3, lat_dim=2, random_state=0).fit(x).save(path)
            >>> HMoG.load(path).n_components
            3
        """
        arguments, attributes = contents_of(path)
        model = cls(**arguments)
        model.__dict__.update(attributes)
        return model

    def report(
        self,
        path: str | Path,
        X: Any,
        y: Any = None,
        *,
        title: str = "Clusters of a table",
        image_shape: tuple[int, ...] | None = None,
        selection: Any = None,
    ) -> Path:
        """Write a page on the clusters of rows: one html file, with a map, tables that sort, and members of clusters.

        Args:
            path: of the file.
            X: rows (N, D); the index of a table of pandas, and obs_names, name them on the page.
            y: known labels (N,), for comparison only; some may be missing.
            title: of the page.
            image_shape: (height, width) or (height, width, 3) of a row, where rows are images.
            selection: of `select`, whose table and recommendation are shown.

        Returns:
            The path.

        Raises:
            ImportError: without the extra `report`.
            ValueError: for other columns, or labels of another number.

        Example:
            >>> import tempfile
            >>> from flax_hmog.toy import x
            >>> model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
            >>> model.report(tempfile.mkdtemp() + "/report.html", x).name
            'report.html'
        """
        rows = self._rows(X)
        for package in ("jinja2", "matplotlib"):
            require(package, "report")
        from flax_hmog.sklearn.report import write_page  # which only this method needs

        options = {"title": title, "image_shape": image_shape, "selection": selection, "identifier": index_of(X)}
        return write_page(self, path, rows, y, **options)

    def __str__(self) -> str:
        return f"{self!r}\n{self.summary()}" if hasattr(self, "natural_") else repr(self)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.input_tags.allow_nan = self.missing == "nan"
        return tags
