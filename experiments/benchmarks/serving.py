"""Time restored models: `python -m experiments.benchmarks.serving [REPEATS]` prints milliseconds per call as JSON.

Rows of numpy, with and without encoder and preprocessing; sizes are (D, L, K) of the head.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.measure import median_time
from flax_hmog import AnalyticHMoG
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.training import Affine, CheckpointWriter, Preprocessing, restore

SIZES = ((64, 10, 40), (784, 50, 200))
ROWS = (1, 7, 256)


def saved(folder: str, size: tuple[int, int, int], with_encoder: bool) -> None:
    """Write a checkpoint of a random model, on an encoder of as many columns and whitened inputs, or alone."""
    obs_dim, lat_dim, n_components = size
    x = np.random.default_rng(0).normal(size=(1024, obs_dim)).astype(np.float32)
    head = AnalyticHMoG(lat_dim, n_components)
    encoder = MLP(features=obs_dim) if with_encoder else None
    module: Any = head if encoder is None else Clusterer(encoder, head)
    steps = Preprocessing((Affine.constant(obs_dim, offset=0.1, scale=2.0),), obs_dim) if with_encoder else None
    with CheckpointWriter(folder, head=head, encoder=encoder, preprocessing=steps) as writer:
        writer.save(0, jax.jit(module.init)(jax.random.key(0), x))


def measure(repeats: int) -> dict[str, float]:
    """Milliseconds of a call, median, by size, rows, and what stands before the head."""
    times = {}
    for size in SIZES:
        for with_encoder in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                saved(folder, size, with_encoder)
                model = restore(folder)
            for rows in ROWS:
                x = np.random.default_rng(1).normal(size=(rows, size[0])).astype(np.float32)
                name = f"{size} {rows} rows{' with encoder' if with_encoder else ''}"
                times[name] = 1e3 * median_time(model, x, repeats=repeats)
    return times


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 50), indent=2))
