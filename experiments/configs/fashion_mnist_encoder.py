"""Fashion-MNIST with an encoder, as mnist_encoder.

Command: `python -m experiments.train fashion_mnist_encoder`; with the files in a folder `--data.downloads FOLDER`.
Data: as in the experiment fashion_mnist, as is the linear model. Images are shifted and scaled a little, and mirrored.
Expected on the test split: docs/results.md.
"""

import dataclasses

from experiments.configs import fashion_mnist
from flax_hmog.recipe import Augmentation, Gradient, Rounds, Template
from flax_hmog.recipe.presets import LEAST_STEPS

CONFIG = dataclasses.replace(
    fashion_mnist.CONFIG,
    workdir="runs/fashion_mnist_encoder",
    encoder=Template("conv"),
    rounds=Rounds(distil_epochs=1),
    gradient=Gradient(least_steps=LEAST_STEPS, epochs=24, batch_size=256),
    augmentation=Augmentation(shift=2.0, rotation=5.0, scale=0.1, mirror=True),
)
