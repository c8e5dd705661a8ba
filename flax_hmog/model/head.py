"""The interface of a head, for fits, checkpoints and networks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array

from flax_hmog.model.checks import door
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.structure import Structure
from flax_hmog.model.typed import Variables


@runtime_checkable
class HeadSizes(Protocol):
    """The sizes and kinds of a head, all that fits need of it: linen or NNX, or any object with these members.

    Example:
        >>> from flax_hmog.toy import head
        >>> isinstance(head, HeadSizes)
        True
    """

    @property
    def lat_dim(self) -> int:
        """Latent dimension L."""

    @property
    def n_components(self) -> int:
        """Number of components K."""

    @property
    def obs_dim(self) -> int | None:
        """Observed dimension D; None takes it from the data at init."""

    @property
    def obs_rep(self) -> Any:
        """Kind of the noise covariance."""

    @property
    def param_dtype(self) -> Any:
        """Dtype in which the model is computed."""

    @property
    def projection_dtype(self) -> Any:
        """Dtype in which x is multiplied by the D x L projection; None for `param_dtype`."""

    @property
    def component_structure(self) -> Structure:
        """Structure of the component precisions."""


@runtime_checkable
class Head(HeadSizes, Protocol):
    """A linen module that is a hierarchical mixture of Gaussians; any class with these members is one.

    Nothing has to be inherited from or registered. What a head has besides, as leaves, bounds and training, is its own.
    With a method `start(moments) -> variables` it can also be warm-started: `moments` are those of a fitted model in
    standard form, in numpy float64 and with noise of the kind `obs_rep`.

    Example:
        >>> from flax_hmog.toy import head
        >>> isinstance(head, Head)
        True
    """

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """A call or method on variables, as of any linen module."""

    def natural(self) -> Natural:
        """The model in natural coordinates, of variables that are there."""

    def __call__(self, x: Array) -> Any:
        """`HMoGOutput` of x (..., D)."""


def check_head(head: object, signature: str, needs: Any = Head) -> None:
    """TypeError, naming the order of arguments, unless `head` has the members of a protocol."""
    if isinstance(head, type) or not isinstance(head, needs):
        raise TypeError(
            f"{door()}: `head` must be a head, as DifferentiableHMoG, or offer what flax_hmog.{needs.__name__} lists; "
            f"got {type(head).__name__}. Call {door()}{signature}."
        )


def check_head_and_key(head: object, key: object) -> None:
    """TypeError unless `head` is a head, and `key` a PRNG key, typed or raw."""
    check_head(head, "(head, data, key)", HeadSizes)
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_typed and dtype != jnp.uint32:
        raise TypeError(f"{door()}: `key` must be a PRNG key; got {type(key).__name__}. Use jax.random.key(0).")
