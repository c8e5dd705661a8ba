"""A head in an NNX network: an autoencoder gives features, exact EM finds clusters in them, both are trained together.

The network has two heads on the same features. `DifferentiableHMoG` is trained by gradients. `AnalyticHMoG` has no
parameters: in training every call takes a step of EM, as batch normalisation takes its averages, and so follows
features that move. The decoder keeps these from collapse.

    python examples/nnx_head.py
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from flax_hmog import fit_em
from flax_hmog import nnx as heads
from flax_hmog.analysis import clustering_metrics
from flax_hmog.networks import negative_joint_information, reconstruction

SIZES: Any = {"lat_dim": 8, "n_components": 10, "obs_dim": 16}


class Network(nnx.Module):
    """An autoencoder with two heads on its features."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 16, rngs=rngs))
        self.decoder = nnx.Sequential(nnx.Linear(16, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 64, rngs=rngs))
        self.noise = nnx.Dropout(0.2, rngs=rngs)
        self.head = heads.DifferentiableHMoG(**SIZES, rngs=rngs)
        self.em = heads.AnalyticHMoG(**SIZES, step_delay=100.0, min_rate=0.01, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        return self.encoder(self.noise(x))


@nnx.jit
def learn_features(network: Network, optimizer: nnx.Optimizer, x: jax.Array, key: jax.Array) -> jax.Array:
    """A step of the autoencoder."""

    def loss(network: Network) -> jax.Array:
        return reconstruction(network.decoder(network.features(x)), x)

    value, gradients = nnx.value_and_grad(loss)(network)
    optimizer.update(network, gradients)
    return value


@nnx.jit
def learn_clusters(network: Network, optimizer: nnx.Optimizer, x: jax.Array, key: jax.Array) -> jax.Array:
    """An image and a shifted copy are to be in one cluster, and clusters to be of equal size."""
    shifted = jnp.roll(x.reshape(-1, 8, 8), jax.random.randint(key, (2,), -1, 2), axis=(1, 2)).reshape(x.shape)

    def loss(network: Network) -> jax.Array:
        features = network.features(x)
        agreed = negative_joint_information(network.head(features), network.head(network.features(shifted)))
        fixed = jax.lax.stop_gradient(
            features
        )  # the likelihood trains the head alone: it would shrink features to a point
        network.em(fixed)  # a step of EM, in place
        return agreed - 0.01 * network.head(fixed).log_density.mean() + reconstruction(network.decoder(features), x)

    value, gradients = nnx.value_and_grad(loss)(network)
    optimizer.update(network, gradients)
    return value


def epochs(
    step: Callable[..., jax.Array], network: Network, optimizer: nnx.Optimizer, x: np.ndarray, count: int
) -> float:
    """Pass over the rows, in a new order each time; the last value of the objective."""
    network.train()  # dropout, and steps of EM
    value: Any = np.nan
    for epoch in range(count):
        order = np.random.default_rng(epoch).permutation(len(x))
        for number in range(len(x) // 128):
            key = jax.random.fold_in(jax.random.key(epoch), number)
            value = step(network, optimizer, x[order[128 * number : 128 * (number + 1)]], key)
    network.eval()
    return float(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=30, help="epochs of the autoencoder")
    parser.add_argument("--em-steps", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=30, help="epochs with the heads")
    options = parser.parse_args(arguments)

    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    network = Network(nnx.Rngs(0))
    # of nnx.Param alone: what EM learns is a variable of another type
    optimizer = nnx.Optimizer(network, optax.adam(1e-3), wrt=nnx.Param)
    error = epochs(learn_features, network, optimizer, x, options.pretraining)
    print(f"autoencoder: squared error {error:.3f}")

    features = network.features(x)
    fit = fit_em(network.em, features, jax.random.key(0), max_steps=options.em_steps)
    for head in (network.head, network.em):
        head.warm_start(fit.natural, features)
    for when in ("start", "end"):
        if when == "end":
            epochs(learn_clusters, network, optimizer, x, options.epochs)
        features = network.features(x)
        for head in (network.head, network.em):
            scores = clustering_metrics(digits.target, head(features).log_responsibilities.argmax(axis=-1))
            print(f"{when}, {type(head).__name__}: {scores}")
    print("steps of EM:", network.em.em.get_value()["step"])


if __name__ == "__main__":
    main()
