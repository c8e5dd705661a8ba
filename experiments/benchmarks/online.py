"""Online EM against batch EM: `python -m experiments.benchmarks.online --images train-images-idx3-ubyte.gz`.

Question: how much of what batch EM gains over the initialisation is missing after three passes of online EM? Both start
from the same model of MNIST-like images in [0, 1] (the standard idx file). One minute at L = K = 10 on 2 cores.
"""

from __future__ import annotations

import dataclasses
import gzip
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from flax_hmog import AnalyticHMoG, fit_em, fit_online_em, initialize_moments


@dataclasses.dataclass(frozen=True)
class Config:
    """The comparison.

    Attributes:
        images: idx file of images, gzipped.
        lat_dim: L.
        n_components: K.
        batch_steps: steps of batch EM at most.
        tolerance: gain in nats per sample at which batch EM ends.
        seeds: initialisations.
    """

    images: Path
    lat_dim: int = 10
    n_components: int = 10
    batch_steps: int = 200
    tolerance: float = 1e-2
    seeds: int = 3


def main(config: Config) -> None:
    """Print, for every seed, what is missing after 1 to 3 passes of batch EM and after 3 of online EM."""
    pixels = np.frombuffer(gzip.decompress(config.images.read_bytes()), np.uint8, offset=16).reshape(-1, 28 * 28)
    x = jnp.asarray(pixels, jnp.float32) / 255
    head = AnalyticHMoG(config.lat_dim, config.n_components)
    for seed in range(config.seeds):
        start = initialize_moments(head, x, jax.random.key(seed))
        times = [time.perf_counter()]
        batch = fit_em(
            head, x, jax.random.key(seed), init=start, max_steps=config.batch_steps, tolerance=config.tolerance
        ).objective_history
        times.append(time.perf_counter())
        online = fit_online_em(head, x, jax.random.key(seed), init=start).objective_history[-1]
        times.append(time.perf_counter())
        missing = (batch[-1] - np.append(batch[1:4], online)) / (batch[-1] - batch[0])
        batch_seconds, online_seconds = np.diff(times)
        print(
            f"seed {seed}: batch EM {len(batch) - 1} steps, {batch_seconds:.1f} s; missing after 1, 2, 3 of them "
            f"{', '.join(f'{100 * share:.2f} %' for share in missing[:3])}; after 3 passes of online EM "
            f"({online_seconds:.1f} s) {100 * missing[3]:.2f} %",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
