"""CIFAR-10: how far does a linear model of raw colour pixels come?

Command: `python -m experiments.train cifar10`; with the archive in a folder `--data.downloads FOLDER`.
Data: CIFAR-10 through tensorflow-datasets, 50,000 training and 10,000 test images, scaled to [0, 1].
Expected: a held-out log-density above that of the warm start; raw pixels hold little of the classes.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe.config import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/cifar10",
    data=Data("cifar10", scale="range"),
    model=Model(lat_dim=60, n_components=50),
    em=EM(max_steps=30, tolerance=0.05, regularizer=PseudoCounts(noise_share=0.01), accelerate=False),
    gradient=Gradient(epochs=5, batch_size=1000, learning_rate=1e-3),
)
