"""A head on a linen encoder: digits are clustered without labels, and the network is saved and restored.

An encoder that is trained on the likelihood of its own features shrinks them all to a point. So here

1. exact EM finds clusters in the pixels, a linear model in closed form;
2. the network learns these clusters of distorted images, then to agree with itself about two distortions of one image;
3. the likelihood trains the head alone, on features that pass no gradient.

    python examples/linen_head.py
"""

import argparse
import tempfile
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, HMoGOutput, fit_em, infer
from flax_hmog.analysis import clustering_metrics, merge_components, merged_responsibilities
from flax_hmog.networks import distillation, negative_joint_information, negative_log_likelihood
from flax_hmog.training import CheckpointWriter, restore

N_CLUSTERS = 10


class Network(nn.Module):
    """An encoder as you would write it, with a head as its last layer."""

    def setup(self) -> None:
        self.layers = [nn.Conv(16, (3, 3)), nn.Conv(32, (3, 3), strides=2), nn.Dense(64)]
        self.normalize = [nn.BatchNorm(momentum=0.9) for _ in self.layers]
        self.last = nn.Dense(16)
        self.head = DifferentiableHMoG(lat_dim=4, n_components=N_CLUSTERS)

    def features(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(-1, 8, 8, 1)
        for layer, normalize in zip(self.layers, self.normalize, strict=True):
            x = x.reshape(len(x), -1) if isinstance(layer, nn.Dense) else x
            x = nn.relu(normalize(layer(x), use_running_average=not train))
        return self.last(x)

    def __call__(self, x: jax.Array, train: bool = False) -> HMoGOutput:
        return self.head(self.features(x, train))

    def both(self, x: jax.Array, train: bool = False) -> tuple[HMoGOutput, HMoGOutput]:
        """The head's output for objectives that train the encoder, and for the likelihood, which must not."""
        features = self.features(x, train)
        return self.head(features), self.head(jax.lax.stop_gradient(features))


def teacher(x: np.ndarray, n_components: int, max_steps: int) -> np.ndarray:
    """Probabilities of the clusters (N, 10) that a linear model finds: many components, merged."""
    fit = fit_em(AnalyticHMoG(lat_dim=8, n_components=n_components), x, jax.random.key(0), max_steps=max_steps)
    output = infer(fit.natural, x)
    merged = merge_components(output.log_responsibilities, N_CLUSTERS)
    return merged_responsibilities(jnp.exp(output.log_responsibilities), merged)


def shift(key: jax.Array, rows: jax.Array) -> jax.Array:
    """Every image moved by at most one pixel."""
    padded = jnp.pad(rows.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(key, (len(rows), 2), 0, 3)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, at, (8, 8)))(padded, corners).reshape(len(rows), 64)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="of the network; the first half learns the teacher")
    parser.add_argument("--components", type=int, default=40, help="of the linear model, which are merged to clusters")
    parser.add_argument("--em-steps", type=int, default=30)
    options = parser.parse_args(arguments)
    digits = load_digits()
    x = (digits.data / 16).astype(np.float32)
    targets = teacher(x, options.components, options.em_steps)
    print("linear model:", clustering_metrics(digits.target, np.argmax(targets, axis=-1)))

    module, optimizer = Network(), optax.adam(2e-3)
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(1), x[:128]))  # without the names of axes
    params, averages = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, averages, state, key, rows, target, share):
        def loss(params):
            views = jnp.concatenate([shift(part, rows) for part in jax.random.split(key)])
            (joint, alone), updates = module.apply(
                {"params": params, "batch_stats": averages}, views, train=True, mutable=["batch_stats"], method="both"
            )
            first, second = (jax.tree.map(lambda leaf, at=at: leaf[at : at + 128], joint) for at in (0, 128))
            learnt, agreed = distillation(first, target), negative_joint_information(first, second)
            value = share * learnt + (1 - share) * agreed + 0.01 * negative_log_likelihood(alone)
            return value, updates["batch_stats"]

        (value, averages), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), averages, state, value

    for epoch in range(options.epochs):
        order = np.random.default_rng(epoch).permutation(len(x))
        for number in range(len(x) // 128):
            batch = order[128 * number :][:128]
            key = jax.random.fold_in(jax.random.key(2), epoch * 1000 + number)
            share = jnp.float32(epoch < options.epochs / 2)
            params, averages, state, _ = step(params, averages, state, key, x[batch], targets[batch], share)

    folder = tempfile.mkdtemp()
    with CheckpointWriter(folder, module, inputs=x, describe=False) as writer:  # a class of a script has no import path
        writer.save(options.epochs, {"params": params, "batch_stats": averages}, state={"optimizer": state})
    clusters = restore(folder, module=Network())(x).log_responsibilities.argmax(axis=-1)
    print("network, restored:", clustering_metrics(digits.target, clusters))


if __name__ == "__main__":
    main()
