"""USPS digits: an over-clustered linear HMoG on scanned postal codes, its components merged to ten clusters.

Command: `python -m experiments.train usps --data.path usps_9298.npz`.
Data: a file with `X` (9298, 16, 16) in [0, 1], `y` and `n_train`.
Expected on the test split: docs/results.md.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe.config import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/usps",
    data=Data("file", path="usps_9298.npz", title="USPS digits", scale="range"),
    model=Model(lat_dim=30, n_components=100, n_clusters=10),
    em=EM(max_steps=30, tolerance=0.01, regularizer=PseudoCounts(noise_share=0.01)),
    gradient=Gradient(epochs=5, batch_size=512),
)
