"""The steps of an accelerated fit: which passes are sparse, which models are kept, and what is given up."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from flax_hmog.data.shards import row_shards
from flax_hmog.data.sources import RowsOnDevice
from flax_hmog.em.accelerate import find, follow
from flax_hmog.em.options import Regularizer
from flax_hmog.em.sparse import SparseInfo
from flax_hmog.em.step import EMInfo
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import Block

if TYPE_CHECKING:
    from flax_hmog.em.fit import Fit
    from flax_hmog.em.result import EMState

FEWEST_COMPONENTS = 33  # with fewer, products with all of them cost less than the choice of a few
MANY_COMPONENTS, LONG_PASS = 100, 2e10  # components and products of a pass from which on it pays unasked
KEPT_PASSES = 10  # of a step, after its sparse pass, which costs as much as three or four of them
FOLLOWED_STEPS, FOLLOWED_PASSES = 2, 4  # of plain EM, or of kept passes, after which starts are compared
FEWEST_SLOTS, MOST_SLOTS = 8, 64  # components per row at most; four times as many after a failure
LEAST_RANK = 8  # directions of the screen; half of L where that is more
TOLERANCE = 1e-6  # nats that a row may drop before it looks at all components, and that rows may drop on average


@dataclasses.dataclass(frozen=True)
class Cycles:
    """State of an accelerated fit between two steps of a start, beside the model.

    Attributes:
        reached: free energy that the model has at least.
        slots: components per row of sparse passes.
        retry: number of objectives in the history from which on sparse passes are tried.
        sparse: of the last sparse pass that counted, or None.
    """

    reached: float = -math.inf
    slots: int = FEWEST_SLOTS
    retry: int = 0
    sparse: SparseInfo | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a fit.

    Attributes:
        natural: a model.
        updated: the next one.
        info: diagnostics of the first, of a dense pass; None after a sparse one.
        objective: penalised log-likelihood per sample of x of the first.
        cycles: what the next step needs; None in plain EM.
    """

    natural: Natural
    updated: Natural
    info: EMInfo | None
    objective: float
    cycles: Cycles | None = None

    @property
    def sparse(self) -> SparseInfo | None:
        """`SparseInfo` of the last sparse pass."""
        return None if self.cycles is None else self.cycles.sparse


def take_step(fit: Fit, state: EMState, *, is_last: bool = False) -> Step:
    """A sparse pass and kept ones, each beyond the M-step before; or a step of plain EM.

    Plain EM takes over where a certificate fails: rows that drop too much, or an objective below the free energy that
    was reached, as a component that counted is no candidate any more. After a failure sparse passes look at more
    components per row; where those are too many, they wait until twice as many steps are done.
    """
    natural, regularizer, done = state.natural, state.regularizer, len(state.history)
    if not _accelerates(fit):
        return Step(natural, *fit.evaluate(natural, regularizer))
    cycles = state.cycles or Cycles()
    if is_last:
        return Step(natural, natural, *fit.diagnose(natural, regularizer), cycles)
    if done >= cycles.retry:
        step = _cycle(fit, natural, regularizer, cycles, KEPT_PASSES)
        if step is not None:
            return step
        if cycles.slots < min(MOST_SLOTS, fit.head.n_components / 2):
            cycles = dataclasses.replace(cycles, slots=min(MOST_SLOTS, 4 * cycles.slots))
        else:
            cycles = dataclasses.replace(cycles, retry=2 * done + 2)
    updated, info, objective = fit.evaluate(natural, regularizer)
    return Step(natural, updated, info, objective, dataclasses.replace(cycles, reached=objective))


def follow_start(fit: Fit, state: EMState, block: Block) -> tuple[Natural, float]:
    """The model of a start after some steps on a block of rows, and an objective that it has at least.

    In an accelerated fit these are a sparse pass and kept ones, which need no other programs than all steps after it,
    or as many of plain EM where the sparse pass fails.
    """
    natural, regularizer, steps = state.natural, state.regularizer, FOLLOWED_STEPS
    if _accelerates(fit):
        step, steps = _cycle(fit, natural, regularizer, Cycles(), FOLLOWED_PASSES), FOLLOWED_PASSES
        if step is not None and step.cycles is not None:
            return step.updated, step.cycles.reached
    for _ in range(steps):
        natural, _, _ = fit.evaluate(natural, regularizer, block)
    return natural, fit.evaluate(natural, regularizer, block)[-1]


def _cycle(fit: Fit, natural: Natural, regularizer: Regularizer | None, cycles: Cycles, passes: int) -> Step | None:
    """A sparse pass with a model and so many kept ones after it, or None where its certificate fails."""
    x, weights, labels = fit.source.sample()
    lat_dim, inner = fit.head.lat_dim, natural.in_frame(fit.row_frame)
    given: Any = {"shards": row_shards(x), "projection_dtype": fit.dtype}
    found = find(
        inner, regularizer, x, weights, labels,
        rank=min(lat_dim, max(LEAST_RANK, lat_dim // 2)), slots=cycles.slots, dense_rows=len(x), tolerance=TOLERANCE,
        **given,
    )  # fmt: skip
    objective = _of_x(fit, found.objective, regularizer)
    has_fallen = not cycles.reached - objective <= fit.rounding(objective)
    if has_fallen or not np.asarray(found.info.mean_dropped) <= TOLERANCE:
        return None
    updated, energy = follow(found, inner, regularizer, weights, passes=passes, **given)
    sparse = jax.tree.map(lambda leaf: np.asarray(leaf).item(), found.info)
    cycles = dataclasses.replace(cycles, reached=_of_x(fit, energy, regularizer), sparse=sparse)
    return Step(natural, updated.in_frame(fit.frame), None, objective, cycles)


def _accelerates(fit: Fit) -> bool:
    """True if passes of this fit can be sparse, with rows on the device, and it is asked for or pays."""
    is_asked, n_components, source = fit.options.accelerate, fit.head.n_components, fit.source
    if fit.missing or n_components < FEWEST_COMPONENTS or not isinstance(source, RowsOnDevice):
        return False
    if is_asked is not None:
        return is_asked
    lat_dim, n_rows = fit.head.lat_dim, len(source.sample()[0])
    products = n_rows * lat_dim * (n_components * lat_dim + 4 * source.obs_dim)
    return n_components >= MANY_COMPONENTS and products >= LONG_PASS and jax.default_backend() == "cpu"


def _of_x(fit: Fit, objective: Array, regularizer: Regularizer | None) -> float:
    return fit.of_x(float(np.asarray(objective)), fit.source.total_weight, regularizer)
