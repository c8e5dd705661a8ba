"""MNIST with an encoder: clusters of a linear HMoG, learnt and improved by a small convolutional network with a head.

Command: `python -m experiments.train mnist_encoder`; with the files in a folder `--data.downloads FOLDER`.
Data: as in the experiment mnist, as is the linear model. Images are shifted, rotated and scaled at random.
Expected on the test split: docs/results.md.
"""

import dataclasses

from experiments.configs import mnist
from flax_hmog.recipe import Augmentation, Gradient, Rounds, Template
from flax_hmog.recipe.presets import LEAST_STEPS

CONFIG = dataclasses.replace(
    mnist.CONFIG,
    workdir="runs/mnist_encoder",
    encoder=Template("conv"),
    rounds=Rounds(distil_epochs=1),
    gradient=Gradient(least_steps=LEAST_STEPS, epochs=30, batch_size=256),
    augmentation=Augmentation(shift=3.0, rotation=15.0, scale=0.15),
)
