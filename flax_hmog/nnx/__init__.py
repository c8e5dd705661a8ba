"""The heads as NNX modules, a head on an encoder as one, and the way between them and linen."""

from flax_hmog.nnx.heads import AnalyticHMoG, DifferentiableHMoG, EMState, SymmetricHMoG, from_linen
from flax_hmog.nnx.networks import Clusterer

__all__ = [
    "AnalyticHMoG",
    "Clusterer",
    "DifferentiableHMoG",
    "EMState",
    "SymmetricHMoG",
    "from_linen",
]
