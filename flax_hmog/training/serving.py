"""A model as one portable program, from rows to clusters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export

from flax_hmog.data.containers import dense
from flax_hmog.data.rows import on_host
from flax_hmog.em.result import EMResult
from flax_hmog.heads import modules as linen
from flax_hmog.inference.posterior import HMoGOutput, infer
from flax_hmog.model.checks import door, may_miss, public
from flax_hmog.model.coordinates import Natural, Prepared, check_natural
from flax_hmog.model.kinds import Array, matmul
from flax_hmog.model.typed import Tree, Variables
from flax_hmog.model_file import SavedModel
from flax_hmog.networks.encoders import Clusterer, train_arguments
from flax_hmog.nnx import heads as native
from flax_hmog.nnx.networks import Clusterer as NativeClusterer
from flax_hmog.training.describe import observed_dim
from flax_hmog.training.exported import WIDE, Program, shapes_of_rows
from flax_hmog.training.folding import folded
from flax_hmog.training.restoring import Restored

PLATFORMS = ("cpu", "cuda", "tpu")


@public
def export(
    model: Any,
    variables: Variables | None = None,
    *,
    inputs: Any = None,
    platforms: Sequence[str] = PLATFORMS,
    missing: str = "refuse",
) -> Program:
    """The program from rows to clusters, for any number of rows and several platforms at once.

    All that does not depend on rows is computed here, factorisations of the model too; matrix products and entrywise
    operations are left.

    Args:
        model: of `restore`, with its preprocessing, encoder and merged components; of `fit_em` or `load`, or any
            `Natural`; a linen or NNX module, ours or one's own, which is called out of training; or a function of rows.
        variables: of a linen module.
        inputs: rows (B, ...) as the model takes them, of which only shape and dtype count; needed where the model does
            not say them, as networks and functions. A checkpoint of images says their shape, (B, H, W) or
            (B, H, W, C); with rows (B, D) here, or an axis of one channel, the program is of these.
        platforms: those that it can run on, "cpu", "cuda", "rocm", "tpu"; this machine need not have them.
        missing: "nan" for programs that take NaN for missing entries, as `infer` does; of modules those of `restore`.

    Returns:
        `Program`. Of heads, `Clusterer`s and models its dict has `log_density` (B,) in nats, `responsibilities`
        (B, K), `assignment` (B,) int32 and `latent_mean` (B, L); other modules give what they return, heads' outputs as
        such dicts. A row that is not finite has NaN in all outputs, and -1 in those of whole numbers, `assignment`
        among them. It computes in float32; in float64 where the model's arrays are, or a function's `inputs`.

    Raises:
        TypeError: for a model that is none of these, or that returns for rows what can not be marked.
        ValueError: for variables or inputs that are missing or do not fit, a module that was not imported, or one that
            works for some numbers of rows only.

    Example:
        >>> from flax_hmog.toy import head, variables, x
        >>> program = export(head, variables, inputs=x, platforms=["cpu"])
        >>> rows = np.array(x)
        >>> rows[1, 2] = np.nan
        >>> program(rows)["assignment"].tolist()
        [0, -1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    """
    if isinstance(platforms, str):
        raise ValueError(
            f"{door()}: `platforms` must be a sequence of names; got {platforms!r}. Write ({platforms!r},)."
        )
    served = _served(model, variables)
    row, is_wide = _row(served, inputs)
    with jax.enable_x64(is_wide), jax.set_mesh(None):
        (batch,) = jax_export.symbolic_shape("batch")
        rows = jax.ShapeDtypeStruct((batch, *row.shape[1:]), row.dtype)
        try:
            function = folded(functools.partial(_answer, served), rows)
            exported = jax_export.export(jax.jit(function), platforms=tuple(platforms))(rows)
        except jax.errors.InconclusiveDimensionOperation as error:
            raise ValueError(
                f"{door()}: `model` must take any number of rows; got {str(error).splitlines()[0]} Let it not compare "
                "x.shape[0] or cut rows into parts of one size, as lax.map(..., batch_size=...) does."
            ) from error
    return Program(exported, served.by_row, function, served.image_shape)


@dataclasses.dataclass(frozen=True, eq=False)
class _Served:
    """A function of rows, and what is known of it.

    Attributes:
        function: of rows.
        arrays: a tree of those that it holds; None where they are not known.
        row: shape (1, ...) and dtype of rows, or None.
        clusters: of the components of its output (K,), or None.
        by_row: True if what it says of a row is known not to depend on the others.
        image_shape: of a row, where rows are images.
    """

    function: Callable[[Any], Any]
    arrays: Tree = None
    row: jax.ShapeDtypeStruct | None = None
    clusters: Any = None
    by_row: bool = False
    image_shape: tuple[int, ...] | None = None


def _served(model: Any, variables: Variables | None) -> _Served:
    """The function of rows that a model is.

    Raises:
        TypeError: for something that is none.
        ValueError: for variables that are missing, or in vain.
    """
    if isinstance(model, nn.Module) != (variables is not None):
        raise ValueError(
            f"{door()}: `variables` must be given with a linen module, and with nothing else; got "
            f"{type(variables).__name__} with {type(model).__name__}. Give those of `init`, or leave them out."
        )
    if isinstance(model, Restored):
        columns = None if model.place else observed_dim(model.imported(), model.variables)
        row = model.inputs if model.place or columns is None else _floats(columns)
        image_shape = None if model.preprocessing is None else model.preprocessing.image_shape
        if model.preprocessing is not None:
            row = _floats(*(image_shape or (model.preprocessing.obs_dim,)))
        parts = dataclasses.replace(model, clusters=None)
        return _Served(parts, model.module_variables, row, model.clusters, model.infers, image_shape)
    if isinstance(model, nn.Module):
        positional, named = train_arguments(model, False)
        by_row, variables = isinstance(model, linen.HMoGHead | Clusterer), _on_host(variables)
        return _Served(lambda x: model.apply(variables, x, *positional, **named), variables, by_row=by_row)
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        state = _on_host(state)
        row = _floats(model.obs_dim) if isinstance(model, native.HMoGHead) else None
        by_row = row is not None or isinstance(model, NativeClusterer)
        return _Served(lambda x: _out_of_training(nnx.merge(graph, state))(x), state, row, by_row=by_row)
    if isinstance(model, SavedModel):
        return dataclasses.replace(_served(model.natural, None), clusters=model.clusters)
    if isinstance(model, EMResult):
        model = model.natural
    if isinstance(model, Natural | Prepared):
        model, row = _on_host(model), _floats(check_natural(model).interaction.shape[0])
        return _Served(lambda x: infer(model, x), model, row, by_row=True)
    if callable(model):
        return _Served(model)
    raise TypeError(
        f"{door()}: `model` must be what restore, fit_em or load return, a module, or a function of rows; got "
        f"{type(model).__name__}. Give one of these."
    )


def _on_host(tree: Tree) -> Tree:
    """A tree with its arrays on the host: a program is for one device, wherever the model lies."""

    def moved(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return on_host(leaf) if is_array else leaf

    return jax.tree.map(moved, tree)


def _out_of_training(module: Any) -> Any:
    module.eval()
    return module


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), np.float32)


def _row(served: _Served, inputs: Any) -> tuple[jax.ShapeDtypeStruct, bool]:
    """Shape (1, ...) and dtype of rows that the program takes; True if it computes in 64 bits.

    Raises:
        ValueError: for inputs that are missing, or do not fit the model.
    """
    given = inputs if isinstance(inputs, jax.ShapeDtypeStruct | None) else dense("inputs", inputs)
    given = served.row if given is None else given
    if given is None or not given.shape:
        raise ValueError(
            f"{door()}: `inputs` must be rows (B, ...) where the model does not say which it takes; got {inputs!r}. "
            'Give some, or jax.ShapeDtypeStruct((1, columns), "float32").'
        )
    shapes = () if served.row is None else shapes_of_rows(served.row.shape[1:], served.image_shape)
    if shapes and given.shape[1:] not in shapes:
        raise ValueError(
            f"{door()}: `inputs` must be rows of the model's shape {' or '.join(map(str, shapes))}; got "
            f"{given.shape[1:]}. Leave them out."
        )
    dtype = jax.dtypes.canonicalize_dtype(given.dtype)
    leaves = jax.tree.leaves(served.arrays)
    is_wide = (
        dtype in WIDE if served.arrays is None else any(getattr(leaf, "dtype", None) == np.float64 for leaf in leaves)
    )
    if jnp.issubdtype(dtype, np.floating):
        dtype = np.dtype(np.float64 if is_wide else np.float32)
    return jax.ShapeDtypeStruct((1, *given.shape[1:]), dtype), is_wide


def _answer(served: _Served, x: Array) -> Any:
    """The output of a program: dicts, in which rows that are not finite are marked."""
    output = served.function(x)
    if isinstance(output, HMoGOutput):
        output = _named(output, served.clusters)
    output = jax.tree.map(_named, output, is_leaf=dataclasses.is_dataclass)
    if not jnp.issubdtype(x.dtype, np.floating):
        return output
    is_known = jnp.isfinite(x) | jnp.isnan(x) if may_miss() else jnp.isfinite(x)
    finite = jnp.all(is_known, axis=tuple(range(1, x.ndim)))
    return jax.tree.map(functools.partial(_marked, finite=finite), output)


def _named(output: Any, clusters: Any = None) -> Any:
    """A dataclass as a dict, that of a head with probabilities and assignments; anything else as it is."""
    if not dataclasses.is_dataclass(output):
        return output
    if not isinstance(output, HMoGOutput):
        fields = (f.name for f in dataclasses.fields(output) if not f.metadata.get("static"))
        return {name: jax.tree.map(_named, getattr(output, name), is_leaf=dataclasses.is_dataclass) for name in fields}
    responsibilities = jnp.exp(output.log_responsibilities)
    if clusters is not None:
        member = np.asarray(clusters)[:, None] == np.arange(max(clusters) + 1)
        responsibilities = matmul(responsibilities, member.astype(responsibilities.dtype))
    is_known = ~jnp.any(jnp.isnan(responsibilities), axis=-1)
    return {
        "log_density": output.log_density,
        "responsibilities": responsibilities,
        "assignment": jnp.where(is_known, jnp.argmax(responsibilities, axis=-1), -1).astype(jnp.int32),
        "latent_mean": output.latent_mean,
    }


def _marked(leaf: Any, finite: Array) -> Any:
    """An output with NaN or -1 in rows that are not finite; one that is not of rows as it is."""
    leaf = jnp.asarray(leaf)
    if not leaf.ndim or leaf.shape[0] != finite.shape[0]:
        return leaf
    if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, np.unsignedinteger):
        raise TypeError(
            f"{door()}: `model` must return floats, or whole numbers with a sign, for rows, so that those that are not "
            f"finite can be marked; got {leaf.dtype}. Return int32."
        )
    mark = jnp.nan if jnp.issubdtype(leaf.dtype, np.inexact) else -1
    return jnp.where(finite.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.asarray(mark, leaf.dtype))
