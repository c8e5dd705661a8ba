"""Outputs of inference for rows."""

from __future__ import annotations

from jaxtyping import Float

from flax_hmog.model.kinds import Array, pytree
from flax_hmog.model.structure import Precision


@pytree
class Posterior:
    """Natural parameters of p(y, z | x).

    Attributes:
        location: eta_k + Theta' x (..., K, L).
        precision: Q_k, batch (K,), the same for every x; where entries are missing, of every x (..., K).
        bias: harmonium categorical bias (K-1,), against component 0.

    Example:
        >>> from flax_hmog import posterior_at
        >>> from flax_hmog.toy import natural, x
        >>> posterior = posterior_at(natural, x)
        >>> posterior.location.shape, posterior.precision.entries.shape, posterior.bias.shape
        ((12, 3, 2), (3, 2, 2), (2,))
    """

    location: Float[Array, "... K L"]
    precision: Precision
    bias: Float[Array, " K-1"]


@pytree
class HMoGOutput:
    """Output of a head for observations x (..., D).

    Attributes:
        log_density: log p(x) in nats (...).
        log_responsibilities: log p(z = k | x) (..., K).
        latent_mean: E[y | x] (..., L).

    Example:
        >>> from flax_hmog.toy import output
        >>> output.log_responsibilities.argmax(axis=-1).tolist()
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    """

    log_density: Float[Array, " ..."]
    log_responsibilities: Float[Array, "... K"]
    latent_mean: Float[Array, "... L"]
