"""A head that is not ours, in place of one that is: what remains of the recipe with k-means' spheres."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_hmog import HMoGOutput, Moments, Natural, PositiveDefinite, Scale, Structure, infer, moments_to_natural


class KMeansHead(nn.Module):
    """Clusters by distances to centres, as softly as one variance says: k-means, if that goes to 0.

    It is an HMoG of K spheres of one size and weight, half of whose variance is noise.

    Attributes:
        lat_dim: latent dimension of the mixture that it starts from; its own is D.
        n_components: number of centres K.
        obs_dim: number of features D.
    """

    lat_dim: int
    n_components: int
    obs_dim: int
    obs_rep: str = "scale"
    param_dtype: Any = jnp.float32
    projection_dtype: Any = None

    @property
    def component_structure(self) -> Structure:
        """Full component precisions."""
        return Structure(PositiveDefinite)

    def setup(self) -> None:
        """Centres (K, D) and the logarithm of the variance ()."""
        self.centres = self.param("centres", nn.initializers.normal(), (self.n_components, self.obs_dim))
        self.log_variance = self.param("log_variance", nn.initializers.zeros, ())

    def natural(self) -> Natural:
        """The model in natural coordinates."""
        half, axes = jnp.exp(self.log_variance) / 2, jnp.eye(self.obs_dim)
        weights = jnp.full(self.n_components, 1 / self.n_components)
        spheres = PositiveDefinite(jnp.tile(half * axes, (self.n_components, 1, 1)))
        return moments_to_natural(Moments(axes, jnp.zeros(self.obs_dim), Scale(half), weights, self.centres, spheres))

    def __call__(self, x: jax.Array) -> HMoGOutput:
        """Log-density, log-responsibilities and latent mean of x (B, D)."""
        return infer(self.natural(), x)

    def start(self, moments: Moments) -> dict[str, Any]:
        """Variables with the means of a mixture as centres, and its variance within components."""
        within = jnp.einsum(
            "dl,k,klm,dm->", moments.loadings, moments.weights, moments.covariances.dense(), moments.loadings
        )
        noise = jnp.trace(moments.noise.dense())
        centres = moments.means @ moments.loadings.T + moments.bias
        log_variance = jnp.log((within + noise) / self.obs_dim)
        return {"params": {"centres": jnp.asarray(centres, jnp.float32), "log_variance": log_variance}}
