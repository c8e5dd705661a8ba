"""Encoders before a head, a head on an encoder as one module, and the objectives that train both."""

from flax_hmog.inference.posterior import merge_output
from flax_hmog.networks.adversarial import perturbation_radius, virtual_adversarial
from flax_hmog.networks.encoders import MLP, Autoencoder, Clusterer, ConvNet, train_arguments
from flax_hmog.networks.neighbors import nearest_neighbors, neighbor_embedding, neighbor_weights
from flax_hmog.networks.objectives import (
    combine,
    conditional_entropy,
    consistency,
    distillation,
    loading_penalty,
    marginal_entropy,
    negative_joint_information,
    negative_log_likelihood,
    negative_mutual_information,
    negative_weight_entropy,
    precision_penalty,
    reconstruction,
)

__all__ = [
    "MLP",
    "Autoencoder",
    "Clusterer",
    "ConvNet",
    "combine",
    "conditional_entropy",
    "consistency",
    "distillation",
    "loading_penalty",
    "marginal_entropy",
    "merge_output",
    "nearest_neighbors",
    "negative_joint_information",
    "negative_log_likelihood",
    "negative_mutual_information",
    "negative_weight_entropy",
    "neighbor_embedding",
    "neighbor_weights",
    "perturbation_radius",
    "precision_penalty",
    "reconstruction",
    "train_arguments",
    "virtual_adversarial",
]
