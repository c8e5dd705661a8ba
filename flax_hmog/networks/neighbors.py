"""Nearest neighbours of rows, the weights of these pairs, and an embedding in which they lie near each other.

Source: McInnes, Healy and Melville 2018 (weights, attraction and repulsion).
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from flax_hmog.model.checks import check_size, door, public
from flax_hmog.model.kinds import Array, matmul
from flax_hmog.model.typed import Samples, jit

BLOCK = 1024  # rows that are compared with all others at once
BISECTIONS = 40
LEAST_WIDTH = 1e-3  # of the weights of a row, relative to its mean distance
EPOCHS = 300
RATE = 0.5  # of Adam, falling to 0
REPULSIONS = 10  # random partners of a row in every epoch
REPULSION = 5.0  # weight of all repulsion against all attraction
NEAREST = 1e-3  # squared distance below which repulsion grows no more
SPREAD = 5.0  # standard deviation of the first axis of the start


@public
def nearest_neighbors(
    x: Samples, n_neighbors: int, *, among: Samples | None = None
) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """Exact nearest neighbours by Euclidean distance: every row is compared with all others, in blocks of rows.

    Args:
        x: rows (N, D).
        n_neighbors: k, of each row; itself is none of them.
        among: other rows (M, D) to choose from; None takes x itself.

    Returns:
        Their numbers (N, k), nearest first, and their distances (N, k).

    Raises:
        ValueError: for rows that are no matrices of the same columns, or more neighbours than there are.

    Example:
        >>> numbers, distances = nearest_neighbors(np.array([[0.0], [1.0], [5.0]]), 1)
        >>> numbers.ravel().tolist(), distances.ravel().tolist()
        ([1, 0, 1], [1.0, 1.0, 4.0])
    """
    rows = jnp.asarray(x, jnp.float32)
    others = rows if among is None else jnp.asarray(among, jnp.float32)
    if rows.ndim != 2 or others.shape[1:] != rows.shape[1:]:
        raise ValueError(
            f"{door()}: `x` must have shape (N, D), and `among` as many columns; got {rows.shape} and {others.shape}. "
            "Give one row for each sample."
        )
    check_size("n_neighbors", n_neighbors, at_most=others.shape[0] - (among is None))
    center = jnp.mean(others, axis=0, keepdims=True)  # far from the origin, squares would lose their differences
    rows, others = rows - center, others - center
    blocks = [(rows[start : start + BLOCK], jnp.asarray(start)) for start in range(0, rows.shape[0], BLOCK)]
    found = [_nearest(*block, others, count=n_neighbors, itself=among is None) for block in blocks]
    numbers, distances = zip(*found, strict=True)
    return jnp.concatenate(numbers), jnp.concatenate(distances)


@jit(static_argnames=("count", "itself"))
def _nearest(block: Array, first: Array, others: Array, *, count: int, itself: bool) -> tuple[Array, Array]:
    """`nearest_neighbors` of a block whose first row has this number."""
    nearness = matmul(block, others.T) - jnp.sum(jnp.square(others), axis=1)[None] / 2
    if itself:
        each = jnp.arange(block.shape[0])
        nearness = nearness.at[each, first + each].set(-jnp.inf)
    numbers = jax.lax.top_k(nearness, count)[1]
    # one neighbour of every row at a time: (B, k, D) would not fit where D is large
    apart = jax.lax.map(lambda number: jnp.linalg.norm(block - others[number], axis=1), numbers.T)
    distances = apart.T
    order = jnp.argsort(distances, axis=1)
    return jnp.take_along_axis(numbers, order, axis=1), jnp.take_along_axis(distances, order, axis=1)


@public
def neighbor_weights(distances: Samples) -> Float[Array, "N k"]:
    """Weights of pairs of neighbours, on a scale of each row's own: 1 for the nearest, falling by what lies beyond it.

        w_ij = exp(-(d_ij - d_i1) / s_i),   sum_j w_ij = log2 k

    Rows in sparse regions reach farther than those in dense ones.

    Args:
        distances: of the neighbours of each row (N, k), nearest first.

    Returns:
        Weights (N, k) in (0, 1].

    Example:
        >>> weights = neighbor_weights(np.array([[1.0, 2.0, 3.0, 4.0]]))
        >>> weights.shape, round(float(weights.sum()), 3)
        ((1, 4), 2.0)
    """
    return _weights(jnp.asarray(distances, jnp.float32))


@jit
def _weights(distances: Array) -> Array:
    beyond = distances - distances[:, :1]
    mean = jnp.mean(distances, axis=1, keepdims=True)
    scale = jnp.where(mean > 0, mean, 1)  # of copies of one row
    wanted = np.log2(distances.shape[1])

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        is_wide = jnp.sum(jnp.exp(-beyond / jnp.exp(middle)), axis=1, keepdims=True) > wanted
        return jnp.where(is_wide, low, middle), jnp.where(is_wide, middle, high)

    bounds = jnp.log(LEAST_WIDTH * scale), jnp.log(scale / LEAST_WIDTH)
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, bounds)
    return jnp.exp(-beyond / jnp.exp((low + high) / 2))


@public
def neighbor_embedding(start: Samples, numbers: Samples, weights: Samples, key: Array) -> Float[Array, "N F"]:
    """Places of rows at which neighbours are near each other and others are not. Linear in the number of rows.

        sum_ij w_ij log(1 + |z_i - z_j|^2) - repulsion sum_ij' v_i log(1 - 1 / (1 + |z_i - z_j'|^2))

    with random j' that are drawn anew in each of 300 steps of Adam, and v_i the weights of all pairs of a row.

    Args:
        start: places to start from (N, F), as principal components.
        numbers: of the neighbours of each row (N, k).
        weights: of these pairs (N, k).
        key: PRNG key.

    Returns:
        The places (N, F).

    Source: Damrich et al. 2023 (this objective among its kin).

    Example:
        >>> x = np.concatenate([np.zeros((5, 2)), np.ones((5, 2))]) + np.arange(20.0).reshape(10, 2) / 100
        >>> numbers, distances = nearest_neighbors(x, 2)
        >>> neighbor_embedding(x, numbers, neighbor_weights(distances), jax.random.key(0)).shape
        (10, 2)
    """
    return _embedded(jnp.asarray(start), jnp.asarray(numbers), jnp.asarray(weights), key)


@jit
def _embedded(start: Array, numbers: Array, weights: Array, key: Array) -> Array:
    start = start.astype(jnp.float32)
    count = start.shape[0]
    mass = jnp.sum(weights, axis=1).at[numbers.ravel()].add(weights.ravel())

    def loss(z: Array, key: Array) -> Array:
        squares = jnp.sum(jnp.square(z[:, None] - z[numbers]), axis=-1)
        order, shift = jax.random.split(key)
        shuffled = jax.random.permutation(order, count)
        places, own = z[shuffled], mass[shuffled]
        repulsion = jnp.zeros(())
        for by in jax.random.randint(shift, (REPULSIONS,), 1, count):
            apart = jnp.sum(jnp.square(places - jnp.roll(places, by, axis=0)), axis=-1)
            repulsion += jnp.sum(own * (jnp.log1p(apart) - jnp.log(apart + NEAREST)))
        return jnp.sum(weights * jnp.log1p(squares)) + REPULSION / 2 / REPULSIONS * repulsion

    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, EPOCHS))

    def step(number: Array, carry: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
        z, state = carry
        updates, state = optimizer.update(jax.grad(loss)(z, jax.random.fold_in(key, number)), state)
        return z + updates, state

    z = start * (SPREAD / jnp.maximum(jnp.std(start[:, 0]), jnp.finfo(jnp.float32).tiny))
    places, _ = jax.lax.fori_loop(0, EPOCHS, step, (z, optimizer.init(z)))
    return cast(Array, places)
