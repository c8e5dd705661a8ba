"""Results, states and warnings of fits."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from flax_hmog.data.framing import Framing
from flax_hmog.em.cycles import Cycles
from flax_hmog.em.options import Regularizer
from flax_hmog.em.sparse import SparseInfo
from flax_hmog.em.step import EMInfo
from flax_hmog.model.checks import door
from flax_hmog.model.coordinates import Natural

MOST_OPTIMISM, MOST_PER_COLUMN = 4.0, 0.01  # nats per row, and per entry of one, from which on a fit is overfitted


@dataclasses.dataclass(frozen=True)
class EMResult:
    """Result of `fit_em`: the model and its history.

    Attributes:
        natural: the fitted model, its prior whitened (y has mean 0 and covariance I).
        objective_history: penalised log-likelihood per sample before the first step and after each (steps + 1,), nats;
            of sparse passes without what they left out, which is no more than `sparse.mean_dropped` says.
        converged: True if the last gain was below the tolerance, and no fall beyond rounding.
        info: `EMInfo` of the fitted model.
        restart_objectives: final objective of every start (n_restarts,); the best one is returned.
        regularizer: the pseudo-statistics in the latent basis of `natural`, or None.
        classes: name of component k for k < len(classes), where `labels` were names; None otherwise.
        sparse: `SparseInfo` of the last sparse pass; None if there was none.
        left_out: numbers of the wild rows, which took no part.

    Example:
        >>> from flax_hmog import fit_em
        >>> from flax_hmog.toy import head, natural, x
        >>> result = fit_em(head, x, jax.random.key(0), init=natural, max_steps=3)
        >>> print(result.info.occupancy.round())
        [4. 4. 4.]
    """

    natural: Natural
    objective_history: Float[np.ndarray, " steps+1"]
    converged: bool
    info: EMInfo
    restart_objectives: Float[np.ndarray, " n_restarts"]
    regularizer: Regularizer | None
    classes: tuple[str, ...] | None = None
    sparse: SparseInfo | None = None
    left_out: tuple[int, ...] = ()

    @property
    def optimism(self) -> float:
        """Nats by which components make the rows of the fit likelier than new ones, on average.

        A Gaussian of L dimensions that is fitted to n rows, pseudo-samples among them, costs new ones
        L (L + 3) / (2 n) (1 + L / n) nats to second order.
        """
        rows, lat_dim = np.asarray(self.info.occupancy, np.float64), self.natural.interaction.shape[1]
        counted = rows.copy()
        if (pseudo := self.regularizer) is not None:
            counted += float(pseudo.components) + (0.0 if pseudo.shrinkage is None else float(pseudo.shrinkage))
        counted = np.maximum(counted, 1.0)
        loss = lat_dim * (lat_dim + 3) / (2 * counted) * (1 + lat_dim / counted)
        return float(rows @ loss / rows.sum())


@dataclasses.dataclass(frozen=True)
class EMState:
    """State of `fit_em` between two steps.

    Attributes:
        natural: the model of the present start, in its first latent basis; None before the start's first step.
        top: that of its models so far with the best objective.
        regularizer: its pseudo-statistics.
        history: objectives of the start's models so far.
        finals: final objectives of the starts that have ended.
        best: the best of them, or None.
        cycles: what an accelerated fit needs beside the model, or None.

    Example:
        >>> from flax_hmog import fit_em
        >>> from flax_hmog.toy import head, natural, x
        >>> states = []
        >>> result = fit_em(head, x, jax.random.key(0), init=natural, max_steps=3, on_step=states.append)
        >>> again = fit_em(head, x, jax.random.key(0), init=natural, max_steps=3, state=states[0])  # goes on from there
        >>> bool((again.objective_history == result.objective_history).all())
        True
    """

    natural: Any = None
    top: Any = None
    regularizer: Regularizer | None = None
    history: tuple[float, ...] = ()
    finals: tuple[float, ...] = ()
    best: EMResult | None = None
    cycles: Cycles | None = None


class ConvergenceWarning(UserWarning):
    """EM stopped where its objective fell.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("error", category=ConvergenceWarning)  # to stop where a fit warns
    """


class WildRowsWarning(UserWarning):
    """Rows far from all others took no part in a fit.

    Example:
        >>> import warnings
        >>> from flax_hmog import fit_em
        >>> from flax_hmog.toy import head, natural, x
        >>> rows = np.where(np.arange(12)[:, None] == 5, np.float32(1e6), x)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     result = fit_em(head, rows, jax.random.key(0), init=natural, max_steps=1)
        >>> str(caught[0].message)
        'fit_em: 1 rows are left out, ...the first is row 5. Check them, or raise max_distance...'
    """


class OverfitWarning(UserWarning):
    """Components of a fit hold few rows against their parameters, so that new rows are much less likely.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("ignore", category=OverfitWarning)  # where these rows are all there are
    """


def warn_of_overfit(result: EMResult, stacklevel: int) -> None:
    """`OverfitWarning` where components cost new rows much."""
    obs_dim, lat_dim = result.natural.interaction.shape
    if not result.optimism > max(MOST_OPTIMISM, MOST_PER_COLUMN * obs_dim):
        return
    is_shrunk = result.regularizer is not None and result.regularizer.shrinkage is not None
    remedy = "Lower" if is_shrunk else 'Use PseudoCounts(shrinkage="auto"), or lower'
    warnings.warn(
        f"{door()}: half of the components hold fewer than {np.median(np.asarray(result.info.occupancy)):.0f} rows for "
        f"{lat_dim * (lat_dim + 1) // 2} entries of a covariance: new rows are about {result.optimism:.1f} nats less "
        f"likely than these on average{'' if result.converged else ', and EM has not converged'}. {remedy} lat_dim or "
        "n_components; `select` compares them on held-out rows.",
        OverfitWarning,
        stacklevel=stacklevel,
    )


def wild_rows(framing: Framing, stacklevel: int) -> tuple[int, ...]:
    """Numbers of the rows that were left out, with a warning."""
    if framing.wild:
        warnings.warn(
            f"{door()}: {len(framing.wild)} rows are left out, as an entry is more than `max_distance` = "
            f"{framing.max_distance:g} typical distances from the median; the first is row {min(framing.wild)}. "
            "Check them, or raise max_distance (HMoG: background=True takes them along).",
            WildRowsWarning,
            stacklevel=stacklevel,
        )
    return tuple(sorted(framing.wild))
