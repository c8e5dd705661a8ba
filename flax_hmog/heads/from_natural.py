"""From a fitted model to the variables of a head: the inverse of leaves.py, exact where the head can hold the model.

Everything here is computed once, in numpy float64.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.data.samples import check_observations
from flax_hmog.em.online import stepwise_start
from flax_hmog.em.step import whiten_moments
from flax_hmog.heads.leaves import Bounds, leaf_specs, leaves_to_natural
from flax_hmog.heads.modules import AnalyticHMoG, head_bounds
from flax_hmog.inference.posterior import log_observable_density, sample
from flax_hmog.model.checks import check_head, check_precision
from flax_hmog.model.conversions import moments_to_natural, own_moments, with_prior
from flax_hmog.model.coordinates import Moments, Natural, check_natural
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import Array, Covariance, Diagonal, PositiveDefinite, Rep, Scale, as_rep, pytree

ROUNDING = 1e-5  # of the log-likelihood and of one nat per column, which float32 may lose
REFERENCE_DRAWS = 4096  # draws of the model on which it is compared when no data are given
LEAST_DIGITS = 1e-1  # of a noise standard deviation, by which values of x may be apart in the dtype
BASE_SHARE = 0.5  # the part of the smallest component precision that goes into the shared base


@pytree
class WarmStartInfo:
    """What a warm start cost.

    Attributes:
        log_likelihood_before: mean log p(x) of the given model, in nats per sample ().
        log_likelihood_after: that of the head (); equal to rounding where the head can hold the model.
    """

    log_likelihood_before: Array
    log_likelihood_after: Array


def warm_start(head: Any, natural: Natural, x: Any = None) -> tuple[dict[str, Any], WarmStartInfo]:
    """Variables of a head for a fitted model.

    Full heads (`pst_rep="full"`, `lat_rep="full"`, Analytic) hold the model exactly, within their bounds. For
    restricted ones the latent basis is first changed to the generalised eigenvectors of (W'Psi^-1 W, mean P_k), in
    which both are diagonal; then the component covariances are reduced to the head's kind by their variances in that
    basis. For `Scale` the basis is also scaled so that the average posterior precision is I.

    Args:
        head: unbound head to start; its dimensions, kinds and bounds are read.
        natural: the fitted model, for example `fit_em(...).natural`.
        x: observations (N, D) to compare on; None draws them from the model.

    Returns:
        Variables for `head.apply`, and `WarmStartInfo`.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if the dimensions of head and model differ.
    """
    check_head("warm_start", head, "(head, natural, x); a `Clusterer` has its `head`")
    check_precision("warm_start", head.param_dtype)
    check_natural("warm_start", natural)
    natural = with_prior(natural, "warm_start")
    _check_dimensions(head, natural)
    obs_dim = natural.interaction.shape[0]
    x = sample(natural, jax.random.key(0), REFERENCE_DRAWS)[0] if x is None else x
    check_observations("warm_start", x, obs_dim, natural.interaction.dtype)
    given = _in_units_of_x(whiten_moments(own_moments(natural)), natural.frame)
    obs_rep = as_rep(head.obs_rep, caller="warm_start", argument="head.obs_rep")
    moments = dataclasses.replace(given, noise=_restrict_noise(given.noise, obs_rep, obs_dim))
    if isinstance(head, AnalyticHMoG):
        own = jax.tree.map(lambda a: jnp.asarray(a, head.param_dtype), moments)
        _check_held(moments, own, head.param_dtype)
        started = moments_to_natural(own)
        variables: dict[str, Any] = {"em": stepwise_start(own)}
    else:
        rep, shared_base = head.component_structure
        bounds = head_bounds(head)
        leaves = _leaves(moments, rep, shared_base, bounds)
        specs = leaf_specs(obs_dim, head.lat_dim, head.n_components, obs_rep, rep, shared_base)
        params = {name: jnp.asarray(leaves[name], head.param_dtype).reshape(spec.shape) for name, spec in specs.items()}
        started = leaves_to_natural(params, obs_rep, rep, shared_base, bounds)
        variables = {"params": params}
    info = WarmStartInfo(jnp.mean(log_observable_density(natural, x)), jnp.mean(log_observable_density(started, x)))
    is_exact = head.component_structure == (PositiveDefinite, False) and (
        obs_rep in (PositiveDefinite, type(given.noise)) or type(given.noise) is Scale
    )
    _warn_of_loss(head, moments, started, info, is_exact)
    return variables, info


class WarmStartWarning(UserWarning):
    """A head does not hold the model that it was started from."""


def _warn_of_loss(head: Any, moments: Moments, started: Natural, info: WarmStartInfo, is_avoidable: bool) -> None:
    """`WarmStartWarning` if more is lost than rounding explains, and by no restriction of the head's kinds."""
    before, after = float(info.log_likelihood_before), float(info.log_likelihood_after)
    obs_dim = moments.bias.shape[0]
    lost, rounding = before - after, ROUNDING * (abs(before) + obs_dim)
    noise, wanted = (_variances(kind, obs_dim) for kind in (started.observable_precision.inverse(), moments.noise))
    outside = not np.allclose(noise, wanted, rtol=1e-2, atol=0)
    spacing = np.spacing(np.abs(moments.bias).astype(head.param_dtype))
    rounded = bool((spacing > LEAST_DIGITS * np.sqrt(wanted)).any())
    if np.isfinite(lost) and not rounded and (lost <= rounding or not (outside or is_avoidable)):
        return
    cause = (
        f"a mean of {np.abs(moments.bias).max():.3g} has a spacing of {spacing.max():.3g} in "
        f"{np.dtype(head.param_dtype).name}, too coarse for the noise. Subtract the column means from x in float64."
        if rounded
        else f"noise variances from {wanted.min():.3g} to {wanted.max():.3g} are outside `noise_bounds` "
        f"{head.noise_bounds}. Widen them, or divide x by its spread."
        if outside and hasattr(head, "noise_bounds")
        else f"{np.dtype(head.param_dtype).name} or the bounds of the head cannot hold it. Subtract the column means "
        "from x and divide it by its spread, or widen `precision_bounds` and `relative_floor`."
    )
    warnings.warn(
        f"warm_start: {type(head).__name__} must hold the model; it has {after:.6g} nats per sample instead of "
        f"{before:.6g}: {cause}",
        WarmStartWarning,
        stacklevel=3,
    )


def _leaves(moments: Any, rep: Rep, shared_base: bool, bounds: Bounds) -> dict[str, np.ndarray]:
    """All leaves of a trainable head, for a model in a whitened basis."""
    noise: Any = moments.noise.entries
    common: dict[str, Any] = {
        "bias": moments.bias,
        "noise": _positive_definite_leaf(noise, bounds.noise, bounds.relative_floor)
        if isinstance(moments.noise, PositiveDefinite)
        else _unbounded(noise, bounds.noise),
        "logits": np.log(moments.weights),
    }
    whitened = _whiten_columns(moments.noise, moments.loadings)  # A = Psi^-1/2 W
    covariances = moments.covariances.entries
    if rep is PositiveDefinite:
        return common | _full_leaves(whitened, moments.means, np.linalg.inv(covariances), bounds)
    # y = basis y': the mean prior precision becomes I (times `unit`), A'A diagonal
    root = np.linalg.cholesky(np.mean(np.linalg.inv(covariances), axis=0))
    gram, rotation = np.linalg.eigh(_both_sides(np.linalg.inv(root), whitened.T @ whitened))
    gram = np.maximum(gram, 0)
    basis = np.linalg.inv(root).T @ rotation
    if rep is Scale and not shared_base:
        scale = 1 / np.sqrt(1 + gram)
        basis, gram = basis * scale, gram * scale**2
    inverse = np.linalg.inv(basis)
    variances = np.einsum("ij,kjl,il->ki", inverse, covariances, inverse)
    restricted = _symmetric_leaves if shared_base else _restricted_leaves
    return common | restricted(whitened @ basis, moments.means @ inverse.T, 1 / variances, gram, rep, bounds)


def _full_leaves(whitened: np.ndarray, means: np.ndarray, prior: np.ndarray, bounds: Bounds) -> dict[str, np.ndarray]:
    """Inverse of `leaves._full_components` without a base."""
    own = _unbalance(prior, bounds.relative_floor)
    spread = np.sqrt(np.einsum("kii->ki", prior).mean(axis=0))
    return {
        "loadings": _unbounded_columns(whitened / spread, bounds.signal),
        "means": means,
        "precisions": _positive_definite_leaf(own, bounds.precision, bounds.relative_floor),
    }


def _symmetric_leaves(
    whitened: np.ndarray, means: np.ndarray, precisions: np.ndarray, gram: np.ndarray, rep: Rep, bounds: Bounds
) -> dict[str, np.ndarray]:
    """Base precision diag(c) plus differences; precisions (K, L) along the axes of the basis."""
    base = BASE_SHARE * precisions.min(axis=0)
    own = precisions - base
    if rep is Scale:
        own = own.mean(axis=1)
    spread = np.sqrt(base + (own if own.ndim == 2 else own[:, None]).mean(axis=0))
    own = np.maximum(_unbalance(own, bounds.relative_floor), bounds.precision[0])
    return {
        "loadings": _unbounded_columns(whitened / spread, bounds.signal),
        "means": means,
        "precisions": _unbounded(own, bounds.precision),
        "base_precision": _positive_definite_leaf(np.diag(base), bounds.precision, bounds.relative_floor),
    }


def _restricted_leaves(
    whitened: np.ndarray, means: np.ndarray, precisions: np.ndarray, gram: np.ndarray, rep: Rep, bounds: Bounds
) -> dict[str, np.ndarray]:
    """Posterior precisions s (1 + delta_k) with s above A'A = diag(gram) and below all of gram + precisions."""
    posterior = gram + precisions
    if rep is Scale:
        # the prior precision q_k - gram must stay positive on every axis
        least = gram.max() + BASE_SHARE * (1 - gram).min()
        posterior = np.maximum(posterior.mean(axis=1), least)
        margin = BASE_SHARE * (posterior.min() - gram.max())
        base = np.full_like(gram, gram.max() + margin)
        delta = posterior / base[0] - 1
    else:
        base = gram + BASE_SHARE * precisions.min(axis=0)
        delta = posterior / base - 1
    # in units of s: U = A / sqrt(s), B = A / sqrt(s - gram), mu = T^-1 sqrt(s) m = sqrt(s - gram) m
    margin = np.sqrt(base - gram)
    return {
        "loadings": _unbounded_columns(whitened / margin, bounds.signal),
        "means": means * margin,
        "precisions": _unbounded(delta, bounds.precision),
    }


def _unbounded(value: np.ndarray, interval: tuple[float, float]) -> np.ndarray:
    """Inverse of `leaves.bounded`; what lies outside goes to the edge."""
    lower, upper = (math.log(bound) for bound in interval)
    middle, half = (upper + lower) / 2, (upper - lower) / 2
    edge = 1 - 1e-6
    return half * np.arctanh(np.clip((np.log(value) - middle) / half, -edge, edge))


def _unbounded_columns(matrix: np.ndarray, bound: float) -> np.ndarray:
    """Inverse of `leaves.bounded_columns`; columns outside go to the edge."""
    norm = np.linalg.norm(matrix, axis=0)
    inside = np.minimum(norm, (1 - 1e-4) * bound)
    scale = np.where(norm > 0, inside / np.where(norm > 0, norm, 1), 1)
    return matrix * scale / np.sqrt(1 - (inside / bound) ** 2)


def _positive_definite_leaf(matrix: np.ndarray, interval: tuple[float, float], floor: float) -> np.ndarray:
    """Inverse of `leaves.positive_definite`; a correlation with smaller eigenvalues goes to the floor."""
    identity = np.eye(matrix.shape[-1])
    variances = np.maximum(np.einsum("...ii->...i", matrix), interval[0])
    scale = np.sqrt(variances)
    correlation = matrix / (scale[..., :, None] * scale[..., None, :])
    values, vectors = np.linalg.eigh((1 + floor) * correlation - floor * identity)
    clipped = np.maximum(values, 1e-2 * floor)
    factor = np.linalg.cholesky((vectors * clipped[..., None, :]) @ np.swapaxes(vectors, -1, -2))
    rows = np.tril(factor / np.einsum("...ii->...i", factor)[..., :, None], -1)
    return rows + identity * _unbounded(variances, interval)[..., :, None]


def _unbalance(own: np.ndarray, floor: float) -> np.ndarray:
    """Inverse of adding `floor` times the average over components."""
    return own - floor / (1 + floor) * own.mean(axis=0, keepdims=True)


def _both_sides(left: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return left @ matrix @ left.T


def _whiten_columns(noise: Covariance, loadings: np.ndarray) -> np.ndarray:
    """A = F' W (D, L) with F F' = Psi^-1, F as inference.factorise takes it."""
    if isinstance(noise, PositiveDefinite):
        return np.linalg.cholesky(np.linalg.inv(noise.entries)).T @ loadings
    return loadings / np.sqrt(noise.entries[..., None] if isinstance(noise, Diagonal) else noise.entries)


def _variances(noise: Covariance, obs_dim: int) -> np.ndarray:
    """Noise variances (D,) in float64."""
    entries = np.asarray(noise.entries, np.float64)
    return np.diagonal(entries) if isinstance(noise, PositiveDefinite) else np.broadcast_to(entries, obs_dim)


def _restrict_noise(noise: Covariance, obs_rep: Rep, obs_dim: int) -> Covariance:
    """The noise in the head's kind: its variances where that is diagonal, their average where it is isotropic."""
    variances = _variances(noise, obs_dim)
    if obs_rep is PositiveDefinite:
        return noise if isinstance(noise, PositiveDefinite) else PositiveDefinite(np.diag(variances))
    return Diagonal(variances) if obs_rep is Diagonal else Scale(np.mean(variances))


def _in_units_of_x(moments: Moments, frame: Frame | None) -> Moments:
    """Standard form in units of x, in float64: the working dtype need not hold it."""
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), moments)
    if frame is None:
        return own
    origin, unit = frame.exact()
    noise = own.noise.entries
    scale = {Scale: unit[0] ** 2, Diagonal: unit**2, PositiveDefinite: np.outer(unit, unit)}[type(own.noise)]
    return dataclasses.replace(
        own,
        loadings=own.loadings * unit[:, None],
        bias=origin + unit * own.bias,
        noise=type(own.noise)(noise * scale),
    )


def _check_held(moments: Moments, own: Moments, dtype: Any) -> None:
    """ValueError unless a model in the dtype of a head is still one."""
    kept, variances = _variances(own.noise, own.bias.shape[0]), _variances(moments.noise, own.bias.shape[0])
    finite = all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(own))
    if not finite or kept.min() < jnp.finfo(dtype).tiny:
        raise ValueError(
            f"warm_start: `natural` must fit in {np.dtype(dtype).name} in units of x; got noise variances from "
            f"{variances.min():.3g} to {variances.max():.3g}. Rescale the data, or use float64."
        )


def _check_dimensions(head: Any, natural: Natural) -> None:
    obs_dim, lat_dim = natural.interaction.shape
    got = (obs_dim, lat_dim, natural.posterior_location.shape[0])
    wanted = (head.obs_dim or obs_dim, head.lat_dim, head.n_components)
    if got != wanted:
        raise ValueError(
            f"warm_start: `natural` must have the head's (obs_dim, lat_dim, n_components) {wanted}; got {got}. "
            "Fit and start models of one size."
        )
