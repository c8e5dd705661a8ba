"""The three coordinate systems of a HMoG: `Moments` for people, `Natural` for densities and gradients, `Mean` for EM.

Conversions: conversions.py. Symbols as in docs/notation.md: D observed,
L latent, K components; W loadings, Psi noise, Theta = Psi^-1 W.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeAlias

import jax.numpy as jnp

from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import Array, Kind, PositiveDefinite, Rep, einsum, fill_sizes, inverse_and_log_det, pytree

FULL_ONLY = "Only models with full component covariances have this form; `warm_start` carries one to a restricted head."


@pytree
class SharedBase:
    """Component precisions Q_0 + Delta_k (Delta_0 = 0): a full base and differences of a restricted kind.

    Attributes:
        base: Q_0, `PositiveDefinite` (L, L).
        differences: Delta_1 .. Delta_{K-1}, of kind `lat_rep`, batch (K-1); any sign.
    """

    base: PositiveDefinite
    differences: Kind

    is_diagonal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        fill_sizes(self, getattr(self.base, "entries", None), "differences")

    def dense(self) -> Array:
        """The precisions (K, L, L)."""
        base = self.base.entries[None]
        return jnp.concatenate([base, base + self.differences.dense()])


Precision: TypeAlias = Kind | SharedBase


@pytree
class Moments:
    """Standard form: z ~ w, y | z = k ~ N(m_k, S_k), x | y ~ N(W y + b, Psi).

    Attributes:
        loadings: W (D, L).
        bias: b (D,).
        noise: Psi, of kind `obs_rep`.
        weights: w (K,), positive, summing to 1.
        means: m (K, L).
        covariances: S, `PositiveDefinite` (K, L, L).
    """

    loadings: Array
    bias: Array
    noise: Kind
    weights: Array
    means: Array
    covariances: PositiveDefinite

    def __post_init__(self) -> None:
        fill_sizes(self, self.bias, "noise")


@pytree
class Natural:
    """Exponential-family form. The component parameters are those of the *posterior* at Theta' x = 0.

    The prior follows from the rest (`h_k = eta_k + W'Psi^-1 b`, `P_k = Q_k - W'Psi^-1 W`, `log w_k` from cat and
    both), but those differences cancel in float32; whoever knows the prior carries it along. Change a field
    and set these to None.

    Attributes:
        observable_location: Psi^-1 b (D,).
        observable_precision: Psi^-1, of kind `obs_rep`.
        interaction: Theta = Psi^-1 W (D, L).
        posterior_location: eta (K, L).
        posterior_precision: Q of kind `pst_rep`, batch (K,); `SharedBase` for a restricted `lat_rep`.
        categorical_bias: (K-1,), against component 0.
        prior_location: h (K, L) or None.
        prior_precision: P, `PositiveDefinite` (K, L, L) or None.
        log_weights: log w (K,) or None.
        frame: the parameters are those of x' = (x - origin) / unit, where the dtype could not hold those of x; None:
            of x. Densities are always those of x; `in_units_of_x` gives the parameters of x.
        projection_dtype: dtype in which x is multiplied by the D x L projection, as "bfloat16"; None for that of the
            parameters. Not a parameter: a policy that inference follows (docs/performance.md).
    """

    observable_location: Array
    observable_precision: Kind
    interaction: Array
    posterior_location: Array
    posterior_precision: Precision
    categorical_bias: Array
    prior_location: Array = None  # type: ignore[assignment]
    prior_precision: PositiveDefinite = None  # type: ignore[assignment]
    log_weights: Array = None  # type: ignore[assignment]
    frame: Frame | None = None
    projection_dtype: str | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        fill_sizes(self, self.observable_location, "observable_precision")
        fill_sizes(self, self.posterior_location, "posterior_precision")


def check_natural(caller: str, value: Any) -> None:
    """TypeError, with the way to a `Natural`, unless `value` is one."""
    if isinstance(value, Natural):
        return
    remedy = "Convert with moments_to_natural or mean_to_natural."
    if isinstance(value, dict) or callable(getattr(value, "natural", None)):
        remedy = 'A head\'s model is head.apply(variables, method="natural").'
    elif hasattr(value, "natural"):
        remedy = "Give its `natural`."
    raise TypeError(f"{caller}: `natural` must be Natural; got {type(value).__name__}. {remedy}")


@pytree
class Mean:
    """Expected statistics of the family.

    Attributes:
        observable_mean: E[x] (D,).
        observable_second_moment: E[x x'], of kind `obs_rep`.
        cross_moment: E[x y'] (D, L).
        weights: w_k = P(z = k) (K,).
        weighted_means: w_k E[y | k] (K, L).
        weighted_second_moments: w_k E[y y' | k], batch (K,), of kind `pst_rep`, `lat_rep` or full.
        pooled_second_moment: E[y y'] in full; only beside a restricted `lat_rep`, else None.
    """

    observable_mean: Array
    observable_second_moment: Kind
    cross_moment: Array
    weights: Array
    weighted_means: Array
    weighted_second_moments: Kind
    pooled_second_moment: PositiveDefinite = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        fill_sizes(self, self.observable_mean, "observable_second_moment")
        fill_sizes(self, self.weighted_means, "weighted_second_moments")


def outer(u: Array, v: Array) -> Array:
    """U v', over leading batch dimensions."""
    return u[..., :, None] * v[..., None, :]


def gaussian_log_partition(location: Array, precision: PositiveDefinite) -> tuple[Array, Array, Array]:
    """psi_N(h, P) = 1/2 h' P^-1 h - 1/2 log|P| (K,), with the means P^-1 h (K, L) and covariances P^-1 (K, L, L)."""
    covariances, log_det = inverse_and_log_det(precision.entries)
    means = einsum("kij,kj->ki", covariances, location)
    return (jnp.sum(location * means, axis=-1) - log_det) / 2, means, covariances


def categorical_logits(bias: Array) -> Array:
    """Harmonium bias (..., K-1) with the implicit 0 of component 0 in front (..., K)."""
    return jnp.concatenate([jnp.zeros_like(bias, shape=(*bias.shape[:-1], 1)), bias], axis=-1)


def observable_bias(natural: Natural) -> Array:
    """B = Psi Psi^-1 b (D,)."""
    return natural.observable_precision.inverse().times(natural.observable_location[:, None])[:, 0]


def natural_bias(log_weights: Array, means: Array, location: Array, log_det: Array) -> Array:
    """cat_k = log w_k - psi_N(h_k, P_k) against component 0 (K-1,), from log|S_k| = -log|P_k|."""
    logits = log_weights - (jnp.sum(location * means, axis=-1) + log_det) / 2
    return logits[1:] - logits[0]


def structure(natural: Natural) -> tuple[Rep, bool]:
    """The kind of the component precisions, and whether they are differences from a full base."""
    precision = natural.posterior_precision
    if isinstance(precision, SharedBase):
        return type(precision.differences), True
    return type(precision), False


def restrict_precision(dense: Array, rep: Rep, shared_base: bool) -> Precision:
    """Component precisions (K, L, L) in the structure of a head; what the structure cannot hold is dropped."""
    if shared_base and rep is not PositiveDefinite:
        return SharedBase(PositiveDefinite(dense[0]), rep.project(dense[1:] - dense[:1]))
    return rep.project(dense)


def check_full(caller: str, argument: str, kind: Any) -> None:
    """TypeError unless component matrices are full."""
    if not isinstance(kind, PositiveDefinite):
        raise TypeError(
            f"{caller}: `{argument}` must have full component matrices; got {type(kind).__name__}. {FULL_ONLY}"
        )
