"""Sizes that small fits are padded to, so that one compiled program serves many of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from flax_hmog.em.directions import EXACT_DIM
from flax_hmog.em.options import Regularizer
from flax_hmog.model.coordinates import Moments, Natural, Prior, outer
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import Array, PositiveDefinite, identity_like, pytree
from flax_hmog.model.typed import Block, jit

COMPONENT_SIZES = (16, 32)
FACTOR_SIZES = (8, 16, 24)  # 2 L at most `KURTOSIS_AXES` of directions.py, on which starts depend beyond
FEWEST_ROWS = 8  # that rows are padded to a multiple of; of many rows an eighth to a quarter of them
MOST_WORK = 2**24  # multiplications per product of a padded pass; beyond, the pass outweighs compilation


@pytree
class InUse:
    """The parts of a padded model that count.

    The other components have weight 0, the other factors no loadings and a prior N(0, 1) of their own: neither changes
    p(x), and EM leaves both as they are.

    Attributes:
        components: (K,).
        factors: (L,).
    """

    components: Bool[Array, " K"]
    factors: Bool[Array, " L"]

    @property
    def n_components(self) -> Array:
        """Number of components that count ()."""
        return jnp.sum(self.components)

    @property
    def n_factors(self) -> Array:
        """Number of factors that count ()."""
        return jnp.sum(self.factors)

    def masked(self, moments: Moments) -> Moments:
        """The model, whatever stands in place of the parts that do not count."""
        k, l = self.components, self.factors
        counts = k[:, None, None] & outer(l, l)[None]
        covariances = moments.covariances.entries
        return dataclasses.replace(
            moments,
            loadings=jnp.where(l[None], moments.loadings, 0),
            weights=jnp.where(k, moments.weights, 0),
            means=jnp.where(k[:, None] & l[None], moments.means, 0),
            covariances=PositiveDefinite(jnp.where(counts, covariances, identity_like(covariances))),
        )

    def completed(self, natural: Natural) -> Natural:
        """The model, whatever stands in the prior in place of the parts that do not count.

        Components that do not count get the mean precision of those which do: it decides the basis of the E-step.
        """
        k, l, precision = self.components, self.factors, natural.prior.precision.entries
        mean = jnp.sum(jnp.where(k[:, None, None], precision, 0), axis=0) / self.n_components
        precision = jnp.where(k[:, None, None], precision, mean[None])
        precision = jnp.where(outer(l, l)[None], precision, identity_like(precision))
        location = jnp.where(k[:, None] & l[None], natural.prior.location, 0)
        return natural.carrying(Prior(location, PositiveDefinite(precision), natural.prior.log_weights))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a fit, and what they are padded to.

    Attributes:
        n_components: K.
        lat_dim: L.
        padded: rows, K and L after padding.
    """

    n_components: int
    lat_dim: int
    padded: tuple[int, int, int]

    def in_use(self) -> InUse:
        """The parts of a padded model that count."""
        _, n_components, lat_dim = self.padded
        parts = np.arange(n_components) < self.n_components, np.arange(lat_dim) < self.lat_dim
        return InUse(*map(jax.device_put, parts))

    def pad(self, tree: Any) -> Any:
        """A `Natural` or `Regularizer`, padded; None as it is."""
        return _resized(tree, *self.padded[1:])

    def crop(self, tree: Any) -> Any:
        """A padded `Natural` or `Regularizer` in its own size; None as it is."""
        return _resized(tree, self.n_components, self.lat_dim)

    def filled(self, block: Block, frame: Frame) -> Block:
        """Rows, filled up with such of weight 0 at the origin of the frame."""
        return _filled(block, frame, self.padded[0])


def padded_sizes(n_rows: int, obs_dim: int, lat_dim: int, n_components: int) -> Sizes | None:
    """Sizes of a small fit; None for one that is not padded, as its arithmetic outweighs compilation."""
    components = [size for size in COMPONENT_SIZES if size >= n_components]
    factors = [min(size, obs_dim) for size in FACTOR_SIZES if size >= lat_dim]
    if not components or not factors or obs_dim > EXACT_DIM:
        return None
    step = max(FEWEST_ROWS, 2 ** (n_rows.bit_length() - 3))
    rows, n_padded, factor = -(-n_rows // step) * step, components[0], factors[0]
    work = rows * (obs_dim * factor + n_padded * factor * (factor + 3) // 2)
    return Sizes(n_components, lat_dim, (rows, n_padded, factor)) if work <= MOST_WORK else None


@jit(static_argnames="count")
def _filled(block: Block, frame: Frame, count: int) -> Block:
    x, weights, labels = block
    missing = count - x.shape[0]
    rows = jnp.concatenate([x, jnp.broadcast_to(frame.origin[None], (missing, x.shape[1]))])
    labels = None if labels is None else jnp.pad(labels, (0, missing), constant_values=-1)
    return rows, jnp.pad(weights, (0, missing)), labels


def _resized(tree: Any, n_components: int, lat_dim: int) -> Any:
    """A `Natural` or `Regularizer` with other numbers of components and factors; on the host, without a program."""
    if isinstance(tree, Regularizer):
        covariance = np.zeros((lat_dim, lat_dim))
        return dataclasses.replace(
            tree,
            component_mean=_placed(tree.component_mean, np.zeros(lat_dim)),
            component_covariance=PositiveDefinite(_placed(tree.component_covariance.entries, covariance)),
        )
    if tree is None:
        return None
    obs_dim, prior = tree.interaction.shape[0], tree.prior
    locations, squares = np.zeros((n_components, lat_dim)), np.tile(np.eye(lat_dim), (n_components, 1, 1))
    nothing = np.full(n_components, -np.inf)
    resized = dataclasses.replace(
        tree,
        interaction=_placed(tree.interaction, np.zeros((obs_dim, lat_dim))),
        posterior_location=_placed(tree.posterior_location, locations),
        posterior_precision=PositiveDefinite(_placed(tree.posterior_precision.entries, squares)),
        categorical_bias=_placed(tree.categorical_bias, nothing[1:]),
    )
    prior = Prior(
        location=_placed(prior.location, locations),
        precision=PositiveDefinite(_placed(prior.precision.entries, squares)),
        log_weights=_placed(prior.log_weights, nothing),
    )
    return resized.carrying(prior)


def _placed(array: Array, blank: np.ndarray) -> Array:
    """An array in the corner of another, what lies outside cut off."""
    given: np.ndarray = np.asarray(array)
    blank = blank.astype(given.dtype)
    part = tuple(slice(min(sizes)) for sizes in zip(given.shape, blank.shape, strict=True))
    blank[part] = given[part]
    placed: Array = jax.device_put(blank)  # `jnp.asarray` would compile a program for every shape
    return placed
