"""The encoder of an experiment: by name or import path, its first variables, and what it makes of many rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from experiments.config import Experiment
from flax_hmog.encoders import MLP, Autoencoder, ConvNet, train_argument
from flax_hmog.rows import map_rows, row_shards
from flax_hmog.training.describe import import_path

FEATURE_ROWS = 1024  # that an encoder sees at once where nothing is trained
SETTLING_PASSES = 500  # over the same rows, enough for averages with flax's momentum of .99
OURS: dict[str, Any] = {"mlp": MLP, "conv": ConvNet, "autoencoder": Autoencoder}


def make_encoder(config: Experiment, obs_dim: int, image_shape: tuple[int, ...] | None) -> Any:
    """The experiment's encoder, or None.

    A class is given `features`, and whichever of `obs_dim`, `image_shape` and `normalization` it has a field for.

    Raises:
        ValueError: for a class that cannot be imported or does not take `features`, or a network for images without
            images.
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
    return kind(**{name: value for name, value in known.items() if name in fields})


def _encoder_class(name: str) -> Any:
    """One of ours by name, or a linen class with a field `features` by import path."""
    if name in OURS:
        return OURS[name]
    found: Any = None
    cause = ""
    try:
        found = import_path(name)
    except (ImportError, AttributeError) as error:
        cause = f" ({error})"
    is_linen = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_linen or "features" not in {field.name for field in dataclasses.fields(found)}:
        raise ValueError(
            "make_encoder: `encoder.name` must name a linen class that can be imported and has a field `features`; "
            f"got {name!r}{cause}. Correct the path MODULE:CLASS, or the class."
        )
    return found


def init_encoder(encoder: Any, key: jax.Array, x: jax.Array, n_features: int) -> dict[str, Any]:
    """Variables of an encoder from inputs (B, D) to features (B, n_features), running averages those of x.

    Raises:
        ValueError: for other features.
    """
    inference = train_argument(encoder, False)
    output, _ = jax.eval_shape(lambda x: encoder.init_with_output(key, x, **inference), x[:1])
    if output.shape != (1, n_features):
        raise ValueError(
            f"init_encoder: the encoder must map inputs (B, {x.shape[1]}) to features (B, {n_features}); got features "
            f"{output.shape} for one input. Flatten its output."
        )
    variables = dict(jax.jit(lambda x: encoder.init(key, x, **inference))(x[:1]))
    averages = [name for name in variables if name != "params"]
    training = train_argument(encoder, True)
    if averages and training:

        @jax.jit
        def settle(variables: dict[str, Any], x: jax.Array) -> dict[str, Any]:
            """The averages after another pass."""
            return encoder.apply(variables, x, **training, mutable=averages, rngs={"dropout": key})[1]

        for _ in range(SETTLING_PASSES):
            variables |= settle(variables, x)
    return variables


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
    return encoder.apply(variables, x, **train_argument(encoder, False))


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
