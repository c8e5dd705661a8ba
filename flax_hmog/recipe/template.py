"""Encoders, heads and optimisers of a configuration: by name, import path or class, with arguments of theirs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from flax_hmog.heads.modules import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG
from flax_hmog.networks.encoders import MLP, Autoencoder, ConvNet
from flax_hmog.training.describe import import_path, plain

NAMED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mlp": (MLP, {"features": 64, "normalization": "batch"}),
    "conv": (ConvNet, {"features": 64}),
    "autoencoder": (Autoencoder, {"features": 64, "normalization": "batch"}),
    "differentiable": (DifferentiableHMoG, {}),
    "symmetric": (SymmetricHMoG, {}),
    "analytic": (AnalyticHMoG, {"step_delay": 100.0, "min_rate": 0.01}),
}
"""Classes by name, with arguments that are not as by default."""
FOLLOWING = ("obs_dim", "image_shape", "lat_dim", "n_components", "obs_rep", "projection_dtype")
"""Arguments that follow from data and model where they are not given."""
REQUIRED = inspect.Parameter.empty


@dataclasses.dataclass(init=False)
class Template:
    """A linen class or an optimiser with some of its arguments; a run adds those that follow from data and model.

    Args:
        target: a name of `NAMED` or of optax, the import path MODULE:NAME of a class or function, such a class, or a
            module, of which all arguments are taken.
        arguments: arguments by name.

    Raises:
        ValueError: for a name that leads to nothing, or arguments that it does not take.

    Example:
        >>> Template("mlp", features=32, hidden=(64,)).make({}).hidden
        (64,)
        >>> Template("conv", features=32).make({"image_shape": (8, 8)}).image_shape
        (8, 8)
    """

    name: str
    arguments: dict[str, Any]
    target: Callable[..., Any]

    def __init__(self, target: str | Callable[..., Any] | nn.Module, /, **arguments: Any) -> None:
        if isinstance(target, nn.Module):
            arguments = {name: getattr(target, name) for name in parameters(type(target))} | arguments
            target = type(target)
        if isinstance(target, str):
            self.name = target
            target, defaults = _found(target)
            arguments = defaults | arguments
        else:
            names = [name for name, (known, _) in NAMED.items() if known is target]
            self.name = names[0] if names else f"{target.__module__}:{target.__qualname__}"
        self.target, self.arguments = target, arguments
        unknown = [name for name in arguments if name not in parameters(self.target)]
        if unknown:
            raise ValueError(
                f"Template: `{unknown[0]}` must be an argument of {self.name}; got one that is none. Choose from "
                f"{', '.join(parameters(self.target))}."
            )

    @property
    def label(self) -> str:
        """The name, or of an import path the name of the class."""
        return self.name.replace(":", ".").rpartition(".")[2]

    def given(self, **arguments: object) -> Template:
        """The same with these arguments, those of them that it takes."""
        taken = {name: value for name, value in arguments.items() if name in parameters(self.target)}
        made = copy.copy(self)
        made.arguments = self.arguments | taken
        return made

    def bare(self) -> Template:
        """The same without arguments, but those of its name."""
        return Template(self.name if self.name in NAMED else self.target)

    def switched(self, name: str) -> Template:
        """Another class or function by name, with those of the arguments that both take."""
        return self if name == self.name else Template(name).given(**self.arguments)

    def make(self, known: Mapping[str, Any]) -> Any:
        """The module or optimiser.

        Args:
            known: arguments that follow from data and model; those that it takes and that are not given are used, of
                `obs_dim` only where it must be given.

        Raises:
            ValueError: for arguments that are missing or wrong.
        """
        taken = parameters(self.target)
        used = {key for key, value in taken.items() if key != "obs_dim" or value.default is REQUIRED}
        try:
            return self.target(**({name: value for name, value in known.items() if name in used} | self.arguments))
        except TypeError as error:
            raise ValueError(
                f"Template: {self.name} must have a value for each of its arguments; got {error}. Give them as options."
            ) from error

    def options(self) -> dict[str, Any]:
        """Name and arguments as JSON values: those that are given, and defaults of those that follow from nothing.

        What JSON cannot hold is left out.
        """
        found: dict[str, Any] = {"name": self.name}
        for name, parameter in parameters(self.target).items():
            default = REQUIRED if name in FOLLOWING else parameter.default
            value = _as_json(self.arguments.get(name, default))
            found |= {} if value is REQUIRED else {name: value}
        return found


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Arguments of a class or function, of a module but its place among others."""
    found = inspect.signature(target).parameters
    place = ("parent", "name") if isinstance(target, type) and issubclass(target, nn.Module) else ()
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in found.items() if name not in place and p.kind not in variable}


def _found(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class or function that a name or import path leads to, with arguments that are not as by default."""
    if name in NAMED:
        return NAMED[name]
    if callable(getattr(optax, name, None)):
        return getattr(optax, name), {}
    return imported("Template: the name", name, f"one of {', '.join(NAMED)}, an optimiser of optax, or "), {}


def imported(argument: str, name: str, others: str = "") -> Callable[..., Any]:
    """A class or function of a user's.

    Args:
        argument: the argument that holds the path, for errors.
        name: the import path MODULE:NAME.
        others: values that the argument may have besides, for errors.

    Raises:
        ValueError: for a path that leads to none.
    """
    found, cause = None, ""
    if ":" in name:
        try:
            found = import_path(name)
        except Exception as error:  # whatever the user's module raises
            cause = f" ({type(error).__name__}: {error})"
    if not callable(found):
        raise ValueError(
            f"{argument} must be {others}an import path MODULE:NAME of a class or function; got {name!r}{cause}. "
            "Correct it."
        )
    return cast(Callable[..., Any], found)


def is_dtype(value: object) -> bool:
    """True for dtypes and scalar types, as jnp.float32."""
    is_scalar_type = isinstance(value, type) and issubclass(value, np.generic)
    return isinstance(value, np.dtype) or is_scalar_type or (callable(value) and hasattr(value, "dtype"))


def _as_json(value: Any) -> Any:
    """A value as JSON, or `REQUIRED` for what JSON cannot hold."""
    try:
        return jnp.dtype(value).name if is_dtype(value) else json.loads(json.dumps(plain(value)))
    except TypeError:
        return REQUIRED
