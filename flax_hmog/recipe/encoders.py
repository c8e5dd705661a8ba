"""The encoder of an experiment: by name or import path, its first variables, and what it makes of many rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_hmog.data.rows import map_rows, row_shards
from flax_hmog.networks.encoders import MLP, Autoencoder, ConvNet, train_arguments
from flax_hmog.recipe.config import Experiment
from flax_hmog.training.describe import import_path

FEATURE_ROWS = 1024  # that an encoder sees at once where nothing is trained
SETTLING_PASSES = 500  # over the same rows at most, until running averages change by no more than
SETTLED = 1e-6  # of their largest entry in a pass
OURS: dict[str, Any] = {"mlp": MLP, "conv": ConvNet, "autoencoder": Autoencoder}


def make_encoder(config: Experiment, obs_dim: int, image_shape: tuple[int, ...] | None) -> Any:
    """The experiment's encoder, or None.

    A class is given `features`, and whichever of `obs_dim`, `image_shape` and `normalization` it has a field for.

    Raises:
        ValueError: for a class that cannot be imported, does not take `features` or asks for more, a network for images
            without images.
    """
    options = config.encoder
    if options.name == "none":
        return None
    kind = _encoder_class(options.name)
    fields = {field.name for field in dataclasses.fields(kind)}
    if "image_shape" in fields and image_shape is None:
        raise ValueError(
            f"make_encoder: `encoder.name` {options.name} must have images; got inputs that are none. Use mlp, or "
            "leave out --data.columns and --data.whitened."
        )
    known: dict[str, Any] = {"features": options.features, "obs_dim": obs_dim, "image_shape": image_shape}
    known["normalization"] = options.normalization
    try:
        encoder = kind(**{name: value for name, value in known.items() if name in fields})
    except TypeError as error:
        raise ValueError(
            f"make_encoder: `encoder.name` must name a class with a default for each field but {', '.join(known)}; got "
            f"{options.name}: {error}. Give its fields defaults."
        ) from error
    return encoder


def features_shape(encoder: Any, obs_dim: int) -> tuple[int, ...]:
    """Shape of the features of two inputs (2, D)."""
    x = jax.ShapeDtypeStruct((2, obs_dim), jnp.float32)
    made = jax.eval_shape(lambda x: apply_encoder(encoder, untrained_variables(encoder, jax.random.key(0), x), x), x)
    return made.shape


def check_encoder(encoder: Any, config: Experiment, obs_dim: int) -> None:
    """ValueError for an encoder of other features than the configuration says, or one that must decode and cannot."""
    shape = features_shape(encoder, obs_dim)
    if shape != (2, config.encoder.features):
        raise ValueError(
            f"make_encoder: the encoder must map inputs (B, {obs_dim}) to features (B, {config.encoder.features}); got "
            f"features {shape} for two inputs. Flatten its output, or set --encoder.features."
        )
    if config.rounds.reconstruction_weight and not hasattr(encoder, "decode"):
        raise ValueError(
            f"make_encoder: the encoder must have a method `decode` for `rounds.reconstruction_weight`; got "
            f"{config.encoder.name}. Use autoencoder, or leave out the weight."
        )


def _encoder_class(name: str) -> Any:
    """One of ours by name, or a linen class with a field `features` by import path."""
    if name in OURS:
        return OURS[name]
    found: Any = None
    cause = ""
    try:
        found = import_path(name)
    except Exception as error:  # whatever the user's module raises
        cause = f" ({type(error).__name__}: {error})"
    is_linen = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_linen or "features" not in {field.name for field in dataclasses.fields(found)}:
        raise ValueError(
            "make_encoder: `encoder.name` must name a linen class that can be imported and has a field `features`; "
            f"got {name!r}{cause}. Correct the path MODULE:CLASS, or the class."
        )
    return found


def init_encoder(encoder: Any, key: jax.Array, x: jax.Array) -> dict[str, Any]:
    """Variables of an encoder for inputs (B, D), running averages those of x."""
    variables = jax.jit(lambda x: untrained_variables(encoder, key, x))(x[:1])
    averages = [name for name in variables if name != "params"]
    positional, named = train_arguments(encoder, True)
    if not averages or not (positional or named):
        return variables

    @jax.jit
    def settle(variables: dict[str, Any], x: jax.Array) -> tuple[dict[str, Any], jax.Array]:
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


def untrained_variables(encoder: Any, key: jax.Array, x: jax.Array) -> dict[str, Any]:
    """Variables of an encoder for inputs (B, D), before any training."""
    positional, named = train_arguments(encoder, False)
    return dict(encoder.init(key, x, *positional, **named))


def features(encoder: Any, variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """The head's inputs, by blocks of rows."""
    if encoder is None:
        return x
    return _features(encoder, variables, x, row_shards(x))


@functools.partial(jax.jit, static_argnames=("encoder", "shards"))
def _features(encoder: Any, variables: dict[str, Any], x: jax.Array, shards: Any) -> jax.Array:
    return map_rows(functools.partial(apply_encoder, encoder), variables, x, FEATURE_ROWS, shards)


def apply_encoder(encoder: Any, variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """Features of rows, as after training."""
    positional, named = train_arguments(encoder, False)
    return encoder.apply(variables, x, *positional, **named)


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
