"""Results, states and warnings of fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from flax_hmog.em.cycles import Cycles
from flax_hmog.em.options import Regularizer
from flax_hmog.em.sparse import SparseInfo
from flax_hmog.em.step import EMInfo
from flax_hmog.model.coordinates import Natural


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
        'fit_em: 1 rows are left out, ...the first is row 5. Check them, or raise max_distance.'
    """
