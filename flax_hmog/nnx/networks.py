"""A head on an encoder as one NNX module."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.kinds import Array
from flax_hmog.nnx.heads import HMoGHead


class Clusterer(nnx.Module):
    """A head on an encoder's features. `train()` and `eval()` set the mode of both.

    Args:
        encoder: any NNX module, or function, from inputs (B, ...) to features (B, D).
        head: any head.

    Example:
        >>> from flax_hmog import nnx as heads
        >>> rngs = nnx.Rngs(0)
        >>> head = heads.DifferentiableHMoG(lat_dim=2, n_components=3, obs_dim=4, rngs=rngs)
        >>> module = heads.Clusterer(nnx.Linear(6, 4, rngs=rngs), head)
        >>> module(jax.numpy.ones((5, 6))).log_density.shape
        (5,)
    """

    def __init__(self, encoder: Any, head: HMoGHead[Any]) -> None:
        if isinstance(encoder, HMoGHead):
            raise TypeError(
                f"Clusterer: `encoder` must come before `head`; got {type(encoder).__name__}. Swap the two."
            )
        self.encoder, self.head = encoder, head

    def __call__(self, x: Array) -> HMoGOutput:
        """The head's output on the features of x."""
        return self.head(self.features(x))

    def features(self, x: Array) -> Array:
        """The encoder's output for x (B, ...)."""
        features: Array = self.encoder(x)
        return features

    def joint_and_head_outputs(self, x: Array) -> tuple[HMoGOutput, HMoGOutput]:
        """The head's output on the features of x, once with gradients into the encoder and once without.

        The likelihood of the features alone collapses an encoder: use it on the second output only. In training an
        `AnalyticHMoG` takes its step after the first.
        """
        features = self.features(x)
        return self.head.infer(features), self.head(jax.lax.stop_gradient(features))

    def reconstruct(self, x: Array) -> Array:
        """Inputs reconstructed by an encoder that has a method `decode`."""
        decoded: Array = self.encoder.decode(self.features(x))
        return decoded
