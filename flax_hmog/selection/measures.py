"""Measures of a clustering that need no labels: agreement, entropy of merges, and a linear probe of the clusters."""

from __future__ import annotations

import numpy as np

from flax_hmog.model.typed import Floats

PROBE_SHRINKAGE = 1e-2  # of the pooled covariance of standardised columns towards the identity
UNCERTAIN = 1e-6  # nats of entropy of a row, below which it counts for no merge


def folds_of(n_rows: int, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each row (N,), at random and of equal sizes."""
    folds: np.ndarray = np.random.default_rng(seed).permutation(n_rows) % n_folds
    return folds


def adjusted_rand(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> float | None:
    """The adjusted Rand index of two clusterings (N,) of weighted rows: 1 at best, 0 expected by chance.

    None where both have one cluster, which says nothing. Rows count by their weights, as numbers of rows.

    Source: Hubert and Arabie 1985.
    """
    n_one, n_other = int(one.max()) + 1, int(other.max()) + 1
    table = np.bincount(one * n_other + other, weights, n_one * n_other).reshape(n_one, n_other)
    rows, columns, total = table.sum(axis=1), table.sum(axis=0), table.sum()
    if (rows > 0).sum() == 1 == (columns > 0).sum():
        return None
    pairs, in_rows, in_columns = (float(np.sum(c * (c - 1)) / 2) for c in (table, rows, columns))
    expected, most = in_rows * in_columns / (total * (total - 1) / 2), (in_rows + in_columns) / 2
    return float((pairs - expected) / (most - expected)) if most != expected else 1.0


def weighted_entropy(responsibilities: Floats, weights: np.ndarray) -> float:
    """Mean entropy of the assignments of rows (N, C), nats per row."""
    return float(weights @ _entropies(responsibilities) / weights.sum())


def merge_entropies(responsibilities: Floats, weights: np.ndarray) -> tuple[float, ...]:
    """Mean entropy of the assignments with 1, 2, ... K clusters, when each step merges the two that lower it most.

    A merge of components that describe one cluster lowers it much, one of clusters that lie apart by little: the curve
    bends at a number of clusters.

    Args:
        responsibilities: p(z = k | x) (N, K).
        weights: of the rows (N,).

    Returns:
        Nats per row, for 1 to K clusters.

    Source: Baudry, Raftery, Celeux, Lo and Gottardo 2010.
    """
    total, count = weights.sum(), responsibilities.shape[1]
    uncertain = _entropies(responsibilities) > UNCERTAIN
    r, share = responsibilities[uncertain].T.copy(), weights[uncertain] / total
    own, curve = _x_log_x(r) @ share, []
    gain = np.full((count, count), -np.inf)
    alive = np.arange(count)
    for k in range(count):
        gain[k, :k] = _x_log_x(r[k] + r[:k]) @ share - own[k] - own[:k]
    for _ in range(count):
        curve.append(-float(own[alive].sum()))
        if len(alive) == 1:
            break
        kept, gone = sorted(divmod(int(np.argmax(gain)), count))
        r[kept] += r[gone]
        own[kept] = _x_log_x(r[kept]) @ share
        alive = alive[alive != gone]
        gain[gone] = gain[:, gone] = -np.inf
        others = alive[alive != kept]
        merged = _x_log_x(r[kept] + r[others]) @ share - own[kept] - own[others]
        gain[np.maximum(kept, others), np.minimum(kept, others)] = merged
    return tuple(max(entropy, 0.0) for entropy in reversed(curve))


class Probe:
    """A linear discriminant that learns clusters on some of the rows and is asked for them on the others.

    Clusters that it finds again are ones that other rows have too; those that follow the noise of single rows are not.

    Args:
        x: rows (N, D); what is missing is taken at the mean of its column.
        weights: of the rows (N,).
        folds: the fold of each row (N,).
    """

    def __init__(self, x: np.ndarray, weights: np.ndarray, folds: np.ndarray) -> None:
        rows = np.asarray(x, np.float64)
        share = np.where(np.isnan(rows), 0, weights[:, None])
        filled, mass = np.where(np.isnan(rows), 0, rows), np.maximum(share.sum(axis=0), 1e-300)
        centred = np.where(np.isnan(rows), 0, rows - (share * filled).sum(axis=0) / mass)
        spread = np.sqrt(weights @ centred**2 / weights.sum())
        self.x = centred / np.where(spread > 0, spread, 1)
        self.weights, self.folds = weights, folds
        # sums of squares over the rows of a fold, the same for all clusterings
        self.squares = [_square(self.x[folds == f], weights[folds == f]) for f in range(int(folds.max()) + 1)]

    def score(self, clusters: np.ndarray) -> float | None:
        """Cohen's kappa of the clusters (N,) of rows and of what the probe says that has learnt on the other folds.

        1 at best, 0 by chance; None for one cluster.
        """
        _, clusters = np.unique(clusters, return_inverse=True)
        count = int(clusters.max()) + 1
        if count == 1:
            return None
        found = np.empty_like(clusters)
        for fold, own in enumerate(self.squares):
            asked = self.folds == fold
            found[asked] = self._learnt(clusters, ~asked, sum(self.squares) - own, asked)
        table = np.bincount(clusters * count + found, self.weights, count**2).reshape(count, count)
        table = table / self.weights.sum()
        chance = float(table.sum(axis=1) @ table.sum(axis=0))
        return float((np.trace(table) - chance) / (1 - chance)) if chance < 1 else None

    def _learnt(self, clusters: np.ndarray, train: np.ndarray, square: Floats, asked: np.ndarray) -> np.ndarray:
        """Clusters of rows as said by linear discriminants that have learnt on others."""
        x, weights, clusters = self.x[train], self.weights[train], clusters[train]
        mass = np.bincount(clusters, weights, clusters.max() + 1)
        sums = np.zeros((len(mass), x.shape[1]))
        for cluster in np.flatnonzero(mass):
            member = clusters == cluster
            sums[cluster] = weights[member] @ x[member]
        known = mass > 0
        means = sums[known] / mass[known, None]
        pooled = (square - sums[known].T @ means) / mass.sum()
        level = np.trace(pooled) / len(pooled) + 1e-12
        pooled = (1 - PROBE_SHRINKAGE) * pooled + PROBE_SHRINKAGE * level * np.eye(len(pooled))
        slopes = np.linalg.solve(pooled, means.T)
        offsets = np.log(mass[known] / mass.sum()) - np.einsum("kd,dk->k", means, slopes) / 2
        numbers: np.ndarray = np.flatnonzero(known)[np.argmax(self.x[asked] @ slopes + offsets, axis=1)]
        return numbers


def _square(x: Floats, weights: np.ndarray) -> Floats:
    square: Floats = (x * weights[:, None]).T @ x
    return square


def _entropies(responsibilities: Floats) -> Floats:
    entropies: Floats = -_x_log_x(responsibilities).sum(axis=1)
    return entropies


def _x_log_x(p: Floats) -> Floats:
    return p * np.log(np.where(p > 0, p, 1))
