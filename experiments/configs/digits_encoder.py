"""Handwritten digits with an encoder: the recipe of mnist_encoder in a minute.

Command: `python -m experiments.train digits_encoder`.
Data: scikit-learn's 1,797 digits of 8 x 8 pixels, scaled to [0, 1]; 20 % held out. Turned and moved a little.
Expected on the test split: docs/results.md.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe import EM, Augmentation, Data, Experiment, Gradient, Model, Rounds, Template
from flax_hmog.recipe.running import Checkpoints

CONFIG = Experiment(
    workdir="runs/digits_encoder",
    data=Data("digits", scale="range"),
    model=Model(lat_dim=15, n_components=40, n_clusters=10),
    encoder=Template("conv", features=32),
    heads=(Template("differentiable", lat_dim=8),),
    rounds=Rounds(distil_epochs=8, mixed_epochs=4),
    em=EM(max_steps=30, tolerance=0.01, regularizer=PseudoCounts(noise_share=0.01)),
    gradient=Gradient(epochs=80, batch_size=128, learning_rate=2e-3),
    augmentation=Augmentation(shift=0.5, rotation=10.0, scale=0.1),
    checkpoints=Checkpoints(gradient_steps=5000),
)
