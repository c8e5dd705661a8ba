"""The three heads as NNX modules: the leaves, answers and steps of EM of the linen ones, made from their sizes."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from jaxtyping import Float, Int

from flax_hmog.data.containers import in_memory
from flax_hmog.em.online import accepted_update, first_moments, stepwise_start
from flax_hmog.em.options import Regularizer
from flax_hmog.em.step import EMInfo, em_step
from flax_hmog.heads import modules as linen
from flax_hmog.heads.answers import Answers
from flax_hmog.heads.from_natural import WarmStartInfo, warm_start
from flax_hmog.heads.leaves import leaf_specs, leaves_to_natural
from flax_hmog.inference import posterior as inference
from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.checks import check_precision, door, public, public_methods
from flax_hmog.model.conversions import moments_to_natural
from flax_hmog.model.coordinates import Moments, Natural, Prepared
from flax_hmog.model.kinds import Array, as_rep
from flax_hmog.model.prepared import prepare
from flax_hmog.model.structure import Structure
from flax_hmog.model.typed import Samples, Variables

OwnT = TypeVar("OwnT", bound=linen.HMoGHead)


class EMState(nnx.Variable[Any]):
    """The collection `em` of a linen `AnalyticHMoG`: model, running statistics and number of steps.

    Filters find it by its type, as they find `nnx.Param` and `nnx.BatchStat`.

    Example:
        >>> from flax_hmog import nnx as heads
        >>> head = heads.AnalyticHMoG(lat_dim=2, n_components=3, obs_dim=4, rngs=nnx.Rngs(0))
        >>> sorted(nnx.state(head, EMState)["em"].get_value())
        ['model', 'running', 'step']
    """


@public_methods
class HMoGHead(Answers, nnx.Module, Generic[OwnT]):
    """Base of the three heads: inference on the model that `natural()` returns. Abstract.

    Methods take observations with any leading dimensions; see the functions of the same names for shapes, errors and
    `missing`.

    Attributes:
        linen: the linen head with the same sizes, kinds and bounds.
    """

    def __init__(self, head: OwnT) -> None:
        if type(self) is HMoGHead or head.obs_dim is None:
            raise TypeError(
                f"{type(self).__name__}: `obs_dim` must be given, as NNX makes variables at once; got {head}. Name the "
                "number of columns, and use one of the three heads."
            )
        check_precision(head.param_dtype)
        self.linen = head

    @property
    def lat_dim(self) -> int:
        """Latent dimension L."""
        return self.linen.lat_dim

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.linen.n_components

    @property
    def obs_dim(self) -> int:
        """Observed dimension D."""
        return int(self.linen.obs_dim or 0)

    @property
    def obs_rep(self) -> Any:
        """Kind of the noise covariance."""
        return self.linen.obs_rep

    @property
    def param_dtype(self) -> Any:
        """Dtype of the variables, in which everything is computed."""
        return self.linen.param_dtype

    @property
    def projection_dtype(self) -> Any:
        """Dtype in which x is multiplied by the D x L projection; None for `param_dtype`."""
        return self.linen.projection_dtype

    @property
    def component_structure(self) -> Structure:
        """Structure of the component precisions."""
        structure: Structure = self.linen.component_structure
        return structure

    def _model(self) -> Natural:
        raise NotImplementedError

    def _natural(self, x: Array | None = None) -> Natural | Prepared:
        natural, dtype = self._model(), self.projection_dtype
        return natural if x is None or dtype is None else prepare(natural, dtype)

    def __call__(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> HMoGOutput:
        """Log-density, log-responsibilities and latent mean of x (..., D)."""
        return self.infer(x, missing=missing)

    def infer(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> HMoGOutput:
        """Log-density, log-responsibilities and latent mean of x (..., D), in training too without a step of EM."""
        return inference.infer(self._natural(x), x, missing=missing)

    def sample(self, n: int, key: Array) -> tuple[Float[Array, "n D"], Float[Array, "n L"], Int[Array, " n"]]:
        """X (n, D), y (n, L), z (n,) from the joint, by a PRNG key, as `rngs.sample()` gives one."""
        return inference.sample(self.natural(), key, n)

    def warm_start(self, natural: Natural, x: Samples | None = None) -> WarmStartInfo:
        """Take over a fitted model, in place.

        Args:
            natural: the model, for example `fit_em(head, x, key).natural`.
            x: observations (N, D) to compare on; None draws them from the model.

        Returns:
            `WarmStartInfo`; see the function `warm_start`.
        """
        variables, info = warm_start(self.linen, natural, x)
        self.take(variables)
        return info

    def take(self, variables: Variables) -> None:
        """Take over the variables of the linen head, in place."""
        raise NotImplementedError

    def variables(self) -> dict[str, Any]:
        """The variables of the linen head: `head.linen.apply(head.variables(), x)` is `head(x)`."""
        raise NotImplementedError


@public_methods
class TrainableHead(HMoGHead[linen.TrainableHead]):
    """Base of the heads trained by gradients: leaves `nnx.Param`, any real values of which are a model. Abstract."""

    def __init__(self, head: linen.TrainableHead, rngs: nnx.Rngs, logical_axes: bool) -> None:
        super().__init__(head)
        for name, spec in self._specs().items():
            value = spec.scale * jax.random.normal(rngs.params(), spec.shape, head.param_dtype)
            axes: Any = {"out_sharding": spec.axes} if logical_axes else {}
            setattr(self, name, nnx.Param(value, **axes))

    def _specs(self) -> Any:
        kinds = as_rep(self.obs_rep), self.component_structure
        return leaf_specs(self.obs_dim, self.lat_dim, self.n_components, *kinds)

    def _model(self) -> Natural:
        return leaves_to_natural(self._leaves(), as_rep(self.obs_rep), self.component_structure, self.linen.bounds)

    def _leaves(self) -> dict[str, Any]:
        return {name: getattr(self, name).get_value() for name in self._specs()}

    def take(self, variables: Variables) -> None:
        """Take over the variables of the linen head, in place."""
        leaves = meta.unbox(variables["params"])
        for name in self._specs():
            getattr(self, name).set_value(jnp.asarray(leaves[name]))

    def variables(self) -> dict[str, Any]:
        """The variables of the linen head: `head.linen.apply(head.variables(), x)` is `head(x)`."""
        return {"params": self._leaves()}


@public_methods
class DifferentiableHMoG(TrainableHead):
    """HMoG head trained by gradients, its posterior precisions of a restricted kind: the cheap head.

    Args:
        lat_dim: latent dimension L, at most D.
        n_components: number of components K.
        obs_dim: observed dimension D.
        rngs: of the initial values, the stream "params".
        logical_axes: name the axes of leaves "observed", "latent" and "component", within a mesh and
            `nnx.logical_axis_rules` for these names, or `nnx.use_eager_sharding(False)`.
        options: the other attributes of the linen head, by name: pst_rep, obs_rep, param_dtype, projection_dtype,
            bounds.

    Raises:
        ValueError: for dimensions, kinds or bounds that make no model.

    Example:
        >>> from flax_hmog import nnx as heads
        >>> from flax_hmog.toy import x
        >>> head = heads.DifferentiableHMoG(lat_dim=2, n_components=3, obs_dim=4, rngs=nnx.Rngs(0))
        >>> nnx.jit(lambda head, x: head(x))(head, x).log_responsibilities.shape
        (12, 3)
    """

    def __init__(
        self, lat_dim: int, n_components: int, obs_dim: int, *, rngs: nnx.Rngs, logical_axes: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(linen.DifferentiableHMoG(lat_dim, n_components, obs_dim, **options), rngs, logical_axes)


@public_methods
class SymmetricHMoG(TrainableHead):
    """HMoG head trained by gradients whose prior and posterior share one structure.

    Args:
        lat_dim: latent dimension L, at most D.
        n_components: number of components K.
        obs_dim: observed dimension D.
        rngs: of the initial values, the stream "params".
        logical_axes: as in `DifferentiableHMoG`.
        options: the other attributes of the linen head, by name: lat_rep, obs_rep, param_dtype, projection_dtype,
            bounds.

    Raises:
        ValueError: for dimensions, kinds or bounds that make no model.

    Example:
        >>> from flax_hmog import nnx as heads
        >>> from flax_hmog.toy import x
        >>> head = heads.SymmetricHMoG(lat_dim=2, n_components=3, obs_dim=4, lat_rep="scale", rngs=nnx.Rngs(0))
        >>> head.latent_mean(x).shape
        (12, 2)
    """

    def __init__(
        self, lat_dim: int, n_components: int, obs_dim: int, *, rngs: nnx.Rngs, logical_axes: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(linen.SymmetricHMoG(lat_dim, n_components, obs_dim, **options), rngs, logical_axes)


@public_methods
class AnalyticHMoG(HMoGHead[linen.AnalyticHMoG]):
    """HMoG head with full covariances, fitted by closed-form EM; it has no `nnx.Param`.

    In training a call takes a step of stepwise EM, as BatchNorm takes its averages: after `train()` of it or a module
    around it, until `eval()`, or for one call with `train=True`. It begins out of training.

    Args:
        lat_dim: latent dimension L, at most D.
        n_components: number of components K.
        obs_dim: observed dimension D.
        x: a batch (B, D) from which the first model takes location and scale; None for mean 0 and variances 1.
        rngs: of the first model, the stream "params".
        options: the other attributes of the linen head, by name: obs_rep, param_dtype, projection_dtype, step_delay,
            step_decay, min_rate, pseudo_share, axis_name.

    Raises:
        ValueError: for dimensions or kinds that make no model, or rates out of bounds.

    Example:
        >>> from flax_hmog import nnx as heads
        >>> from flax_hmog.toy import x
        >>> head = heads.AnalyticHMoG(lat_dim=2, n_components=3, obs_dim=4, x=x, rngs=nnx.Rngs(0))
        >>> head.train()
        >>> output = nnx.jit(lambda head, x: head(x))(head, x)  # a step of EM
        >>> int(head.em.get_value()["step"])
        1
    """

    def __init__(
        self, lat_dim: int, n_components: int, obs_dim: int, *, rngs: nnx.Rngs, x: Array | None = None, **options: Any
    ) -> None:
        super().__init__(linen.AnalyticHMoG(lat_dim, n_components, obs_dim, **options))
        self.use_running_average = True  # the name that `train` and `eval` of NNX set
        x = None if x is None else in_memory("x", x)
        sizes = obs_dim, lat_dim, n_components, as_rep(self.obs_rep), self.param_dtype
        self.em = EMState(stepwise_start(first_moments(rngs.params(), x, *sizes)))

    def _model(self) -> Natural:
        return moments_to_natural(self.moments())

    def __call__(self, x: Float[Array, "... D"], train: bool | None = None, *, missing: str = "refuse") -> HMoGOutput:
        """Log-density, log-responsibilities and latent mean of x (..., D); in training also a step of stepwise EM."""
        learns = train if train is not None else not self.use_running_average
        if learns and missing != "refuse":
            raise ValueError(
                f'{door()}: `missing` must be "refuse" for steps of EM in a network; got {missing!r}. Use fit_em.'
            )
        output = self.infer(x, missing=missing)
        if learns:
            options, axis_name = self.linen.options, self.linen.axis_name
            self.em.set_value(accepted_update(self.em.get_value(), in_memory("x", x), options, axis_name))
        return output

    def moments(self) -> Moments:
        """The model in standard form, as `em` holds it."""
        moments: Moments = self.em.get_value()["model"]
        return moments

    def expectation_maximization(
        self, x: Float[Array, "N D"], weights: Array | None = None, regularizer: Regularizer | None = None, *,
        missing: str = "refuse",
    ) -> tuple[Natural, EMInfo]:  # fmt: skip
        """One step of exact EM on x (N, D): the new model and diagnostics; `em` is not changed."""
        return em_step(self._natural(x), x, weights, regularizer, missing=missing)

    def take(self, variables: Variables) -> None:
        """Take over the variables of the linen head, in place."""
        self.em.set_value(jax.tree.map(jnp.asarray, dict(variables["em"])))

    def variables(self) -> dict[str, Any]:
        """The variables of the linen head: `head.linen.apply(head.variables(), x)` is `head(x)`."""
        return {"em": self.em.get_value()}


NATIVE: dict[type[linen.HMoGHead], Any] = {
    linen.DifferentiableHMoG: DifferentiableHMoG,
    linen.SymmetricHMoG: SymmetricHMoG,
    linen.AnalyticHMoG: AnalyticHMoG,
}


@public
def from_linen(head: linen.HMoGHead, variables: Variables) -> HMoGHead[Any]:
    """The NNX head of a linen one with its variables, as `restore` and `warm_start` give them.

    The way back is `head.linen` and `head.variables()`.

    Args:
        head: unbound linen head.
        variables: its variables.

    Returns:
        A head that gives the same outputs.

    Raises:
        TypeError: for a module that is none of the three heads.

    Example:
        >>> from flax_hmog.toy import head, variables, x
        >>> bool((from_linen(head, variables)(x).log_density == head.apply(variables, x).log_density).all())
        True
    """
    if type(head) not in NATIVE:
        raise TypeError(
            f"{door()}: `head` must be one of the three linen heads; got {type(head).__name__}. Bring other linen "
            "modules over by nnx.bridge.ToNNX."
        )
    given = {f.name: getattr(head, f.name) for f in dataclasses.fields(head) if f.name not in ("parent", "name")}
    bias = meta.unbox(variables["params"]["bias"]) if "params" in variables else variables["em"]["model"].bias
    native: HMoGHead[Any] = NATIVE[type(head)](**(given | {"obs_dim": bias.shape[0]}), rngs=nnx.Rngs(0))
    native.take(variables)
    return native
