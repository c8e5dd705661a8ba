"""Components as a graph: the affinity of two is in the samples of which they are the first and second choice."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Float

from flax_hmog.analysis.inputs import as_array
from flax_hmog.model.checks import check_positive, door, public
from flax_hmog.model.typed import Floats, Samples

TEMPERATURE = 16.0


@public
def component_affinity(log_responsibilities: Samples, *, temperature: float = TEMPERATURE) -> Float[np.ndarray, "K K"]:
    """Affinity of two components: the samples of which they are the first and second choice.

    With i and j the most and second most probable components of sample n,

        A_ij += s_i s_j,   A_ji += s_i s_j,   A_ii += s_i^2,   A_jj += s_j^2,   s_k = r_nk ** (1 / temperature)

    In many dimensions responsibilities are almost always 0 or 1, the more so the longer a model is fitted, and
    co-assignment then rests on a few samples. The second choice shows which components are neighbours even
    where it is improbable, and the temperature makes it count. Further choices add more noise than information.

    Args:
        log_responsibilities: log p(z = k | x) (..., K), natural logarithm; -inf is allowed.
        temperature: from 1 (products of responsibilities) upwards (counts of samples); from 8 on the
            result depends little on it.

    Returns:
        Affinities (K, K), symmetric, at least 0.

    Raises:
        TypeError: if `log_responsibilities` holds no real numbers.
        ValueError: unless they are logarithms of probabilities, or for a temperature that is not positive.

    Source: Martinetz and Schulten 1994 (first and second choice as neighbours).

    Example:
        >>> component_affinity(np.log([[0.6, 0.4], [0.3, 0.7]])).shape
        (2, 2)
    """
    return affinity_of(as_log_responsibilities(log_responsibilities), temperature)


def affinity_of(rows: Floats, temperature: float) -> Floats:
    """Affinities (K, K) of checked log-responsibilities (N, K)."""
    check_positive("temperature", temperature, f"Use {TEMPERATURE}.")
    count = rows.shape[1]
    if count == 1:
        return np.array([[float(len(rows))]])
    # the best, and the best of the others: faster than a partition of every row
    each, choices = np.arange(len(rows)), np.empty((len(rows), 2), int)
    choices[:, 0] = rows.argmax(axis=1)
    first = rows[each, choices[:, 0]]
    rows[each, choices[:, 0]] = -np.inf
    choices[:, 1] = rows.argmax(axis=1)
    rows[each, choices[:, 0]] = first
    share = np.exp(np.stack([first, rows[each, choices[:, 1]]], axis=1) / temperature)
    affinity = np.zeros((count, count))
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pair = choices[:, a] * count + choices[:, b]
        affinity += np.bincount(pair, share[:, a] * share[:, b], count**2).reshape(count, count)
    return affinity


def joint_table(affinity: Samples) -> Floats:
    """Affinities as a joint distribution of two components (K, K)."""
    table = as_array("affinity", affinity, 2, "(K, K)")
    count = len(table)
    scale = float(np.abs(table).max())
    is_symmetric = table.shape == (count, count) and np.allclose(table, table.T, atol=1e-9 * scale)
    if not is_symmetric or table.min() < 0 or scale == 0:
        raise ValueError(
            f"{door()}: `affinity` must be symmetric, (K, K), at least 0 and not all 0; got shape {table.shape}. "
            "Use component_affinity."
        )
    return cast(Floats, (table + table.T) / (2 * table.sum()))


def x_log_x(p: Floats) -> Floats:
    """P log p, and 0 at 0."""
    return p * np.log(np.where(p > 0, p, 1))


def in_order(labels: np.ndarray) -> np.ndarray:
    """The same clusters, numbered in the order of their first members."""
    _, first, numbers = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers]


def as_log_responsibilities(value: object) -> Floats:
    """Log-responsibilities (N, K) in float64, from (..., K)."""
    array = np.asarray(value)
    array = array.reshape(-1, array.shape[-1]) if array.ndim > 2 else array
    if array.dtype.kind == "f":
        array = np.maximum(array, -1e30, dtype=np.float64)
    array = as_array("log_responsibilities", array, 2, "(..., K)")
    total = np.exp(array).sum(axis=1)
    worst = int(np.abs(total - 1).argmax())
    if abs(total[worst] - 1) > 1e-3:
        raise ValueError(
            f"{door()}: `log_responsibilities` must be logarithms of probabilities that sum to 1 in each row; got sum "
            f"{total[worst]:.6g} in row {worst}. Use the output's log_responsibilities."
        )
    return array
