"""`fit_em`: starts, passes over arrays or streams of batches, convergence; and what `fit_online_em` shares."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.data.framing import Framing
from flax_hmog.data.shards import on_auto_axes, row_shards
from flax_hmog.data.sources import RowsOnDevice, Stream, as_source
from flax_hmog.em.cycles import follow_start, take_step
from flax_hmog.em.initialize import check_columns, check_counts, frame_of, starts
from flax_hmog.em.options import EMOptions, PseudoCounts, Regularizer, chosen_options
from flax_hmog.em.padding import InUse, Sizes, padded_sizes
from flax_hmog.em.products import checked_products
from flax_hmog.em.progress import progress_bar
from flax_hmog.em.result import ConvergenceWarning, EMResult, EMState, warn_of_overfit, wild_rows
from flax_hmog.em.shrinkage import FIRST_STRENGTH, estimated_shrinkage
from flax_hmog.em.statistics import accumulate
from flax_hmog.em.step import EMInfo, diagnose, finish_step, one_step, whiten_moments, whiten_regularizer
from flax_hmog.model.checks import OUTSIDE, check_outside_transformations, door, may_miss, named, public
from flax_hmog.model.conversions import (
    fits_units_of_x,
    moments_to_natural,
    own_in_units_of_x,
    own_moments,
    reframe,
)
from flax_hmog.model.coordinates import Moments, Natural, Prepared, check_full, check_natural, prior_moments
from flax_hmog.model.frames import Frame, has_more_digits
from flax_hmog.model.head import HeadSizes, check_head_and_key
from flax_hmog.model.kinds import Array, as_rep
from flax_hmog.model.prepared import prepare
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import Block, Data, Samples, jit

FAR = 100.0  # variance of a factor, 1 at the start, from which float32 needs another basis
ROUNDING = 100  # units in the last place of objective and dimension that objectives of one model may differ by


@public
@on_auto_axes
def fit_em(
    head: HeadSizes,
    data: Data,
    key: Array,
    *,
    weights: Samples | None = None,
    labels: Samples | None = None,
    options: EMOptions = EMOptions(),
    progress: bool = False,
    state: EMState | None = None,
    on_step: Callable[[EMState], None] | None = None,
    missing: str = "refuse",
    **changes: object,
) -> EMResult:
    """Fit a HMoG by exact EM.

    Every step is a pass over the data in blocks; the penalised log-likelihood never decreases (but for rounding in
    float32 and lower dtypes). Data are converted to `head.param_dtype`. Steps of an accelerated fit take more and
    cheaper passes: their objectives are lower bounds, the last one is exact.

    Args:
        head: unbound head with full component matrices (`AnalyticHMoG`); dimensions, `obs_rep` and `param_dtype` count.
        data: observations (N, D): an array, sharded or not, or a table; a memory map, an array of h5py or zarr, a scipy
            sparse matrix or an AnnData (its `X`, in memory or backed), of which one block at a time is brought to the
            device; or a collection of batches (B, D) that can be iterated repeatedly. docs/sharp_bits.md has a table.
        key: PRNG key of the initialisation.
        weights: sample weights (N,); not for a collection of batches.
        labels: known components (N,), which clamp responsibilities: integers, -1 where unknown, or names, numbered as
            they sort (`EMResult.classes`). None, NaN, NA and "" are unknown too. Not for a collection of batches.
        options: start, regulariser, restarts, convergence and units: see `EMOptions`.
        progress: show a progress bar.
        state: value given to `on_step`: goes on from there, with all other arguments as before, to the same result.
        on_step: called after every step, for example to save its `EMState`.
        missing: "nan" takes NaN, None, NA and masked entries for missing ones, exactly; not with full noise.
        changes: single options by name, in place of those of `options`: init, regularizer, n_restarts, max_steps,
            tolerance, accelerate, column_units, max_distance.

    Returns:
        `EMResult`.

    Raises:
        TypeError: for a head with restricted component matrices (see `warm_start`), data that cannot be read twice, or
            an option that is not of this function.
        ValueError: for unusable data or arguments, or if the objective stops being finite.

    Example:
        >>> from flax_hmog.toy import head, x
        >>> result = fit_em(head, x, jax.random.key(0), max_steps=3, tolerance=0.0)
        >>> result.objective_history.shape, bool((np.diff(result.objective_history) > 0).all())
        ((4,), True)
    """
    options = chosen_options("fit_em", options, changes)
    n_starts, passes = options.n_restarts, options.max_steps + 1
    fit = Fit(head, data, key, weights, labels, options, pad=True)
    if not isinstance(options.init, str) and n_starts > 1:
        raise ValueError(
            f"fit_em: `n_restarts` must be 1 for a given `init`; got {n_starts}. All starts would be the same."
        )
    state = EMState() if state is None else fit.padded(state)
    with progress_bar("EM", progress, n_starts * passes) as report:
        while (start := len(state.finals)) < n_starts:
            if state.natural is None:
                natural, regularizer = fit.start(jax.random.split(key, n_starts)[start])
                state = dataclasses.replace(state, natural=natural, regularizer=regularizer)
            with checked_products(fit, state.natural):
                state, objective = fit.step(state)
            report(start * passes + max(len(state.history) - 1, 0), start + 1, objective)
            if on_step is not None:
                with named(OUTSIDE):
                    on_step(fit.cropped(state))
    if state.best is None:
        raise ValueError(f"fit_em: `state` must be one of these starts; got {state.finals}. Give that of this fit.")
    history = state.best.objective_history
    if fit.fell(history.tolist()):
        warnings.warn(
            f"fit_em: the objective fell from {history.max():.6g} to {history[-1]:.6g} nats per sample after "
            f"{len(history) - 1} steps, beyond rounding; the best model is returned, `converged` is False. Raise the "
            "counts of `regularizer`, or fit in float64.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return fit.finished(dataclasses.replace(state.best, restart_objectives=np.asarray(state.finals)))


class Fit:
    """A head and samples, checked as `fit_em` says and moved to the frame that the fit computes in.

    With `pad` its models and rows have the sizes of `padded_sizes`; results have their own.
    """

    def __init__(
        self, head: HeadSizes, data: Data, key: Array, weights: Samples | None, labels: Samples | None,
        options: EMOptions, *, pad: bool = False,
    ) -> None:  # fmt: skip
        check_head_and_key(head, key)
        check_outside_transformations(data=data, key=key, weights=weights, labels=labels, init=options.init)
        check_full("head", head.component_structure.rep())
        counts = options.regularizer
        self.estimates = isinstance(counts, PseudoCounts) and counts.shrinkage == "auto"
        if isinstance(counts, PseudoCounts) and self.estimates:
            counts = dataclasses.replace(counts, shrinkage=FIRST_STRENGTH * head.lat_dim)
            options = dataclasses.replace(options, regularizer=counts)
        self.head, self.options, self.dtype = head, options, head.projection_dtype
        self.products: str | None = None  # of `checked_products`, once they were
        self.source = source = as_source(data, head.obs_dim, head.param_dtype, weights, labels, head.n_components)
        if source.count is not None:
            check_counts((source.count, source.obs_dim), head)
        rows, row_weights = source.host_sample()
        check_columns(head, rows, row_weights)
        self.missing = may_miss() and not (isinstance(source, RowsOnDevice) and np.isfinite(rows).all())
        self.frame, by_column = frame_of(head, rows, row_weights, options.column_units)
        exact = has_more_digits(rows, head.param_dtype)
        # from now on the source gives rows that go with the frame
        source.use_frame(Framing(self.frame, head.param_dtype, options.max_distance, by_column, exact))
        # log-volumes are added in float64 at the end: gains do not depend on the units of x
        self.volume = float(np.log(np.asarray(self.frame.unit, np.float64)).sum())
        self.row_frame = dataclasses.replace(source.framing.frame, log_volume=jnp.zeros_like(self.frame.log_volume))
        self.n_samples = source.n_rows if isinstance(source, Stream) else source.total_weight
        self.block: Block | None = None
        self.sizes: Sizes | None = None
        self.used: InUse | None = None
        if isinstance(source, RowsOnDevice):
            self.block = source.sample()  # which is all
            if pad and not self.missing and len(source.x.sharding.device_set) == 1:
                self.sizes = padded_sizes(source.count, source.obs_dim, head.lat_dim, head.n_components)
            if self.sizes is not None:
                self.used, self.block = self.sizes.in_use(), self.sizes.filled(self.block, source.framing.frame)

    def start(self, key: Array) -> tuple[Natural, Regularizer | None]:
        """The model that EM starts from, in the frame, and the regulariser in its latent basis.

        Of starts that measure distances in several metrics, each followed for some steps on the sample that starts are
        made from, the one with the best objective, the first of those that are equal to rounding.
        """
        init = self.options.init
        if not isinstance(init, str):
            natural = with_prior(self._checked_model(init))
            natural = natural if self.sizes is None else self.sizes.pad(natural)
            return self._estimated(
                *self._whitened(reframe(own_moments(natural), natural.frame, self.frame), natural.frame)
            )
        x, weights, labels = block = self.block or self.source.sample()
        best, framing = cast(Any, None), self.source.framing
        given: Any = {"method": init, "used": self.used}
        for moments in starts(self.head, x, weights, labels, framing.frame, framing.by_column, key, **given):
            natural, regularizer = self._whitened(moments, None)
            natural, objective = follow_start(self, EMState(natural, regularizer=regularizer), block)
            # starts that end at one optimum differ by rounding, which must not choose how components are numbered
            least = 0.0 if best is None else best[0] + self.rounding(best[0])
            if math.isfinite(objective) and (best is None or objective > least):
                best = objective, natural, regularizer
        if best is None:
            wrong = "keep the likelihood bounded on these data; got no start whose objective is finite"
            remedy = "Use PseudoCounts(), raise its counts, or leave `max_distance` finite."
            raise ValueError(f"{door()}: `regularizer` must {wrong}. {remedy}")
        _, natural, regularizer = best
        # wild entries were drawn in for the start: the rows as they are may spread much farther
        if float(np.max(prior_moments(own_moments(natural))[1].diagonal())) > FAR:
            natural, regularizer = _in_whitened_basis(natural, regularizer, self.used)
        return self._estimated(natural, regularizer)

    def _estimated(self, natural: Natural, regularizer: Regularizer | None) -> tuple[Natural, Regularizer | None]:
        """The same with the shrinkage that one step from the model finds, where it is to be found."""
        if regularizer is None or not self.estimates:
            return natural, regularizer
        updated, info, _ = self.evaluate(natural, regularizer, self.block or self.source.sample())
        before, after = (own_moments(n if self.sizes is None else self.sizes.crop(n)) for n in (natural, updated))
        rows = np.asarray(info.occupancy)[: self.head.n_components]
        first = FIRST_STRENGTH * self.head.lat_dim
        return natural, regularizer.shrinking(estimated_shrinkage(before, after, rows, first))

    def _checked_model(self, init: Moments | Natural | Prepared) -> Natural:
        """The model to start from, once its size is that of head and data."""
        head, init = self.head, moments_to_natural(init) if isinstance(init, Moments) else init
        natural = check_natural(init, "init")
        got = (*natural.interaction.shape, natural.posterior_location.shape[0], natural.observable_precision.name)
        obs_rep = as_rep(head.obs_rep, argument="head.obs_rep").name
        wanted = (self.source.obs_dim, head.lat_dim, head.n_components, obs_rep)
        if got != wanted:
            raise ValueError(
                f"{door()}: `init` must have (D, L, K, obs_rep) {wanted}; got {got}. Start from a model of one size."
            )
        return natural

    def _whitened(self, moments: Moments, own: Frame | None) -> tuple[Natural, Regularizer | None]:
        """A model in the frame with its prior whitened, and the regulariser for EM that starts from there.

        Args:
            moments: the model in the frame, as it is.
            own: the frame in whose units a given `Regularizer` holds its noise; None for units of x.
        """
        regularizer, whitened = self.options.regularizer, whiten_moments(moments)
        if isinstance(regularizer, PseudoCounts):
            regularizer = regularizer.regularizer(whitened, self.n_samples)
        elif regularizer is not None:
            ratio = (1 if own is None else own.unit) / self.frame.unit
            noise = regularizer.noise_covariance.scaled(ratio)
            regularizer = dataclasses.replace(regularizer, noise_covariance=noise)
            regularizer = regularizer if self.sizes is None else self.sizes.pad(regularizer)
            regularizer = whiten_regularizer(regularizer, moments)
        return _as_natural(whitened, self.used).in_frame(self.frame), regularizer

    def evaluate(
        self, natural: Natural, regularizer: Regularizer | None, block: Block | None = None
    ) -> tuple[Natural, EMInfo, float]:
        """One pass over the samples, or over one block of them, with a model in the frame.

        Returns:
            The model that maximises with the sums of the pass; diagnostics, their densities those of rows in the frame;
            and the penalised log-likelihood per sample of x, in nats.
        """
        inner, block = natural.in_frame(self.row_frame), block or self.block
        if block is not None:
            given: Any = {"shards": row_shards(block[0]), "projection_dtype": self.dtype, "missing": self.missing}
            updated, info, _, read = one_step(inner, block, regularizer, self.frame, **given, used=self.used)
        else:
            factors, statistics = prepare(inner, self.dtype), cast(Any, None)
            for rows in self.source.blocks():
                part = accumulate(factors, *rows, shards=row_shards(rows[0]), missing=self.missing)
                statistics = part if statistics is None else jax.tree.map(jnp.add, statistics, part)
            updated, info, _, read = finish_step(factors, statistics, regularizer, self.frame)
        # the only values of a step that are read
        objective, count = np.asarray(read, np.float64).tolist()
        return updated, info, self.of_x(objective, count, regularizer)

    def diagnose(self, natural: Natural, regularizer: Regularizer | None) -> tuple[EMInfo, float]:
        """Diagnostics and objective of `evaluate` for a model of an accelerated fit that takes no step."""
        block = self.source.sample()
        given: Any = {"shards": row_shards(block[0]), "projection_dtype": self.dtype}
        info = diagnose(natural.in_frame(self.row_frame), block, regularizer, self.frame, **given)
        return info, self.of_x(float(np.asarray(info.objective)), self.source.total_weight, regularizer)

    def of_x(self, objective: float, count: float, regularizer: Regularizer | None) -> float:
        """The objective per sample of x from that of rows in the frame."""
        penalised = 0.0 if regularizer is None else float(regularizer.noise) / count
        return objective - self.volume * (1 + penalised)

    def step(self, state: EMState) -> tuple[EMState, float]:
        """One pass: the next model of the start, or the end of the start; and the objective of the model before."""
        regularizer, is_last = state.regularizer, len(state.history) == self.options.max_steps
        # the penalty refers to the first latent basis, so that whitening waits for the end
        step = take_step(self, state, is_last=is_last)
        natural, info, objective = step.natural, step.info, step.objective
        if not math.isfinite(objective):
            raise ValueError(
                f"fit_em: `regularizer` must keep the likelihood bounded on these data; got objective {objective} "
                f"after {len(state.history)} steps. Use PseudoCounts() or raise its counts."
            )
        history = (*state.history, objective)
        top = natural if objective >= max(history) else state.top
        small_gain = len(history) > 1 and history[-1] - history[-2] < self.options.tolerance
        if not small_gain and not is_last:
            state = dataclasses.replace(state, natural=step.updated, top=top, history=history, cycles=step.cycles)
            return state, objective
        if info is None:  # the last pass is dense
            info, objective = self.diagnose(natural, regularizer)
            history = (*history[:-1], objective)
        if has_fallen := self.fell(history):
            natural = top
            _, info, objective = self.evaluate(natural, regularizer)
        if (best := state.best) is None or objective > max(state.finals):
            best = self.result(natural, info, objective, regularizer, history, small_gain and not has_fallen)
            best = dataclasses.replace(best, sparse=step.sparse)
        return EMState(best=best, finals=(*state.finals, objective)), objective

    def fell(self, history: Sequence[float]) -> bool:
        """True if the last objective is below the best one by more than rounding explains."""
        return max(history) - history[-1] > self.rounding(history[-1])

    def rounding(self, objective: float) -> float:
        """Difference of objectives that rounding can cause, in nats per sample; the same in any units of x."""
        obs_dim, precision = self.source.obs_dim, float(jnp.finfo(self.frame.unit.dtype).eps)
        explained = ROUNDING * precision * (abs(objective + float(self.frame.log_volume)) + obs_dim)
        if self.dtype is not None:
            explained += float(jnp.finfo(self.dtype).eps) * obs_dim
        return explained

    def result(
        self, natural: Natural, info: EMInfo, objective: float, regularizer: Regularizer | None,
        history: Sequence[float], converged: bool,
    ) -> EMResult:  # fmt: skip
        """A model in the frame, after `evaluate`, as a result: in the latent basis in which y has mean 0 and
        covariance I, and with diagnostics whose densities are those of x.
        """
        natural, regularizer = _in_whitened_basis(natural, regularizer)
        if self.sizes is not None:
            natural, regularizer = self.sizes.crop(natural), self.sizes.crop(regularizer)
            occupancy = jax.device_put(np.asarray(info.occupancy)[: self.head.n_components])
            info = dataclasses.replace(info, occupancy=occupancy)
        return EMResult(
            natural=natural,
            objective_history=np.asarray(history),
            converged=converged,
            info=dataclasses.replace(
                info,
                log_likelihood=info.log_likelihood - self.volume,
                objective=jnp.asarray(objective, info.objective.dtype),
            ),
            restart_objectives=np.asarray(history[-1:]),
            regularizer=regularizer,
        )

    def padded(self, state: EMState) -> EMState:
        """A state whose models have the sizes that the fit computes with."""
        return state if self.sizes is None else _of_size(state, self.sizes.pad)

    def cropped(self, state: EMState) -> EMState:
        """A state whose models have their own sizes."""
        return state if self.sizes is None else _of_size(state, self.sizes.crop)

    def finished(self, result: EMResult) -> EMResult:
        """The result with model and regulariser in units of x, where the dtype can hold them; its warnings."""
        left_out = wild_rows(self.source.framing, stacklevel=5)
        natural, regularizer = result.natural, result.regularizer
        warn_of_overfit(result, stacklevel=5)
        result = dataclasses.replace(result, classes=self.source.classes, left_out=left_out)
        if natural.frame is None or not fits_units_of_x(natural):
            return result
        if regularizer is not None:
            noise = regularizer.noise_covariance.scaled(natural.frame.unit)
            regularizer = dataclasses.replace(regularizer, noise_covariance=noise)
        if self.sizes is None:
            natural = own_in_units_of_x(natural)
        else:
            natural = self.sizes.crop(own_in_units_of_x(self.sizes.pad(natural)))
        return dataclasses.replace(result, natural=natural, regularizer=regularizer)


def _of_size(state: EMState, resize: Callable[[Any], Any]) -> EMState:
    models = {name: resize(getattr(state, name)) for name in ("natural", "top", "regularizer")}
    return dataclasses.replace(state, **models)


@jit
def _as_natural(moments: Moments, used: InUse | None) -> Natural:
    return moments_to_natural(moments if used is None else used.masked(moments))


@jit
def _in_whitened_basis(
    natural: Natural, regularizer: Regularizer | None, used: InUse | None = None
) -> tuple[Natural, Regularizer | None]:
    """The same p(x) and penalty in the latent basis in which y has mean 0 and covariance I."""
    moments = own_moments(natural)
    regularizer = None if regularizer is None else whiten_regularizer(regularizer, moments)
    return _as_natural(whiten_moments(moments), used).in_frame(natural.frame), regularizer
