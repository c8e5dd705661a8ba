"""Encoders, and a head on one as a single module."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from flax_hmog.covariances import Array
from flax_hmog.inference import HMoGOutput


class MLP(nn.Module):
    """Dense layers with rectified linear units between them.

    Attributes:
        features: number of features, the head's D.
        hidden: widths of the layers before.
    """

    features: int
    hidden: tuple[int, ...] = (256, 256)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Features (..., features) of x (..., D)."""
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.features)(x)


class Clusterer(nn.Module):
    """A head on an encoder's features; their variables lie under `encoder` and `head`.

    Attributes:
        encoder: any linen module from inputs (B, ...) to features (B, D).
        head: any head.
    """

    encoder: nn.Module
    head: Any

    def __call__(self, x: Array) -> HMoGOutput:
        """The head's output on the features of x."""
        return self.head(self.encoder(x))

    def features(self, x: Array) -> Array:
        """What the encoder makes of x."""
        return self.encoder(x)

    def joint_and_head_outputs(self, x: Array) -> tuple[HMoGOutput, HMoGOutput]:
        """The head's output on the features of x, once with gradients into the encoder and once without.

        The likelihood of the features alone collapses an encoder: use it on the second output only.
        """
        features = self.encoder(x)
        return self.head(features), self.head(jax.lax.stop_gradient(features))
