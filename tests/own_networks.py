"""Heads and networks as users write them, in a module that can be imported."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_hmog import AnalyticHMoG, Diagonal, DifferentiableHMoG, Natural, Structure, infer, moments_to_natural
from flax_hmog.em.initialize import random_moments
from flax_hmog.model.kinds import PositiveDefinite
from flax_hmog.networks import MLP


class SphericalHMoG(DifferentiableHMoG):
    """A head of ours with another default."""

    obs_rep: str = "scale"


class Inline(nn.Module):
    """A head that is made in a compact call."""

    widths: tuple[int, ...] = (8,)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return DifferentiableHMoG(lat_dim=2, n_components=3)(nn.Dense(4)(x))


class Inner(nn.Module):
    """Some encoder before a head, both given, and something that the head is no part of."""

    encoder: nn.Module
    parts: tuple
    options: dict
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.hidden = {"clusters": AnalyticHMoG(2, 3), "scale": nn.Dense(4)}
        self.offset = self.param("offset", nn.initializers.ones, (1, 4))

    def features(self, x):
        return self.encoder(x).astype(self.dtype) + self.offset

    def __call__(self, x, train=False):
        features = self.features(x)
        return {"output": self.hidden["clusters"](features, train=train), "more": self.parts[0](features)}


class Twins(nn.Module):
    """Two heads."""

    def setup(self):
        self.left, self.right = DifferentiableHMoG(2, 3), AnalyticHMoG(2, 4)

    def __call__(self, x):
        return self.left(x), self.right(x)


class Foreign(nn.Module):
    """A head that has nothing of ours but the model: its only leaf moves all means."""

    lat_dim: int
    n_components: int
    obs_dim: int
    obs_rep: str = "diagonal"
    param_dtype: jnp.dtype = jnp.float32
    projection_dtype: None = None

    @property
    def component_structure(self):
        return Structure(PositiveDefinite)

    def setup(self):
        sizes = self.obs_dim, self.lat_dim, self.n_components
        self.moments = random_moments(jax.random.key(0), *sizes, Diagonal)
        self.shift = self.param("shift", nn.initializers.normal(), (self.obs_dim,))

    def natural(self) -> Natural:
        return moments_to_natural(dataclasses.replace(self.moments, bias=self.shift))

    def __call__(self, x):
        return infer(self.natural(), x)


SMALL = Inner(MLP(4, (8,)), (nn.Dense(2), "a"), {"depth": 2, "names": ("a",)}, jnp.bfloat16)


def init(module, *args, **options):
    """Variables from one program: operations one by one take longer to compile."""
    return nn.unbox(jax.jit(functools.partial(module.init, **options))(*args))
