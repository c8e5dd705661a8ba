"""The head in a module: its place, its variables, and what a module's variables look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from flax_hmog.model.head import Head
from flax_hmog.networks.encoders import train_arguments
from flax_hmog.training.named import named_arrays

BIASES = ("params/bias", "em/moments/bias")  # leaves of our heads, of length D


def find_heads(module: Any, variables: Any, inputs: Any) -> dict[str, Any]:
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

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        visit(context.module)
        return call(*args, **kwargs)

    walk(module.bind(variables))
    if inputs is not None:
        positional, named = train_arguments(module, False)
        with nn.intercept_methods(intercept):
            jax.eval_shape(lambda v, x: module.apply(v, x, *positional, **named), variables, inputs)
    return found


def part_of(variables: Any, place: str) -> dict[str, Any]:
    """The variables of the part of a module that lies at a place; collections without it are left out."""
    parts = {}
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


def abstract_variables(module: Any, inputs: Any) -> Any:
    """Variables of a module without values, for abstract inputs."""
    positional, named = train_arguments(module, False)
    made = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *positional, **named), inputs)
    return nn.unbox(made)


def observed_dim(head: Any, variables: Any) -> int | None:
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


def head_inputs(head: Any, obs_dim: int) -> jax.ShapeDtypeStruct:
    """Abstract inputs of a head."""
    return jax.ShapeDtypeStruct((1, obs_dim), head.param_dtype)
