"""Encoders, and a head on one as a single module."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.head import Head
from flax_hmog.model.kinds import Array

Normalization = Literal["none", "layer", "batch"]
AVERAGING = 0.95  # share of the old running averages that stays, in batch normalisation
# names of the argument for training, and its value in training
TRAIN_ARGUMENTS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class MLP(nn.Module):
    """Dense layers with rectified linear units between them.

    Attributes:
        features: number of features, the head's D.
        hidden: widths of the layers before.
        normalization: of every layer's output: "none", "layer" (of each sample) or "batch" (running averages in the
            collection `batch_stats`).
        dtype: in which layers compute, as "bfloat16"; None for that of inputs and parameters.
        axis_name: axis of `shard_map` or `vmap` over which a batch is spread that is to be normalised as a whole; None
            under `jit`.

    Example:
        >>> encoder = MLP(features=2, hidden=(8,))
        >>> variables = jax.jit(encoder.init)(jax.random.key(0), jnp.ones((5, 4)))
        >>> encoder.apply(variables, jnp.ones((5, 4))).shape
        (5, 2)
    """

    features: int
    hidden: tuple[int, ...] = (256, 256)
    normalization: Normalization = "none"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Features (..., features) of x (..., D)."""
        for width in self.hidden:
            x = nn.relu(_normalized(self, nn.Dense(width, dtype=self.dtype)(x), train))
        return _normalized(self, nn.Dense(self.features, dtype=self.dtype)(x), train)


class ConvNet(nn.Module):
    """Small convolutional network for images: convolutions that halve the resolution, then a dense layer.

    Kernels are 5 x 5 in the first convolution and 3 x 3 in the others.

    Attributes:
        features: number of features, the head's D.
        image_shape: (height, width) or (height, width, channels) of an input.
        widths: channels of the convolutions.
        hidden: width of the dense layer after them.
        normalization: as in `MLP`.
        dtype: as in `MLP`.
        axis_name: as in `MLP`.

    Example:
        >>> encoder = ConvNet(features=2, image_shape=(4, 4), widths=(3,), hidden=8)
        >>> variables = jax.jit(encoder.init)(jax.random.key(0), jnp.ones((5, 16)))
        >>> sorted(variables)
        ['batch_stats', 'params']
    """

    features: int
    image_shape: tuple[int, ...]
    widths: tuple[int, ...] = (16, 32)
    hidden: int = 256
    normalization: Normalization = "batch"
    dtype: Any = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Features (B, features) of images, as rows (B, D) or in their shape."""
        size = math.prod(self.image_shape)
        if math.prod(x.shape[1:]) != size:
            raise ValueError(
                f"ConvNet: `x` must hold images {tuple(self.image_shape)} of {size} numbers, one for each sample; got "
                f"shape {x.shape}. Give the data's image_shape."
            )
        height, width, *channels = self.image_shape
        x = x.reshape(x.shape[0], height, width, *(channels or [1]))
        for number, count in enumerate(self.widths):
            kernel = (3, 3) if number else (5, 5)
            x = nn.Conv(count, kernel, strides=(2, 2), dtype=self.dtype)(x)
            x = nn.relu(_normalized(self, x, train))
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = nn.relu(_normalized(self, nn.Dense(self.hidden, dtype=self.dtype)(x), train))
        return _normalized(self, nn.Dense(self.features, dtype=self.dtype)(x), train)


class Autoencoder(nn.Module):
    """An `MLP` and its mirror image, which reconstructs inputs from features (`decode`): for `reconstruction`.

    Attributes:
        features: number of features, the head's D.
        obs_dim: number of columns of an input.
        hidden: widths of the encoder's layers, in reverse those of the decoder.
        normalization: as in `MLP`; of the encoder.
        dtype: as in `MLP`.
        axis_name: as in `MLP`.

    Example:
        >>> encoder = Autoencoder(features=2, obs_dim=4, hidden=(8,))
        >>> variables = jax.jit(encoder.init)(jax.random.key(0), jnp.ones((5, 4)))
        >>> encoder.apply(variables, jnp.ones((5, 2)), method="decode").shape
        (5, 4)
    """

    features: int
    obs_dim: int
    hidden: tuple[int, ...] = (256, 256)
    normalization: Normalization = "none"
    dtype: Any = None
    axis_name: str | None = None

    def setup(self) -> None:
        """Both halves."""
        self.encoder = MLP(self.features, self.hidden, self.normalization, self.dtype, self.axis_name)
        self.decoder = MLP(self.obs_dim, tuple(self.hidden)[::-1], dtype=self.dtype)

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Features (..., features) of x (..., obs_dim)."""
        features = self.encoder(x, train)
        if self.is_initializing():
            self.decoder(features)
        return features

    def decode(self, features: Array) -> Array:
        """Inputs (..., obs_dim) computed from features (..., features)."""
        return self.decoder(features)


class Clusterer(nn.Module):
    """A head on an encoder's features; their variables lie under `encoder` and `head`.

    `train` is passed to encoder and head, as batch normalisation, dropout and an `AnalyticHMoG` need it, by the
    arguments of their `__call__` that are named in `train_arguments`. Other methods of the head are called by
    `module.apply(variables, x, method=lambda m, x: m.head.posterior_categorical(m.features(x)))`.

    Attributes:
        encoder: any linen module from inputs (B, ...) to features (B, D).
        head: any head.

    Example:
        >>> from flax_hmog import DifferentiableHMoG
        >>> module = Clusterer(MLP(features=4, hidden=(8,)), DifferentiableHMoG(lat_dim=2, n_components=3))
        >>> output, variables = jax.jit(module.init_with_output)(jax.random.key(0), jnp.ones((5, 6)))
        >>> output.log_density.shape, sorted(variables["params"])
        ((5,), ['encoder', 'head'])
    """

    encoder: nn.Module
    head: Head

    def __post_init__(self) -> None:
        if isinstance(self.encoder, Head):
            raise TypeError(
                f"Clusterer: `encoder` must come before `head`; got {type(self.encoder).__name__}. Swap the two."
            )
        super().__post_init__()

    def __call__(self, x: Array, train: bool = False) -> HMoGOutput:
        """The head's output on the features of x."""
        return self._head_output(self.features(x, train), train)

    def features(self, x: Array, train: bool = False) -> Array:
        """The encoder's output for x (B, ...)."""
        positional, named = train_arguments(self.encoder, train)
        return cast(Array, self.encoder(x, *positional, **named))

    def joint_and_head_outputs(self, x: Array, train: bool = False) -> tuple[HMoGOutput, HMoGOutput]:
        """The head's output on the features of x, once with gradients into the encoder and once without.

        The likelihood of the features alone collapses an encoder: use it on the second output only. With `train` an
        `AnalyticHMoG` takes its step after the first.
        """
        features = self.features(x, train)
        return self.head(features), self._head_output(jax.lax.stop_gradient(features), train)

    def reconstruct(self, x: Array, train: bool = False) -> Array:
        """Inputs reconstructed by the decoder of an `Autoencoder`, or of any encoder with a method `decode`."""
        return cast(Array, self.encoder.decode(self.features(x, train)))

    def _head_output(self, features: Array, train: bool) -> HMoGOutput:
        positional, named = train_arguments(self.head, train)
        return cast(HMoGOutput, self.head(features, *positional, **named))


def train_arguments(module: nn.Module | Head, train: bool) -> tuple[tuple[bool, ...], dict[str, Any]]:
    """Positional and named arguments, after the inputs, by which a module's `__call__` takes `train`.

    These are the arguments named `train`, `training` or `is_training`, and `deterministic` or `use_running_average`,
    their contraries; none for a module that has no such argument. One that comes right after the inputs is given by
    position, as `nn.remat(..., static_argnums=2)` needs it.

    Example:
        >>> train_arguments(MLP(features=2), True), train_arguments(nn.Dropout(0.5), True)
        (((True,), {}), ((False,), {}))
    """
    parameters = list(inspect.signature(type(module).__call__).parameters.values())
    values = {p.name: train == TRAIN_ARGUMENTS[p.name] for p in parameters if p.name in TRAIN_ARGUMENTS}
    second = parameters[2] if len(parameters) > 2 else None  # after self and the inputs
    if second is not None and second.name in values and second.kind is second.POSITIONAL_OR_KEYWORD:
        return (values.pop(second.name),), values
    return (), values


def _normalized(module: MLP | ConvNet, x: Array, train: bool) -> Array:
    """X as the module normalises it, in float32 as averages need it; the layer becomes one of the module's."""
    kind, dtype = module.normalization, jnp.promote_types(x.dtype, jnp.float32)
    if kind == "none":
        return x
    if kind == "layer":
        # flax takes a variance by default as a difference of squares, which is lost in float32 far from the origin
        return cast(Array, nn.LayerNorm(dtype=dtype, use_fast_variance=False)(x))
    if kind == "batch":
        options: dict[str, Any] = {"momentum": AVERAGING, "dtype": dtype, "axis_name": module.axis_name}
        return cast(Array, nn.BatchNorm(use_running_average=not train, use_fast_variance=False, **options)(x))
    raise ValueError(f'encoders: `normalization` must be "none", "layer" or "batch"; got {kind!r}. Choose one.')
