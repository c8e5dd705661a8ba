"""Virtual adversarial perturbations: consistency under the small change of a sample that moves its assignment most.

Source: Miyato et al. 2018 (VAT); the radius as a share of the distance to a neighbour: Hu et al. 2017 (IMSAT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.checks import check_positive, public
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import Samples, Variables
from flax_hmog.networks.encoders import train_arguments
from flax_hmog.networks.objectives import consistency

PERTURBATION_STEP = 1e-2  # length of the step that asks for the most sensitive direction, relative to `radius`
RADIUS_SHARE, RADIUS_NEIGHBOUR = 0.25, 10  # of the distance to which neighbour a perturbation has
RADIUS_ROWS = 4096  # that are looked at
QUERIES = 512  # of them whose distances are held at once


@public
def virtual_adversarial(
    model: Callable[[Array], HMoGOutput] | nn.Module,
    x: Array,
    key: Array,
    *,
    radius: ArrayLike,
    steps: int = 1,
    variables: Variables | None = None,
    rngs: dict[str, Array] | None = None,
) -> Float[Array, ""]:
    """`consistency` under the small perturbation of each sample that changes its assignment most.

    The direction is found by `steps` power iterations on the Hessian of the divergence, from a random start; no
    gradient flows through it. Batch normalisation is that of the batch x, for the perturbed samples too, and its
    running averages stay: with averages, which a loss cannot move, an encoder would collapse in inference while its
    training looks well.

    Args:
        model: a linen module with a head in it, as `Clusterer`, with its `variables`; or any function from inputs to a
            head's output. A function with batch normalisation takes statistics of what it is given:
            `lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"])[0]`.
        x: inputs (B, ...).
        key: PRNG key of the start.
        radius: Euclidean length of a sample's perturbation, in units of x; `perturbation_radius` measures one.
        steps: power iterations; each costs a forward and a backward pass.
        variables: of the module.
        rngs: keys of the module, where it has dropout; only statistics of the batch are taken with it.

    Returns:
        The loss (), in nats.

    Raises:
        ValueError: for a radius that is not positive, a module without variables, a function whose `nn.BatchNorm` takes
            running averages, or a module whose running averages are not of `nn.BatchNorm`.

    Source: Miyato et al. 2018.

    Example:
        >>> model = lambda x: HMoGOutput(-jnp.sum(x**2, axis=-1), jax.nn.log_softmax(x), x)  # or of a `Clusterer`
        >>> virtual_adversarial(model, jnp.eye(3), jax.random.key(0), radius=0.5).shape
        ()
    """
    check_positive("radius", radius, "Use `perturbation_radius`, or a share of the distance between samples.")
    if isinstance(model, nn.Module):
        apply = _of_batch(model, variables, x, rngs)
        plain = apply(x)
    else:
        apply = model
        with nn.intercept_methods(_refuse_averages):
            plain = apply(x)
    fixed = jax.lax.stop_gradient(plain)

    def divergence(direction: Array) -> Array:
        return consistency(fixed, apply(x + PERTURBATION_STEP * radius * direction))

    direction = _unit_rows(jax.random.normal(key, x.shape, x.dtype))
    for _ in range(steps):
        direction = _unit_rows(jax.grad(divergence)(direction))
    return consistency(plain, apply(x + radius * jax.lax.stop_gradient(direction)))


@public
def perturbation_radius(x: Samples, *, share: float = RADIUS_SHARE, neighbour: int = RADIUS_NEIGHBOUR) -> float:
    """A radius for `virtual_adversarial`: a share of the median distance from a sample to its tenth neighbour.

    So perturbed samples stay among their neighbours, whatever the units and the number of columns.

    Args:
        x: inputs (N, ...) as the encoder takes them; of more than 4,096, rows at even intervals are taken.
        share: of the distance.
        neighbour: its number from 1, at most N - 1.

    Returns:
        The radius, in units of x.

    Raises:
        ValueError: for fewer than two rows, rows that are all alike, or a share that is not positive.

    Source: Hu et al. 2017, with a radius for each sample.

    Example:
        >>> perturbation_radius(np.arange(100.0)[:, None], neighbour=2)
        0.25
    """
    check_positive("share", share, "A quarter keeps a sample nearer to itself than to others.")
    rows = np.asarray(x)
    rows = rows[:: max(-(-len(rows) // RADIUS_ROWS), 1)].reshape(-1, math.prod(rows.shape[1:]))
    if len(rows) < 2:
        raise ValueError(f"perturbation_radius: `x` must have two rows at least; got {len(rows)}. Add rows.")
    rows = (rows - rows.mean(axis=0)).astype(np.float32)
    squares, number, found = np.sum(rows**2, axis=1), min(neighbour, len(rows) - 1), []
    for start in range(0, len(rows), QUERIES):
        block = slice(start, start + QUERIES)
        distances = squares[block, None] + squares - 2 * rows[block] @ rows.T
        found.append(np.partition(distances, number, axis=1)[:, number])  # a row itself is number 0
    radius = share * math.sqrt(max(np.median(np.concatenate(found)), 0))
    if not radius > 0:
        raise ValueError(
            "perturbation_radius: `x` must have rows that differ, most from their neighbours; got a distance of 0. "
            "Leave out copies, or choose a radius."
        )
    return radius


def _of_batch(
    module: nn.Module, variables: Variables | None, x: Array, rngs: dict[str, Array] | None
) -> Callable[[Array], HMoGOutput]:
    """The module in inference, its batch normalisation with the statistics of x, through which gradients flow."""
    if variables is None:
        raise ValueError(
            "virtual_adversarial: `variables` must be those of the module; got None. Give `state.variables`, or a "
            "function of x in place of the module."
        )
    count = 0

    def without_memory(call: Callable[..., Any], arguments: Any, options: Any, context: Any) -> Any:
        """Batch normalisation whose running averages become the statistics of its batch."""
        nonlocal count
        layer = context.module
        if not _is_call_of_norm(context):
            return call(*arguments, **options)
        count, momentum = count + 1, layer.momentum
        object.__setattr__(layer, "momentum", 0.0)
        try:
            return call(*arguments, **options)
        finally:
            object.__setattr__(layer, "momentum", momentum)

    at = dict(variables)
    if "batch_stats" in at:
        positional, named = train_arguments(module, True)
        changing = [name for name in at if name != "params"]
        with nn.intercept_methods(without_memory):
            _, after = module.apply(at, x, *positional, **named, mutable=changing, rngs=rngs)
        if not count:
            raise ValueError(
                "virtual_adversarial: `model` must have its running averages in `nn.BatchNorm` that is not compiled by "
                f"itself; got {type(module).__name__}. Give a function that calls it in training."
            )
        at["batch_stats"] = after["batch_stats"]
    positional, named = train_arguments(module, False)
    return lambda x: cast(HMoGOutput, module.apply(at, x, *positional, **named))


def _refuse_averages(call: Callable[..., Any], arguments: Any, options: Any, context: Any) -> Any:
    """ValueError for batch normalisation by running averages, in a function that the user gives."""
    layer = context.module
    if _is_call_of_norm(context):
        given = arguments[1] if len(arguments) > 1 else options.get("use_running_average")
        if layer.use_running_average if given is None else given:
            raise ValueError(
                f"virtual_adversarial: `model` must not normalise by running averages, which its loss cannot move; got "
                f"BatchNorm {'/'.join(layer.path)}. Give the module itself and its variables, or call it with "
                'train=True, mutable=["batch_stats"].'
            )
    return call(*arguments, **options)


def _is_call_of_norm(context: Any) -> bool:
    return isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"


def _unit_rows(x: Array) -> Array:
    """Each sample of x (B, ...) scaled to length 1; a sample of zeros stays."""
    rows = x.reshape(x.shape[0], -1)
    largest = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)  # whose square may be below the smallest float
    rows = rows / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1, keepdims=True))
    return (rows / jnp.where(length > 0, length, 1)).reshape(x.shape)
