"""A watch on training: without labels, how many clusters are in use, what is left of the start's, and the best step."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.checks import check_type, public
from flax_hmog.networks.objectives import marginal_entropy

KEPT = 0.5  # share of clusters in use, and of the agreement, that has to stay
LEAST_LOSS, LEAST_ERRORS = 0.01, 2.0  # nats per row, and standard errors, that a fall below the start is worth

REMEDY = "Lower the learning rate or, of adversarial perturbations, the radius."


class BelowStartWarning(UserWarning):
    """Training has lost clusters, or ends below the model that it started from.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("error", category=BelowStartWarning)  # to stop a run that falls
    """


class Look(NamedTuple):
    """Clusters of the fixed rows at a step.

    Attributes:
        clusters_in_use: exp of the entropy of the average assignment: K where all are of one size, 1 for a collapse.
        agreement: normalised mutual information with the start's clusters, from 0 to 1; None without a start.
        criterion: of the run, on these rows; the larger the better.
        is_best: True if no step before was better.
        has_fallen: True if less than half of the clusters, or of the agreement, is left of what was there.

    Example:
        >>> from flax_hmog.toy import output
        >>> round(Watch().look(0, output).clusters_in_use, 1)
        3.0
    """

    clusters_in_use: float
    agreement: float | None
    criterion: float
    is_best: bool
    has_fallen: bool


class Watch:
    """Clusters of the same rows at several steps of training, without labels, and which step is the best so far.

    The best has the largest criterion among steps with at least half of the clusters in use, and of the agreement with
    the start, that there have been before: an objective of training may rise while an encoder collapses in inference.
    The first step at which less is left is warned of.

    Args:
        start: what training starts from: output (N, K) of a teacher or a fitted model for the rows that are watched, or
            their clusters (N,); None where there is nothing.
        name: of the training, for its warnings.
        seen: of a watch before, as `seen`, with which training is resumed.

    Attributes:
        seen: JSON values, for a checkpoint's `progress`; "best" names the step with its numbers.

    Example:
        >>> from flax_hmog.toy import output
        >>> watch = Watch(output)  # of a teacher, or of the model that a head starts from
        >>> look = watch.look(1, output)  # every epoch: of the network in inference, for the rows of `start`
        >>> round(look.clusters_in_use, 1), round(look.agreement, 1), look.is_best
        (3.0, 1.0, True)
        >>> watch.is_below_start()
        False
    """

    def __init__(
        self,
        start: HMoGOutput | npt.ArrayLike | None = None,
        *,
        name: str = "training",
        seen: dict[str, Any] | None = None,
    ) -> None:
        self.start = None if start is None else _clusters(start)
        self.density, self.in_use = None, None
        if isinstance(start, HMoGOutput):
            self.density = np.asarray(start.log_density, np.float64)
            self.in_use = float(jnp.exp(marginal_entropy(start)))
        self.name, self.seen = name, dict(seen or {})

    @public
    def look(self, step: int, output: HMoGOutput, criterion: float | None = None) -> Look:
        """Numbers of a step; a `BelowStartWarning` at the first one that has lost half of what was there.

        Args:
            step: its number.
            output: (N, K) of the model in inference, for the rows that are watched.
            criterion: of the run, the larger the better: for an encoder the information of two views,
                `-negative_joint_information(output, twin)`; None takes the mean log-density, for a head on the data.

        Raises:
            ValueError: for other rows than those of the start.
        """
        check_type("output", output, HMoGOutput, "Give what a head returns.")
        clusters = _clusters(output)
        if self.start is not None and self.start.shape != clusters.shape:
            raise ValueError(
                f"Watch.look: `output` must be of the {len(self.start)} rows of the start; got {len(clusters)}. Watch "
                "the same rows."
            )
        found = {"clusters_in_use": float(jnp.exp(marginal_entropy(output)))}
        if self.start is not None:
            found["agreement"] = normalized_information(self.start, clusters)
        most = self.seen.get("most", found)
        has_fallen = any(value < KEPT * most[name] for name, value in found.items())
        density = np.asarray(output.log_density, np.float64)
        value = float(density.mean()) if criterion is None else float(criterion)
        best = self.seen.get("best")
        is_best = not has_fallen and math.isfinite(value) and (best is None or value >= best["criterion"])
        if is_best:
            self.seen["best"] = {"step": int(step), "criterion": value} | found
            if criterion is None and self.density is not None:
                lost = self.density - density
                self.seen["best"] |= {"lost": float(lost.mean()), "error": float(lost.std() / math.sqrt(len(lost)))}
        if has_fallen and not self.seen.get("has_warned"):
            self.seen["has_warned"] = True
            kept = f" Step {best['step']} is the best so far." if best else ""
            self._warn(f"has lost clusters at step {step}, with {_text(found)}, where it had {_text(most)}.{kept}")
        self.seen["most"] = {name: max(most[name], number) for name, number in found.items()}
        return Look(found["clusters_in_use"], found.get("agreement"), value, is_best, has_fallen)

    @public
    def is_below_start(self) -> bool:
        """True, with a `BelowStartWarning`, if the best step has lost more of the start than chance and half of it.

        That is less than half of its clusters in use, an agreement below one half, or, where the criterion is the
        log-density of the start's own rows, more than 0.01 nats per row and two standard errors.
        """
        best, before = self.seen.get("best"), self.in_use
        if best is None:
            self._warn("has no step that could be kept: the criterion was never finite.")
            return True
        lost = best.get("lost", 0.0)
        is_less_dense = lost > max(LEAST_LOSS, LEAST_ERRORS * best.get("error", 0.0))
        is_below = is_less_dense or best.get("agreement", 1.0) < KEPT
        is_below |= before is not None and best["clusters_in_use"] < KEPT * before
        if is_below:
            fewer = "" if before is None else f", of {before:.1f} before"
            density = f", and {lost:.3g} nats per row less than its start" if is_less_dense else ""
            remedy = "Keep the start, or give the head full matrices." if is_less_dense else REMEDY
            self._warn(
                f"ends below its start: its best step, {best['step']}, has {_text(best)}{fewer}{density}.", remedy
            )
        return bool(is_below)

    def _warn(self, what: str, remedy: str = REMEDY) -> None:
        warnings.warn(f"{self.name} {what} {remedy}", BelowStartWarning, stacklevel=4)  # of the caller, beside `public`


def normalized_information(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information of two clusterings (N,) over the mean of their entropies: NMI, 1 where they are the same."""
    number = int(second.max()) + 1
    table = np.bincount(first * number + second, minlength=number * (int(first.max()) + 1)).reshape(-1, number)
    rows, columns, both = (_entropy(counts) for counts in (table.sum(1), table.sum(0), table.ravel()))
    return 1.0 if rows + columns == 0 else max(2 * (rows + columns - both) / (rows + columns), 0.0)


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


def _clusters(of: Any) -> np.ndarray:
    """Clusters (N,): the most probable ones of an output."""
    found = of.log_responsibilities.argmax(axis=-1) if isinstance(of, HMoGOutput) else of
    return np.asarray(found).astype(np.int64).reshape(-1)


def _text(found: dict[str, float]) -> str:
    agreement = f" and agreement {found['agreement']:.2f} with the start" if "agreement" in found else ""
    return f"{found['clusters_in_use']:.1f} clusters in use{agreement}"
