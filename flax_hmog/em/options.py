"""The options of EM: regularisation, start and end, and the rate at which it learns from batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Float

from flax_hmog.data.shards import with_auto_axes
from flax_hmog.em.shrinkage import FIRST_STRENGTH
from flax_hmog.model.checks import check_size, check_type, door, public
from flax_hmog.model.coordinates import Moments, Natural, Prepared, within_covariance
from flax_hmog.model.kinds import Array, Kind, PositiveDefinite, matmul, pytree
from flax_hmog.model.typed import jit

METHODS = ("pca", "fa")
COLUMN_UNITS = ("auto", "own", "common")


@pytree
class Regularizer:
    """Pseudo-statistics that EM adds to those of the data.

    They are fixed before the first step, so that the penalised log-likelihood

        sum_i log p(x_i) + weights sum_k log w_k + noise E[log N(e; 0, Psi)]
            + components sum_k (mean_share E[log N(y; m_k, S_k)] + (1 - mean_share) E[log N(y; m_*, S_k)])
            - shrinkage min_{Omega, s} sum_k KL(N(0, s_k Omega) || N(0, S_k)),
        y ~ N(m_*, component_covariance),  m_* = component_mean,  e ~ N(0, noise_covariance),

    never decreases, and an empty component or a constant column does no harm. Pseudo-samples of `shrinkage` follow the
    model: they have the shape that its components share, at the scale of each, about its own mean.

    Attributes:
        weights: pseudo-count added to each component's weight ().
        components: pseudo-samples added to each component's covariance ().
        noise: pseudo-samples added to the noise ().
        component_mean: (L,), in the latent basis of the model.
        component_covariance: `PositiveDefinite` (L, L), in the latent basis of the model.
        noise_covariance: of kind `obs_rep`, in squared units of x; of a model with a frame, in those of its frame.
        shrinkage: pseudo-samples of each component's covariance, of the shape that all share (); None for none.
        mean_share: the share of `components` that lies at `component_mean` and counts for the mean of the component
            (); the others lie about its own mean. None for all of them.
        component_floor: least variance of a component in any direction, as a share of that of the whole latent space
            (); None for none.

    Example:
        >>> from flax_hmog.toy import moments
        >>> regularizer = PseudoCounts().regularizer(moments)
        >>> regularizer.component_covariance.entries.shape, regularizer.noise_covariance.entries.shape
        ((2, 2), (4,))
    """

    weights: Float[Array, ""]
    components: Float[Array, ""]
    noise: Float[Array, ""]
    component_mean: Float[Array, " L"]
    component_covariance: PositiveDefinite
    noise_covariance: Kind
    shrinkage: Float[Array, ""] | None = None
    mean_share: Float[Array, ""] | None = None
    component_floor: Float[Array, ""] | None = None

    def shrinking(self, count: float) -> Regularizer:
        """The same with so many pseudo-samples of each component's covariance."""
        return dataclasses.replace(self, shrinkage=jnp.asarray(count, self.weights.dtype))


@dataclasses.dataclass(frozen=True)
class PseudoCounts:
    """Strength of the regulariser, in samples; their mean and covariance are taken from the initial model.

    Attributes:
        weights: added to each component's weight.
        components: added to each component's mean and covariance; such a sample has the pooled within-component
            covariance and lies at the mean of the latent space.
        noise: added to the noise; such a sample has the noise variances of the initial model, but no less than
            `noise_floor` times their average (of full noise, along its principal axes).
        noise_floor: see `noise`; a share, not a number of samples.
        noise_share: the same, per sample of the data, where that is more than `noise`.
        shrinkage: added to each component's covariance about its own mean; such a sample has the shape that all
            components share, at the scale of this one. "auto" takes the number under which the scatter of the
            components is most likely, as a fit finds it from its start: one to fifty for each factor.
        mean_share: the share of `components` that lies at the mean of the latent space; the others lie about the
            component's own mean, and do not widen what is far apart. In (0, 1]; .01 makes new rows likelier on most
            tables.
        component_floor: least variance of a component in any direction, as a share of that of the whole latent space:
            float32 cannot tell much less from none. 0 for no floor.

    Source: Fraley and Raftery 2007 (mean_share).

    Example:
        >>> from flax_hmog.toy import moments
        >>> regularizer = PseudoCounts(components=10.0).regularizer(moments)
        >>> float(regularizer.components), regularizer.component_mean.tolist()  # at E[y]
        (10.0, [0.0, 0.5])
    """

    weights: float = 1.0
    components: float = 1.0
    noise: float = 1.0
    noise_floor: float = 1e-2
    noise_share: float = 0.0
    shrinkage: float | Literal["auto"] = 0.0
    mean_share: float = 1.0
    component_floor: float = 1e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                if (field.name, value) != ("shrinkage", "auto"):
                    raise ValueError(
                        f"PseudoCounts: `{field.name}` must be a number, or for shrinkage 'auto'; got {value!r}. "
                        "Give one."
                    )
                continue
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"PseudoCounts: `{field.name}` must be at least 0; got {value!r}. Use 0 for none of this kind."
                )
        if not 0 < self.mean_share <= 1:
            raise ValueError(
                f"PseudoCounts: `mean_share` must be above 0 and at most 1; got {self.mean_share!r}. Without any pull "
                "the mean of an empty component would be undefined."
            )

    def regularizer(self, moments: Moments, n_samples: float = 0.0) -> Regularizer:
        """The pseudo-statistics of this strength for EM that starts from `moments`, on so many samples.

        For shrinkage "auto" those of the step from which a fit finds the number: two for each factor.
        """
        noise = max(self.noise, self.noise_share * n_samples)
        counts = self.weights, self.components, noise, self.mean_share
        regularizer = _pseudo_statistics(moments, counts, (self.noise_floor, self.component_floor))
        if not self.component_floor:
            regularizer = dataclasses.replace(regularizer, component_floor=None)
        count = self.shrinkage
        if count == "auto":
            count = FIRST_STRENGTH * moments.loadings.shape[1]
        return regularizer.shrinking(count) if count else regularizer


@jit
def _pseudo_statistics(moments: Moments, counts: tuple[float, ...], floors: tuple[float, float]) -> Regularizer:
    weights, components, noise, mean_share = (jnp.asarray(count, moments.loadings.dtype) for count in counts)
    return Regularizer(
        weights=weights,
        components=components,
        noise=noise,
        component_mean=matmul(moments.weights, moments.means),
        component_covariance=within_covariance(moments),
        noise_covariance=moments.noise.floored(floors[0]),
        mean_share=mean_share,
        component_floor=jnp.asarray(floors[1], weights.dtype),
    )


@dataclasses.dataclass(frozen=True)
class EMOptions:
    """The options of EM, under the same names wherever they are used.

    `fit_em` and `fit_online_em` take them as `options`, single ones by name beside it; those of `AnalyticHMoG` are its
    attributes. What a function does not use it refuses by name.

    Attributes:
        init: "pca" or "fa" (see `initialize_moments`), or a model to start from; its prior is whitened first.
        regularizer: strength of pseudo-samples that look like the initial model, or the pseudo-samples themselves (in
            the latent basis of `init`); None for maximum likelihood, whose maximum need not exist.
        column_units: with diagonal noise, columns have units of their own ("own": the fit is the same in any
            units) or one for all ("common", as pixels); "auto" takes common ones if most columns share their bounds.
            Full noise has one unit for all unless "own" is asked for, scale noise always.
        max_distance: rows farther than this from the median, in typical distances, are left out with a warning; `inf`
            keeps all (docs/sharp_bits.md).
        n_restarts: for `fit_em`: starts from different keys, each run to its end; the best objective wins.
        max_steps: for `fit_em`: steps per start at most.
        tolerance: for `fit_em`: a gain in nats per sample below which a start has converged.
        accelerate: for `fit_em`: reach the same objective in fewer and cheaper passes, of which all but the last look
            at few components per row; None does so where it pays, longer compilation included: on CPUs, with 100
            components or more, data in memory, and passes that take about half a second or more. With 32 components or
            fewer, or data in blocks or batches, the fit is the one without it (docs/performance.md).
        batch_size: for `fit_online_em`: samples per step, where the data are no batches.
        passes: for `fit_online_em`: passes over the data.
        average: for `fit_online_em`: average the statistics over the last pass; for small batches or a slow decay.
        step_delay: for steps after batches: delay of the rate, at least 1.
        step_decay: for steps after batches: exponent of the rate, in (0.5, 1] for convergence. `AnalyticHMoG` takes 0.7
            where none is given: features change while they are learnt, and what is old should weigh less.
        min_rate: for steps after batches: smallest rate: 0 to converge on data that stay, about 0.01 to follow features
            that move.
        pseudo_share: for `AnalyticHMoG`: pseudo-samples per sample of a batch. They follow the model, since the scale
            of features that are being learnt is not known beforehand; those of `regularizer` stay.

    Example:
        >>> from flax_hmog import fit_em
        >>> from flax_hmog.toy import head, natural, x
        >>> options = EMOptions(init=natural, max_steps=3)
        >>> fit_em(head, x, jax.random.key(0), options=options, tolerance=0.0).objective_history.shape
        (4,)
    """

    init: Literal["pca", "fa"] | Moments | Natural | Prepared = "pca"
    regularizer: PseudoCounts | Regularizer | None = PseudoCounts()
    column_units: Literal["auto", "own", "common"] = "auto"
    max_distance: float = 1e3
    n_restarts: int = 1
    max_steps: int = 200
    tolerance: float = 1e-3
    accelerate: bool | None = None
    batch_size: int = 512
    passes: int = 3
    average: bool = False
    step_delay: float = 2.0
    step_decay: float = 0.75
    min_rate: float = 0.0
    pseudo_share: float = 1e-4

    @public
    def __post_init__(self) -> None:
        check_options({name: getattr(self, name) for name in NAMES})

    def rate(self, step: int | Array) -> Any:
        """The step size after so many steps: max(min_rate, (step + step_delay) ** -step_decay)."""
        falling = (step + self.step_delay) ** -self.step_decay
        return max(falling, self.min_rate) if isinstance(step, int) else jnp.maximum(falling, self.min_rate)


NAMES = tuple(field.name for field in dataclasses.fields(EMOptions))
OF_FITS = ("init", "regularizer", "column_units", "max_distance")
OF_RATES = ("step_delay", "step_decay", "min_rate")
USED = {
    "fit_em": (*OF_FITS, "n_restarts", "max_steps", "tolerance", "accelerate"),
    "fit_online_em": (*OF_FITS, "batch_size", "passes", "average", *OF_RATES),
    "AnalyticHMoG": (*OF_RATES, "pseudo_share"),
}
COUNTS = ("n_restarts", "max_steps", "batch_size", "passes")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "init": (lambda init: not isinstance(init, str) or init in METHODS, f"a model or one of {METHODS}"),
    "column_units": (lambda units: units in COLUMN_UNITS, f"one of {COLUMN_UNITS}"),
    "accelerate": (lambda accelerate: isinstance(accelerate, bool | None), "True, False or None"),
    "max_distance": (lambda distance: distance > 1, "above 1"),
    "step_delay": (lambda delay: delay >= 1, "at least 1"),
    "step_decay": (lambda decay: 0 < decay <= 1, "above 0 and at most 1"),
    "min_rate": (lambda rate: 0 <= rate <= 1, "from 0 to 1"),
    "pseudo_share": (lambda share: share >= 0, "at least 0"),
}


def check_options(values: Mapping[str, Any]) -> None:
    """ValueError or TypeError for the first option, by name, whose value is none."""
    for name, value in values.items():
        if name in COUNTS:
            check_size(name, value)
        elif name in RULES and not RULES[name][0](value):
            default = getattr(EMOptions, name)
            raise ValueError(f"{door()}: `{name}` must be {RULES[name][1]}; got {value!r}. The default is {default!r}.")
        elif name == "init" and not isinstance(value, str | Moments | Prepared):
            check_type(name, value, Natural, 'Give "pca", "fa", Moments or Natural.')
        elif name == "regularizer" and not isinstance(value, PseudoCounts | None):
            check_type(name, value, Regularizer, "Give PseudoCounts(), a Regularizer or None.")


def chosen_options(function: str, options: EMOptions, changes: Mapping[str, Any]) -> EMOptions:
    """The options of a fit, those that were given by name in place of those of `options`.

    Raises:
        TypeError: for a name that is no option of `function`, or as `check_used`.
        ValueError: for a value that is none.
    """
    check_type("options", options, EMOptions, "Give EMOptions(...), and single options by their names.")
    check_used(function, options, changes)
    check_options(changes)
    options = dataclasses.replace(options, **changes)
    arrays = {name: with_auto_axes(getattr(options, name)) for name in ("init", "regularizer")}
    return dataclasses.replace(options, **arrays)


def check_used(function: str, options: EMOptions, names: Iterable[str] = ()) -> None:
    """TypeError unless `function` uses the options with these names, and all those that differ from their defaults."""
    used = USED[function]
    changed = [name for name in NAMES if name not in used and getattr(options, name) != getattr(EMOptions, name)]
    for name in (*names, *changed):
        if name not in used:
            users = " and ".join(user for user, known in USED.items() if name in known)
            raise TypeError(
                f"{function}: `{name}` must be an option of {function}; got "
                f"{f'one of {users}' if users else 'no option'}. Choose from {', '.join(used)}."
            )
