"""Contents of a checkpoint: modules as JSON values, the head in them, arrays by name and digest."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.em.options import PseudoCounts
from flax_hmog.heads import modules as heads
from flax_hmog.model.head import Head
from flax_hmog.model.typed import Inputs, Tree, Variables
from flax_hmog.networks import encoders

FORMAT = 6  # of checkpoints; a reader takes this one and the two before it
NAMED: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(heads.DifferentiableHMoG, heads.SymmetricHMoG, heads.AnalyticHMoG, PseudoCounts),
        *(encoders.MLP, encoders.ConvNet, encoders.Autoencoder, encoders.Clusterer),
    )
}
"""The classes that a checkpoint names without a path."""
BIASES = ("params/bias", "em/model/bias", "em/moments/bias")  # leaves of our heads, of length D; the last one of before
TRUSTED = "flax.linen."  # beginning of paths whose modules are loaded already
REMEDY = (
    "Put the class into a module file, and apply transformations as nn.remat within its `__call__`; or leave the "
    "description out with describe=False, and restore with restore(path, module=...)."
)

Allowed = bool | str | Collection[str]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another structure; the message names the file or leaf.

    Example:
        >>> from flax_hmog.training import restore
        >>> restore("no such folder")
        Traceback (most recent call last):
        flax_hmog.training.describe.CheckpointError: restore: ...
    """


class _NotAllowedError(Exception):
    """A class of others stands in a description, and may not be imported."""


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Class and constructor arguments of a module: by name if it is ours, else by its import path.

    Arguments may be modules themselves. Those that JSON cannot hold are left out if they are the default.

    Raises:
        CheckpointError: for arguments that JSON cannot hold, or a class that cannot be imported.
    """
    cls = type(module)
    name = cls.__name__ if NAMED.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"
    if ":" in name and not _leads_to(name, cls):
        raise CheckpointError(
            "CheckpointWriter: `module` must be of a class at the top of a module that can be imported, and so its "
            f"head, its encoder and what they hold; got {name}. {REMEDY}"
        )
    arguments = {}
    for field in _arguments(cls):
        value = getattr(module, field.name)
        try:
            arguments[field.name] = _as_json(value)
        except TypeError:
            if value is not field.default:
                raise CheckpointError(
                    f"CheckpointWriter: `{field.name}` of {name} must be a plain JSON value, a dtype or a module; got "
                    f"{value!r}. Choose it inside the module by name, or leave the description out with describe=False."
                ) from None
    return {"class": name, "arguments": arguments}


def rebuild(description: dict[str, Any], allow_import: Allowed = False) -> Any:
    """The module that `describe_module` described; None if a class of others is in it that may not be imported.

    Nothing is called but classes, and those of others must be linen modules. Arguments are JSON values, tuples, dtypes
    and modules.

    Args:
        description: of `describe_module`.
        allow_import: permission to import classes of others: any, or those with these paths MODULE:CLASS.

    Raises:
        CheckpointError: for a class that is not there, is another than those allowed, is no linen module, or no longer
            takes these arguments.
    """
    try:
        return _rebuilt(description, allow_import)
    except _NotAllowedError:
        return None


def _rebuilt(description: dict[str, Any], allowed: Allowed) -> Any:
    name, described = description["class"], description["arguments"]
    cls = _class_of(name, allowed)
    unknown = described.keys() - {field.name for field in _arguments(cls)}
    if unknown:
        raise CheckpointError(
            f"restore: {name} must take {sorted(described)}; got no field {', '.join(sorted(unknown))}. "
            "Use the version of its code that saved it."
        )
    arguments = {key: _from_json(value, allowed) for key, value in described.items()}
    try:
        return cls(**_in_precision(arguments, name))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"restore: {name} must take {sorted(described)}; got {type(error).__name__}: {error}. "
            "Use the version of its code that saved it."
        ) from error


def _class_of(name: str, allowed: Allowed) -> Any:
    """The class that a description names."""
    if name in NAMED:
        return NAMED[name]
    if ":" not in name:
        raise CheckpointError(
            f"restore: `class` must be an import path or one of {sorted(NAMED)}; got {name!r}. Update flax_hmog."
        )
    if name.startswith(TRUSTED) or allowed is True:
        return _imported_module(name)
    if not allowed:
        raise _NotAllowedError
    paths = [allowed] if isinstance(allowed, str) else list(allowed)
    for path in sorted(paths, key=lambda path: path != name):
        cls = _imported_module(path) if ":" in path else None
        if cls is not None and name in (path, f"{cls.__module__}:{cls.__qualname__}"):
            return cls
    raise CheckpointError(
        f"restore: the module must be {' or '.join(paths)}, as `allow_import` says; got {name}. "
        "Give its path if you trust it."
    )


def _imported_module(path: str) -> type[nn.Module]:
    """The linen class that a path leads to; something else is not called."""
    try:
        found = import_path(path)
    except Exception as error:  # whatever the module raises
        raise CheckpointError(
            f"restore: `{path}` must be importable; got {type(error).__name__}: {error}. Use the version of its code "
            "that saved it."
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(
            f"restore: the class must be a linen module; got {path}, which is none, and is not called. "
            "Do not trust this checkpoint."
        )
    return found


def _in_precision(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments, with float32 in place of a float64 that JAX does not compute in here."""
    asked = arguments.get("param_dtype")
    is_double = isinstance(asked, str | np.dtype) and jnp.dtype(asked) == np.float64
    if not is_double or jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        return arguments
    warnings.warn(
        f"restore: {name} was saved in float64 and is restored in float32, as JAX computes in 32 bits here. Switch "
        '64 bits on before restoring: jax.config.update("jax_enable_x64", True).',
        stacklevel=6,
    )
    return arguments | {"param_dtype": jnp.dtype("float32")}


def _arguments(cls: Any) -> list[dataclasses.Field[Any]]:
    """Constructor arguments of a class, but for its place among modules."""
    return [field for field in dataclasses.fields(cls) if field.init and field.name not in ("parent", "name")]


def import_path(name: str) -> Any:
    """The object at an import path MODULE:NAME.

    Raises:
        ImportError: for a module that is not there.
        AttributeError: for a name that is not in it.
    """
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _leads_to(name: str, cls: type) -> bool:
    """True if another process finds the class under its import path."""
    try:
        return not name.startswith("__main__:") and import_path(name) is cls
    except (ImportError, AttributeError):
        return False


def _as_json(value: Any) -> Any:
    """A constructor argument; TypeError for what JSON cannot hold."""
    if isinstance(value, nn.Module) or type(value) in NAMED.values():
        return describe_module(value)
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": jnp.dtype(value).name}
    if hasattr(value, "dtype") and callable(value):  # jnp.float32 and its like
        return {"dtype": jnp.dtype(value).name}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys that are no strings")
        return {"dict": {key: _as_json(entry) for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return json.loads(json.dumps(plain(value)))


def _from_json(value: object, allowed: Allowed) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(entry, allowed) for entry in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype"}:
        return jnp.dtype(value["dtype"])
    if value.keys() == {"class", "arguments"}:
        return _rebuilt(value, allowed)
    return {key: _from_json(entry, allowed) for key, entry in value.get("dict", value).items()}


def plain(value: Any) -> Any:
    """A tree of dicts, lists and tuples, its scalars and arrays without a dimension as Python numbers.

    Anything else stays as it is, for JSON to refuse.
    """
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    is_number = isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 0)
    return value.item() if is_number and value.dtype.kind in "biuf" else value


def named_arrays(tree: object) -> dict[str, Any]:
    """The leaves of a tree by their path, as "variables/params/means"; in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def current_names(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays under the names of today.

    Three leaves of a `Natural` were not yet those of its `prior` once, and the model in the collection `em` was
    `moments`.
    """
    moved = {"prior_location": "location", "prior_precision": "precision", "log_weights": "log_weights"}

    def today(name: str) -> str:
        place, is_moments, leaf = name.rpartition("moments/")
        if is_moments and "em" in place.split("/") and f"{place}step" in arrays:
            return f"{place}model/{leaf}"
        owner, _, field = name.removesuffix("/entries").rpartition("/")
        if field not in moved or f"{owner}/prior_location" not in arrays:
            return name
        return name.replace(f"{owner}/{field}", f"{owner}/prior/{moved[field]}", 1)

    return {today(name): array for name, array in arrays.items()}


def describe_array(array: np.ndarray) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of an array on the host."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": hashlib.sha256(data).hexdigest()}


def find_heads(module: nn.Module, variables: Variables, inputs: Inputs | None) -> dict[str, Any]:
    """The heads in a module by their place, as "encoder/head"; "" is the module itself.

    Args:
        module: unbound.
        variables: of it.
        inputs: abstract inputs of a call; None finds those that stand in fields and in `setup`, and not those that are
            made in a compact call.

    Returns:
        Unbound heads.
    """
    found: dict[str, Any] = {}

    def visit(part: nn.Module) -> bool:
        if isinstance(part, Head):
            found.setdefault("/".join(part.path), part.unbind()[0].clone(name=None))
        return isinstance(part, Head)

    def walk(part: nn.Module) -> None:
        if part.scope is None or visit(part):
            return
        getattr(part, "_", None)  # runs `setup`
        for child in jax.tree.leaves(list(vars(part).values()), is_leaf=lambda value: isinstance(value, nn.Module)):
            if isinstance(child, nn.Module):
                walk(child)

    def intercept(call: Callable[..., Any], args: Tree, kwargs: Tree, context: nn.module.InterceptorContext) -> Any:
        visit(context.module)
        return call(*args, **kwargs)

    walk(module.bind(variables))
    if inputs is not None:
        positional, named = encoders.train_arguments(module, False)
        # wherever the variables lie, of which another mesh than the one in scope would refuse the call
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), variables)
        with nn.intercept_methods(intercept):
            jax.eval_shape(lambda v, x: module.apply(v, x, *positional, **named), shapes, inputs)
    return found


def part_of(variables: Variables, place: str) -> dict[str, Any]:
    """The variables of the part of a module that lies at a place; collections without it are left out."""
    parts = {}
    tree: Any
    for collection, tree in variables.items():
        for name in place.split("/") if place else ():
            tree = tree.get(name) if isinstance(tree, Mapping) else None
        if tree is not None:
            parts[collection] = tree
    return parts


def replace_part(variables: dict[str, Any], place: str, part: dict[str, Any]) -> dict[str, Any]:
    """The variables of a module with others for the part at a place."""
    if not place:
        return part
    name, _, rest = place.partition("/")
    inner = {key: tree[name] for key, tree in variables.items() if name in tree}
    return variables | {key: variables[key] | {name: tree} for key, tree in replace_part(inner, rest, part).items()}


def abstract_variables(module: nn.Module, inputs: Inputs | None) -> Any:
    """Variables of a module without values, for abstract inputs."""
    positional, named = encoders.train_arguments(module, False)
    made = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *positional, **named), inputs)
    return nn.unbox(made)


def observed_dim(head: Head, variables: Variables) -> int | None:
    """D of a head with these variables; None where they do not say it."""
    if head.obs_dim is not None:
        return int(head.obs_dim)
    bias = next((leaf for name, leaf in named_arrays(variables).items() if name in BIASES), None)
    if bias is not None:
        return int(bias.shape[0])
    try:
        model = jax.eval_shape(lambda v: head.apply(v, method="natural"), variables)
    except Exception:  # whatever a head says of variables that are not its own
        return None
    return int(model.interaction.shape[0])
