"""The recipe: from data to clusters by EM, rounds with an encoder and training by gradients, as configured.

It needs `pip install "flax-hmog[train]"`.
"""

from flax_hmog.networks.augment import Augmentation
from flax_hmog.recipe.clusterer import fit_clusterer
from flax_hmog.recipe.config import EM, Data, Encoder, Experiment, Gradient, Model, Rounds
from flax_hmog.recipe.saved import restore_run

__all__ = [
    "EM",
    "Augmentation",
    "Data",
    "Encoder",
    "Experiment",
    "Gradient",
    "Model",
    "Rounds",
    "fit_clusterer",
    "restore_run",
]
