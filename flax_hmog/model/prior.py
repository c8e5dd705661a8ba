"""The prior of a model from its posterior-side parameters."""

from __future__ import annotations

import jax

from flax_hmog.model.checks import check_positive_definite
from flax_hmog.model.coordinates import Natural, Prior, categorical_logits, gaussian_log_partition
from flax_hmog.model.kinds import Array, PositiveDefinite, matmul, symmetrize


def conjugation(natural: Natural) -> tuple[Array, Array]:
    """W' Psi^-1 b (L,) and W' Psi^-1 W (L, L), which the likelihood adds to the prior of y."""
    # F F' = Psi^-1: with A = F^-1 Theta = F' W,  W'Psi^-1 W = A'A  and  W'Psi^-1 b = A' F^-1 (Psi^-1 b)
    root = natural.observable_precision.cholesky()
    whitened = root.lower_solve(natural.interaction)
    location = root.lower_solve(natural.observable_location[:, None])[:, 0]
    return matmul(location, whitened), matmul(whitened.T, whitened)


def with_prior(natural: Natural) -> Natural:
    """The model with its prior, from the differences that define it where it is not known.

    Raises:
        ValueError: if a prior precision is not positive definite: no such model exists.
    """
    if natural.prior is not None:
        return natural
    natural.observable_precision.check("observable_precision", "Check where the model comes from.")
    shift, gram = conjugation(natural)
    location = natural.posterior_location + shift[None]
    prior = PositiveDefinite(symmetrize(natural.posterior_precision.dense() - gram[None]))
    check_positive_definite(
        "prior precision Q_k - W'Psi^-1 W",
        prior.entries,
        "Raise the posterior precisions or shrink the interaction, or come from `moments_to_natural`.",
    )
    log_partitions, *_ = gaussian_log_partition(location, prior)
    log_weights = jax.nn.log_softmax(categorical_logits(natural.categorical_bias) + log_partitions)
    return natural.carrying(Prior(location, prior, log_weights))
