"""The three coordinate systems of a HMoG: `Moments` for people, `Natural` for densities and gradients, `Mean` for EM;
and `ResidualMoments`, the statistics about a model that steps of EM carry.

Conversions: conversions.py. Symbols as in docs/notation.md: D observed,
L latent, K components; W loadings, Psi noise, Theta = Psi^-1 W.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from flax_hmog.model.checks import door
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import (
    Array,
    Kind,
    PositiveDefinite,
    einsum,
    fill_sizes,
    inverse_and_log_det,
    matmul,
    pytree,
    symmetrize,
)
from flax_hmog.model.structure import Precision

FULL_ONLY = "Only models with full component covariances have this form; `warm_start` carries one to a restricted head."


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

    Example:
        >>> from flax_hmog import Diagonal, PositiveDefinite, moments_to_natural
        >>> moments = Moments(
        ...     loadings=jnp.ones((3, 1)),
        ...     bias=jnp.zeros(3),
        ...     noise=Diagonal(jnp.ones(3)),
        ...     weights=jnp.array([0.4, 0.6]),
        ...     means=jnp.array([[-2.0], [2.0]]),
        ...     covariances=PositiveDefinite(jnp.ones((2, 1, 1))),
        ... )
        >>> natural = moments_to_natural(moments)
    """

    loadings: Float[Array, "D L"]
    bias: Float[Array, " D"]
    noise: Kind
    weights: Float[Array, " K"]
    means: Float[Array, "K L"]
    covariances: PositiveDefinite

    def __post_init__(self) -> None:
        fill_sizes(self, self.bias, "noise")


@pytree
class Prior:
    """p(y, z) of a `Natural`, in natural coordinates: z ~ w, y | z = k ~ N(P_k^-1 h_k, P_k^-1).

    Attributes:
        location: h (K, L).
        precision: P, `PositiveDefinite` (K, L, L).
        log_weights: log w (K,).

    Example:
        >>> from flax_hmog.toy import natural
        >>> natural.prior.location.shape, natural.prior.precision.entries.shape
        ((3, 2), (3, 2, 2))
    """

    location: Float[Array, "K L"]
    precision: PositiveDefinite
    log_weights: Float[Array, " K"]


@pytree
class Natural:
    """Exponential-family form. The component parameters are those of the *posterior* at Theta' x = 0.

    The prior follows from the rest (`h_k = eta_k + W'Psi^-1 b`, `P_k = Q_k - W'Psi^-1 W`, `log w_k` from cat and
    both), but those differences cancel in float32; functions that know it attach it (`carrying`). No argument of the
    constructor, it is dropped by `dataclasses.replace`, and computed again where it is needed.

    Attributes:
        observable_location: Psi^-1 b (D,).
        observable_precision: Psi^-1, of kind `obs_rep`.
        interaction: Theta = Psi^-1 W (D, L).
        posterior_location: eta (K, L).
        posterior_precision: Q of kind `pst_rep`, batch (K,); `SharedBase` for a restricted `lat_rep`.
        categorical_bias: (K-1,), against component 0.
        frame: the parameters are those of x' = (x - origin) / unit, where the dtype could not hold those of x; None:
            of x. Densities are always those of x; `in_units_of_x` gives the parameters of x.
        prior: `Prior`, or None where it is not known.

    Example:
        >>> from flax_hmog.toy import natural
        >>> natural.interaction.shape, natural.posterior_location.shape, type(natural.posterior_precision).__name__
        ((4, 2), (3, 2), 'PositiveDefinite')
    """

    observable_location: Float[Array, " D"]
    observable_precision: Kind
    interaction: Float[Array, "D L"]
    posterior_location: Float[Array, "K L"]
    posterior_precision: Precision
    categorical_bias: Float[Array, " K-1"]
    frame: Frame | None = None
    prior: Prior = dataclasses.field(default=None, init=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        fill_sizes(self, self.observable_location, "observable_precision")
        fill_sizes(self, self.posterior_location, "posterior_precision")

    def carrying(self, prior: Prior) -> Natural:
        """The same parameters with the prior that follows from them."""
        new = dataclasses.replace(self)
        object.__setattr__(new, "prior", prior)
        return new

    def in_frame(self, frame: Frame | None) -> Natural:
        """The same parameters and prior, those of x' in another frame."""
        new = dataclasses.replace(self, frame=frame)
        object.__setattr__(new, "prior", self.prior)
        return new


@pytree
class Prepared:
    """A model with all that inference needs of it and that does not depend on x; `prepare` makes it.

    Every function that takes a `Natural` takes it in its place, and computes none of this again. With r = F'(x - b)
    and t = U'r, and C_k the posterior covariance of u = T y given component k:

        log p(x) = offset - (|r - U t|^2 + |V t|^2) / 2 + logsumexp_k(constant_k + linear_k . t - t' curvature_k t / 2)

    Component matrices are (K, L, L), or (K, L) where the posterior precisions are diagonal.

    Attributes:
        natural: the model, with its prior.
        bias: b (D,).
        root: F with F F' = Psi^-1.
        projection: U = F'W T^-1 (D, L).
        projector: F U (D, L), so that t = (F U)'(x - b), in the dtype of that product.
        prior_root: V (L, L) with V'V + U'U = I.
        basis: T (L, L).
        inverse_basis: T^-1 (L, L).
        constant: terms of the logits free of x (K,).
        linear: C_k h~_k (K, L).
        curvature: I - C_k, the part of the quadratic that components do not share.
        coefficients: linear_k and the distinct entries of curvature_k (K, L + L(L+1)/2), or (K, 2 L).
        covariance: C_k.
        location: h~_k = T^-T h_k (K, L).
        prior_means: m_k (K, L).
        prior_log_det: log|P_k| (K,).
        offset: log|Psi^-1| / 2 - D log(2 pi) / 2 (), less the log-volume of the frame.

    Example:
        >>> from flax_hmog import prepare
        >>> from flax_hmog.toy import natural
        >>> prepared = prepare(natural)
        >>> prepared.projection.shape, prepared.covariance.shape
        ((4, 2), (3, 2, 2))
    """

    natural: Natural
    bias: Float[Array, " D"]
    root: Kind
    projection: Float[Array, "D L"]
    projector: Float[Array, "D L"]
    prior_root: Float[Array, "L L"]
    basis: Float[Array, "L L"]
    inverse_basis: Float[Array, "L L"]
    constant: Float[Array, " K"]
    linear: Float[Array, "K L"]
    curvature: Float[Array, " K *C"]
    coefficients: Float[Array, "K M"]
    covariance: Float[Array, " K *C"]
    location: Float[Array, "K L"]
    prior_means: Float[Array, "K L"]
    prior_log_det: Float[Array, " K"]
    offset: Float[Array, ""]

    @property
    def precision(self) -> Kind:
        """Psi^-1."""
        return self.natural.observable_precision

    @property
    def frame(self) -> Frame | None:
        """The map from x to the rows that all the fields are of, or None."""
        return jax.lax.stop_gradient(self.natural.frame)

    @property
    def is_diagonal(self) -> bool:
        """True if component matrices are diagonal."""
        return self.covariance.ndim == 2


def check_natural(value: object, argument: str = "natural") -> Natural:
    """The `Natural` that `value` is, or was prepared from.

    Raises:
        TypeError: for anything else, with the way to a `Natural`.
    """
    if isinstance(value, Natural):
        return value
    if isinstance(value, Prepared):
        return value.natural
    remedy = "Convert with moments_to_natural or mean_to_natural."
    if isinstance(value, dict) or callable(getattr(value, "natural", None)):
        remedy = 'A head\'s model is head.apply(variables, method="natural").'
    elif hasattr(value, "natural"):
        remedy = "Give its `natural`."
    raise TypeError(f"{door()}: `{argument}` must be Natural; got {type(value).__name__}. {remedy}")


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

    Example:
        >>> from flax_hmog import natural_to_mean
        >>> from flax_hmog.toy import natural
        >>> mean = natural_to_mean(natural)
        >>> mean.observable_mean.shape, mean.cross_moment.shape
        ((4,), (4, 2))
    """

    observable_mean: Float[Array, " D"]
    observable_second_moment: Kind
    cross_moment: Float[Array, "D L"]
    weights: Float[Array, " K"]
    weighted_means: Float[Array, "K L"]
    weighted_second_moments: Kind
    pooled_second_moment: PositiveDefinite = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        fill_sizes(self, self.observable_mean, "observable_second_moment")
        fill_sizes(self, self.weighted_means, "weighted_second_moments")


def check_mean(value: object) -> None:
    """TypeError, with the way to a `Mean`, unless `value` is one."""
    if isinstance(value, Mean):
        return
    remedy = "Convert with natural_to_mean."
    if isinstance(value, ResidualMoments):
        remedy = "They are about a model: `to_mean(moments)` gives those of x, as em['running'].to_mean(em['moments'])."
    raise TypeError(f"{door()}: `mean` must be Mean; got {type(value).__name__}. {remedy}")


@pytree
class ResidualMoments:
    """Average statistics of (q, y, z) about a model, with q = x - b - W y what its W and b leave of x.

    Sums of squares of x itself would lose all accuracy where its mean is far above its spread. Fields are named as
    those of `Mean`, with q in place of x. Without the model they do not determine statistics of
    x; `to_mean(moments)` gives those.

    Attributes:
        observable_mean: E[q] (D,).
        observable_second_moment: E[q q'], of kind `obs_rep`.
        cross_moment: E[q y'] (D, L).
        weights: w_k = P(z = k) (K,).
        weighted_means: w_k E[y | k] (K, L).
        weighted_second_moments: w_k E[y y' | k], `PositiveDefinite` (K, L, L).

    Example:
        >>> from flax_hmog import mean_to_natural
        >>> from flax_hmog.toy import variables
        >>> em = variables["em"]
        >>> natural = mean_to_natural(em["running"].to_mean(em["model"]))
    """

    observable_mean: Float[Array, " D"]
    observable_second_moment: Kind
    cross_moment: Float[Array, "D L"]
    weights: Float[Array, " K"]
    weighted_means: Float[Array, "K L"]
    weighted_second_moments: PositiveDefinite

    def __post_init__(self) -> None:
        fill_sizes(self, self.observable_mean, "observable_second_moment")

    @classmethod
    def of(cls, moments: Moments) -> ResidualMoments:
        """Those of a model that has seen no data: of its own samples."""
        weights, means = moments.weights, moments.means
        weighted_means = weights[:, None] * means
        second = moments.covariances.weighted(weights).entries + outer(weighted_means, means)
        return cls(
            observable_mean=jnp.zeros_like(moments.bias),
            observable_second_moment=moments.noise,
            cross_moment=jnp.zeros_like(moments.loadings),
            weights=weights,
            weighted_means=weighted_means,
            weighted_second_moments=PositiveDefinite(second),
        )

    def about(self, *, turn: Array, shift: Array) -> ResidualMoments:
        """Those about a model with loadings W + turn (D, L) and bias b + shift (D,)."""
        # with Y = (1, y) and Gamma = (shift, turn):  q' = q - Gamma Y
        first = jnp.sum(self.weighted_means, axis=0)
        second = jnp.sum(self.weighted_second_moments.entries, axis=0)
        one = jnp.concatenate([jnp.ones_like(first[:1]), first])
        square = jnp.concatenate([one[None], jnp.concatenate([first[:, None], second], axis=1)])
        change = jnp.concatenate([shift[:, None], turn], axis=1)
        cross = jnp.concatenate([self.observable_mean[:, None], self.cross_moment], axis=1)
        moved = cross - matmul(change, square)
        # E[q'q''] = E[q q'] - E[q Y'] Gamma' - Gamma E[Y q'']
        kind = type(self.observable_second_moment)
        explained = kind.project_product(
            jnp.concatenate([cross, change], axis=1), jnp.concatenate([change, moved], axis=1)
        )
        return dataclasses.replace(
            self,
            observable_mean=moved[:, 0],
            observable_second_moment=jax.tree.map(jnp.subtract, self.observable_second_moment, explained),
            cross_moment=moved[:, 1:],
        )

    def to_mean(self, moments: Moments) -> Mean:
        """Expected statistics of x, where these are about `moments`."""
        of_x = self.about(turn=-moments.loadings, shift=-moments.bias)
        return Mean(**{field.name: getattr(of_x, field.name) for field in dataclasses.fields(of_x)})


def outer(u: Array, v: Array) -> Array:
    """U v', over leading batch dimensions."""
    return u[..., :, None] * v[..., None, :]


def gaussian_log_partition(location: Array, precision: PositiveDefinite) -> tuple[Array, Array, Array]:
    """psi_N(h, P) = 1/2 h' P^-1 h - 1/2 log|P| (K,), with the means P^-1 h (K, L) and covariances P^-1 (K, L, L)."""
    covariances, log_det = inverse_and_log_det(precision.entries)
    means = einsum("kij,kj->ki", covariances, location)
    return (jnp.sum(location * means, axis=-1) - log_det) / 2, means, covariances


def prior_moments(moments: Moments) -> tuple[Array, PositiveDefinite]:
    """E[y] (L,) and Cov(y) of the mixture."""
    center = matmul(moments.weights, moments.means)
    gap = moments.means - center[None]
    within = moments.covariances.weighted(moments.weights).entries
    covariance = jnp.sum(within + outer(moments.weights[:, None] * gap, gap), axis=0)
    return center, PositiveDefinite(symmetrize(covariance))


def within_covariance(moments: Moments) -> PositiveDefinite:
    """The pooled covariance within components, sum_k w_k S_k (L, L)."""
    return PositiveDefinite(jnp.sum(moments.covariances.weighted(moments.weights).entries, axis=0))


def categorical_logits(bias: Array) -> Array:
    """Harmonium bias (..., K-1) with the implicit 0 of component 0 in front (..., K)."""
    return jnp.concatenate([jnp.zeros_like(bias, shape=(*bias.shape[:-1], 1)), bias], axis=-1)


def observable_bias(natural: Natural) -> Array:
    """B = Psi Psi^-1 b (D,)."""
    return cast(Array, natural.observable_precision.inverse().times(natural.observable_location[:, None])[:, 0])


def natural_bias(log_weights: Array, means: Array, location: Array, log_det: Array) -> Array:
    """cat_k = log w_k - psi_N(h_k, P_k) against component 0 (K-1,), from log|S_k| = -log|P_k|."""
    logits = log_weights - (jnp.sum(location * means, axis=-1) + log_det) / 2
    return logits[1:] - logits[0]


def check_full(argument: str, kind: Any) -> None:
    """TypeError unless component matrices are full."""
    if not isinstance(kind, PositiveDefinite):
        raise TypeError(
            f"{door()}: `{argument}` must have full component matrices; got {type(kind).__name__}. {FULL_ONLY}"
        )
