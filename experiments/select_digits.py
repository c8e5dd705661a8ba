"""Which noise model, regulariser and number of components for the digits, without labels.

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
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.metrics import adjusted_rand_score

from flax_hmog import Natural, fit_em, infer, log_observable_density
from flax_hmog.networks.objectives import merge_output
from flax_hmog.recipe.config import Experiment, Kind
from flax_hmog.recipe.inputs import prepare_inputs
from flax_hmog.recipe.load import load
from flax_hmog.recipe.merge import merged_clusters
from flax_hmog.recipe.presets import DIGITS as CONFIG
from flax_hmog.training import make_mesh

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
        counts = dataclasses.replace(CONFIG.em.regularizer, noise_share=share)
        config = dataclasses.replace(
            CONFIG,
            model=dataclasses.replace(CONFIG.model, n_components=n_components, obs_rep=obs_rep),
            em=dataclasses.replace(CONFIG.em, regularizer=counts),
        )
        densities, stabilities = zip(*(score(config, s, split) for s in SEEDS for split in range(SPLITS)), strict=True)
        spread = np.std(stabilities, ddof=1) / np.sqrt(len(stabilities))
        cells = f"{share:g}", f"{np.mean(densities):.2f}", f"{np.mean(stabilities):.3f} ± {spread:.3f} (s.e.)"
        table.add_row(str(n_components), obs_rep, *cells)
    Console(width=100).print(table)


def score(config: Experiment, seed: int, split: int) -> tuple[float, float]:
    """Held-out log-density and stability for one split into halves."""
    dataset = load(config.data, seed)
    x = prepare_inputs(config.data, dataset, make_mesh()).read(dataset.train, slice(None))
    order = np.random.default_rng((seed, split)).permutation(len(x))
    half = len(x) // 2
    first, second = x[order[:half]], x[order[half : 2 * half]]
    a, b = fit(config, first, 2 * split), fit(config, second, 2 * split + 1)
    held_out = np.mean([log_observable_density(a, second).mean(), log_observable_density(b, first).mean()])
    stability = adjusted_rand_score(clusters(config, a, first, x), clusters(config, b, second, x))
    return float(held_out), float(stability)


def clusters(config: Experiment, natural: Natural, fitted: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The clusters of all rows, components merged by the rows that were fitted."""
    merged = merged_clusters(natural, jnp.asarray(fitted), jnp.ones(len(fitted)), config.n_clusters)
    output = infer(natural, x)
    output = output if merged is None else merge_output(output, merged, config.n_clusters)
    return np.asarray(output.log_responsibilities).argmax(axis=-1)


def fit(config: Experiment, x: np.ndarray, key: int) -> Natural:
    """EM as the experiment runs it."""
    return fit_em(config.analytic, x, jax.random.key(key), options=config.em).natural


if __name__ == "__main__":
    main()
