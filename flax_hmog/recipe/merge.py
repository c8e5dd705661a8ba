"""Components of a mixture merged to clusters, from rows that may lie on several devices and processes."""

from __future__ import annotations

from typing import cast

import jax
import numpy as np

from flax_hmog.analysis import merge_components
from flax_hmog.inference.posterior import infer
from flax_hmog.model.coordinates import Natural
from flax_hmog.training.processes import gather, to_host

MERGED_ROWS = 100_000  # of which a merge looks at most


def merged_clusters(natural: Natural, x: jax.Array, weights: jax.Array, n_clusters: int | None) -> np.ndarray | None:
    """The cluster of each component (K,), the same on all processes; None where nothing is to be merged.

    Args:
        natural: the fitted mixture.
        x: the rows that it was fitted to (N, D).
        weights: their weights (N,); rows of weight 0 do not count.
        n_clusters: number of clusters, or None.
    """
    if n_clusters in (None, natural.posterior_location.shape[0]):
        return None
    step = -(-x.shape[0] // MERGED_ROWS)
    rows = to_host(infer(natural, x[::step]).log_responsibilities)
    clusters = merge_components(rows[to_host(weights[::step]) > 0], n_clusters)
    return cast(np.ndarray | None, gather(clusters)[0])  # other machines may round otherwise
