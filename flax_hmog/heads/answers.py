"""The answers of a head from its model, for linen and NNX alike."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int

from flax_hmog.em.statistics import whiten_prior
from flax_hmog.inference import posterior as inference
from flax_hmog.inference.likelihood import mean_log_density
from flax_hmog.inference.posterior import Posterior
from flax_hmog.model.checks import public_methods
from flax_hmog.model.conjugation import LinearGaussian, Mixture, join_conjugated, split_conjugated
from flax_hmog.model.conversions import natural_to_mean, natural_to_moments
from flax_hmog.model.coordinates import Mean, Moments, Natural, Prepared, check_natural
from flax_hmog.model.kinds import Array
from flax_hmog.model.prepared import prepare


@public_methods
class Answers:
    """Methods of a head that follow from its model.

    See the functions of the same names for shapes, errors and `missing`.
    """

    projection_dtype: Any

    def _natural(self, x: Array | None = None) -> Natural | Prepared:
        """The model; prepared where rows x are to be projected in another dtype."""
        raise NotImplementedError

    def natural(self) -> Natural:
        """The model in natural coordinates."""
        return check_natural(self._natural())

    def prepared(self) -> Prepared:
        """The model with all that inference needs of it and that does not depend on x."""
        return prepare(self.natural(), self.projection_dtype)

    def moments(self) -> Moments:
        """The model in standard form."""
        return natural_to_moments(self.natural())

    def mean(self) -> Mean:
        """The model's expected statistics."""
        return natural_to_mean(self.natural())

    def log_observable_density(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> Float[Array, " ..."]:
        """Log p(x) (...)."""
        return inference.log_observable_density(self._natural(x), x, missing=missing)

    def mean_log_density(
        self, x: Float[Array, "... D"], weights: Float[Array, " ..."] | None = None, *, missing: str = "refuse"
    ) -> Float[Array, ""]:
        """Weighted average of log p(x) over x (..., D) (): minus the loss of a fit, value and gradient in one pass."""
        return mean_log_density(self._natural(x), x, weights, missing=missing)

    def posterior_at(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> Posterior:
        """Natural parameters of p(y, z | x)."""
        return inference.posterior_at(self._natural(x), x, missing=missing)

    def posterior_categorical(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> Float[Array, "... K-1"]:
        """Log-odds of components against component 0 (..., K-1)."""
        return inference.posterior_categorical(self._natural(x), x, missing=missing)

    def posterior_soft_assignments(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> Float[Array, "... K"]:
        """Responsibilities (..., K)."""
        return inference.posterior_soft_assignments(self._natural(x), x, missing=missing)

    def posterior_assignments(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> Float[Array, "... K"]:
        """Responsibilities (..., K); the same as `posterior_soft_assignments`."""
        return self.posterior_soft_assignments(x, missing=missing)

    def posterior_hard_assignment(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> Int[Array, " ..."]:
        """Most probable component (...)."""
        return inference.posterior_hard_assignment(self._natural(x), x, missing=missing)

    def latent_mean(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> Float[Array, "... L"]:
        """E[y | x] (..., L)."""
        return inference.latent_mean(self._natural(x), x, missing=missing)

    def whiten_prior(self) -> Mean:
        """Expected statistics in the latent basis in which y has mean 0 and covariance I, as far as the kind allows."""
        return whiten_prior(self.mean())

    def split_conjugated(self) -> tuple[LinearGaussian, Mixture]:
        """p(x | y) and p(y, z)."""
        return split_conjugated(self.natural())

    def join_conjugated(self, likelihood: LinearGaussian, prior: Mixture) -> Natural:
        """The joint of a likelihood and a prior."""
        return join_conjugated(likelihood, prior)
