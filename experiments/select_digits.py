"""Choice of noise model, regulariser and number of components for the digits, without labels.

    python -m experiments.select_digits

For each candidate: halves of the training data (seeds 0 and 1, three splits each) are fitted apart. Held-out
log-density is that of each half under the model of the other; stability is the adjusted Rand index between the two
models' clusters of the whole training data. No label is read.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import train_test_split

from flax_hmog.recipe import EM, Model, fit_clusterer
from flax_hmog.recipe.config import Kind
from flax_hmog.recipe.presets import DIGITS

CANDIDATES: list[tuple[int, Kind, float]] = [
    (40, "scale", 0.0),
    *((40, kind, share) for kind in get_args(Kind)[1:] for share in (0.1, 0.3, 1.0, 3.0)),
    *((n_components, "full", 1.0) for n_components in (10, 20, 80)),
]
SEEDS, SPLITS = (0, 1), 3


def main() -> None:
    """Print the table."""
    table = Table("components", "noise", "pseudo-samples per sample", "held-out log p(x)", "stability (ARI)")
    for n_components, obs_rep, share in CANDIDATES:
        model = dataclasses.replace(DIGITS.model, n_components=n_components, obs_rep=obs_rep)
        counts = dataclasses.replace(DIGITS.em.regularizer, noise_share=share)
        em = dataclasses.replace(DIGITS.em, regularizer=counts)
        densities, stabilities = zip(
            *(score(model, em, s, split) for s in SEEDS for split in range(SPLITS)), strict=True
        )
        spread = np.std(stabilities, ddof=1) / np.sqrt(len(stabilities))
        cells = f"{share:g}", f"{np.mean(densities):.2f}", f"{np.mean(stabilities):.3f} ± {spread:.3f} (s.e.)"
        table.add_row(str(n_components), obs_rep, *cells)
    Console(width=100).print(table)


def score(model: Model, em: EM, seed: int, split: int) -> tuple[float, float]:
    """Held-out log-density and stability for one split into halves."""
    x = train_test_split(load_digits().data / 16, test_size=DIGITS.data.test_share, random_state=seed)[0]
    order = np.random.default_rng((seed, split)).permutation(len(x))
    half = len(x) // 2
    halves = [x[order[:half]], x[order[half : 2 * half]]]
    a, b = (
        fit_clusterer(None, rows, DIGITS.n_clusters, jax.random.key(2 * split + number), model=model, em=em)
        for number, rows in enumerate(halves)
    )
    held_out = np.mean([a(halves[1]).log_density.mean(), b(halves[0]).log_density.mean()])
    clusters = [np.argmax(found(x).log_responsibilities, axis=-1) for found in (a, b)]
    return float(held_out), float(adjusted_rand_score(*clusters))


if __name__ == "__main__":
    main()
