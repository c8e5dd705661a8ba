"""Variables of a head for a fitted model: the inverse of leaves.py, exact where the head can hold the model.

Everything here is computed once, in numpy float64.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from flax_hmog.em.online import stepwise_start
from flax_hmog.em.step import whiten_moments
from flax_hmog.heads.leaves import Bounds, leaf_specs, leaves_to_natural
from flax_hmog.heads.modules import AnalyticHMoG, HMoGHead, TrainableHead
from flax_hmog.inference.posterior import log_observable_density, sample
from flax_hmog.model.checks import check_precision, public
from flax_hmog.model.conversions import moments_to_natural, own_moments
from flax_hmog.model.coordinates import Moments, Natural, check_natural
from flax_hmog.model.frames import Frame
from flax_hmog.model.head import Head, check_head
from flax_hmog.model.kinds import Array, Kind, PositiveDefinite, Rep, as_rep, pytree
from flax_hmog.model.prior import with_prior
from flax_hmog.model.structure import Structure
from flax_hmog.model.typed import Floats, Rows, Samples

ROUNDING = 1e-5  # of the log-likelihood and of one nat per column, which float32 may lose
REFERENCE_DRAWS = 4096  # draws of the model on which it is compared when no data are given
LEAST_DIGITS = 1e-1  # of a noise standard deviation, by which values of x may be apart in the dtype
BASE_SHARE = 0.5  # the part of the smallest component precision that goes into the shared base


@pytree
class WarmStartInfo:
    """Log-likelihood before and after a warm start.

    Attributes:
        log_likelihood_before: mean log p(x) of the given model, in nats per sample ().
        log_likelihood_after: that of the head (); equal to rounding where the head can hold the model.
    """

    log_likelihood_before: Float[Array, ""]
    log_likelihood_after: Float[Array, ""]


@public
def warm_start(head: Head, natural: Natural, x: Samples | None = None) -> tuple[dict[str, Any], WarmStartInfo]:
    """Variables of a head for a fitted model.

    Full heads (`pst_rep="full"`, `lat_rep="full"`, Analytic) hold the model exactly, within their bounds. For
    restricted ones the latent basis is first changed to the generalised eigenvectors of (W'Psi^-1 W, mean P_k), in
    which both are diagonal; then the component covariances are reduced to the head's kind by their variances in that
    basis. For an isotropic kind the basis is also scaled so that the average posterior precision is I.

    Args:
        head: unbound head to start; its dimensions, kinds and bounds are read. One of others has a method
            `start(moments) -> variables` (`Head`).
        natural: the fitted model, for example `fit_em(...).natural`.
        x: observations (N, D) to compare on; None draws them from the model.

    Returns:
        Variables for `head.apply`, and `WarmStartInfo`.

    Raises:
        TypeError: if `natural` is of another coordinate type, or the head is of others and has no method `start`.
        ValueError: if the dimensions of head and model differ.

    Example:
        >>> from flax_hmog import DifferentiableHMoG
        >>> from flax_hmog.toy import natural, x
        >>> head = DifferentiableHMoG(lat_dim=2, n_components=3, pst_rep="full")
        >>> variables, info = warm_start(head, natural, x)
        >>> round(float(info.log_likelihood_before - info.log_likelihood_after), 2)
        0.0
    """
    check_head(head, "(head, natural, x); a `Clusterer` has its `head`, and an NNX head its warm_start")
    if not (hasattr(head, "start") or isinstance(head, HMoGHead)):
        raise TypeError(
            f"warm_start: `head` must be one of ours, or have a method `start`; got {type(head).__name__}. Give its "
            "class a method start(moments) that returns its variables."
        )
    check_precision(head.param_dtype)
    natural = check_natural(natural)
    natural = with_prior(natural)
    _check_dimensions(head, natural)
    obs_dim = natural.interaction.shape[0]
    x = sample(natural, jax.random.key(0), REFERENCE_DRAWS)[0] if x is None else x
    given = _in_units_of_x(whiten_moments(own_moments(natural)), natural.frame)
    obs_rep = as_rep(head.obs_rep, argument="head.obs_rep")
    moments = dataclasses.replace(given, noise=_restricted(given.noise, obs_rep))
    if hasattr(head, "start"):
        variables: dict[str, Any] = head.start(moments)
        started = cast(Natural, head.apply(variables, method="natural"))
    elif isinstance(head, AnalyticHMoG):
        own = jax.tree.map(lambda a: jnp.asarray(a, head.param_dtype), moments)
        _check_held(moments, own, head.param_dtype)
        started = moments_to_natural(own)
        variables = {"em": stepwise_start(own)}
    else:
        structure = head.component_structure
        bounds = cast(TrainableHead, head).bounds
        leaves = _leaves(moments, structure, bounds)
        specs = leaf_specs(obs_dim, head.lat_dim, head.n_components, obs_rep, structure)
        params = {name: jnp.asarray(leaves[name], head.param_dtype).reshape(spec.shape) for name, spec in specs.items()}
        started = leaves_to_natural(params, obs_rep, structure, bounds)
        variables = {"params": params}
    info = WarmStartInfo(jnp.mean(log_observable_density(natural, x)), jnp.mean(log_observable_density(started, x)))
    holds_noise = given.noise.is_isotropic or obs_rep in (PositiveDefinite, type(given.noise))
    is_exact = holds_noise and head.component_structure == Structure(PositiveDefinite)
    _warn_of_loss(head, moments, started, info, is_exact)
    return variables, info


class WarmStartWarning(UserWarning):
    """A head does not hold the model that it was started from.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("error", category=WarmStartWarning)  # to stop where a head cannot hold its model
    """


def _warn_of_loss(head: Head, moments: Moments, started: Natural, info: WarmStartInfo, is_avoidable: bool) -> None:
    """`WarmStartWarning` if more is lost than rounding explains, and by no restriction of the head's kinds."""
    before, after = float(info.log_likelihood_before), float(info.log_likelihood_after)
    obs_dim = moments.bias.shape[0]
    lost, rounding = before - after, ROUNDING * (abs(before) + obs_dim)
    wanted, noise = moments.noise.diagonal(), np.asarray(started.observable_precision.inverse().diagonal(), np.float64)
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
        stacklevel=4,
    )


def _leaves(moments: Moments, structure: Structure, bounds: Bounds) -> dict[str, np.ndarray]:
    """All leaves of a trainable head, for a model in a whitened basis."""
    rep = structure.rep
    common: dict[str, Any] = {
        "bias": moments.bias,
        "noise": moments.noise.leaf(bounds.noise, bounds.relative_floor),
        "logits": np.log(moments.weights),
    }
    factor = moments.noise.inverse().cholesky()
    whitened = factor.rows_times(moments.loadings.T).T  # A = F' W with F F' = Psi^-1, F as inference takes it
    covariances = moments.covariances.entries
    if rep is PositiveDefinite:
        return common | _full_leaves(whitened, moments.means, np.linalg.inv(covariances), bounds)
    # y = basis y': the mean prior precision becomes I (times `unit`), A'A diagonal
    root = np.linalg.cholesky(np.mean(np.linalg.inv(covariances), axis=0))
    gram, rotation = np.linalg.eigh(_both_sides(np.linalg.inv(root), whitened.T @ whitened))
    gram = np.maximum(gram, 0)
    basis = np.linalg.inv(root).T @ rotation
    if rep.is_isotropic and not structure.has_base:
        scale = 1 / np.sqrt(1 + gram)
        basis, gram = basis * scale, gram * scale**2
    inverse = np.linalg.inv(basis)
    variances = np.einsum("ij,kjl,il->ki", inverse, covariances, inverse)
    restricted = _symmetric_leaves if structure.has_base else _restricted_leaves
    return common | restricted(whitened @ basis, moments.means @ inverse.T, 1 / variances, gram, rep, bounds)


def _full_leaves(whitened: Floats, means: Rows, prior: Floats, bounds: Bounds) -> dict[str, Any]:
    """Inverse of `leaves._full_components` without a base."""
    own = _unbalance(prior, bounds.relative_floor)
    spread = np.sqrt(np.einsum("kii->ki", prior).mean(axis=0))
    return {
        "loadings": _unbounded_columns(whitened / spread, bounds.signal),
        "means": means,
        "precisions": PositiveDefinite(own).leaf(bounds.precision, bounds.relative_floor),
    }


def _symmetric_leaves(
    whitened: Floats, means: Rows, precisions: Floats, gram: Floats, rep: Rep, bounds: Bounds
) -> dict[str, Any]:
    """Base precision diag(c) plus differences; precisions (K, L) along the axes of the basis."""
    base = BASE_SHARE * precisions.min(axis=0)
    own = rep.from_diagonal(precisions - base).diagonal()
    spread = np.sqrt(base + own.mean(axis=0))
    own = np.maximum(_unbalance(own, bounds.relative_floor), bounds.precision[0])
    return {
        "loadings": _unbounded_columns(whitened / spread, bounds.signal),
        "means": means,
        "precisions": rep.from_diagonal(own).leaf(bounds.precision, bounds.relative_floor),
        "base_precision": PositiveDefinite(np.diag(base)).leaf(bounds.precision, bounds.relative_floor),
    }


def _restricted_leaves(
    whitened: Floats, means: Rows, precisions: Floats, gram: Floats, rep: Rep, bounds: Bounds
) -> dict[str, Any]:
    """Posterior precisions s (1 + delta_k) with s above A'A = diag(gram) and below all of gram + precisions."""
    posterior = gram + precisions
    base = gram + BASE_SHARE * precisions.min(axis=0)
    if rep.is_isotropic:
        # the prior precision q_k - gram must stay positive on every axis
        least = gram.max() + BASE_SHARE * (1 - gram).min()
        posterior = np.maximum(rep.from_diagonal(posterior).diagonal(), least)
        base = np.full_like(gram, gram.max() + BASE_SHARE * (posterior.min() - gram.max()))
    delta = rep.from_diagonal(posterior / base - 1)
    # in units of s: U = A / sqrt(s), B = A / sqrt(s - gram), mu = T^-1 sqrt(s) m = sqrt(s - gram) m
    margin = np.sqrt(base - gram)
    return {
        "loadings": _unbounded_columns(whitened / margin, bounds.signal),
        "means": means * margin,
        "precisions": delta.leaf(bounds.precision, bounds.relative_floor),
    }


def _unbounded_columns(matrix: Floats, bound: float) -> Floats:
    """Inverse of `leaves.bounded_columns`; columns outside go to the edge."""
    norm = np.linalg.norm(matrix, axis=0)
    inside = np.minimum(norm, (1 - 1e-4) * bound)
    scale = np.where(norm > 0, inside / np.where(norm > 0, norm, 1), 1)
    return cast(Floats, matrix * scale / np.sqrt(1 - (inside / bound) ** 2))


def _unbalance(own: Floats, floor: float) -> Floats:
    """Inverse of adding `floor` times the average over components."""
    return cast(Floats, own - floor / (1 + floor) * own.mean(axis=0, keepdims=True))


def _both_sides(left: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return cast(np.ndarray, left @ matrix @ left.T)


def _restricted(noise: Kind, rep: Rep) -> Kind:
    """The noise in another kind: its variances where that is diagonal."""
    return rep.from_diagonal(noise.diagonal()) if rep.is_diagonal else rep.project(noise.dense())


def _in_units_of_x(moments: Moments, frame: Frame | None) -> Moments:
    """Standard form in units of x, in float64: the working dtype need not hold it."""
    own: Moments = jax.tree.map(lambda a: np.asarray(a, np.float64), moments)
    if frame is None:
        return own
    origin, unit = frame.exact()
    return dataclasses.replace(
        own,
        loadings=own.loadings * unit[:, None],
        bias=origin + unit * own.bias,
        noise=own.noise.scaled(unit),
    )


def _check_held(moments: Moments, own: Moments, dtype: DTypeLike) -> None:
    """ValueError unless a model in the dtype of a head is still one."""
    kept, variances = np.asarray(own.noise.diagonal(), np.float64), moments.noise.diagonal()
    finite = all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(own))
    if not finite or kept.min() < jnp.finfo(dtype).tiny:
        raise ValueError(
            f"warm_start: `natural` must fit in {np.dtype(dtype).name} in units of x; got noise variances from "
            f"{variances.min():.3g} to {variances.max():.3g}. Rescale the data, or use float64."
        )


def _check_dimensions(head: Head, natural: Natural) -> None:
    obs_dim, lat_dim = natural.interaction.shape
    got = (obs_dim, lat_dim, natural.posterior_location.shape[0])
    wanted = (head.obs_dim or obs_dim, head.lat_dim, head.n_components)
    if got != wanted:
        raise ValueError(
            f"warm_start: `natural` must have the head's (obs_dim, lat_dim, n_components) {wanted}; got {got}. "
            "Fit and start models of one size."
        )
