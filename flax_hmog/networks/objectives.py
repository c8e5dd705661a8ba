"""Losses for heads on encoders: small functions of a head's output, averaged over the batch and to be minimised.

The likelihood of the features alone collapses an encoder: shrinking all features raises it without limit. Train the
head with it on features behind `stop_gradient`, and the encoder with an objective of the assignments: docs/encoders.md.
Source: Krause et al. 2010 (RIM), Hu et al. 2017 (IMSAT), Ji et al. 2019 (IIC).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Float

from flax_hmog.data.shards import on_shards, reshaped, row_shards
from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.checks import check_positive, check_type, door, is_concrete, public
from flax_hmog.model.conversions import natural_to_moments, own_moments
from flax_hmog.model.coordinates import Natural, prior_moments, within_covariance
from flax_hmog.model.kinds import Array, einsum, matmul
from flax_hmog.model.prior import with_prior

ONE_OUTPUT = "Give what a head returns; joint_and_head_outputs returns two of them."


@public
def negative_log_likelihood(output: HMoGOutput) -> Float[Array, ""]:
    """-mean log p(x), in nats per sample.

    Args:
        output: of a head, for a batch (..., D); of features behind `stop_gradient` where there is an encoder.

    Returns:
        The loss ().

    Example:
        >>> from flax_hmog.toy import output
        >>> bool(negative_log_likelihood(output) == -output.log_density.mean())
        True
    """
    check_type("output", output, HMoGOutput, ONE_OUTPUT)
    return -jnp.mean(output.log_density)


@public
def conditional_entropy(output: HMoGOutput) -> Float[Array, ""]:
    """H(z | x): mean entropy of the assignments in nats; 0 when all are certain.

    Args:
        output: of a head, for a batch (..., D).

    Returns:
        The entropy ().

    Example:
        >>> from flax_hmog.toy import output
        >>> bool(conditional_entropy(output) < 0.01)  # certain
        True
    """
    rows = _rows(output)
    return -jnp.mean(_expectation(jnp.exp(rows), rows))


@public
def marginal_entropy(output: HMoGOutput) -> Float[Array, ""]:
    """H(z): entropy of the batch's average assignment in nats; log K when clusters are used equally.

    Args:
        output: of a head, for a batch (..., D).

    Returns:
        The entropy ().

    Example:
        >>> from flax_hmog.toy import output
        >>> round(float(marginal_entropy(output)), 2)  # log 3: balanced
        1.1
    """
    return -_sum_x_log_x(jnp.mean(jnp.exp(_rows(output)), axis=0))


@public
def negative_mutual_information(output: HMoGOutput, *, marginal_weight: float = 1.0) -> Float[Array, ""]:
    """-I(x; z) = H(z | x) - marginal_weight H(z): confident and balanced assignments.

    Args:
        output: of a head, for a batch (..., D).
        marginal_weight: weight of the balance, positive.

    Returns:
        The loss (), in nats.

    Raises:
        ValueError: for a weight that is not positive: a single cluster would be best.

    Example:
        >>> from flax_hmog.toy import output
        >>> round(float(negative_mutual_information(output)), 2)  # the best: -log 3
        -1.1
    """
    check_positive("marginal_weight", marginal_weight, "1 gives the information.")
    return conditional_entropy(output) - marginal_weight * marginal_entropy(output)


@public
def negative_joint_information(
    output: HMoGOutput, twin: HMoGOutput, *, marginal_weight: float = 1.0
) -> Float[Array, ""]:
    """-I(z; z') of the assignments of two views of the same samples: each view predicts the cluster of the other.

    With the table P_jk = mean_n gamma_nj gamma'_nk of the batch, made symmetric,

        I = sum_jk P_jk log P_jk - 2 marginal_weight sum_j P_j log P_j

    It is at most log K, for certain, equal and balanced assignments; no view can win by a collapse to one cluster. With
    a weight the best are worth (2 marginal_weight - 1) log K, against 0 for a collapse.

    Args:
        output: of a head, for a batch (..., D).
        twin: of the head, for other views of the same samples in the same order.
        marginal_weight: weight of the balance, above 1/2; below 1 for clusters of unequal size.

    Returns:
        The loss (), in nats.

    Raises:
        ValueError: for outputs of different shapes, or a weight of at most 1/2: a single cluster would be best.

    Source: Ji, Henriques and Vedaldi 2019.

    Example:
        >>> from flax_hmog.toy import output
        >>> round(float(negative_joint_information(output, output)), 2)  # the best: -log 3
        -1.1
    """
    first, second = jnp.exp(_rows(output)), jnp.exp(_rows(twin, "twin"))
    _check_like("twin", twin.log_responsibilities, output.log_responsibilities)
    if is_concrete(marginal_weight) and not np.asarray(marginal_weight) > 0.5:
        raise ValueError(
            f"{door()}: `marginal_weight` must be above 1/2, below which a single cluster is best; "
            f"got {marginal_weight}. 1 gives the information."
        )
    table = _sums_of_products(first, second) / first.shape[0]
    table = (table + table.T) / 2
    return marginal_weight * 2 * _sum_x_log_x(jnp.sum(table, axis=0)) - _sum_x_log_x(table)


@public
def consistency(output: HMoGOutput, perturbed: HMoGOutput) -> Float[Array, ""]:
    """Mean KL of assignments of perturbed inputs from those of the inputs, which are taken as given.

    Args:
        output: of a head, for a batch (..., D); no gradient flows through it.
        perturbed: of the head, for the same batch augmented.

    Returns:
        The loss (), in nats.

    Raises:
        ValueError: for outputs of different shapes.

    Example:
        >>> from flax_hmog.toy import output
        >>> float(consistency(output, output))
        0.0
    """
    _check_like("perturbed", perturbed.log_responsibilities, output.log_responsibilities)
    target = jax.lax.stop_gradient(output.log_responsibilities)
    return jnp.mean(_expectation(jnp.exp(target), target - perturbed.log_responsibilities))


@public
def distillation(output: HMoGOutput, responsibilities: Array) -> Float[Array, ""]:
    """Cross-entropy of the assignments against given ones: the clusters of one model taught to another.

    Args:
        output: of a head, for a batch (..., D).
        responsibilities: probabilities of the clusters (..., K), for example those of a linear model, merged.

    Returns:
        The loss (), in nats.

    Raises:
        ValueError: unless there is a probability for each sample and cluster; `jax.nn.one_hot` makes them of labels.

    Example:
        >>> from flax_hmog.toy import labels, output
        >>> bool(distillation(output, jax.nn.one_hot(labels, 3)) < 0.01)
        True
    """
    if is_concrete(responsibilities) and np.any(np.asarray(responsibilities) < 0):
        raise ValueError(
            "distillation: `responsibilities` must be probabilities; got negative ones. Take exp of logarithms."
        )
    _check_like("responsibilities", responsibilities, output.log_responsibilities)
    return -jnp.mean(_expectation(responsibilities, output.log_responsibilities))


@public
def reconstruction(decoded: Array, x: Array) -> Float[Array, ""]:
    """Mean squared distance of inputs from a decoder's reconstruction; it keeps features from collapse.

    Args:
        decoded: the decoder's output (B, ...).
        x: inputs (B, ...).

    Returns:
        The loss (): squared units of x, summed over an input and averaged over the batch.

    Raises:
        ValueError: unless both have one shape.

    Example:
        >>> float(reconstruction(jnp.zeros((5, 4)), jnp.ones((5, 4))))
        4.0
    """
    _check_like("decoded", decoded, x)
    return jnp.mean(jnp.sum(jnp.square(decoded - x).reshape(x.shape[0], -1), axis=-1))


@public
def negative_weight_entropy(natural: Natural) -> Float[Array, ""]:
    """-H(w) of the mixture weights in nats; -log K for equal weights. It keeps components alive.

    Args:
        natural: the model, `head.apply(variables, method="natural")`.

    Returns:
        The loss ().

    Example:
        >>> from flax_hmog.toy import natural
        >>> round(float(negative_weight_entropy(natural)), 2)  # of (1/2, 1/4, 1/4)
        -1.04
    """
    return _sum_x_log_x(natural_to_moments(natural).weights)


@public
def precision_penalty(natural: Natural) -> Float[Array, ""]:
    """Differences in width between components: 1/2 mean_k [tr(P_k C) - log|P_k C| - L], C = sum_k w_k S_k.

    It is 0 where all components have one covariance, whatever their means, and grows as one becomes narrower or flatter
    than the average. The latent basis and the units of x do not matter.

    Args:
        natural: the model.

    Returns:
        The loss (), in nats.

    Example:
        >>> from flax_hmog.toy import natural
        >>> bool(abs(precision_penalty(natural)) < 1e-4)  # all components are alike
        True
    """
    natural = with_prior(natural)
    lat_dim = natural.interaction.shape[1]
    within = within_covariance(own_moments(natural))
    traces = einsum("kij,ij->k", natural.prior.precision.entries, within.entries)
    log_dets = natural.prior.precision.log_det() + within.log_det()
    return jnp.mean(traces - log_dets - lat_dim) / 2


@public
def loading_penalty(natural: Natural) -> Float[Array, ""]:
    """Signal over noise per column of x: tr(C W' Psi^-1 W) / D, C the prior's covariance.

    The latent basis and the units of x do not matter.

    Args:
        natural: the model.

    Returns:
        The loss ().

    Example:
        >>> from flax_hmog.toy import natural
        >>> loading_penalty(natural).shape
        ()
    """
    moments = own_moments(natural)
    gram = matmul(moments.loadings.T, natural.interaction)  # W' Psi^-1 W
    _, covariance = prior_moments(moments)
    return einsum("ij,ij->", covariance.entries, gram) / natural.interaction.shape[0]


@public
def combine(terms: Mapping[str, Array], weights: Mapping[str, Any], step: ArrayLike) -> Float[Array, ""]:
    """The weighted sum of losses, each weight a number or an optax schedule of the step.

    Args:
        terms: losses () by name.
        weights: for each name a number, or a function of the step, as `optax.linear_schedule(0.0, 1.0, 1000)`.
        step: number of the step.

    Returns:
        The loss ().

    Raises:
        ValueError: unless terms and weights have the same names.

    Example:
        >>> weights = {"density": 0.1, "information": lambda step: step / 10}
        >>> float(combine({"density": jnp.array(2.0), "information": jnp.array(-1.0)}, weights, step=1)).__round__(2)
        0.1
    """
    if terms.keys() != weights.keys():
        raise ValueError(
            f"combine: `weights` must have one weight for each term, {sorted(terms)}; got {sorted(weights)}. "
            "Give 0 to a term that does not count."
        )
    values = {name: weight(step) if callable(weight) else weight for name, weight in weights.items()}
    return sum((values[name] * term for name, term in terms.items()), start=jnp.zeros(()))


def _check_like(argument: str, value: Any, like: Array) -> None:
    """ValueError unless both have one shape: others would broadcast to a loss that means nothing."""
    if jnp.shape(value) != jnp.shape(like):
        raise ValueError(
            f"{door()}: `{argument}` must have shape {jnp.shape(like)}, as what it is compared with; got "
            f"{jnp.shape(value)}. Give both for the same samples."
        )


def _rows(output: HMoGOutput, argument: str = "output") -> Array:
    """Log-responsibilities (N, K), from (..., K)."""
    check_type(argument, output, HMoGOutput, ONE_OUTPUT)
    return reshaped(output.log_responsibilities, (-1, output.log_responsibilities.shape[-1]))


def _sums_of_products(first: Array, second: Array) -> Array:
    """Sums over rows of the products of columns (K, K') of (N, K) and (N, K'), wherever the rows lie."""
    shards = row_shards(first)

    def sums(_: tuple[()], rows: tuple[Array, Array]) -> Array:
        table = matmul(rows[0].T, rows[1])
        return table if shards is None else jax.lax.psum(table, shards[1])

    return on_shards(sums, (), (first, second), shards, PartitionSpec())


def _sum_x_log_x(p: Array) -> Array:
    """Sum of p log p, with 0 log 0 = 0 and finite gradients."""
    return jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)))


def _expectation(p: Array, values: Array) -> Array:
    """Sum of p times values over the last axis, with 0 log 0 = 0 and finite gradients."""
    return jnp.sum(p * jnp.where(p > 0, values, 0), axis=-1)
