"""Clusters of frozen features: embeddings of sentences or images that a pretrained encoder has made."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from flax_hmog.analysis.clusters import merged_responsibilities
from flax_hmog.analysis.merging import merge_components
from flax_hmog.em.fit import fit_em
from flax_hmog.em.options import PseudoCounts
from flax_hmog.heads.modules import AnalyticHMoG
from flax_hmog.inference.posterior import infer
from flax_hmog.model.checks import check_size
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import jit
from flax_hmog.networks.neighbors import nearest_neighbors

MOST_FACTORS, ROWS_PER_COMPONENT = 20, 40
ROUNDS = 2  # of averages over neighbours


@dataclasses.dataclass(frozen=True)
class FeatureClusters:
    """Clusters of frozen features; called with new ones, it gives their probabilities of the clusters (B, n_clusters).

    Attributes:
        assignments: cluster of every row of the fit (N,).
        probabilities: of every row and cluster (N, n_clusters).
        natural: the model of features that are averaged over neighbours.
        cluster_of_component: (K,).
        layers: the features of the fit at unit length, and their averages but the last (ROUNDS, N, F).
        hubs: square roots of the numbers of rows that rows are neighbours of or have as such, themselves included (N,).
        n_neighbors: of each row.

    Example:
        >>> from flax_hmog.toy import x
        >>> found = fit_features(x, 3, jax.random.key(0), n_neighbors=2)
        >>> found.assignments.shape, found(x[:5]).shape
        ((12,), (5, 3))
    """

    assignments: Int[np.ndarray, " N"]
    probabilities: Float[np.ndarray, "N C"]
    natural: Natural
    cluster_of_component: Int[np.ndarray, " K"]
    layers: Float[Array, "R N F"]
    hubs: Float[Array, " N"]
    n_neighbors: int

    def __call__(self, features: object) -> np.ndarray:
        """Probabilities (B, n_clusters) of new features (B, F), each averaged with its neighbours of the fit."""
        rows = _unit_rows(features, self.layers.shape[-1])
        if not rows.shape[0]:
            return np.zeros((0, self.probabilities.shape[1]), self.probabilities.dtype)
        here, own = rows, float(np.sqrt(2 * self.n_neighbors + 1))
        if self.n_neighbors:
            nearest, _ = nearest_neighbors(rows, self.n_neighbors, among=self.layers[0])  # at unit length, by cosine
            for layer in self.layers:
                here = _averaged(here / own, nearest, layer / self.hubs[:, None])
        return _probabilities(self.natural, self.cluster_of_component, here)


def fit_features(
    features: object, n_clusters: int, key: Array, *, n_components: int | None = None, lat_dim: int | None = None,
    n_neighbors: int = 10, n_restarts: int = 1,
) -> FeatureClusters:  # fmt: skip
    """Clusters of features from an encoder that stays as it is, without labels and with nothing to set.

    Rows are brought to unit length, averaged twice over their nearest neighbours by cosine, hubs counting less, and
    fitted by EM with one noise variance, and component covariances that shrink to their common shape by as much as the
    data say. It compares all rows with each other, and keeps three times the features for new rows.

    Args:
        features: (N, F).
        n_clusters: number of clusters.
        key: PRNG key.
        n_components: K, merged to clusters where there are more; None takes two for each cluster, and no more than one
            for every 40 rows.
        lat_dim: L; None takes 20, or F - 1 where that is less.
        n_neighbors: neighbours that a row is averaged with; 0 fits the features themselves.
        n_restarts: of EM.

    Returns:
        `FeatureClusters`.

    Raises:
        ValueError: for features that are no matrix, that are not finite, or a row of zeros.

    Example:
        >>> from flax_hmog.toy import x
        >>> fit_features(x, 2, jax.random.key(0), n_neighbors=3).probabilities.shape
        (12, 2)
    """
    rows = _unit_rows(features)
    count, obs_dim = rows.shape
    if not 0 <= n_neighbors < count:
        raise ValueError(
            f"fit_features: `n_neighbors` must be at least 0 and below the number of rows {count}; got {n_neighbors}. "
            "Give fewer; 0 takes rows as they are."
        )
    if n_components is None:
        n_components = max(n_clusters, min(2 * n_clusters, count // ROWS_PER_COMPONENT))
    for name, size in (("n_clusters", n_clusters), ("n_components", n_components)):
        check_size(name, size)
    lat_dim = min(MOST_FACTORS, max(1, obs_dim - 1)) if lat_dim is None else lat_dim
    layers, hubs = [rows], jnp.ones(count, rows.dtype)
    if n_neighbors:
        nearest, _ = nearest_neighbors(rows, n_neighbors)
        hubs = jnp.sqrt(1.0 + n_neighbors + jnp.zeros_like(hubs).at[nearest.ravel()].add(1.0))
        for _ in range(ROUNDS):
            scaled = layers[-1] / hubs[:, None]
            layers.append(_averaged(scaled, nearest, scaled, both=True))
    fitted = fit_em(
        AnalyticHMoG(lat_dim, n_components, obs_rep="scale"), layers[-1], key,
        regularizer=PseudoCounts(shrinkage="auto"), tolerance=1e-2, n_restarts=n_restarts,
    )  # fmt: skip
    clusters = np.arange(n_components)
    if n_components > n_clusters:
        clusters = merge_components(infer(fitted.natural, layers[-1]).log_responsibilities, n_clusters)
    probabilities = _probabilities(fitted.natural, clusters, layers[-1])
    kept = jnp.stack(layers[:-1]) if n_neighbors else jnp.zeros((0, *rows.shape))
    assignments = probabilities.argmax(axis=1)
    return FeatureClusters(assignments, probabilities, fitted.natural, clusters, kept, hubs, n_neighbors)


def _unit_rows(features: object, columns: int | None = None) -> Array:
    """Rows at unit length; those of a fit, or with so many columns as it had."""
    rows = np.asarray(features, np.float32)
    is_known = rows.size > 0 if columns is None else rows.shape[1:] == (columns,)
    if rows.ndim != 2 or not is_known:
        wanted = "(N, F)" if columns is None else f"(N, {columns})"
        raise ValueError(
            f"fit_features: `features` must have shape {wanted}; got {rows.shape}. Give one row per sample."
        )
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        bad = int((~(np.isfinite(length) & (length > 0))).argmax())
        raise ValueError(
            f"fit_features: `features` must be finite and differ from 0; got row {bad} of length {length[bad, 0]}. "
            "Leave it out."
        )
    return jnp.asarray(rows / length)


@jit(static_argnames="both")
def _averaged(own: Array, nearest: Array, others: Array, both: bool = False) -> Array:
    """Directions of the sums of rows (B, F) and their neighbours among others (N, F); where both are the same rows,
    also of those that each is a neighbour of.
    """

    def add(number: int, total: Array) -> Array:
        near = nearest[:, number]
        return total.at[near].add(others) + others[near] if both else total + others[near]

    total: Array = jax.lax.fori_loop(0, nearest.shape[1], add, own)
    averaged: Array = total / jnp.linalg.norm(total, axis=1, keepdims=True)
    return averaged


def _probabilities(natural: Natural, clusters: np.ndarray, rows: Array) -> np.ndarray:
    responsibilities = np.exp(np.asarray(infer(natural, rows).log_responsibilities))
    return np.asarray(merged_responsibilities(responsibilities, clusters))
