"""Checkpoints read again: whole models from a folder alone, and trees of arrays for a run that goes on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int

from flax_hmog.data.containers import dense, is_in_blocks
from flax_hmog.data.shards import on_auto_axes
from flax_hmog.data.sources import as_source
from flax_hmog.heads.modules import AnalyticHMoG, HMoGHead
from flax_hmog.inference.padded import in_few_sizes
from flax_hmog.inference.posterior import HMoGOutput, infer, merge_output
from flax_hmog.model.checks import check_type, door, may_miss, public
from flax_hmog.model.coordinates import Natural, Prepared
from flax_hmog.model.head import Head
from flax_hmog.model.kinds import Array
from flax_hmog.model.prepared import prepare
from flax_hmog.model.typed import Data, Samples, Variables
from flax_hmog.networks.encoders import Clusterer, train_arguments
from flax_hmog.training.describe import (
    FORMAT,
    Allowed,
    CheckpointError,
    abstract_variables,
    current_names,
    find_heads,
    named_arrays,
    observed_dim,
    part_of,
    rebuild,
    replace_part,
)
from flax_hmog.training.files import read_chosen
from flax_hmog.training.mesh import place as place_on
from flax_hmog.training.preprocessing import Preprocessing, rebuild_preprocessing

CALLS = (HMoGHead.__call__, AnalyticHMoG.__call__)  # of heads that return what `infer` does


@dataclasses.dataclass(frozen=True, eq=False)
class Restored:
    """A model from a checkpoint; called with raw data it returns their clusters, under `jit` too.

    Attributes:
        step: the step it was saved at.
        module: the unbound module that was trained: a head, a `Clusterer` or another one with a head in it; None if its
            code was not to be imported.
        module_variables: for `module.apply`.
        head: the unbound head in it; None if its code was not to be imported.
        place: path of the head in the module, as "encoder/head"; "" if it is the module.
        inputs: shape (1, ...) and dtype of the module's inputs, or None where the writer did not know them.
        preprocessing: from raw data to the inputs of the module, or None.
        clusters: cluster of each component (K,) where components are merged, or None.
        state: all other arrays by name, as "opt_state/0/mu/params/means"; see `restore_like`.
        progress: position of the run, as it was saved.
        history: metrics so far, one dict for each record.
        metrics: those by which the best checkpoint is chosen.
        config: the run's configuration.
        versions: of the libraries that saved it.
        origin: the folder that it was read from, as "runs/mine/checkpoints/seed0/em/30"; of a run in memory the same
            from "checkpoints" on.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import head, variables, x
        >>> from flax_hmog.training import CheckpointWriter
        >>> folder = tempfile.mkdtemp()
        >>> with CheckpointWriter(folder, head=head) as writer:
        ...     writer.save(1, variables)
        >>> model = restore(folder)
        >>> model.step, model(x).log_responsibilities.shape
        (1, (12, 3))
    """

    step: int
    module: Any
    module_variables: dict[str, Any] = dataclasses.field(repr=False)
    head: Any = dataclasses.field(repr=False)
    place: str
    inputs: jax.ShapeDtypeStruct | None
    preprocessing: Preprocessing | None = dataclasses.field(repr=False)
    clusters: Int[np.ndarray, " K"] | None = dataclasses.field(repr=False)
    state: dict[str, np.ndarray] = dataclasses.field(repr=False)
    progress: dict[str, Any] = dataclasses.field(repr=False)
    history: list[dict[str, Any]] = dataclasses.field(repr=False)
    metrics: dict[str, float]
    config: dict[str, Any] = dataclasses.field(repr=False)
    versions: dict[str, str]
    origin: str = ""

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the head, for `head.apply`."""
        return part_of(self.module_variables, self.place)

    @property
    def encoder(self) -> Any:
        """The unbound encoder of a `Clusterer`, or None."""
        return self.module.encoder if isinstance(self.module, Clusterer) else None

    @property
    def encoder_variables(self) -> dict[str, Any] | None:
        """The variables of the module's part `encoder`, for `encoder.apply`; None for a head by itself."""
        return part_of(self.module_variables, "encoder") if self.place else None

    @property
    def infers(self) -> bool:
        """True if a call is `infer` of the head's model at `features`; not for networks and calls of one's own."""
        return (not self.place or isinstance(self.module, Clusterer)) and type(self.head).__call__ in CALLS

    @functools.cached_property
    def prepared(self) -> Prepared:
        """The model of the head with all that inference needs of it."""
        with jax.ensure_compile_time_eval():
            return prepare(self.natural, self.head.projection_dtype)

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        """The module's call, or its method of this name, compiled."""
        module = self.imported()
        positional, named = train_arguments(module, False)

        def apply(variables: Variables, x: Samples, method: str | None = None) -> Any:
            arguments, options = ((), {"method": method}) if method else (positional, named)
            return module.apply(variables, x, *arguments, **options)

        return jax.jit(apply, static_argnames="method")

    def imported(self) -> nn.Module:
        """The module, as the way from raw data needs it."""
        if self.module is None:
            raise ValueError(
                "Restored: `module` must be imported to take raw data; got a checkpoint with a class that is not of "
                "flax_hmog, or of a notebook. Restore with allow_import=True if you trust it, or with module=..."
            )
        return cast(nn.Module, self.module)

    @property
    def natural(self) -> Natural:
        """The model of the head, on its inputs."""
        return cast(Natural, self.head.apply(self.variables, method="natural"))

    @public
    def __call__(self, raw: Data, *, missing: str = "refuse") -> Any:
        """The module's output for raw data (..., D) of any kind: preprocessing, module, merge of components.

        Rows of a head or a `Clusterer` are filled up to a power of two, so that few sizes are compiled, unless they are
        spread over devices.

        Of a head, or a `Clusterer`, this is `HMoGOutput`; other modules return what they return, in which components
        are merged if it is a `HMoGOutput` itself. With `missing="nan"` a head takes NaN for missing entries. Other
        methods: `restored.module.apply(restored.module_variables, x, method="name")`. For components that are not
        merged, `dataclasses.replace(restored, clusters=None)`.

        Raises:
            ValueError: for another number of columns, or a module that was not imported.
        """
        if may_miss() and (self.place or not self.infers):
            raise ValueError(
                f'{door()}: `missing` must be "refuse" for a model with an encoder; got {missing!r}. Impute first: '
                "encoders take whole rows."
            )
        if not self.infers:
            output = self._apply(self.module_variables, self.preprocessed(raw))
            return self.merged(output) if isinstance(output, HMoGOutput) else output
        if is_in_blocks(raw):
            source: Any = as_source(raw, None, np.float32, argument="raw")
            parts = [self(rows) for rows, _ in source.given()]
            return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        x = self._inputs(raw)
        is_split = isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and len(x.sharding.device_set) > 1)
        if is_split or x.ndim != 2 or not x.size:
            return self._inferred(x)
        return cast(HMoGOutput, jax.tree.map(jax.device_put, in_few_sizes(self._inferred, np.asarray(x))))

    def _inferred(self, x: Samples) -> HMoGOutput:
        """The output for inputs of the module (..., D)."""
        rows = self._apply(self.module_variables, x, "features") if self.place else x
        return self.merged(infer(self.prepared, rows, missing="nan" if may_miss() else "refuse"))

    def merged(self, output: HMoGOutput) -> HMoGOutput:
        """The head's output with its components merged to clusters, where they are."""
        if self.clusters is None:
            return output
        return merge_output(output, self.clusters, int(self.clusters.max()) + 1)

    @public
    def features(self, raw: Samples) -> Float[Array, "... F"]:
        """The inputs of the head for raw data (..., D): numpy, jax or a scipy sparse matrix.

        Of a module of one's own this is what its method `features` returns.
        """
        x = self.preprocessed(raw)
        return self._apply(self.module_variables, x, "features") if self.place else x

    @public
    def preprocessed(self, raw: Data) -> Float[Array, "... D"]:
        """The inputs of the module for raw data (..., D)."""
        return jnp.asarray(self._inputs(raw))

    def _inputs(self, raw: Data) -> Any:
        x = dense("raw", raw) if self.preprocessing is None else self.preprocessing(raw)
        return x.copy() if isinstance(x, np.ndarray) else x  # programs read it after the caller has it back


@public
@on_auto_axes
def restore(
    path: str | Path,
    *,
    step: int | Literal["best"] | None = None,
    allow_import: Allowed = False,
    module: nn.Module | None = None,
) -> Restored:
    """Restore a checkpoint with nothing but its folder.

    Args:
        path: folder that `CheckpointWriter` wrote.
        step: which step; None takes the latest, "best" that with the best metric.
        allow_import: import classes that are not of this library: True by the paths that the checkpoint names, or
            MODULE:CLASS, one or several, by these paths, if they are the ones. This runs the code of their modules.
            What is not a linen module is never called.
        module: the module itself, as the writer was given it; then nothing is imported.

    Returns:
        `Restored`; its variables lie on this process's first device.

    Raises:
        TypeError: for a `module` that is none.
        CheckpointError: if there is no such checkpoint, or it is damaged. A damaged step is never replaced by another.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import head, variables, x
        >>> from flax_hmog.training import CheckpointWriter
        >>> folder = tempfile.mkdtemp()
        >>> with CheckpointWriter(folder, head=head) as writer:
        ...     writer.save(1, variables)
        >>> restore(folder)(x).log_density.shape
        (12,)
    """
    if module is not None:
        check_type("module", module, nn.Module, "Give an instance, as the writer was given it.")
    folder = Path(path).absolute()
    chosen, arrays, description = read_chosen(folder, step)
    try:
        found = _assembled(chosen, arrays, description, allow_import, module)
        return dataclasses.replace(found, origin=str(Path(path) / str(chosen)))
    except CheckpointError as error:
        raise CheckpointError(f"{error} The checkpoint is {folder / str(chosen)}.") from error.__cause__
    except Exception as error:  # it is as it was saved, by another version
        raise CheckpointError(
            f"restore: checkpoint {folder / str(chosen)} must be of a known structure; got {type(error).__name__}: "
            f"{error}. Use the flax_hmog that saved it: {description.get('versions')}."
        ) from error


def _assembled(
    step: int, arrays: dict[str, Any], description: dict[str, Any], allow_import: Allowed, module: nn.Module | None
) -> Restored:
    """Modules and variables from what was read."""
    groups: dict[str, dict[str, Any]] = {"variables": {}, "state": {}, "preprocessing": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    described, place, inputs = description, description.get("place", ""), description.get("inputs")
    if description["format"] != FORMAT:  # before, it held a head, and an encoder or none
        head, encoder = description["head"], description["encoder"]
        whole = {"class": "Clusterer", "arguments": {"encoder": encoder, "head": head}}
        described, place = ({"module": head}, "") if encoder is None else ({"module": whole, "head": head}, "head")
    if inputs is not None:
        inputs = jax.ShapeDtypeStruct(tuple(inputs["shape"]), inputs["dtype"])
    if module is None and described["module"] is not None:
        module = rebuild(described["module"], allow_import)
    variables = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(groups["variables"], sep="/"))
    is_known = inputs is not None and not isinstance(module, Clusterer | Head | None)
    if module is not None and is_known:
        variables = restore_like(abstract_variables(module, inputs), groups["variables"], "variables")
    head = module if not place else described["head"] and rebuild(described["head"], allow_import)
    if head is None and module is not None:
        head = find_heads(module, variables, inputs).get(place)
    if head is not None and not isinstance(head, Head):
        raise CheckpointError(
            f"restore: the head must offer what flax_hmog.Head lists; got {type(head).__name__}. Give the module that "
            "was saved."
        )
    obs_dim = None if is_known or head is None else observed_dim(head, part_of(variables, place))
    if head is not None and obs_dim is not None:
        template = abstract_variables(cast(nn.Module, head), jax.ShapeDtypeStruct((1, obs_dim), head.param_dtype))
        own = restore_like(template, named_arrays(part_of(variables, place)), "variables")
        variables = replace_part(variables, place, own)
    return Restored(
        step=step,
        module=module,
        module_variables=variables,
        head=head,
        place=place,
        inputs=inputs,
        preprocessing=None
        if description["preprocessing"] is None
        else rebuild_preprocessing(description["preprocessing"], groups["preprocessing"]),
        clusters=None if description["clusters"] is None else np.asarray(description["clusters"]),
        state=current_names(groups["state"]),
        **{name: description[name] for name in ("progress", "history", "metrics", "config", "versions")},
    )


def restore_like(template: object, arrays: dict[str, Any], what: str) -> Any:
    """A tree like `template` with the arrays saved under its names, where the template's leaves lie.

    Args:
        template: tree of arrays, keys or abstract arrays (`jax.ShapeDtypeStruct`).
        arrays: by name, for example `Restored.state`; names beyond the template's are an error. Names of
            earlier versions are taken.
        what: says in messages what the tree is.

    Returns:
        The tree.

    Raises:
        CheckpointError: naming the leaf that is missing, extra, of another shape, or with numbers too large for the
            template's dtype.

    Example:
        >>> template = {"mean": jnp.zeros(2)}
        >>> restore_like(template, {"mean": np.ones(2, np.float32)}, "the state")["mean"].tolist()
        [1.0, 1.0]
    """
    template = nn.unbox(template)
    wanted = named_arrays(template)
    if wanted.keys() != arrays.keys():
        arrays = current_names(arrays)
    for name in sorted(wanted.keys() ^ arrays.keys()):
        where = "is missing in the checkpoint" if name in wanted else "is not in the model"
        raise CheckpointError(
            f"restore_like: leaf `{name}` of {what} must be in both checkpoint and model; it {where}. "
            "Restore into the model that was saved."
        )
    leaves = []
    for name, leaf in wanted.items():
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
        if arrays[name].shape != data.shape:
            raise CheckpointError(
                f"restore_like: leaf `{name}` of {what} must have shape {data.shape}; got {arrays[name].shape}. "
                "The checkpoint is of another model."
            )
        if jnp.issubdtype(arrays[name].dtype, jnp.floating) != jnp.issubdtype(data.dtype, jnp.floating):
            raise CheckpointError(
                f"restore_like: leaf `{name}` of {what} must hold {data.dtype}; got {arrays[name].dtype}. "
                "The checkpoint is of another model."
            )
        array, sharding = _in_dtype(name, arrays[name], data.dtype, what), getattr(leaf, "sharding", None)
        if is_key:
            leaves.append(jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf)))
        else:
            leaves.append(jnp.asarray(array) if sharding is None else place_on(array, sharding))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _in_dtype(name: str, array: Any, dtype: Any, what: str) -> np.ndarray:
    """An array in the dtype of the template, or the 32 bits of it where JAX has no more.

    Raises:
        CheckpointError: for a number that this dtype cannot hold, as NumPy and orbax make 0 or infinity of it.
    """
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    saved = np.asarray(array)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = saved.astype(dtype)
    is_whole = np.issubdtype(saved.dtype, np.integer)
    is_lost = cast.astype(saved.dtype) != saved if is_whole else np.isfinite(saved) & ~np.isfinite(cast)
    if np.any(is_lost):
        raise CheckpointError(
            f"restore_like: leaf `{name}` of {what} must fit into {dtype}; got {saved[is_lost].flat[0]} of "
            f"{saved.dtype}. "
            'Switch 64 bits on before restoring: jax.config.update("jax_enable_x64", True).'
        )
    return cast
