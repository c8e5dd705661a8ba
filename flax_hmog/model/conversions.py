"""Conversions between `Moments`, `Natural` and `Mean`."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve

from flax_hmog.model.checks import (
    check_finite,
    check_positive,
    check_positive_definite,
    check_shape,
    check_type,
    door,
    is_concrete,
    public,
)
from flax_hmog.model.coordinates import (
    Mean,
    Moments,
    Natural,
    Prior,
    ResidualMoments,
    check_full,
    check_mean,
    check_natural,
    gaussian_log_partition,
    natural_bias,
    observable_bias,
    outer,
)
from flax_hmog.model.frames import Frame
from flax_hmog.model.kind import RepLike
from flax_hmog.model.kinds import (
    Array,
    Kind,
    PositiveDefinite,
    Rep,
    as_rep,
    einsum,
    inverse_and_log_det,
    matmul,
    symmetrize,
)
from flax_hmog.model.prior import with_prior
from flax_hmog.model.structure import Precision, Structure
from flax_hmog.model.typed import jit


@public
def natural_to_moments(natural: Natural) -> Moments:
    """Standard form of a model in natural coordinates: W = Psi Theta, S_k = P_k^-1, m_k = S_k h_k.

    Args:
        natural: the model.

    Returns:
        `Moments` with full component covariances, whatever the kind of the posterior precisions.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if a prior precision is not positive definite, or the dtype cannot hold the model in units of x.

    Example:
        >>> from flax_hmog.toy import natural
        >>> print(natural_to_moments(natural).weights.round(2))
        [0.5  0.25 0.25]
    """
    natural = check_natural(natural)
    moments = own_moments(natural)
    if natural.frame is None:
        return moments
    moments = reframe(moments, natural.frame, None)
    remedy = "The dtype cannot hold them in units of x: rescale the data, or use float64."
    check_positive("noise variances", moments.noise.diagonal(), remedy)
    for argument in ("loadings", "bias", "noise"):
        for leaf in jax.tree.leaves(getattr(moments, argument)):
            check_finite(argument, leaf, remedy)
    return moments


def own_moments(natural: Natural) -> Moments:
    """Standard form in the units of the model's own parameters: those of its frame, if it has one."""
    return _natural_to_moments(with_prior(natural))


@jit
def reframe(moments: Moments, old: Frame | None, new: Frame | None) -> Moments:
    """The same model of x, its parameters in another frame; None stands for the units of x."""
    zero, one = jnp.zeros_like(moments.bias), jnp.ones_like(moments.bias)
    old_origin, old_rest, old_unit = (zero, zero, one) if old is None else (old.origin, old.rest, old.unit)
    origin, rest, unit = (zero, zero, one) if new is None else (new.origin, new.rest, new.unit)
    ratio = old_unit / unit
    return dataclasses.replace(
        moments,
        loadings=moments.loadings * ratio[:, None],
        # the large parts first: what is left of them is exact
        bias=moments.bias * ratio + ((old_origin - origin) + (old_rest - rest)) / unit,
        noise=moments.noise.scaled(ratio),
    )


@public
def in_units_of_x(natural: Natural) -> Natural:
    """The same model, its parameters those of x; as it is if it has no frame.

    Args:
        natural: the model.

    Returns:
        `Natural` without a frame.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if the dtype cannot hold its parameters in units of x.

    Example:
        >>> from flax_hmog.toy import natural
        >>> in_units_of_x(natural) is natural  # it has no frame
        True
    """
    natural = check_natural(natural)
    if natural.frame is None:
        return natural
    plain = own_in_units_of_x(with_prior(natural))
    if is_concrete(plain) and not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(plain)):
        raise ValueError(
            f"in_units_of_x: the parameters must be finite in {plain.interaction.dtype} in units of x; got units from "
            f"{float(jnp.min(natural.frame.unit)):.3g} to {float(jnp.max(natural.frame.unit)):.3g}. Rescale the data, "
            "or use float64."
        )
    return plain


@jit
def own_in_units_of_x(natural: Natural) -> Natural:
    """`in_units_of_x` of a model with its prior and a frame, unchecked."""
    frame: Any = natural.frame
    precision = natural.observable_precision.scaled(1 / frame.unit)
    interaction = natural.interaction / frame.unit[:, None]
    bias = (frame.origin + frame.rest) + frame.unit * observable_bias(natural)
    return dataclasses.replace(
        natural,
        observable_location=precision.times(bias[:, None])[:, 0],
        observable_precision=precision,
        interaction=interaction,
        posterior_location=natural.prior.location - matmul(bias, interaction)[None],
        frame=None,
    ).carrying(natural.prior)


def fits_units_of_x(natural: Natural) -> bool:
    """True if the dtype holds the model in units of x as well as in its frame: b to a thousandth of the noise."""
    if natural.frame is None:
        return True
    frame, kind = natural.frame, jnp.finfo(natural.interaction.dtype)
    origin, unit = frame.exact()
    noise = np.sqrt(np.asarray(natural.observable_precision.inverse().diagonal(), np.float64)) * unit
    bias = origin + unit * np.asarray(observable_bias(natural), np.float64)
    safe = float(kind.max) ** 0.25  # squares and their products stay in range
    digits = kind.eps * np.abs(bias) / noise
    return bool((digits < 1e-3).all() and (noise < safe).all() and (noise > 1 / safe).all())


@jit
def _natural_to_moments(natural: Natural) -> Moments:
    noise = natural.observable_precision.inverse()
    _, means, covariances = gaussian_log_partition(natural.prior.location, natural.prior.precision)
    return Moments(
        loadings=noise.times(natural.interaction),
        bias=noise.times(natural.observable_location[:, None])[:, 0],
        noise=noise,
        weights=jnp.exp(natural.prior.log_weights),
        means=means,
        covariances=PositiveDefinite(covariances),
    )


@public
def moments_to_natural(moments: Moments, rep: RepLike = PositiveDefinite, *, shared_base: bool = False) -> Natural:
    """Natural coordinates of a model in standard form: Q_k = S_k^-1 + W'Psi^-1 W, eta_k = S_k^-1 m_k - W'Psi^-1 b.

    Args:
        moments: the model. `covariances` may be given as a plain (K, L, L) array.
        rep: kind of the posterior precisions: class, instance or name.
        shared_base: hold them as a full base plus differences of kind `rep`, as `SymmetricHMoG` does.

    Returns:
        `Natural`, with its prior.

    Raises:
        TypeError: if `moments` is of another coordinate type.
        ValueError: for wrong shapes, weights or a covariance that is not positive definite (with component and
            eigenvalue), or if `rep` would drop an entry that is not zero (see `warm_start`).

    Example:
        >>> from flax_hmog.toy import moments
        >>> natural = moments_to_natural(moments)
        >>> print(natural_to_moments(natural).weights.round(2))
        [0.5  0.25 0.25]
    """
    check_type("moments", moments, Moments, "Convert with natural_to_moments.")
    rep = as_rep(rep)
    natural, dense = _moments_to_natural(_check_moments(moments), Structure(rep, shared_base))
    _check_nothing_dropped(dense, natural.posterior_precision, rep)
    return natural


@jit(static_argnames="structure")
def _moments_to_natural(moments: Moments, structure: Structure) -> tuple[Natural, Array]:
    """The model, and its posterior precisions (K, L, L) before the structure restricts them."""
    noise_inverse = moments.noise.inverse()
    precisions, log_det = inverse_and_log_det(moments.covariances.entries)
    prior_location = einsum("kij,kj->ki", precisions, moments.means)
    interaction = noise_inverse.times(moments.loadings)
    dense = precisions + symmetrize(matmul(moments.loadings.T, interaction))[None]
    log_weights = jnp.log(moments.weights)
    natural = Natural(
        observable_location=noise_inverse.times(moments.bias[:, None])[:, 0],
        observable_precision=noise_inverse,
        interaction=interaction,
        posterior_location=prior_location - matmul(moments.bias, interaction)[None],
        posterior_precision=structure.restrict(dense),
        categorical_bias=natural_bias(log_weights, moments.means, prior_location, log_det),
    )
    return natural.carrying(Prior(prior_location, PositiveDefinite(precisions), log_weights)), dense


@public
def natural_to_mean(natural: Natural) -> Mean:
    """Expected statistics of a model: the gradient of its log-partition function.

    Args:
        natural: the model.

    Returns:
        `Mean`, with latent second moments in the kind of the posterior precisions.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if a prior precision is not positive definite.

    Example:
        >>> from flax_hmog.toy import natural
        >>> print(natural_to_mean(natural).observable_mean.round(2))  # E[x]
        [ 1.    0.25  0.5  -0.5 ]
    """
    natural = check_natural(natural)
    return _natural_to_mean(with_prior(in_units_of_x(natural)))


@jit
def _natural_to_mean(natural: Natural) -> Mean:
    moments = _natural_to_moments(natural)
    weights, means = moments.weights, moments.means
    weighted_means = weights[:, None] * means
    dense = moments.covariances.weighted(weights).entries + outer(weighted_means, means)
    pooled = jnp.sum(dense, axis=0)
    latent_mean = jnp.sum(weighted_means, axis=0)
    structure = Structure.of(natural.posterior_precision)
    observable_mean = matmul(moments.loadings, latent_mean) + moments.bias
    # Cov(x) = W Cov(y) W' + Psi,  E[x x'] = Cov(x) + E[x] E[x]'
    spread = matmul(moments.loadings, pooled - outer(latent_mean, latent_mean))
    signal = type(moments.noise).project_product(
        jnp.concatenate([spread, observable_mean[:, None]], axis=-1),
        jnp.concatenate([moments.loadings, observable_mean[:, None]], axis=-1),
    )
    return Mean(
        observable_mean=observable_mean,
        observable_second_moment=jax.tree.map(jnp.add, moments.noise, signal),
        cross_moment=matmul(moments.loadings, pooled) + outer(moments.bias, latent_mean),
        weights=weights,
        weighted_means=weighted_means,
        weighted_second_moments=structure.rep.project(dense),
        pooled_second_moment=PositiveDefinite(pooled) if structure.has_base else None,  # type: ignore[arg-type]
    )


@public
def mean_to_moments(mean: Mean) -> Moments:
    """Standard form of the maximum-likelihood model with these expected statistics: regression of x on y.

    Args:
        mean: expected statistics with full latent second moments.

    Returns:
        `Moments` with W = Cov(x, y) Cov(y)^-1, b = E[x] - W E[y] and Psi the residual covariance.

    Raises:
        TypeError: if `mean` is of another coordinate type or its latent second moments are restricted.
    """
    check_mean(mean)
    check_full("mean", mean.weighted_second_moments)
    return _mean_to_moments(mean)


@jit
def _mean_to_moments(mean: Mean) -> Moments:
    loadings, bias, noise = regress_observed(mean)
    means, covariances = component_moments(mean.weights, mean.weighted_means, mean.weighted_second_moments.entries)
    return Moments(loadings, bias, noise, mean.weights, means, covariances)


def regress_observed(mean: Mean | ResidualMoments) -> tuple[Array, Array, Kind]:
    """Linear regression of x on y: W = Cov(x, y) Cov(y)^-1, b = E[x] - W E[y], Psi the residual covariance."""
    latent_mean = jnp.sum(mean.weighted_means, axis=0)
    second = jnp.sum(mean.weighted_second_moments.entries, axis=0)
    cross = mean.cross_moment - outer(mean.observable_mean, latent_mean)
    covariance = PositiveDefinite(symmetrize(second - outer(latent_mean, latent_mean)))
    loadings = cho_solve((covariance.cholesky().entries, True), cross.T).T
    kind = type(mean.observable_second_moment)
    # Psi = E[x x'] - E[x] E[x]' - W Cov(y, x)
    explained = kind.project_product(
        jnp.concatenate([loadings, mean.observable_mean[:, None]], axis=-1),
        jnp.concatenate([cross, mean.observable_mean[:, None]], axis=-1),
    )
    noise = jax.tree.map(jnp.subtract, mean.observable_second_moment, explained)
    return loadings, mean.observable_mean - matmul(loadings, latent_mean), noise.symmetrized()


def component_moments(mass: Array, first: Array, second: Array) -> tuple[Array, PositiveDefinite]:
    """Means (K, L) and covariances (K, L, L) of components with mass (K,), mass E[y | k] and mass E[y y' | k]."""
    means = first / mass[:, None]
    return means, PositiveDefinite(symmetrize(second / mass[:, None, None] - outer(means, means)))


@public
def mean_to_natural(mean: Mean) -> Natural:
    """Natural coordinates of the maximum-likelihood model with these expected statistics (the M-step of EM).

    Args:
        mean: expected statistics with full latent second moments.

    Returns:
        `Natural` with full posterior precisions.

    Raises:
        TypeError: if `mean` is of another coordinate type or its latent second moments are restricted.
        ValueError: if the statistics belong to no model, as a component or noise covariance is not positive definite.

    Example:
        >>> from flax_hmog import expected_statistics
        >>> from flax_hmog.toy import natural, x
        >>> better = mean_to_natural(expected_statistics(natural, x))  # a step of EM
        >>> better.interaction.shape
        (4, 2)
    """
    return moments_to_natural(mean_to_moments(mean))


def _check_moments(moments: Moments) -> Moments:
    """`moments` with its covariances as `PositiveDefinite`, once its shapes and values make a model."""
    for argument in ("loadings", "means"):
        if jnp.ndim(getattr(moments, argument)) != 2:
            check_shape(argument, getattr(moments, argument), ("D" if argument == "loadings" else "K", "L"))
    if not isinstance(moments.covariances, PositiveDefinite):
        moments = dataclasses.replace(moments, covariances=PositiveDefinite(jnp.asarray(moments.covariances)))
    obs_dim, lat_dim = jnp.shape(moments.loadings)
    n_components = jnp.shape(moments.means)[0]
    check_shape("bias", moments.bias, (obs_dim,))
    check_shape("weights", moments.weights, (n_components,))
    check_shape("means", moments.means, (n_components, lat_dim))
    for argument in ("loadings", "bias", "means"):
        check_finite(argument, jnp.asarray(getattr(moments, argument)), "Check where the model comes from.")
    check_shape("covariances", moments.covariances.entries, (n_components, lat_dim, lat_dim))
    as_rep(moments.noise, argument="noise")
    check_shape("noise", moments.noise.entries, moments.noise.shape(obs_dim))
    check_shape("noise", jax.eval_shape(lambda noise: noise.diagonal(), moments.noise), (obs_dim,))
    remedy = "Regularise it, for example by fit_em's `regularizer`."
    moments.noise.check("noise", remedy)
    check_positive_definite("covariances", moments.covariances.entries, remedy)
    check_positive("weights", moments.weights, "Drop empty components.")
    if is_concrete(moments.weights) and abs(float(np.sum(np.asarray(moments.weights))) - 1) > 1e-3:
        raise ValueError(
            f"{door()}: `weights` must sum to 1; got {float(np.sum(np.asarray(moments.weights))):.4g}. "
            "Divide by the sum."
        )
    return cast(Moments, jax.tree.map(jnp.asarray, moments))


def _check_nothing_dropped(dense: Array, precision: Precision, rep: Rep) -> None:
    """ValueError if the structure of `precision` lost entries of `dense` beyond rounding."""
    if not is_concrete(dense) or rep is PositiveDefinite:
        return
    with jax.ensure_compile_time_eval():
        lost = np.abs(np.asarray(dense - precision.dense()))
    scale = np.abs(np.asarray(dense)).max(axis=(-1, -2))
    rounding = 1e3 * float(jnp.finfo(dense.dtype).eps)
    if (lost.max(axis=(-1, -2)) > rounding * scale).any():
        worst = np.unravel_index(lost.argmax(), lost.shape)
        raise ValueError(
            f"moments_to_natural: `rep` must hold every entry of the posterior precisions; {rep.__name__} would drop "
            f"{lost[worst]:.3g} at entry {tuple(int(i) for i in worst)}. Use `warm_start` for such a head."
        )
