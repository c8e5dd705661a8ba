"""Online EM over batches that come one by one: what is kept between two of them, and a step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from flax_hmog.data.framing import Framing
from flax_hmog.data.shards import row_shards
from flax_hmog.data.sources import as_source
from flax_hmog.em.fit import Fit
from flax_hmog.em.online import OnlineState, one_batch
from flax_hmog.em.options import EMOptions, Regularizer
from flax_hmog.em.result import EMResult, wild_rows
from flax_hmog.em.step import whiten_moments
from flax_hmog.model.checks import may_miss
from flax_hmog.model.conversions import fits_units_of_x, moments_to_natural, own_in_units_of_x, own_moments
from flax_hmog.model.coordinates import Natural, ResidualMoments
from flax_hmog.model.frames import Frame, has_more_digits
from flax_hmog.model.head import HeadSizes
from flax_hmog.model.kinds import Array
from flax_hmog.model.typed import Data, Samples


@dataclasses.dataclass(frozen=True)
class Learnt:
    """A model that learns from batches, in the frame of the data that it started from.

    Attributes:
        head: its sizes and kinds.
        online: the model and its running statistics.
        regularizer: the pseudo-statistics, in the frame.
        frame: the frame, in which all batches are taken.
        by_column: True if columns have units of their own.
        samples: sum of the weights so far.
        batches: number of batches so far.
    """

    head: HeadSizes
    online: OnlineState
    regularizer: Regularizer | None
    frame: Frame
    by_column: bool
    samples: float
    batches: int

    @property
    def natural(self) -> Natural:
        """The model with its prior whitened, in units of x where the dtype can hold them."""
        natural = moments_to_natural(whiten_moments(self.online.moments)).in_frame(self.frame)
        return own_in_units_of_x(natural) if fits_units_of_x(natural) else natural

    def on_host(self) -> Learnt:
        """The same with arrays of numpy, which keep float64 wherever they are read."""
        return dataclasses.replace(
            self,
            online=jax.tree.map(np.asarray, self.online),
            regularizer=jax.tree.map(np.asarray, self.regularizer),
            frame=jax.tree.map(np.asarray, self.frame),
        )


def learnt_from(
    head: HeadSizes,
    data: Data,
    key: Array,
    found: EMResult,
    *,
    weights: Samples | None = None,
    labels: Samples | None = None,
    column_units: Any = "auto",
) -> Learnt:
    """A fit as the first batch, ready for the next one; its data once more, for their statistics."""
    options = EMOptions(init=found.natural, regularizer=found.regularizer, column_units=column_units)
    fit = Fit(head, data, key, weights, None, options)
    natural, regularizer = fit.start(key)
    moments = own_moments(natural)
    learnt = Learnt(
        head=head,
        online=OnlineState(moments, ResidualMoments.of(moments)),
        regularizer=regularizer,
        frame=fit.frame,
        by_column=fit.source.framing.by_column,
        samples=0.0,
        batches=0,
    )
    return next_batch(learnt, data, weights, labels)[0]


def next_batch(
    learnt: Learnt, data: Data, weights: Samples | None = None, labels: Samples | None = None
) -> tuple[Learnt, float, tuple[int, ...]]:
    """A step of online EM.

    The first batch replaces the statistics that the model expects. A later one counts by its share of samples in the
    average batch.

    Args:
        learnt: the model before.
        data: the batch (B, D), as `fit_em` takes rows in memory; NaN is missing within `allowing("nan")`.
        weights: sample weights (B,).
        labels: known components (B,), -1 where unknown.

    Returns:
        The model after; the penalised log-likelihood per sample of the batch under the model before; and the numbers of
        wild rows, which took no part.
    """
    head, options = learnt.head, EMOptions()
    source: Any = as_source(data, head.obs_dim, head.param_dtype, weights, labels, head.n_components)
    exact = has_more_digits(source.data, head.param_dtype)
    source.use_frame(Framing(learnt.frame, head.param_dtype, options.max_distance, learnt.by_column, exact))
    count = source.total_weight
    samples, batches = learnt.samples + count, learnt.batches + 1
    rate = (options.rate(learnt.batches) if learnt.batches else 1.0) / (samples / batches)  # per sample
    block = source.sample()
    given: Any = {"shards": row_shards(block[0]), "projection_dtype": head.projection_dtype}
    given["missing"] = may_miss() and bool(np.isnan(source.data).any())
    arguments = (rate, 1.0), samples, learnt.regularizer, source.framing.frame
    online, values = one_batch(learnt.online, block, *arguments, **given)
    value, penalty = np.asarray(values, np.float64).tolist()
    learnt = dataclasses.replace(learnt, online=online, samples=samples, batches=batches)
    left_out = wild_rows(source.framing, stacklevel=4) if batches > 1 else ()  # of the first batch `fit_em` has warned
    return learnt, (value + penalty / samples) / count if count else math.nan, left_out
