"""A joint as likelihood and prior: p(x, y, z) = p(x | y) p(y, z), and back."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float

from flax_hmog.model.checks import check_type, public
from flax_hmog.model.conversions import in_units_of_x
from flax_hmog.model.coordinates import (
    FULL_ONLY,
    Natural,
    Prior,
    categorical_logits,
    check_natural,
    gaussian_log_partition,
)
from flax_hmog.model.kinds import Array, Kind, PositiveDefinite, fill_sizes, pytree
from flax_hmog.model.prior import conjugation, with_prior
from flax_hmog.model.structure import Precision, SharedBase


@pytree
class LinearGaussian:
    """Natural parameters of p(x | y): location + interaction y, precision.

    Attributes:
        location: Psi^-1 b (D,).
        precision: Psi^-1, of kind `obs_rep`.
        interaction: Theta = Psi^-1 W (D, L).

    Example:
        >>> from flax_hmog.toy import natural
        >>> likelihood, _ = split_conjugated(natural)
        >>> likelihood.location.shape, likelihood.interaction.shape
        ((4,), (4, 2))
    """

    location: Float[Array, " D"]
    precision: Kind
    interaction: Float[Array, "D L"]

    def __post_init__(self) -> None:
        fill_sizes(self, self.location, "precision")


@pytree
class Mixture:
    """Natural parameters of the prior p(y, z).

    Attributes:
        location: h_k = S_k^-1 m_k (K, L).
        precision: P_k = S_k^-1, batch (K,), in the structure of the posterior precisions.
        bias: harmonium categorical bias (K-1,) against component 0.

    Example:
        >>> from flax_hmog.toy import natural
        >>> _, prior = split_conjugated(natural)
        >>> prior.location.shape, prior.bias.shape
        ((3, 2), (2,))
    """

    location: Float[Array, "K L"]
    precision: Precision
    bias: Float[Array, " K-1"]


@public
def split_conjugated(natural: Natural) -> tuple[LinearGaussian, Mixture]:
    """Likelihood and prior of a model whose prior shares the structure of its posterior.

    Args:
        natural: the model, of a Symmetric or Analytic head.

    Returns:
        p(x | y) and p(y, z), with h_k = eta_k + W'Psi^-1 b and P_k = Q_k - W'Psi^-1 W.

    Raises:
        TypeError: for restricted posterior precisions, whose prior precisions are full (read `natural.prior`).
        ValueError: if a prior precision is not positive definite.

    Example:
        >>> from flax_hmog.toy import natural
        >>> likelihood, prior = split_conjugated(natural)
        >>> type(likelihood).__name__, type(prior).__name__
        ('LinearGaussian', 'Mixture')
    """
    natural = check_natural(natural)
    natural = with_prior(in_units_of_x(natural))
    precision = natural.posterior_precision
    if isinstance(precision, SharedBase):
        base = PositiveDefinite(natural.prior.precision.entries[0])
        precisions: Precision = dataclasses.replace(precision, base=base)
    elif isinstance(precision, PositiveDefinite):
        precisions = natural.prior.precision
    else:
        raise TypeError(
            "split_conjugated: `natural` must have full or shared-base precisions; got "
            f"{type(precision).__name__}. {FULL_ONLY}"
        )
    likelihood = LinearGaussian(natural.observable_location, natural.observable_precision, natural.interaction)
    return likelihood, Mixture(natural.prior.location, precisions, natural.categorical_bias)


@public
def join_conjugated(likelihood: LinearGaussian, prior: Mixture) -> Natural:
    """The joint of a likelihood and a prior; inverse of `split_conjugated`.

    Args:
        likelihood: p(x | y).
        prior: p(y, z).

    Returns:
        `Natural` with eta_k = h_k - W'Psi^-1 b and Q_k = P_k + W'Psi^-1 W.

    Raises:
        TypeError: if an argument is of another type.

    Example:
        >>> from flax_hmog.toy import natural
        >>> again = join_conjugated(*split_conjugated(natural))
        >>> bool(abs(again.posterior_location - natural.posterior_location).max() < 1e-4)
        True
    """
    check_type("likelihood", likelihood, LinearGaussian, "Take it from split_conjugated.")
    check_type("prior", prior, Mixture, "Take it from split_conjugated.")
    precisions = PositiveDefinite(prior.precision.dense())
    log_partitions, *_ = gaussian_log_partition(prior.location, precisions)
    log_weights = jax.nn.log_softmax(categorical_logits(prior.bias) + log_partitions)
    natural = Natural(
        observable_location=likelihood.location,
        observable_precision=likelihood.precision,
        interaction=likelihood.interaction,
        posterior_location=prior.location,
        posterior_precision=prior.precision,
        categorical_bias=prior.bias,
    )
    location, gram = conjugation(natural)
    if isinstance(prior.precision, SharedBase):
        posterior: Precision = dataclasses.replace(
            prior.precision, base=PositiveDefinite(prior.precision.base.entries + gram)
        )
    else:
        posterior = PositiveDefinite(prior.precision.dense() + gram[None])
    joint = dataclasses.replace(
        natural, posterior_location=prior.location - location[None], posterior_precision=posterior
    )
    return joint.carrying(Prior(prior.location, precisions, log_weights))
