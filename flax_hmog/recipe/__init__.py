"""The recipe: from data to clusters by EM, rounds with an encoder and training by gradients, as configured.

It needs `pip install "flax-hmog[train]"`.
"""

from flax_hmog.data.files import File
from flax_hmog.networks.augment import Augmentation
from flax_hmog.recipe.clusterer import fit_clusterer
from flax_hmog.recipe.config import EM, Data, Experiment, Gradient, Model, Rounds
from flax_hmog.recipe.features import FeatureClusters, fit_features
from flax_hmog.recipe.neighbors import fit_neighbors
from flax_hmog.recipe.saved import restore_run
from flax_hmog.recipe.template import Template

__all__ = [
    "EM",
    "Augmentation",
    "Data",
    "Experiment",
    "FeatureClusters",
    "File",
    "Gradient",
    "Model",
    "Rounds",
    "Template",
    "fit_clusterer",
    "fit_features",
    "fit_neighbors",
    "restore_run",
]
