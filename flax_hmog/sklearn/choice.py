"""The choice of a model for a table: components and factors by BIC, clusters by how little they overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flax_hmog.data.framing import robust_frame
from flax_hmog.model.checks import allowing
from flax_hmog.sklearn.background import scattered
from flax_hmog.sklearn.estimator import HMoG

MOST_ROWS = 10_000  # that a choice looks at
ENOUGH = 0.5  # share of rows without gaps
MANY_COMPONENTS = 8  # with which the factors are chosen
MOST_COMPONENTS = 30
FACTORS = (2, 4, 6, 8)  # that are tried first; one size of programs
MOST_OVERLAP = 0.1  # probability that a row of one cluster passes for one of another
FILL_STEPS, FILL_FACTORS = 30, 8


def choose(
    rows: np.ndarray,
    n_clusters: int | None = None,
    lat_dim: int | None = None,
    *,
    random_state: int = 0,
    say: Callable[[str], None] = print,
    **arguments: Any,
) -> HMoG:
    """A model of rows (N, D), of the size with the least BIC, its components merged to clusters.

    The choice is made on rows without gaps, or, where these are less than half, with gaps filled; the chosen model is
    fitted to all rows as they are.

    Args:
        rows: (N, D), NaN where an entry is missing.
        n_clusters: number of clusters; None for those that overlap little.
        lat_dim: number of factors; None for that with the least BIC.
        random_state: seed.
        say: told what was tried and chosen.
        arguments: of `HMoG`.
    """
    part = rows[:: -(-len(rows) // MOST_ROWS)]
    is_whole = ~np.isnan(part).any(axis=1)
    part = part[is_whole] if is_whole.mean() >= ENOUGH else filled_rows(part, random_state)
    kept = ~scattered(part, np.ones(len(part)))
    part = part[kept]
    tried: dict[tuple[int, int], HMoG] = {}

    def bic(size: tuple[int, int]) -> float:
        if size not in tried:
            model = HMoG(size[0], lat_dim=size[1], random_state=random_state)
            tried[size] = model.fit(part)
        return float(tried[size].criteria_.bic)

    most = max(1, min(part.shape[1], len(part) // 10))
    fewest, many = n_clusters or 1, max(n_clusters or 1, min(MANY_COMPONENTS, len(part) // 20 + 1))
    best = many, lat_dim or min(dict.fromkeys(min(f, most) for f in FACTORS), key=lambda f: bic((many, f)))
    best = _least(bic, best, factors=lat_dim is None, most=most)
    best = min(((k, best[1]) for k in _while_better(bic, fewest, best[1], min(MOST_COMPONENTS, len(part)))), key=bic)
    best = _least(bic, best, factors=lat_dim is None, most=most)
    for size in sorted(tried, key=bic)[:3]:
        say(f"  {size[0]:>2} components, {size[1]:>2} factors: BIC {bic(size):.7g}")
    say(f"  and {max(0, len(tried) - 3)} sizes more")
    model = tried[best]
    count = n_clusters or n_separate(model.predict_proba(part))
    changes = {"n_clusters": count, "missing": "nan", "background": True, "warm_start": True}
    model.set_params(**changes | arguments).fit(rows)
    in_use = int(np.count_nonzero(model.cluster_sizes_))
    if n_clusters is None and in_use < count:  # a component of rows that are of the background now
        model.set_params(n_clusters=in_use).fit(rows)
    return model


def _least(
    bic: Callable[[tuple[int, int]], float], size: tuple[int, int], *, factors: bool, most: int
) -> tuple[int, int]:
    """The size with the number of factors from which neither one more nor one less is better."""
    while factors:
        near = [(size[0], f) for f in (size[1], size[1] - 1, size[1] + 1) if 1 <= f <= most]
        best = min(near, key=bic)
        if best == size:
            break
        size = best
    return size


def _while_better(bic: Callable[[tuple[int, int]], float], fewest: int, lat_dim: int, most: int) -> range:
    """Numbers of components up to two more than the best of them, or `most`."""
    best, last = fewest, fewest
    while last < min(best + 2, most):
        last += 1
        best = min(best, last, key=lambda k: bic((k, lat_dim)))
    return range(fewest, last + 1)


def n_separate(responsibilities: np.ndarray) -> int:
    """Number of clusters when those are merged, one pair after the other, of which one passes for the other too often.

    The probability is that of a row of the one to be assigned to the other (Hennig 2010).

    Args:
        responsibilities: (N, K).
    """
    while (count := int(responsibilities.shape[1])) > 1:
        chosen = np.eye(count)[responsibilities.argmax(axis=1)]
        passes = responsibilities.T @ chosen / np.maximum(responsibilities.sum(axis=0), 1e-12)[:, None]
        np.fill_diagonal(passes, 0)
        i, j = np.unravel_index(passes.argmax(), passes.shape)
        if passes[i, j] < MOST_OVERLAP:
            break
        responsibilities[:, j] += responsibilities[:, i]
        responsibilities = np.delete(responsibilities, i, axis=1)
    return count


def filled_rows(rows: np.ndarray, seed: int) -> np.ndarray:
    """Rows (N, D) whose missing entries are drawn about a plane, by regularised PCA (Josse and Husson 2012)."""
    is_missing = np.isnan(rows)
    if not is_missing.any():
        return rows
    with allowing("nan"):
        center, unit = robust_frame(rows, np.ones(len(rows)), True, np.float64).exact()
    z = plane = np.nan_to_num(np.clip((rows - center) / unit, -10, 10))
    rank = max(1, min(FILL_FACTORS, rows.shape[1] // 2))
    for _ in range(FILL_STEPS):
        mean = z.mean(axis=0)
        values, vectors = np.linalg.eigh((z - mean).T @ (z - mean))
        largest, rest = values[-rank:], values[:-rank].mean() if len(values) > rank else 0.0
        # axes that hold little more than noise count little
        shrunk = vectors[:, -rank:] * np.maximum(1 - rest / np.maximum(largest, 1e-300), 0)
        plane = (z - mean) @ shrunk @ vectors[:, -rank:].T + mean
        z = np.where(is_missing, plane, z)
    gaps = np.where(is_missing, np.nan, z - plane)
    noise = np.nan_to_num(np.nanstd(gaps, axis=0)) * np.random.default_rng(seed).normal(size=z.shape)
    filled: np.ndarray = np.where(is_missing, center + unit * (z + noise), rows)
    return filled
