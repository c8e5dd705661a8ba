"""Train state and the jitted step over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import struct
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_hmog.model.checks import is_concrete
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import Inputs, Samples, Variables
from flax_hmog.training.describe import named_arrays
from flax_hmog.training.mesh import MIN_SHARDED, RULES, batch_sharding, place, tree_shardings


class TrainState(train_state.TrainState):
    """Flax's train state, and the collections that the forward pass changes.

    Attributes:
        collections: all variables beside `params`, as `batch_stats` of an encoder and `em` of an `AnalyticHMoG`.

    Example:
        >>> import flax.linen as nn, optax
        >>> from flax_hmog.training import make_mesh
        >>> module, x = nn.Dense(2), np.ones((12, 4), np.float32)
        >>> state = create_state(module, module.init(jax.random.key(0), x), optax.sgd(0.1), x, make_mesh())
        >>> sorted(state.variables["params"])
        ['bias', 'kernel']
    """

    collections: Any = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """Variables for `module.apply` and `CheckpointWriter.save`."""
        params = {"params": self.params} if jax.tree.leaves(self.params) else {}
        return cast(dict[str, Any], params | self.collections)


def create_state(
    module: nn.Module,
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    x: Inputs,
    mesh: Mesh,
    *,
    min_sharded: int = MIN_SHARDED,
) -> TrainState:
    """The train state of a module from given variables, laid out on the mesh by the rule table.

    Args:
        module: head, or encoder with head.
        variables: its variables, for example of `warm_start`; `params` are trained, other collections follow the
            forward pass.
        optimizer: optax transformation.
        x: a batch (B, D), of which shape and dtype are read.
        mesh: of `make_mesh`, or another; its axes may be Explicit.
        min_sharded: entries of a leaf below which it is replicated.

    Returns:
        `TrainState`; parameters and the optimiser's copies of them lie where the rules say.

    Raises:
        ValueError: for variables of another module, or without a collection.

    Example:
        >>> import optax
        >>> from flax_hmog import DifferentiableHMoG, warm_start
        >>> from flax_hmog.toy import natural, x
        >>> from flax_hmog.training import make_mesh
        >>> head = DifferentiableHMoG(lat_dim=2, n_components=3, pst_rep="full")
        >>> state = create_state(head, warm_start(head, natural, x)[0], optax.sgd(0.1), x, make_mesh())
        >>> int(state.step)
        0
    """
    abstract = abstract_state(module, optimizer, x, mesh, min_sharded=min_sharded)
    state = _state(module, nn.unbox(variables), optimizer)
    got, wanted = named_arrays(state.variables), named_arrays(abstract.variables)
    for name in sorted(got.keys() ^ wanted.keys()):
        where = "is missing" if name in wanted else "is none of the module's"
        raise ValueError(
            f"create_state: `variables` must be those of the module, with all collections; {name!r} {where}. Give what "
            "`module.init` returns, or `Restored.module_variables`."
        )
    shardings = [leaf.sharding for leaf in jax.tree.leaves(abstract)]
    # copies, since the step donates its state and the variables stay the caller's
    leaves, tree = jax.tree.flatten(state)
    placed = [place(np.array(leaf), sharding) for leaf, sharding in zip(leaves, shardings, strict=True)]
    return cast(TrainState, jax.tree.unflatten(tree, placed))


def abstract_state(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    x: Inputs,
    mesh: Mesh,
    *,
    min_sharded: int = MIN_SHARDED,
) -> TrainState:
    """The state of `create_state` as abstract arrays (`jax.ShapeDtypeStruct`) with shardings; nothing is computed."""

    def fresh(key: Array, x: Array) -> TrainState:
        return _state(module, module.init(key, x), optimizer)

    abstract = jax.eval_shape(fresh, jax.random.key(0), x)
    shardings = jax.tree.leaves(tree_shardings(abstract, mesh, RULES, min_sharded))
    leaves, tree = jax.tree.flatten(nn.unbox(abstract))
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    return cast(TrainState, jax.tree.unflatten(tree, placed))


def make_train_step(
    loss: Callable[..., tuple[Array, Any]], state: TrainState, mesh: Mesh
) -> Callable[..., tuple[TrainState, Array]]:
    """The jitted step: the loss's gradient, then the optimiser.

    Args:
        loss: `loss(variables, x, extra) -> (loss (), collections)`, the collections as the forward pass leaves them,
            for example from `module.apply(variables, x, train=True, mutable=list(state.collections))`; {} where there
            are none. Gradients flow to `params`.
        state: a state of `create_state`, whose layout is kept.
        mesh: the mesh.

    Returns:
        `step(state, x, extra=None) -> (state, loss)`; the given state is donated, x (B, D) is split as
        `batch_sharding` says, by axes that must divide B, and `extra` (any tree of arrays that the loss needs) is
        replicated. Its first call raises ValueError for a loss that returns something else.

    Example:
        >>> import flax.linen as nn, optax
        >>> from flax_hmog.training import make_mesh
        >>> module, x, mesh = nn.Dense(2), np.ones((12, 4), np.float32), make_mesh(devices=jax.devices()[:1])
        >>> state = create_state(module, module.init(jax.random.key(0), x), optax.sgd(0.1), x, mesh)
        >>> loss = lambda variables, x, extra: (jnp.mean(module.apply(variables, x) ** 2), {})
        >>> state, value = make_train_step(loss, state, mesh)(state, x)
        >>> int(state.step)
        1
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    replicated = NamedSharding(mesh, PartitionSpec())

    def of_params(params: Variables, state: TrainState, x: Array, extra: object) -> tuple[Array, Any]:
        return _checked(loss(state.replace(params=params).variables, x, extra), state.collections)

    def step(state: TrainState, x: Array, extra: object) -> tuple[TrainState, Array]:
        """The state after one step, and the loss before it."""
        # so that passes over rows see over which axis x lies
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (value, collections), gradients = jax.value_and_grad(of_params, has_aux=True)(state.params, state, x, extra)
        return state.apply_gradients(grads=gradients, collections=collections), value  # type: ignore[no-untyped-call]

    compiled = jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )

    def call(state: TrainState, x: Samples, extra: object = None) -> tuple[TrainState, Array]:
        scope = jax.sharding.get_abstract_mesh()
        if scope.empty or scope == mesh.abstract_mesh or not is_concrete(state, x):
            return cast(tuple[TrainState, Array], compiled(state, x, extra))
        with jax.set_mesh(None):  # another mesh, which would be taken for that of the state
            return cast(tuple[TrainState, Array], compiled(state, x, extra))

    return call


def _checked(result: object, collections: Mapping[str, Any]) -> tuple[Array, Any]:
    """The result of a loss, checked.

    Raises:
        ValueError: unless it is a loss and collections like those of the state.
    """
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"make_train_step: `loss` must return (loss, collections); got {type(result).__name__}. Return "
            "(loss, {}) where there are no collections beside params."
        )
    got, wanted = (set(named_arrays(tree)) for tree in (result[1], collections))
    if got != wanted:
        raise ValueError(
            f"make_train_step: `loss` must return the collections {sorted(collections)} as the state has them; got "
            f"{sorted(result[1])}. Return what `module.apply(..., mutable=list(state.collections))` gives."
        )
    return result


def _state(module: nn.Module, variables: Variables, optimizer: optax.GradientTransformation) -> TrainState:
    collections = {name: collection for name, collection in variables.items() if name != "params"}
    params = variables.get("params", {})
    return TrainState.create(apply_fn=module.apply, params=params, tx=optimizer, collections=collections)  # type: ignore[no-any-return, no-untyped-call]
