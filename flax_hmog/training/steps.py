"""Train state and the jitted step over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_hmog.covariances import Array
from flax_hmog.training.mesh import MIN_SHARDED, RULES, batch_sharding, place, tree_shardings


def create_state(
    module: nn.Module,
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    x: Any,
    mesh: Mesh,
    *,
    min_sharded: int = MIN_SHARDED,
) -> TrainState:
    """The train state of a module from given variables, laid out on the mesh by the rule table.

    Args:
        module: head, or encoder with head.
        variables: its variables, for example of `warm_start`; `params` are trained.
        optimizer: optax transformation.
        x: a batch (B, D), of which shape and dtype are read.
        mesh: of `make_mesh`.
        min_sharded: entries of a leaf below which it is replicated.

    Returns:
        `TrainState`; parameters and the optimiser's copies of them lie where the rules say.
    """
    abstract = abstract_state(module, optimizer, x, mesh, min_sharded=min_sharded)
    state = TrainState.create(apply_fn=module.apply, params=nn.unbox(variables["params"]), tx=optimizer)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(abstract)]
    # copies, since the step donates its state and the variables stay the caller's
    leaves, tree = jax.tree.flatten(state)
    placed = [place(np.array(leaf), sharding) for leaf, sharding in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(tree, placed)


def abstract_state(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    x: Any,
    mesh: Mesh,
    *,
    min_sharded: int = MIN_SHARDED,
) -> TrainState:
    """What `create_state` returns as abstract arrays (`jax.ShapeDtypeStruct`) with shardings; nothing is computed."""

    def fresh(key: Array, x: Array) -> TrainState:
        params = module.init(key, x)["params"]
        return TrainState.create(apply_fn=module.apply, params=params, tx=optimizer)

    abstract = jax.eval_shape(fresh, jax.random.key(0), x)
    shardings = jax.tree.leaves(tree_shardings(abstract, mesh, RULES, min_sharded))
    leaves, tree = jax.tree.flatten(nn.unbox(abstract))
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(tree, placed)


def make_train_step(
    loss: Callable[..., Array], state: TrainState, mesh: Mesh
) -> Callable[..., tuple[TrainState, Array]]:
    """The jitted step: the loss's gradient, then the optimiser.

    Args:
        loss: `loss(params, x, extra) -> ()`, for example of `head.apply({"params": params}, x)`.
        state: a state of `create_state`, whose layout is kept.
        mesh: the mesh.

    Returns:
        `step(state, x, extra=None) -> (state, loss)`; the given state is donated, x (B, D) is split over the data axis,
        which must divide B, and `extra` (any tree of arrays that the loss needs) is replicated.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    replicated = NamedSharding(mesh, PartitionSpec())

    def step(state: TrainState, x: Array, extra: Any) -> tuple[TrainState, Array]:
        # passes over rows then know over which axis x lies
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            value, gradients = jax.value_and_grad(loss)(state.params, x, extra)
        return state.apply_gradients(grads=gradients), value

    compiled = jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    return lambda state, x, extra=None: compiled(state, x, extra)
