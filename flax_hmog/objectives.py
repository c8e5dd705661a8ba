"""Losses for heads on encoders: small functions of a head's output, averaged over the batch and to be minimised.

The likelihood of the features alone collapses an encoder: shrinking all features raises it without limit. Train the
head with it on features behind `stop_gradient`, and the encoder with an objective of the assignments.
Source: Krause et al. 2010 (RIM), Hu et al. 2017 (IMSAT).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flax_hmog.covariances import Array
from flax_hmog.inference import HMoGOutput


def negative_log_likelihood(output: HMoGOutput) -> Array:
    """-mean log p(x), in nats per sample.

    Args:
        output: of a head, for a batch (..., D).

    Returns:
        The loss ().
    """
    return -jnp.mean(output.log_density)


def conditional_entropy(output: HMoGOutput) -> Array:
    """H(z | x): mean entropy of the assignments in nats; 0 when all are certain.

    Args:
        output: of a head, for a batch (..., D).

    Returns:
        The entropy ().
    """
    return jnp.mean(_entropy(output.log_responsibilities))


def marginal_entropy(output: HMoGOutput) -> Array:
    """H(z): entropy of the batch's average assignment in nats; log K when clusters are used equally.

    Args:
        output: of a head, for a batch (..., D).

    Returns:
        The entropy ().
    """
    rows = output.log_responsibilities.reshape(-1, output.log_responsibilities.shape[-1])
    return _entropy(jax.nn.logsumexp(rows, axis=0) - jnp.log(rows.shape[0]))


def negative_mutual_information(output: HMoGOutput, *, marginal_weight: float = 1.0) -> Array:
    """-I(x; z) = H(z | x) - marginal_weight H(z): confident and balanced assignments.

    Args:
        output: of a head, for a batch (..., D).
        marginal_weight: weight of the balance.

    Returns:
        The loss (), in nats.
    """
    return conditional_entropy(output) - marginal_weight * marginal_entropy(output)


def consistency(output: HMoGOutput, perturbed: HMoGOutput) -> Array:
    """Mean KL of assignments of perturbed inputs from those of the inputs, which are taken as given.

    Args:
        output: of a head, for a batch (..., D); no gradient flows through it.
        perturbed: of the head, for the same batch augmented.

    Returns:
        The loss (), in nats.
    """
    target = jax.lax.stop_gradient(output.log_responsibilities)
    gap = target - perturbed.log_responsibilities
    return jnp.mean(jnp.sum(jnp.exp(target) * gap, axis=-1))


def _entropy(log_probabilities: Array) -> Array:
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
