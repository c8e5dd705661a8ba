"""USPS digits with an encoder: two rounds, the first with more clusters than the last, on few images.

Command: `python -m experiments.train usps_encoder --data.path usps_9298.npz`.
Data: as in the experiment usps, as is the linear model. Images are shifted, rotated and scaled at random.
Expected on the test split: docs/results.md.
"""

import dataclasses

from experiments.configs import usps
from flax_hmog.recipe import Augmentation, Gradient, Rounds, Template
from flax_hmog.recipe.presets import LEAST_STEPS

CONFIG = dataclasses.replace(
    usps.CONFIG,
    workdir="runs/usps_encoder",
    encoder=Template("conv"),
    rounds=Rounds(count=2, early_clusters=40, distil_epochs=4, mixed_epochs=2),
    gradient=Gradient(least_steps=LEAST_STEPS, epochs=40, batch_size=256),
    augmentation=Augmentation(shift=2.0, rotation=12.0, scale=0.12),
)
