"""The map from the trainable leaves of a head to `Natural`: any real values give a valid model.

Positive quantities pass through a smooth map onto an open interval, correlation matrices and precisions are sums of
positive definite parts, and nothing is subtracted, so that float32 holds for every setting of the leaves.
Derivations, and what the bounds leave out: docs/derivations.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_hmog.data.shards import whole
from flax_hmog.model.algebra import orthonormalize
from flax_hmog.model.coordinates import Natural, Prior, natural_bias
from flax_hmog.model.kinds import Array, PositiveDefinite, Rep, diagonal, einsum, matmul
from flax_hmog.model.structure import SharedBase, Structure
from flax_hmog.model.typed import jit


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The open intervals onto which leaves are mapped; part of a head's definition.

    Attributes:
        noise: noise variances, in squared units of x.
        precision: component precisions along each latent axis, in units of the head's latent space.
        signal: upper bound of the norm of each column of the noise-whitened loadings, in prior standard deviations:
            how many posterior standard deviations a latent axis may spread.
        relative_floor: smallest eigenvalue of a correlation matrix, and smallest precision of a component
            relative to the average component.
    """

    noise: tuple[float, float] = (1e-16, 1e16)
    precision: tuple[float, float] = (1e-4, 1e4)
    signal: float = 1e3
    relative_floor: float = 1e-3


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """Shape, logical axis names and scale of the initial normal draw of one leaf."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float = 0.0


def leaf_specs(
    obs_dim: int, lat_dim: int, n_components: int, obs_rep: Rep, structure: Structure
) -> dict[str, LeafSpec]:
    """The trainable leaves of a head of this structure."""
    rep = structure.rep
    specs = {
        "bias": LeafSpec((obs_dim,), ("observed",)),
        "noise": LeafSpec(obs_rep.shape(obs_dim), obs_rep.leaf_axes("observed")),
        "loadings": LeafSpec((obs_dim, lat_dim), ("observed", "latent"), 1 / math.sqrt(obs_dim)),
        "logits": LeafSpec((n_components,), ("component",)),
        "means": LeafSpec((n_components, lat_dim), ("component", "latent"), 1.0),
        "precisions": LeafSpec((n_components, *rep.shape(lat_dim)), ("component", *rep.leaf_axes("latent"))),
    }
    if structure.has_base:
        specs["base_precision"] = LeafSpec((lat_dim, lat_dim), ("latent", None))
    return specs


@jit(static_argnames=("obs_rep", "structure", "bounds"))
def leaves_to_natural(leaves: dict[str, Array], obs_rep: Rep, structure: Structure, bounds: Bounds) -> Natural:
    """The model that leaves stand for.

    Args:
        leaves: arrays as in `leaf_specs`, of any real values.
        obs_rep: kind of the noise.
        structure: of the component precisions.
        bounds: the intervals of the maps.

    Returns:
        `Natural`, with its prior.
    """
    leaves = leaves if jax.sharding.get_abstract_mesh().empty else whole(leaves)
    rep = structure.rep
    if rep is PositiveDefinite or structure.has_base:
        whitened, means, prior, posterior = _full_components(leaves, rep, bounds)
        location = einsum("kij,kj->ki", prior, means)
    else:
        whitened, means, location, prior, posterior = _restricted_components(leaves, rep, bounds)
    prior_precision = PositiveDefinite(prior)
    observable_precision = obs_rep.inverse_from_leaf(
        leaves["noise"], len(leaves["bias"]), bounds.noise, bounds.relative_floor
    )
    interaction = observable_precision.cholesky().times(whitened)  # Theta = F A
    log_weights = jax.nn.log_softmax(leaves["logits"])
    bias = natural_bias(log_weights, means, location, -prior_precision.log_det())
    return Natural(
        observable_location=observable_precision.times(leaves["bias"][:, None])[:, 0],
        observable_precision=observable_precision,
        interaction=interaction,
        posterior_location=location - matmul(leaves["bias"], interaction)[None],
        posterior_precision=posterior,
        categorical_bias=bias,
    ).carrying(Prior(location, prior_precision, log_weights))


def _full_components(leaves: dict[str, Array], rep: Rep, bounds: Bounds) -> tuple[Any, ...]:
    """A, m_k, P_k and Q_k = P_k + A'A for a full posterior or a shared base."""
    base, raw = leaves.get("base_precision"), leaves["precisions"]
    lat_dim = leaves["means"].shape[-1]
    own = rep.from_leaf(raw, lat_dim, bounds.precision, bounds.relative_floor)
    # no component may fall below a fixed share of the average one
    own = jax.tree.map(lambda a: a + bounds.relative_floor * jnp.mean(a, axis=0, keepdims=True), own)
    prior = own.dense()
    if base is not None:
        shared = PositiveDefinite.from_leaf(base, lat_dim, bounds.precision, bounds.relative_floor)
        prior = prior + shared.entries[None]
    spread = jnp.sqrt(jnp.mean(diagonal(prior), axis=0))
    whitened = bounded_columns(leaves["loadings"], bounds.signal) * spread[None]
    precision = prior + matmul(whitened.T, whitened)[None]
    if base is None:
        return whitened, leaves["means"], prior, PositiveDefinite(precision)
    differences = jax.tree.map(lambda a: a[1:] - a[:1], own)
    return whitened, leaves["means"], prior, SharedBase(PositiveDefinite(precision[0]), differences)


def _restricted_components(leaves: dict[str, Array], rep: Rep, bounds: Bounds) -> tuple[Any, ...]:
    """A, m_k, h_k, P_k and Q_k = I + delta_k, delta_k > 0, for a posterior of a diagonal kind.

    With [I; B] = [V; U] T (QR), A = U leaves I - A'A = V'V, so P_k = delta_k + V'V is a sum. The leaves B and mu hold
    the model in the latent basis T^-1 y, in which the base prior is N(0, I) and the noise-whitened loadings are B.
    """
    lat_dim = leaves["means"].shape[-1]
    loadings = bounded_columns(leaves["loadings"], bounds.signal)
    orthonormal, t = orthonormalize(jnp.concatenate([jnp.eye(lat_dim, dtype=loadings.dtype), loadings]))
    signs = jnp.where(diagonal(t) < 0, -1, 1).astype(t.dtype)
    orthonormal, t = orthonormal * signs[None], t * signs[:, None]
    root, whitened = orthonormal[:lat_dim], orthonormal[lat_dim:]
    delta = rep.from_leaf(leaves["precisions"], lat_dim, bounds.precision, bounds.relative_floor)
    prior = delta.dense() + matmul(root.T, root)[None]
    # m_k = T mu_k and V = T^-1, so h_k = P_k m_k = delta_k T mu_k + V' mu_k
    means = matmul(leaves["means"], t.T)
    location = delta.diagonal() * means + matmul(leaves["means"], root)
    return whitened, means, location, prior, jax.tree.map(lambda entries: 1 + entries, delta)


def bounded_columns(matrix: Array, bound: float) -> Array:
    """Columns b / sqrt(1 + |b|^2 / bound^2): their norms stay below `bound`."""
    return matrix / jnp.sqrt(1 + jnp.sum((matrix / bound) ** 2, axis=0, keepdims=True))
