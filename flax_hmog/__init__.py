"""Hierarchical mixtures of Gaussians as Flax modules: exact likelihood, inference and EM."""

from importlib.metadata import version as _version

from flax_hmog import serialization as _serialization  # noqa: F401  registers the classes below with flax
from flax_hmog.em.fit import fit_em
from flax_hmog.em.initialize import initialize_moments
from flax_hmog.em.online import fit_online_em
from flax_hmog.em.options import EMOptions, PseudoCounts, Regularizer
from flax_hmog.em.result import ConvergenceWarning, EMResult, EMState, OverfitWarning, WildRowsWarning
from flax_hmog.em.sparse import SparseInfo
from flax_hmog.em.statistics import Statistics, expected_statistics, whiten_prior
from flax_hmog.em.step import EMInfo, em_step, penalty
from flax_hmog.heads.from_natural import WarmStartInfo, WarmStartWarning, warm_start
from flax_hmog.heads.goal import analytic_hmog, differentiable_hmog, symmetric_hmog
from flax_hmog.heads.modules import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG
from flax_hmog.inference.likelihood import mean_log_density
from flax_hmog.inference.missing import Imputed, impute
from flax_hmog.inference.posterior import (
    HMoGOutput,
    Posterior,
    infer,
    infer_blocks,
    latent_mean,
    log_observable_density,
    posterior_assignments,
    posterior_at,
    posterior_categorical,
    posterior_hard_assignment,
    posterior_soft_assignments,
    sample,
)
from flax_hmog.model.conjugation import LinearGaussian, Mixture, join_conjugated, split_conjugated
from flax_hmog.model.conversions import (
    in_units_of_x,
    mean_to_natural,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
)
from flax_hmog.model.coordinates import Mean, Moments, Natural, Prepared, Prior, ResidualMoments
from flax_hmog.model.frames import Frame
from flax_hmog.model.goal import ravel_mean, ravel_natural, unravel_mean, unravel_natural
from flax_hmog.model.head import Head, HeadSizes
from flax_hmog.model.information import kl_divergence, log_partition, negative_entropy
from flax_hmog.model.kinds import Diagonal, Kind, PositiveDefinite, Scale, register_kind
from flax_hmog.model.prepared import prepare
from flax_hmog.model.structure import SharedBase, Structure
from flax_hmog.model_file import SavedModel, load, save
from flax_hmog.selection.compare import select
from flax_hmog.selection.plot import plot_selection
from flax_hmog.selection.study import sweep
from flax_hmog.selection.table import Scores, Selection

__version__ = _version("flax-hmog")

__all__ = [
    "AnalyticHMoG",
    "ConvergenceWarning",
    "Diagonal",
    "DifferentiableHMoG",
    "EMInfo",
    "EMOptions",
    "EMResult",
    "EMState",
    "Frame",
    "HMoGOutput",
    "Head",
    "HeadSizes",
    "Imputed",
    "Kind",
    "LinearGaussian",
    "Mean",
    "Mixture",
    "Moments",
    "Natural",
    "OverfitWarning",
    "PositiveDefinite",
    "Posterior",
    "Prepared",
    "Prior",
    "PseudoCounts",
    "Regularizer",
    "ResidualMoments",
    "SavedModel",
    "Scale",
    "Scores",
    "Selection",
    "SharedBase",
    "SparseInfo",
    "Statistics",
    "Structure",
    "SymmetricHMoG",
    "WarmStartInfo",
    "WarmStartWarning",
    "WildRowsWarning",
    "analytic_hmog",
    "differentiable_hmog",
    "em_step",
    "expected_statistics",
    "fit_em",
    "fit_online_em",
    "impute",
    "in_units_of_x",
    "infer",
    "infer_blocks",
    "initialize_moments",
    "join_conjugated",
    "kl_divergence",
    "latent_mean",
    "load",
    "log_observable_density",
    "log_partition",
    "mean_log_density",
    "mean_to_natural",
    "moments_to_natural",
    "natural_to_mean",
    "natural_to_moments",
    "negative_entropy",
    "penalty",
    "plot_selection",
    "posterior_assignments",
    "posterior_at",
    "posterior_categorical",
    "posterior_hard_assignment",
    "posterior_soft_assignments",
    "prepare",
    "ravel_mean",
    "ravel_natural",
    "register_kind",
    "sample",
    "save",
    "select",
    "split_conjugated",
    "sweep",
    "symmetric_hmog",
    "unravel_mean",
    "unravel_natural",
    "warm_start",
    "whiten_prior",
]
