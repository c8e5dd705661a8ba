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

from flax_hmog import encoders, heads
from flax_hmog.training.plain import plain

MODULES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(heads.DifferentiableHMoG, heads.SymmetricHMoG, heads.AnalyticHMoG),
        *(encoders.MLP, encoders.ConvNet, encoders.Autoencoder),
    )
}
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
    arguments = {
        field.name: _as_json(name, field.name, getattr(module, field.name))
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    }
    return {"class": name, "arguments": arguments}


def rebuild_module(description: dict[str, Any], *, allow_import: bool = False) -> Any:
    """The module that `describe_module` described; None for a class of others unless `allow_import`.

    Raises:
        CheckpointError: for a class that is not there, or no longer takes these arguments.
    """
    name = description["class"]
    arguments = {key: _from_json(value) for key, value in description["arguments"].items()}
    if ":" not in name and name not in MODULES:
        raise CheckpointError(
            f"restore: `class` must be an import path or one of {sorted(MODULES)}; got {name!r}. Update flax_hmog."
        )
    if ":" in name and not allow_import:
        return None
    asked = arguments.get("param_dtype")
    is_double = isinstance(asked, str | np.dtype) and jnp.dtype(asked) == np.float64
    if is_double and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        warnings.warn(
            f"restore: {name} was saved in float64 and is restored in float32, as JAX computes in 32 bits here. Switch "
            '64 bits on before restoring: jax.config.update("jax_enable_x64", True).',
            stacklevel=3,
        )
        arguments["param_dtype"] = jnp.dtype("float32")
    try:
        return (MODULES[name] if name in MODULES else import_path(name))(**arguments)
    except (ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"restore: `{name}` must be importable and take {sorted(arguments)}; got {type(error).__name__}: {error}. "
            "Restore where its code is as it was, or with allow_import=False for the head alone."
        ) from error


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
