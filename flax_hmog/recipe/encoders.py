"""The encoder of an experiment: by name or import path, its first variables, and what it makes of many rows."""

from __future__ import annotations

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_hmog.data.rows import map_rows
from flax_hmog.data.shards import Shards, row_shards
from flax_hmog.model.typed import jit
from flax_hmog.networks.encoders import train_arguments
from flax_hmog.recipe.config import Experiment
from flax_hmog.recipe.template import parameters

FEATURE_ROWS = 1024  # that an encoder sees at once where nothing is trained
SETTLING_PASSES = 500  # over the same rows at most, until running averages change by no more than
SETTLED = 1e-6  # of their largest entry in a pass


def make_encoder(config: Experiment, obs_dim: int, image_shape: tuple[int, ...] | None) -> nn.Module | None:
    """The experiment's encoder, or None.

    Raises:
        ValueError: for a class that is no linen module or asks for more arguments, or a network for images without
            images.
    """
    template = config.encoder
    if template is None:
        return None
    if "image_shape" in parameters(template.target) and not (image_shape or template.arguments.get("image_shape")):
        raise ValueError(
            f"make_encoder: `encoder.name` {template.name} must have images; got inputs that are none. Use mlp, or "
            "leave out --data.columns and --data.whitened."
        )
    encoder = template.make({"obs_dim": obs_dim, "image_shape": image_shape})
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"make_encoder: `encoder.name` must name a linen class; got {template.name}, a {type(encoder).__name__}. "
            "Correct it."
        )
    if config.rounds.reconstruction_weight and not hasattr(encoder, "decode"):
        raise ValueError(
            "make_encoder: the encoder must have a method `decode` for `rounds.reconstruction_weight`; got "
            f"{template.name}. Use autoencoder, or leave out the weight."
        )
    return encoder


def features_shape(encoder: nn.Module, obs_dim: int) -> tuple[int, int]:
    """Shape of the features of two inputs (2, D).

    Raises:
        ValueError: if they are no vectors.
    """
    x = jax.ShapeDtypeStruct((2, obs_dim), jnp.float32)
    made = jax.eval_shape(lambda x: apply_encoder(encoder, untrained_variables(encoder, jax.random.key(0), x), x), x)
    if len(made.shape) != 2 or made.shape[0] != 2:
        raise ValueError(
            f"make_encoder: the encoder must map inputs (B, {obs_dim}) to features (B, F); got features {made.shape} "
            "for two inputs. Flatten its output."
        )
    return cast(tuple[int, int], made.shape)


def init_encoder(encoder: nn.Module, key: jax.Array, x: jax.Array) -> dict[str, Any]:
    """Variables of an encoder for inputs (B, D), running averages those of x."""
    variables: dict[str, Any] = jax.jit(lambda x: untrained_variables(encoder, key, x))(x[:1])
    averages = [name for name in variables if name != "params"]
    positional, named = train_arguments(encoder, True)
    if not averages or not (positional or named):
        return variables

    @jax.jit
    def settle(variables: dict[str, Any], x: jax.Array) -> tuple[Any, jax.Array]:
        """The averages after another pass, and their largest change, as a share of the largest entry of a leaf."""
        rngs = {"dropout": key}
        _, after = encoder.apply(variables, x, *positional, **named, mutable=averages, rngs=rngs)
        before = {name: variables[name] for name in averages}
        change = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + SETTLED), before, after)
        return after, jnp.max(jnp.stack(jax.tree.leaves(change)))

    for _ in range(SETTLING_PASSES):
        after, change = settle(variables, x)
        variables |= after
        if change <= SETTLED:
            break
    return variables


def untrained_variables(encoder: nn.Module, key: jax.Array, x: jax.Array) -> dict[str, Any]:
    """Variables of an encoder for inputs (B, D), before any training."""
    positional, named = train_arguments(encoder, False)
    return dict(encoder.init(key, x, *positional, **named))


def features(encoder: nn.Module | None, variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """The head's inputs, by blocks of rows."""
    if encoder is None:
        return x
    return _features(encoder, variables, x, row_shards(x))


@jit(static_argnames=("encoder", "shards"))
def _features(encoder: nn.Module, variables: dict[str, Any], x: jax.Array, shards: Shards) -> jax.Array:
    return map_rows(functools.partial(apply_encoder, encoder), variables, x, FEATURE_ROWS, shards)


def apply_encoder(encoder: nn.Module, variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """Features of rows, as after training."""
    positional, named = train_arguments(encoder, False)
    return jnp.asarray(encoder.apply(variables, x, *positional, **named))


def split_module(variables: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder's and the head's part of the variables of a `Clusterer`."""
    encoder, head = (
        {name: tree[part] for name, tree in variables.items() if part in tree} for part in ("encoder", "head")
    )
    return encoder, head


def join_module(encoder: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
    """The variables of a `Clusterer`."""
    parts = {"encoder": encoder, "head": head}
    names = sorted(encoder.keys() | head.keys())
    return {name: {part: trees[name] for part, trees in parts.items() if name in trees} for name in names}
