"""Modules as JSON values: by name and constructor arguments, so that a checkpoint needs no code of its own."""

from __future__ import annotations

import dataclasses
import importlib
import json
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.heads import modules as heads
from flax_hmog.networks import encoders
from flax_hmog.training.plain import plain

HEADS: dict[str, Any] = {
    cls.__name__: cls for cls in (heads.DifferentiableHMoG, heads.SymmetricHMoG, heads.AnalyticHMoG)
}
MODULES: dict[str, Any] = HEADS | {cls.__name__: cls for cls in (encoders.MLP, encoders.ConvNet, encoders.Autoencoder)}
"""The modules that a checkpoint names without a path."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another structure; the message names the file or leaf."""


def describe_head(head: Any) -> dict[str, Any]:
    """`describe_module` of one of the three heads.

    Raises:
        CheckpointError: for anything else.
    """
    if not isinstance(head, heads.HMoGHead) or MODULES.get(type(head).__name__) is not type(head):
        raise CheckpointError(
            "CheckpointWriter: `head` must be a DifferentiableHMoG, SymmetricHMoG or AnalyticHMoG, not a subclass; got "
            f"{type(head).__name__}. Give the head by itself, and what comes before it as `encoder`."
        )
    return describe_module(head)


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Class and constructor arguments of a module: by name if it is ours, else by its import path.

    Raises:
        CheckpointError: for arguments that JSON cannot hold, or a class that cannot be imported.
    """
    cls = type(module)
    name = cls.__name__ if MODULES.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"
    if ":" in name and not _leads_to(name, cls):
        raise CheckpointError(
            f"CheckpointWriter: `encoder` must be of a class at the top of a module that can be imported; got {name}. "
            "Move it into a module of its own; apply transformations as nn.remat within its `__call__`."
        )
    arguments = {argument: _as_json(name, argument, getattr(module, argument)) for argument in _arguments(cls)}
    return {"class": name, "arguments": arguments}


def rebuild_head(description: dict[str, Any]) -> Any:
    """The head that `describe_head` described.

    Raises:
        CheckpointError: for anything else than one of the three heads.
    """
    if description["class"] not in HEADS:
        raise CheckpointError(
            f"restore: the head must be one of {sorted(HEADS)}; got {description['class']!r}. Update flax_hmog."
        )
    return _rebuilt(description, HEADS[description["class"]])


def rebuild_encoder(description: dict[str, Any], *, allow_import: bool | str = False) -> Any:
    """The encoder that `describe_module` described; None for a class of others unless it may be imported.

    Nothing is called but the class, and it must be a linen module. Its arguments are JSON values, tuples and dtypes.

    Args:
        description: of `describe_module`.
        allow_import: whether a class of others may be imported: any, or the one with this path MODULE:CLASS.

    Raises:
        CheckpointError: for a class that is not there, is another than that allowed, is no linen module, or no longer
            takes these arguments.
    """
    name = description["class"]
    if name in MODULES:
        return _rebuilt(description, MODULES[name])
    if ":" not in name:
        raise CheckpointError(
            f"restore: `class` must be an import path or one of {sorted(MODULES)}; got {name!r}. Update flax_hmog."
        )
    if not allow_import:
        return None
    wanted = allow_import if isinstance(allow_import, str) else name
    cls = _imported_module(wanted) if ":" in wanted else None
    if cls is None or name not in (wanted, f"{cls.__module__}:{cls.__qualname__}"):
        raise CheckpointError(
            f"restore: the encoder must be {wanted}, as `allow_import` says; got {name}. Give its path if you trust it."
        )
    return _rebuilt(description, cls)


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
            f"restore: the encoder must be a linen module; got {path}, which is none, and is not called. "
            "Do not trust this checkpoint."
        )
    return found


def _rebuilt(description: dict[str, Any], cls: type) -> Any:
    """An instance of a linen class with the arguments that were described."""
    arguments = description["arguments"]
    unknown = arguments.keys() - set(_arguments(cls))
    if unknown:
        raise CheckpointError(
            f"restore: {description['class']} must take {sorted(arguments)}; got no field "
            f"{', '.join(sorted(unknown))}. Use the version of its code that saved it."
        )
    arguments = _in_precision({key: _from_json(value) for key, value in arguments.items()}, description["class"])
    try:
        return cls(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"restore: {description['class']} must take {sorted(arguments)}; got {type(error).__name__}: {error}. "
            "Use the version of its code that saved it."
        ) from error


def _in_precision(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments, with float32 in place of a float64 that JAX does not compute in here."""
    asked = arguments.get("param_dtype")
    is_double = isinstance(asked, str | np.dtype) and jnp.dtype(asked) == np.float64
    if not is_double or jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        return arguments
    warnings.warn(
        f"restore: {name} was saved in float64 and is restored in float32, as JAX computes in 32 bits here. Switch "
        '64 bits on before restoring: jax.config.update("jax_enable_x64", True).',
        stacklevel=5,
    )
    return arguments | {"param_dtype": jnp.dtype("float32")}


def _arguments(cls: Any) -> list[str]:
    """Constructor arguments of a linen class, but for its place among modules."""
    return [field.name for field in dataclasses.fields(cls) if field.init and field.name not in ("parent", "name")]


def import_path(name: str) -> Any:
    """What a path MODULE:NAME leads to.

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
    """Whether another process finds the class under its import path."""
    try:
        return not name.startswith("__main__:") and import_path(name) is cls
    except (ImportError, AttributeError):
        return False


def _as_json(module: str, argument: str, value: Any) -> Any:
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return {"dtype": jnp.dtype(value).name}
    if hasattr(value, "dtype") and callable(value) and not isinstance(value, nn.Module):  # jnp.float32 and its like
        return {"dtype": jnp.dtype(value).name}
    try:
        return json.loads(json.dumps(plain(value)))
    except TypeError:
        raise CheckpointError(
            f"CheckpointWriter: `{argument}` of {module} must be a plain JSON value or a dtype; got {value!r}. "
            "Choose it inside the module by name."
        ) from None


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"dtype"}:
        return jnp.dtype(value["dtype"])
    return tuple(_from_json(entry) for entry in value) if isinstance(value, list) else value
