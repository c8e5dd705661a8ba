"""Handwritten digits: does one joint model beat reduction followed by clustering?

Command: `python -m experiments.train digits`, then `python -m experiments.analyze runs/digits` (`make demo`).
Data: scikit-learn's 1,797 digits of 8 x 8 pixels, scaled to [0, 1]; 20 % held out, five seeds.
Forty components are merged to ten clusters. Expected on the test split: docs/results.md. Time: 50 s on two CPU cores.
The kind of the noise and the strength of its regulariser were chosen without labels, by held-out likelihood and the
stability of assignments between halves of the training data: `python -m experiments.select_digits`.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe.config import EM, Checkpoints, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/digits",
    data=Data("digits", scale="range"),
    model=Model(lat_dim=10, n_components=40, n_clusters=10, obs_rep="full", pst_rep="full", lat_rep="full"),
    em=EM(n_restarts=3, regularizer=PseudoCounts(components=0.2, noise_floor=0.005, noise_share=1.0)),
    gradient=Gradient(epochs=20, batch_size=256, learning_rate=1e-3),
    heads=("differentiable", "symmetric"),
    n_seeds=5,
    baselines=True,
    checkpoints=Checkpoints(em_steps=200, gradient_steps=50),
)
