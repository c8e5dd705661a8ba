"""The three heads as linen modules: leaves, calls and factories. The formulas are in the files below."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import Scope, meta
from jaxtyping import Float, Int

from flax_hmog.data.containers import in_memory
from flax_hmog.em.online import accepted_update, first_moments
from flax_hmog.em.options import USED, EMOptions, Regularizer, check_options
from flax_hmog.em.step import EMInfo, em_step
from flax_hmog.heads.answers import Answers
from flax_hmog.heads.leaves import Bounds, leaf_specs, leaves_to_natural
from flax_hmog.inference import posterior as inference
from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.checks import (
    check_float_dtype,
    check_interval,
    check_positive,
    check_precision,
    check_size,
    door,
    public_methods,
)
from flax_hmog.model.conversions import moments_to_natural
from flax_hmog.model.coordinates import Moments, Natural, Prepared, ResidualMoments
from flax_hmog.model.kinds import Array, PositiveDefinite, as_rep
from flax_hmog.model.prepared import prepare
from flax_hmog.model.structure import Structure


@public_methods
class HMoGHead(Answers, nn.Module):
    """Base of the three heads: inference on the model that `natural()` returns. Abstract.

    All methods take observations with any leading dimensions and are called through
    `head.apply(variables, x, method=...)`. See the functions of the same names for shapes, errors and `missing`.

    Attributes:
        lat_dim: latent dimension L, at most D.
        n_components: number of components K.
        obs_dim: observed dimension D; None takes it from the data at init.
        obs_rep: kind of the noise covariance: "scale", "diagonal" or "full" (or the class).
        param_dtype: dtype of the variables, in which everything is computed; by name.
        projection_dtype: dtype in which x is multiplied by the D x L projection, as "bfloat16"; None for `param_dtype`;
            by name.

    Raises:
        ValueError: for dimensions or kinds that make no model.
    """

    lat_dim: int
    n_components: int
    obs_dim: int | None = None
    obs_rep: Any = "diagonal"
    param_dtype: Any = dataclasses.field(default=jnp.float32, kw_only=True)
    projection_dtype: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.parent, Scope):  # the copy that `apply` makes was checked
            _check_head(self)
        super().__post_init__()

    def _model(self, obs_dim: int, x: Array | None) -> Natural:
        """The model, its variables created at init; x is the batch of that call, or None."""
        raise TypeError(
            f"{type(self).__name__}: a head must be DifferentiableHMoG, SymmetricHMoG or AnalyticHMoG; got the "
            "abstract class. Use one of the three."
        )

    def _natural(self, x: Array | None = None) -> Natural | Prepared:
        """The model; prepared where rows x are to be projected in another dtype."""
        check_precision(self.param_dtype)
        known = self.obs_dim
        if known is None and self.has_variable("params", "bias"):
            known = meta.unbox(self.get_variable("params", "bias")).shape[-1]
        elif known is None and self.has_variable("em", "model"):
            known = self.get_variable("em", "model").bias.shape[-1]
        if known is None and x is not None:
            x = in_memory("x", x)
            known = x.shape[-1] if x.ndim else None
        if known is None:
            raise ValueError(
                f"{door()}: `obs_dim` must be known; got None and no observations. Initialise with an x, or give it."
            )
        if self.is_initializing():
            check_size("lat_dim", self.lat_dim, at_most=known)
        natural, dtype = self._model(known, x), self.projection_dtype
        return natural if x is None or dtype is None else prepare(natural, dtype)

    def __call__(self, x: Float[Array, "... D"], *, missing: str = "refuse") -> HMoGOutput:
        """Log-density, log-responsibilities and latent mean of x (..., D)."""
        return inference.infer(self._natural(x), x, missing=missing)

    def sample(self, n: int) -> tuple[Float[Array, "n D"], Float[Array, "n L"], Int[Array, " n"]]:
        """X (n, D), y (n, L), z (n,) from the joint, with the rng stream "sample"."""
        return inference.sample(self.natural(), self.make_rng("sample"), n)


@public_methods
class TrainableHead(HMoGHead):
    """Base of the heads trained by gradients: leaves in the collection `params`, any real values of which are a model.

    They are given by name, as others than `pst_rep` and those of `HMoGHead` are.

    Attributes:
        noise_bounds: interval of the noise variances, squared units of x.
        precision_bounds: interval of the component precisions, in latent units.
        signal_bound: largest norm of a column of noise-whitened loadings, in prior standard deviations.
        relative_floor: smallest eigenvalue of correlations, and of component precisions relative to their average.
    """

    noise_bounds: tuple[float, float] = dataclasses.field(default=Bounds.noise, kw_only=True)
    precision_bounds: tuple[float, float] = dataclasses.field(default=Bounds.precision, kw_only=True)
    signal_bound: float = dataclasses.field(default=Bounds.signal, kw_only=True)
    relative_floor: float = dataclasses.field(default=Bounds.relative_floor, kw_only=True)

    @property
    def component_structure(self) -> Structure:
        """Structure of the component precisions."""
        raise NotImplementedError

    @property
    def bounds(self) -> Bounds:
        """The intervals of the leaves."""
        return Bounds(self.noise_bounds, self.precision_bounds, self.signal_bound, self.relative_floor)

    @nn.compact
    def _model(self, obs_dim: int, x: Array | None) -> Natural:
        obs_rep = as_rep(self.obs_rep)
        structure = self.component_structure
        specs = leaf_specs(obs_dim, self.lat_dim, self.n_components, obs_rep, structure)
        leaves: dict[str, Any] = {}
        for name, spec in specs.items():
            init = nn.with_logical_partitioning(nn.initializers.normal(spec.scale), spec.axes)
            leaves[name] = self.param(name, init, spec.shape, self.param_dtype)
        return leaves_to_natural(leaves, obs_rep, structure, self.bounds)


@public_methods
class DifferentiableHMoG(TrainableHead):
    """HMoG head trained by gradients, its posterior precisions of a restricted kind: the cheap head.

    Component covariances of the prior are full; with a restricted `pst_rep` their inverses share all entries off the
    diagonal. A batch then costs O(B (D L + K L)), besides O(D L^2 + K L^3) once per call.

    Attributes besides those below: `HMoGHead`, `TrainableHead`.

    Attributes:
        pst_rep: kind of the posterior precisions of y.

    Raises:
        ValueError: for dimensions, kinds or bounds that make no model.

    Example:
        >>> from flax_hmog.toy import x
        >>> head = DifferentiableHMoG(lat_dim=2, n_components=3)
        >>> output, variables = jax.jit(head.init_with_output)(jax.random.key(0), x)
        >>> output.log_responsibilities.shape, sorted(variables["params"])
        ((12, 3), ['bias', 'loadings', 'logits', 'means', 'noise', 'precisions'])
    """

    pst_rep: Any = "diagonal"

    @property
    def component_structure(self) -> Structure:
        """Structure of the component precisions."""
        return Structure(as_rep(self.pst_rep))


@public_methods
class SymmetricHMoG(TrainableHead):
    """HMoG head trained by gradients whose prior and posterior share one structure.

    Component precisions are a full base plus differences of kind `lat_rep`; with "full" nothing is restricted.

    Attributes besides those below: `HMoGHead`, `TrainableHead`.

    Attributes:
        lat_rep: kind of the differences between component precisions.

    Raises:
        ValueError: for dimensions, kinds or bounds that make no model.

    Example:
        >>> from flax_hmog.toy import x
        >>> head = SymmetricHMoG(lat_dim=2, n_components=3, lat_rep="diagonal")
        >>> output, variables = jax.jit(head.init_with_output)(jax.random.key(0), x)
        >>> output.latent_mean.shape
        (12, 2)
    """

    lat_rep: Any = "full"

    @property
    def component_structure(self) -> Structure:
        """Structure of the component precisions."""
        return Structure(as_rep(self.lat_rep), has_base=True)


@public_methods
class AnalyticHMoG(HMoGHead):
    """HMoG head with full covariances, fitted by closed-form EM; it has no `params`.

    The collection `em` holds the model, running statistics about it and a step count, as BatchNorm keeps its averages;
    `init` on a batch takes location and scale from it. With `train=True` and `mutable=["em"]` a call takes a step of
    stepwise EM at the rate `max(min_rate, (step + step_delay) ** -step_decay)`; gradients flow to x only. A batch with
    entries that are not finite leaves the collection as it is, and shows in what the call returns; where features jump
    too far for a step, the model moves to their location and scale. Under `jit` over a mesh a batch is taken as a
    whole. Whole data sets: `fit_em`, then `warm_start`.

    Attributes besides those below: `HMoGHead`.

    Attributes:
        step_delay: delay of the step size, at least 1.
        step_decay: exponent of the step size, in (0.5, 1] for convergence.
        min_rate: smallest step size: 0 to converge on features that stay, about 0.01 to follow features that move.
        pseudo_share: strength of the regulariser, in pseudo-samples per sample of a batch (`stepwise_update`).
        axis_name: axis of `shard_map` or `vmap` over which a batch is spread; None under `jit`.

    Raises:
        ValueError: for dimensions or kinds that make no model, or rates out of bounds.

    Example:
        >>> from flax_hmog.toy import head, variables, x  # AnalyticHMoG(lat_dim=2, n_components=3, obs_dim=4)
        >>> step = jax.jit(lambda variables, x: head.apply(variables, x, train=True, mutable=["em"]))
        >>> output, variables = step(variables, x)  # a step of EM
        >>> int(variables["em"]["step"])
        1
    """

    step_delay: float = EMOptions.step_delay
    step_decay: float = 0.7
    min_rate: float = EMOptions.min_rate
    pseudo_share: float = EMOptions.pseudo_share
    axis_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options({name: getattr(self, name) for name in USED["AnalyticHMoG"]})

    @property
    def options(self) -> EMOptions:
        """The options of its steps of EM, which are attributes."""
        return EMOptions(**{name: getattr(self, name) for name in USED["AnalyticHMoG"]})

    @property
    def component_structure(self) -> Structure:
        """Structure of the component precisions."""
        return Structure(PositiveDefinite)

    @nn.compact
    def _model(self, obs_dim: int, x: Array | None) -> Natural:
        obs_rep = as_rep(self.obs_rep)

        def first() -> Moments:
            sizes = obs_dim, self.lat_dim, self.n_components
            return first_moments(self.make_rng("params"), x, *sizes, obs_rep, self.param_dtype)

        moments = self.variable("em", "model", first)
        self.variable("em", "running", lambda: ResidualMoments.of(moments.value))
        self.variable("em", "step", lambda: jnp.zeros((), jnp.int32))
        return moments_to_natural(moments.value)

    def __call__(self, x: Array, train: bool = False, *, missing: str = "refuse") -> HMoGOutput:
        """Log-density, log-responsibilities and latent mean of x (..., D); with `train` also a step of stepwise EM."""
        if train and missing != "refuse":
            raise ValueError(
                f'{door()}: `missing` must be "refuse" for steps of EM in a network; got {missing!r}. Use fit_em.'
            )
        natural = self._natural(x)
        if train and not self.is_initializing():
            x = in_memory("x", x)
            em: Any = {name: self.get_variable("em", name) for name in ("model", "running", "step")}
            for name, value in accepted_update(em, x, self.options, self.axis_name).items():
                self.put_variable("em", name, value)
        return inference.infer(natural, x, missing=missing)

    def moments(self) -> Moments:
        """The model in standard form, as the collection `em` holds it."""
        self.natural()
        return self.get_variable("em", "model")

    def expectation_maximization(
        self,
        x: Float[Array, "N D"],
        weights: Array | None = None,
        regularizer: Regularizer | None = None,
        *,
        missing: str = "refuse",
    ) -> tuple[Natural, EMInfo]:
        """One step of exact EM on x (N, D): the new model and diagnostics; the collection `em` is not changed."""
        return em_step(self._natural(x), x, weights, regularizer, missing=missing)


def _check_head(head: Any) -> None:
    """Check what a head was given, and hold its kinds by name."""
    for argument in ("obs_rep", "pst_rep", "lat_rep"):
        if hasattr(head, argument):
            rep = as_rep(getattr(head, argument), argument=argument)
            object.__setattr__(head, argument, rep.name)
            if argument == "pst_rep" and not (rep.is_diagonal or rep is PositiveDefinite):
                raise ValueError(
                    f'{door()}: `pst_rep` must be "full" or of a diagonal kind; got {rep.name!r}. Use SymmetricHMoG '
                    "with `lat_rep`."
                )
    check_size("n_components", head.n_components)
    if head.obs_dim is not None:
        check_size("obs_dim", head.obs_dim)
    check_size("lat_dim", head.lat_dim, at_most=head.obs_dim)
    for size in ("lat_dim", "n_components", *(["obs_dim"] if head.obs_dim is not None else [])):
        object.__setattr__(head, size, int(getattr(head, size)))  # numpy's integers are not JSON
    if isinstance(head, TrainableHead):
        check_interval("noise_bounds", head.noise_bounds)
        check_interval("precision_bounds", head.precision_bounds)
        check_positive("signal_bound", head.signal_bound, "Say how far axes may spread, as 1e3.")
        check_positive("relative_floor", head.relative_floor, "Use a small share, as 1e-3.")
    if jnp.dtype(head.param_dtype) not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{door()}: `param_dtype` must be float32 or float64, in which matrices can be factorised; got "
            f"{jnp.dtype(head.param_dtype).name}. Use jnp.float32, and projection_dtype or an encoder in bfloat16."
        )
    dtype = check_float_dtype("projection_dtype", head.projection_dtype)
    object.__setattr__(head, "projection_dtype", dtype)
