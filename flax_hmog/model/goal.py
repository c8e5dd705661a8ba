"""The flat vector layout of goal-jax, to bring fitted parameters from there and to check against it.

    natural = [ Psi^-1 b | shape(Psi^-1) | Theta row-major | component 0 | (component j - component 0) | cat ]
    mean    = [ E[x] | shape(E[x x']) | E[x y'] row-major | E[s(y)] | E[s(y) 1(z = j)] | w_1 .. w_{K-1} ]

A component is [ location | shape ]; the differences form a matrix (shape of a component, K-1), stored row-major.
A precision P enters as theta with theta . s(x) = -1/2 x' P x: Scale -n p / 2, Diagonal -P_ii / 2, full -P_ii / 2 and
-P_ij for i < j along the upper triangle, row by row. Second moments are stored plainly.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from flax_hmog.model.checks import check_finite, check_type, door, public
from flax_hmog.model.conversions import in_units_of_x
from flax_hmog.model.coordinates import Mean, Natural, check_mean, check_natural
from flax_hmog.model.head import HeadSizes
from flax_hmog.model.kinds import Array, Kind, PositiveDefinite, Rep, as_rep
from flax_hmog.model.prior import with_prior
from flax_hmog.model.structure import Precision, SharedBase, Structure


@public
def ravel_natural(natural: Natural, head: HeadSizes) -> Float[Array, " P"]:
    """Natural coordinates as the flat vector of goal-jax.

    Args:
        natural: the model.
        head: unbound head with the model's dimensions and kinds; only these are read.

    Returns:
        The vector (P,).

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if the head leaves `obs_dim` open or its structure is another.

    Example:
        >>> from flax_hmog.toy import head, natural
        >>> ravel_natural(natural, head).shape  # 4 + 4 + 8 + 5 + 10 + 2
        (33,)
    """
    natural = check_natural(natural)
    natural = in_units_of_x(natural)
    obs_dim, lat_dim, _, obs_rep, structure = _read_head(head)
    _check_structure(natural.observable_precision, obs_rep)
    precision: Any = natural.posterior_precision
    if structure.has_base:
        check_type("natural.posterior_precision", precision, SharedBase, "Use the head it came from.")
        first = _pack_precision(precision.base, lat_dim)
        shapes = _pack_precision(precision.differences, lat_dim)
    else:
        _check_structure(precision, structure.rep)
        packed = _pack_precision(precision, lat_dim)
        first, shapes = packed[0], packed[1:] - packed[:1]
    locations = natural.posterior_location
    differences = jnp.concatenate([locations[1:] - locations[:1], shapes], axis=-1)
    return jnp.concatenate([
        natural.observable_location,
        _pack_precision(natural.observable_precision, obs_dim),
        natural.interaction.reshape(-1),
        locations[0],
        first,
        differences.T.reshape(-1),
        natural.categorical_bias,
    ])  # fmt: skip


@public
def unravel_natural(flat: Array, head: HeadSizes) -> Natural:
    """Natural coordinates from the flat vector of goal-jax.

    The prior precisions follow by subtraction, so that derivatives in the flat vector see both.

    Args:
        flat: the vector (P,).
        head: unbound head with the model's dimensions and kinds; only these are read.

    Returns:
        `Natural`, with its prior location and precision.

    Raises:
        ValueError: for a wrong length, entries that are not finite, or a prior precision that is not positive definite.

    Example:
        >>> from flax_hmog.toy import head, natural
        >>> unravel_natural(ravel_natural(natural, head), head).interaction.shape
        (4, 2)
    """
    obs_dim, lat_dim, n_components, obs_rep, structure = _read_head(head)
    rep = structure.rep
    base_rep = PositiveDefinite if structure.has_base else rep
    location, precision, interaction, first, differences, bias = _split(
        flat, obs_dim, lat_dim, n_components, (obs_rep, base_rep, rep)
    )
    first_location, first_shape = first[:lat_dim], first[lat_dim:]
    locations = jnp.concatenate([first_location[None], first_location[None] + differences[:, :lat_dim]])
    shapes = differences[:, lat_dim:]
    if structure.has_base:
        base: Any = _unpack_precision(first_shape, PositiveDefinite, lat_dim)
        components: Precision = SharedBase(base, _unpack_precision(shapes, rep, lat_dim))
    else:
        packed = jnp.concatenate([first_shape[None], first_shape[None] + shapes])
        components = _unpack_precision(packed, rep, lat_dim)
    natural = Natural(
        location, _unpack_precision(precision, obs_rep, obs_dim), interaction, locations, components, bias
    )
    return with_prior(natural)


@public
def ravel_mean(mean: Mean, head: HeadSizes) -> Float[Array, " P"]:
    """Mean coordinates as the flat vector of goal-jax.

    Args:
        mean: expected statistics.
        head: unbound head with the model's dimensions and kinds; only these are read.

    Returns:
        The vector (P,).

    Raises:
        TypeError: if `mean` is of another coordinate type.
        ValueError: if the head leaves `obs_dim` open or its structure is another.

    Example:
        >>> from flax_hmog import natural_to_mean
        >>> from flax_hmog.toy import head, natural
        >>> ravel_mean(natural_to_mean(natural), head).shape
        (33,)
    """
    check_mean(mean)
    *_, obs_rep, structure = _read_head(head)
    _check_structure(mean.observable_second_moment, obs_rep)
    _check_structure(mean.weighted_second_moments, structure.rep)
    shapes = mean.weighted_second_moments.pack()
    pooled = mean.pooled_second_moment.pack() if structure.has_base else jnp.sum(shapes, axis=0)
    components = jnp.concatenate([mean.weighted_means, shapes], axis=-1)[1:]
    return jnp.concatenate([
        mean.observable_mean,
        mean.observable_second_moment.pack(),
        mean.cross_moment.reshape(-1),
        jnp.sum(mean.weighted_means, axis=0),
        pooled,
        components.T.reshape(-1),
        mean.weights[1:],
    ])  # fmt: skip


@public
def unravel_mean(flat: Array, head: HeadSizes) -> Mean:
    """Mean coordinates from the flat vector of goal-jax.

    Args:
        flat: the vector (P,).
        head: unbound head with the model's dimensions and kinds; only these are read.

    Returns:
        `Mean`.

    Raises:
        ValueError: for a wrong length or entries that are not finite.

    Example:
        >>> from flax_hmog import natural_to_mean
        >>> from flax_hmog.toy import head, natural
        >>> unravel_mean(ravel_mean(natural_to_mean(natural), head), head).cross_moment.shape
        (4, 2)
    """
    obs_dim, lat_dim, n_components, obs_rep, structure = _read_head(head)
    rep = structure.rep
    base_rep = PositiveDefinite if structure.has_base else rep
    mean, second, cross, first, components, weights = _split(
        flat, obs_dim, lat_dim, n_components, (obs_rep, base_rep, rep)
    )
    pooled: Any = base_rep.unpack(first[lat_dim:], lat_dim)
    # component 0 is what the others leave of the average
    total = rep.project(pooled.entries).pack() if structure.has_base else first[lat_dim:]
    means, shapes = components[:, :lat_dim], components[:, lat_dim:]
    return Mean(
        observable_mean=mean,
        observable_second_moment=obs_rep.unpack(second, obs_dim),
        cross_moment=cross,
        weights=jnp.concatenate([1 - jnp.sum(weights, keepdims=True), weights]),
        weighted_means=jnp.concatenate([first[None, :lat_dim] - jnp.sum(means, axis=0, keepdims=True), means]),
        weighted_second_moments=rep.unpack(
            jnp.concatenate([total[None] - jnp.sum(shapes, axis=0, keepdims=True), shapes]), lat_dim
        ),
        pooled_second_moment=pooled if structure.has_base else None,  # type: ignore[arg-type]
    )


def _read_head(head: HeadSizes) -> tuple[int, int, int, Rep, Structure]:
    if head.obs_dim is None:
        raise ValueError(f"{door()}: `head.obs_dim` must be a number; got None. Give the head its obs_dim.")
    obs_rep = as_rep(head.obs_rep, argument="head.obs_rep")
    return head.obs_dim, head.lat_dim, head.n_components, obs_rep, head.component_structure


def _check_structure(value: object, rep: Rep) -> None:
    if type(value) is not rep:
        raise ValueError(
            f"{door()}: `head` must have the kinds of the coordinates; got {rep.__name__} for coordinates that hold "
            f"{type(value).__name__}. Use the head they came from."
        )


def _split(flat: ArrayLike, obs_dim: int, lat_dim: int, n_components: int, reps: tuple[Any, ...]) -> tuple[Any, ...]:
    """The six parts of a flat vector; the differences as (K-1, component size)."""
    obs_rep, base_rep, rep = reps
    flat = jnp.asarray(flat)
    first = lat_dim + base_rep.packed_size(lat_dim)
    other = lat_dim + rep.packed_size(lat_dim)
    sizes = [
        obs_dim, obs_rep.packed_size(obs_dim), obs_dim * lat_dim, first, other * (n_components - 1), n_components - 1,
    ]  # fmt: skip
    if flat.shape != (sum(sizes),):
        raise ValueError(
            f"{door()}: `flat` must have shape ({sum(sizes)},) for this head; got {flat.shape}. "
            "Check the head's dimensions and kinds."
        )
    check_finite("flat", flat)
    location, shape, interaction, component, differences, bias = jnp.split(flat, np.cumsum(sizes)[:-1])
    return (
        location, shape, interaction.reshape(obs_dim, lat_dim), component,
        differences.reshape(other, n_components - 1).T, bias,
    )  # fmt: skip


def _pack_precision(precision: Kind, dim: int) -> Array:
    """Natural parameters (..., packed size) of precisions."""
    packed = precision.pack()
    return packed * jnp.broadcast_to(jnp.asarray(precision.natural_factor(dim), packed.dtype), packed.shape)


def _unpack_precision(theta: Array, rep: Rep, dim: int) -> Kind:
    return rep.unpack(theta / jnp.broadcast_to(jnp.asarray(rep.natural_factor(dim), theta.dtype), theta.shape), dim)
