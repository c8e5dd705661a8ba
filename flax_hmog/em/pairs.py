"""Products over pairs of a row and one of its few components: sorted by component, they are matrix products again.

A pass that looks at all K components of every row costs K L^2 operations per row. Where all but a few responsibilities
vanish, the pairs of a row and a component that count are few. Sorted by component and cut into tiles, each tile has one
(L + 1, L + 1) matrix, and every sum is a product with it. Loops run over the tiles that there are, so that no shape
depends on how many pairs count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from flax_hmog.model.coordinates import Prepared
from flax_hmog.model.kinds import Array, matmul, pytree
from flax_hmog.model.prepared import normalize_logits

MIN_TILE, MAX_TILE = 32, 256


@pytree
class Pairs:
    """Components of every row, in slots, and the slots in the order of their components.

    Attributes:
        index: component of a slot (N, C); K for an empty one.
        order: slots of the flattened `index` sorted by component (N C,).
        position: the place of a slot in this order (N, C), the first after all components for empty ones.
        starts: where each component begins in it (K + 1,); from the last one on slots are empty.
    """

    index: Array
    order: Array
    position: Array
    starts: Array


def sorted_pairs(index: Array, n_components: int) -> Pairs:
    """The `Pairs` of components (N, C) in slots, K in an empty one."""
    flat = index.reshape(-1)
    count = flat.shape[0]
    place = jnp.arange(count, dtype=jnp.int32)
    edges = jnp.arange(n_components + 1, dtype=jnp.int32)
    if count * (n_components + 1) < 2**32:
        # one number that holds both sorts several times faster than two
        keys = jnp.sort(flat.astype(jnp.uint32) * jnp.uint32(count) + place.astype(jnp.uint32))
        order = (keys % jnp.uint32(count)).astype(jnp.int32)
        starts = jnp.searchsorted(keys, edges.astype(jnp.uint32) * jnp.uint32(count))
    else:
        components, order = jax.lax.sort((flat.astype(jnp.int32), place), num_keys=1)
        starts = jnp.searchsorted(components, edges)
    starts = starts.astype(jnp.int32)
    position = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    # empty slots read one place, which stays in the cache
    position = jnp.minimum(position, starts[-1])
    return Pairs(index, order, position.reshape(index.shape), starts)


def component_matrices(factors: Prepared) -> Array:
    """Matrices B_k (K, L + 1, L + 1) such that logits are (t, 1)'B_k (t, 1) / 2, and (t, 1)'B_k begins with g_k.

    B_k = ((-curvature_k, linear_k), (linear_k', 2 constant_k)), and g_k = linear_k - curvature_k t.
    """
    linear = factors.linear[:, :, None]
    below = jnp.concatenate([factors.linear, 2 * factors.constant[:, None]], axis=1)[:, None]
    return jnp.concatenate([jnp.concatenate([-factors.curvature, linear], axis=2), below], axis=1)


def pair_logits(matrices: Array, with_ones: Array, pairs: Pairs) -> Array:
    """Logits (N, C) of the components in the slots of every row, -inf in empty ones.

    Args:
        matrices: of `component_matrices`.
        with_ones: (t, 1) of every row (N, L + 1).
        pairs: components of every row.
    """

    def tile(matrix: Array, rows: Array, _: Array) -> tuple[Array, tuple[Any, ...]]:
        return jnp.sum(matmul(rows, matrix) * rows, axis=-1) / 2, ()

    logits, _ = _over_tiles(tile, matrices, with_ones, pairs, None)
    return _in_slots(logits, pairs)


def pair_sums(matrices: Array, with_ones: Array, pairs: Pairs, weights: Array) -> tuple[Array, ...]:
    """The E-step over pairs.

    Args:
        matrices: of `component_matrices`.
        with_ones: (t, 1) of every row (N, L + 1).
        pairs: components of every row.
        weights: sample weights (N,).

    Returns:
        Log-sums of the logits of every row (N,); the gain of the prior, g = sum_k gamma_k g_k (N, L); and the sums of
        v gamma (t, 1)(t, 1)' (K, L + 1, L + 1).
    """
    lat_dim, slots = with_ones.shape[1] - 1, pairs.index.shape[1]

    def products(matrix: Array, rows: Array, _: Array) -> tuple[Array, tuple[Any, ...]]:
        product = matmul(rows, matrix)
        # beside the gain its logit, in the last column
        return product.at[:, lat_dim].set(jnp.sum(product * rows, axis=-1) / 2), ()

    def squares(_: Array, rows: Array, mass: Array) -> tuple[Array, Array]:
        return jnp.zeros(len(rows), rows.dtype), matmul((rows * mass[:, None]).T, rows)

    gains, _ = _over_tiles(products, matrices, with_ones, pairs, None)
    evidence, _, responsibilities = normalize_logits(_in_slots(gains[:, lat_dim], pairs))
    mass = (responsibilities * weights[:, None]).reshape(-1)
    _, sums = _over_tiles(squares, matrices, with_ones, pairs, mass)
    gain = jnp.zeros((pairs.index.shape[0], lat_dim), gains.dtype)
    for slot in range(slots):
        # an empty slot, whose responsibility is 0, points past the pairs that were computed
        gain = gain + responsibilities[:, slot, None] * gains[pairs.position[:, slot], :lat_dim]
    return evidence, gain, sums


def _in_slots(logits: Array, pairs: Pairs) -> Array:
    """Logits in the order of the pairs as (N, C), -inf in empty slots."""
    is_pair = pairs.position < pairs.starts[-1]
    return jnp.where(is_pair, logits[pairs.position], -jnp.inf)


def _over_tiles(
    function: Callable[[Array, Array, Array], tuple[Array, Any]],
    matrices: Array,
    rows: Array,
    pairs: Pairs,
    mass: Array | None,
) -> tuple[Array, Any]:
    """`function(matrix_k, rows, mass)` over the tiles of every component.

    Returns:
        Its first results, in the order of the pairs (N C + tile, ...), 0 beyond the last pair, and the sums of its
        second ones over the tiles of a component (K, ...).
    """
    count, slots = pairs.order.shape[0], pairs.index.shape[1]
    tile = _tile_rows(pairs.index.shape[0], matrices.shape[0])
    row_of = jnp.concatenate([pairs.order // slots, jnp.zeros(tile, jnp.int32)])
    gamma = jnp.zeros(count + tile, rows.dtype)
    if mass is not None:
        gamma = gamma.at[:count].set(mass[pairs.order])
    starts, places = pairs.starts, jnp.arange(tile, dtype=jnp.int32)

    def at(component: Array, number: Array) -> tuple[Array, Any, Array]:
        start = starts[component] + number * tile
        here = jax.lax.dynamic_slice_in_dim(row_of, start, tile)
        share = jax.lax.dynamic_slice_in_dim(gamma, start, tile)
        share = jnp.where(places + start < starts[component + 1], share, 0)
        return start, *function(matrices[component], rows[here], share)

    shapes = jax.eval_shape(lambda: at(jnp.int32(0), jnp.int32(0))[1:])
    # zeros that vary over devices as the rows do
    zero = 0 * rows[0, 0]
    out = jnp.zeros((count + tile, *shapes[0].shape[1:]), shapes[0].dtype) + zero
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) + zero, shapes[1])

    def one_component(out: Array, component: Array) -> tuple[Array, Any]:
        def one_tile(number: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            out, total = carry
            start, first, second = at(component, number)
            # what a last tile writes beyond its component, the next one overwrites
            out = jax.lax.dynamic_update_slice_in_dim(out, first, start, 0)
            return out, jax.tree.map(jnp.add, total, second)

        tiles = (starts[component + 1] - starts[component] + tile - 1) // tile
        return cast(tuple[Array, Any], jax.lax.fori_loop(0, tiles, one_tile, (out, sums)))

    components = jnp.arange(matrices.shape[0], dtype=jnp.int32)
    return cast(tuple[Array, Any], jax.lax.scan(one_component, out, components))


def _tile_rows(n_rows: int, n_components: int) -> int:
    """Pairs of a tile: about as many as a component has."""
    size = MIN_TILE
    while size < MAX_TILE and size * n_components < n_rows:
        size *= 2
    return size
