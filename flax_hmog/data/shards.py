"""Over which devices rows lie, and functions of the rows of each of them.

Under Auto axes the compiler places arrays, and the sharding of a tracer is not known; under Explicit axes it is a part
of the type; under Manual axes, as inside of `shard_map`, every device runs the function on rows of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, ValuesView
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flax_hmog.model.checks import is_concrete
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import P, R, Tree

Shards: TypeAlias = tuple[Mesh | AbstractMesh, tuple[str, ...]] | None
"""A mesh and those of its axes over which rows are split; None for rows in one place."""

# what batches come in stays as it is; JAX takes iterators and views for leaves with a warning, and will refuse them
OF_BATCHES = (list, tuple, dict, Iterator, ValuesView)


def row_shards(x: Array) -> Shards:
    """Over what a pass over the first axis of `x` is split.

    Its sharding says so, or its type where axes are Explicit. That of a tracer under Auto axes is not known: its rows
    are taken to lie over the Auto axes of the mesh in scope, as `jax.set_mesh` or `make_train_step` sets it, as many
    of them from the first one as divide the rows. Devices along other Auto axes share the work.
    """
    if x.ndim < 2:
        return None
    mesh, names = _first_axes(x)
    if not names and isinstance(x, jax.core.Tracer):
        mesh = jax.sharding.get_abstract_mesh()
    elif not names:
        return None
    elif any(_kinds(mesh)[name] != AxisType.Auto for name in names):
        return (mesh, names) if all(_kinds(mesh)[name] == AxisType.Explicit for name in names) else None
    axes = names + tuple(name for name in _axes(mesh, AxisType.Auto) if name not in names)
    while axes:
        size = math.prod(mesh.shape[name] for name in axes)
        if size > 1 and isinstance(x.shape[0], int) and x.shape[0] % size == 0:
            return mesh, axes
        axes = axes[:-1]
    return None


def on_shards(
    function: Callable[[Any, Any], R], operands: Tree, rows: Tree, shards: Shards, out_specs: Any, **options: Any
) -> R:
    """`function(operands, rows)` on every device with the rows that lie there; without shards on all rows.

    Args:
        function: the function; sums over all rows need a `psum` over the names of the shards.
        operands: tree of arrays that every device takes as a whole.
        rows: tree of arrays (N, ...).
        shards: shards of the rows.
        out_specs: a `PartitionSpec`, or a tree of them, of what it returns.
        options: further ones of `jax.shard_map`.
    """
    if shards is None:
        return function(operands, rows)
    mesh, names = shards
    # what is Explicit must have the type that is asked for, and all such axes become Manual
    explicit = _axes(mesh, AxisType.Explicit)
    if explicit:
        operands, rows = _resharded(operands, mesh, ()), _resharded(rows, mesh, (names,))
    share: Callable[..., R] = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(names)),
        out_specs=out_specs,
        axis_names=frozenset(names) | frozenset(explicit),
        **options,
    )
    return share(operands, rows)


def zeros_for(shapes: Tree, *given: Tree) -> Any:
    """Zeros of these shapes and dtypes that vary over the Manual axes over which any of the given arrays does."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    names = {name for leaf in jax.tree.leaves(given) for name in jax.typeof(leaf).mat.varying}
    return jax.lax.pcast(zeros, tuple(sorted(names)), to="varying") if names else zeros


def reshaped(x: Array, shape: tuple[int, ...]) -> Array:
    """`x.reshape(shape)`, which keeps over what the first axis is split."""
    if not isinstance(x, jax.core.Tracer):
        return x.reshape(shape)
    mesh, names = _first_axes(x)
    if not names:
        return x.reshape(shape)
    size = math.prod(x.shape) // max(math.prod(n for n in shape if n > 0), 1)
    return jax.lax.reshape(
        x, tuple(size if n < 0 else n for n in shape), out_sharding=NamedSharding(mesh, PartitionSpec(names))
    )


def together(model: R, x: Array) -> tuple[R, Array, Shards]:
    """A model and rows x as functions of both take them, and the shards of the rows.

    Of Explicit axes those of the first axis of x stay; the model is gathered.
    """
    own = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    is_in_scope = not jax.sharding.get_abstract_mesh().empty
    if not is_in_scope and (not isinstance(own, NamedSharding) or own.mesh.empty):
        return model, x, None
    if not is_in_scope and not is_concrete(model):
        x = with_auto_axes(x)  # derivatives can be taken on Explicit axes only in the scope of their mesh
    sharding = jax.typeof(x).sharding
    if any(axes is not None for axes in sharding.spec[1:]):
        _, names = _first_axes(x)
        x = _resharded(x, sharding.mesh, (names,) if names and x.ndim > 1 else ())
    return whole(beside(model, x)), x, row_shards(x)


def beside(tree: R, x: Array) -> R:
    """Arrays that lie on the devices of rows x with axes of the kind that these have, so that both go together."""
    sharding: Any = x.sharding if _is_sharded(x) else None

    def moved(leaf: Any) -> Any:
        if sharding is None or not _is_sharded(leaf) or leaf.sharding.device_set != sharding.device_set:
            return leaf
        if leaf.sharding.mesh.axis_types == sharding.mesh.axis_types:
            return leaf
        same = set(jax.tree.leaves(tuple(leaf.sharding.spec))) <= set(sharding.mesh.axis_names)
        return jax.device_put(leaf, NamedSharding(sharding.mesh, leaf.sharding.spec if same else PartitionSpec()))

    return cast(R, jax.tree.map(moved, tree))


def whole(tree: R) -> R:
    """Arrays that no Explicit axis splits, as leaves that are computed with together: gathered where one did."""

    def gathered(leaf: Any) -> Any:
        sharding = jax.typeof(leaf).sharding
        return _resharded(leaf, sharding.mesh, ()) if any(axes is not None for axes in sharding.spec) else leaf

    return cast(R, jax.tree.map(gathered, tree))


def on_auto_axes(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a loop on the host: it computes outside of the mesh in scope, on arrays whose axes are all Auto.

    Arrays among its arguments, and in models among them, are taken over as they lie; so are those of its result, with
    axes of the kind that came, so that both go together. Nothing is copied. What the user wants called after each step
    runs in the scope of the user, on such arrays.
    """

    @functools.wraps(function)
    def entered(*args: P.args, **kwargs: P.kwargs) -> R:
        mesh = _explicit_mesh(*args, *kwargs.values())
        if mesh is None:
            return function(*args, **kwargs)
        if kwargs.get("on_step") is not None:
            kwargs["on_step"] = _in_scope(cast(Any, kwargs["on_step"]), mesh)
        with jax.set_mesh(None):
            result = cast(Any, function)(
                *map(with_auto_axes, args), **{k: with_auto_axes(v) for k, v in kwargs.items()}
            )
        return cast(R, _with_axes_of(mesh, result))

    return entered


def _in_scope(function: Callable[[Any], R], mesh: Mesh) -> Callable[[Any], R]:
    """A function of the user as if it were called from where the loop was."""
    scope = jax.sharding.get_mesh()

    def called(argument: Any) -> R:
        with jax.set_mesh(scope):
            return function(_with_axes_of(mesh, argument))

    return called


def _with_axes_of(mesh: Mesh, result: R) -> R:
    """A result with its arrays on this mesh."""
    return _moved(functools.partial(_with_mesh, mesh=mesh), result)


def with_auto_axes(x: R) -> R:
    """An array, or the arrays of a model, on the same devices, with Auto axes; anything else as it is."""
    if isinstance(x, OF_BATCHES):
        return x
    return _moved(
        lambda a: _with_mesh(a, Mesh(a.sharding.mesh.devices, a.sharding.mesh.axis_names)) if _is_explicit(a) else a, x
    )


def _moved(move: Callable[[Any], Any], tree: R) -> R:
    """A tree whose leaves are moved, and those of dataclasses in it; a dataclass of which none was is itself."""

    def leaf_moved(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return move(leaf)
        before = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if field.init}
        after = {name: _moved(move, value) for name, value in before.items()}
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        return leaf if all(a is b for a, b in pairs) else dataclasses.replace(cast(Any, leaf), **after)

    return cast(R, jax.tree.map(leaf_moved, tree))


def _explicit_mesh(*arguments: Any) -> Any:
    """The mesh with Explicit axes that is in scope, or on which any of the arguments lies; None for no such mesh."""
    leaves = jax.tree.leaves([a for a in arguments if not isinstance(a, OF_BATCHES)])
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    if _axes(jax.sharding.get_abstract_mesh(), AxisType.Explicit):
        return jax.sharding.get_mesh()
    return next((leaf.sharding.mesh for leaf in leaves if _is_explicit(leaf)), None)


def _with_mesh(x: Any, mesh: Mesh) -> Any:
    if not _is_sharded(x) or x.sharding.mesh.axis_names != mesh.axis_names:
        return x
    spec = PartitionSpec(*x.sharding.spec[: x.ndim])  # that of a scalar of one device may have an entry
    return jax.device_put(x, NamedSharding(mesh, spec))


def _is_sharded(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding)


def _is_explicit(x: Any) -> bool:
    return _is_sharded(x) and bool(_axes(x.sharding.mesh, AxisType.Explicit))


def _resharded(tree: Tree, mesh: Mesh | AbstractMesh, spec: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda a: jax.sharding.reshard(a, NamedSharding(mesh, PartitionSpec(*spec))), tree)


def _first_axes(x: Array) -> tuple[Any, tuple[str, ...]]:
    """The mesh of an array and the axes that are known to split its first axis."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None, ()
    names = sharding.spec[0]
    return sharding.mesh, (names,) if isinstance(names, str) else tuple(names)


def _kinds(mesh: Mesh | AbstractMesh) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _axes(mesh: Mesh | AbstractMesh, kind: AxisType) -> tuple[str, ...]:
    return tuple(name for name, own in _kinds(mesh).items() if own == kind)
