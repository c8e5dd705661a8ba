"""Modules as JSON values: by name and constructor arguments, so that a checkpoint needs no code of its own."""

from __future__ import annotations

import dataclasses
import importlib
import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.em.options import PseudoCounts
from flax_hmog.heads import modules as heads
from flax_hmog.networks import encoders
from flax_hmog.training.plain import plain

NAMED: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(heads.DifferentiableHMoG, heads.SymmetricHMoG, heads.AnalyticHMoG, PseudoCounts),
        *(encoders.MLP, encoders.ConvNet, encoders.Autoencoder, encoders.Clusterer),
    )
}
"""The classes that a checkpoint names without a path."""
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


def describe_module(module: Any) -> dict[str, Any]:
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


def _arguments(cls: Any) -> list[dataclasses.Field]:
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


def _from_json(value: Any, allowed: Allowed) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(entry, allowed) for entry in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype"}:
        return jnp.dtype(value["dtype"])
    if value.keys() == {"class", "arguments"}:
        return _rebuilt(value, allowed)
    return {key: _from_json(entry, allowed) for key, entry in value.get("dict", value).items()}
