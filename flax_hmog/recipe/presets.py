"""Experiments of `hmog train NAME`, by name; every option can be changed."""

from __future__ import annotations

from flax_hmog.em.options import PseudoCounts
from flax_hmog.recipe.config import EM, Data, Experiment, Gradient, Model
from flax_hmog.recipe.running import Checkpoints
from flax_hmog.recipe.template import Template

LEAST_STEPS = 1000  # of a round with an encoder: of the 20 epochs of default a tenth, 100 steps, distil

# Handwritten digits: does one joint model beat reduction followed by clustering? scikit-learn's 1,797 digits of 8 x 8
# pixels in [0, 1]; 20 % held out, five seeds; 50 s on two CPU cores. Forty components are merged to ten clusters. Kind
# of the noise and strength of its regulariser were chosen without labels, by held-out likelihood and the stability of
# assignments between halves of the training data: `python -m experiments.select_digits`. Expected: docs/results.md.
DIGITS = Experiment(
    workdir="runs/digits",
    data=Data("digits", scale="range"),
    model=Model(lat_dim=10, n_components=40, n_clusters=10, obs_rep="full"),
    em=EM(n_restarts=3, regularizer=PseudoCounts(components=0.2, noise_floor=0.005, noise_share=1.0)),
    gradient=Gradient(epochs=20, batch_size=256, learning_rate=1e-3),
    heads=(Template("differentiable", pst_rep="full"), Template("symmetric", lat_rep="full")),
    n_seeds=5,
    baselines=True,
    checkpoints=Checkpoints(em_steps=200, gradient_steps=50),
)

# A synthetic HMoG with well separated clusters: does training find a known truth? 6,000 rows of 24 columns from 6
# clusters in 4 latent dimensions, drawn with a fixed seed; 20 % held out; seconds. Expected: NMI above .95.
SYNTHETIC = Experiment(
    workdir="runs/synthetic",
    data=Data("synthetic"),
    model=Model(lat_dim=4, n_components=6),
    em=EM(n_restarts=3),
    gradient=Gradient(epochs=10, batch_size=256),
)

# Rows of one's own, in a file; columns in units of their standard deviations unless `--data.scale none` says otherwise.
FILE = Experiment(workdir="runs/file", data=Data("file", scale="standard"), gradient=Gradient(least_steps=LEAST_STEPS))

PRESETS = {"digits": DIGITS, "synthetic": SYNTHETIC, "file": FILE}
