"""The three heads with the argument order of goal-jax."""

from __future__ import annotations

from typing import Any

from flax_hmog.heads.modules import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG
from flax_hmog.model.kind import RepLike


def differentiable_hmog(
    obs_dim: int | None, obs_rep: RepLike, lat_dim: int, pst_rep: RepLike, n_components: int, **options: Any
) -> DifferentiableHMoG:
    """`DifferentiableHMoG` with the argument order of goal-jax; `options` are its other attributes.

    Example:
        >>> differentiable_hmog(4, "diagonal", 2, "diagonal", 3).n_components
        3
    """
    return DifferentiableHMoG(lat_dim, n_components, obs_dim, obs_rep, pst_rep, **options)


def symmetric_hmog(
    obs_dim: int | None, obs_rep: RepLike, lat_dim: int, lat_rep: RepLike, n_components: int, **options: Any
) -> SymmetricHMoG:
    """`SymmetricHMoG` with the argument order of goal-jax; `options` are its other attributes.

    Example:
        >>> symmetric_hmog(4, "diagonal", 2, "full", 3).lat_rep
        'full'
    """
    return SymmetricHMoG(lat_dim, n_components, obs_dim, obs_rep, lat_rep, **options)


def analytic_hmog(
    obs_dim: int | None, obs_rep: RepLike, lat_dim: int, n_components: int, **options: Any
) -> AnalyticHMoG:
    """`AnalyticHMoG` with the argument order of goal-jax; `options` are its other attributes.

    Example:
        >>> analytic_hmog(4, "scale", 2, 3, min_rate=0.01).obs_rep
        'scale'
    """
    return AnalyticHMoG(lat_dim, n_components, obs_dim, obs_rep, **options)
