"""The setting that scores recommend, and the sentences that say why and on what criteria disagree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from flax_hmog.selection.table import Scores

CLEARER = 0.05  # kappa, by which another setting's clusters are found again better
SAME_CLUSTERS = 0.8  # adjusted Rand index of seeds


def verdict_of(
    rows: Sequence[Scores], n_clusters: int | None = None, shares_bounds: bool = False
) -> tuple[int, bool, tuple[str, ...]]:
    """The recommended setting, True if the criteria agree on it, and sentences.

    Held-out log-density says which settings are good enough: those within one standard error of the best (Breiman et
    al. 1984). Of these the one of the lowest BIC is recommended. BIC alone would trust densities that only the fitted
    rows have, held-out density alone would take more components than there are clusters. Criteria agree where BIC and
    ICL are lowest for this setting among all, and a probe finds the clusters of no good one again much better.

    Pixels and the like have few values, of which many columns take one almost always. Densities then say how well a
    noise of its own fits such a column, as closely as one likes, and little of clusters: scale noise is preferred.

    Args:
        rows: scores of the settings; one at least has not failed.
        n_clusters: of `select`: settings with fewer components come into question only where all have fewer.
        shares_bounds: True for columns that share their bounds, as pixels do.
    """
    fitted = [number for number, row in enumerate(rows) if row.failure is None]
    large = [number for number in fitted if rows[number].n_components >= (n_clusters or 1)] or fitted
    of_scale = [number for number in large if shares_bounds and rows[number].obs_rep == "scale"]
    usable = of_scale or large
    top = max(usable, key=_value(rows, "held_out"))
    error = cast(float, rows[top].held_out_error)
    good = [n for n in usable if _value(rows, "held_out")(n) >= _value(rows, "held_out")(top) - error]
    best = min(good, key=_value(rows, "bic"))
    which = f"of the {len(good)} settings whose" if len(good) > 1 else "as the only setting whose"
    lead = f"Recommended: {rows[best].setting}, "
    lead += f"the lowest BIC {which}" if len(good) > 1 else which
    lead += f" held-out log-density is within one standard error ({error:.3g} nats per row) of the best."
    if len(usable) < len(large):
        lead += " Other kinds of noise are not compared by density: columns share their bounds, as pixels do."
    against = [*_against_bic(rows, large, best), *_against_icl(rows, large, best), *_against_probe(rows, good, best)]
    held_out = "its held-out log-density is " + ("the best" if best == top else "not clearly below the best")
    summary = (
        "The criteria disagree." if against else f"The criteria agree: BIC and ICL are lowest for it, and {held_out}."
    )
    return best, not against, (lead, summary, *against, *_cautions(rows, fitted, best))


def _against_bic(rows: Sequence[Scores], usable: list[int], best: int) -> list[str]:
    other = min(usable, key=_value(rows, "bic"))
    if other == best:
        return []
    if rows[other].obs_rep != rows[best].obs_rep and cast(float, rows[other].held_out) > cast(
        float, rows[best].held_out
    ):
        return [f"BIC and held-out log-density prefer {rows[other].setting}."]
    return [
        f"BIC prefers {rows[other].setting}, whose held-out log-density is {rows[other].behind:.3g} nats per row below "
        "the best: it describes the rows that it was fitted to, and not others as well. Columns that hardly vary, and "
        "components of few rows, do this."
    ]


def _against_icl(rows: Sequence[Scores], usable: list[int], best: int) -> list[str]:
    other = min(usable, key=_value(rows, "icl"))
    if other in (best, min(usable, key=_value(rows, "bic"))):
        return []
    row, own = rows[other], rows[best]
    why = "its clusters lie farther apart."
    if row.n_components < own.n_components:
        why = (
            f"components of the recommended one overlap (entropy {own.entropy:.2g} nats per row), so that several may "
            "describe one cluster. Merge them by `n_clusters`, or take ICL's setting where clusters must lie apart."
        )
    return [f"ICL prefers {row.setting}: {why}"]


def _against_probe(rows: Sequence[Scores], good: list[int], best: int) -> list[str]:
    found = {number: kappa for number in good if (kappa := rows[number].generalisation) is not None}
    if best not in found or max(found.values()) <= found[best] + CLEARER:
        return []
    other = max(found, key=lambda number: found[number])
    return [
        f"A linear probe finds the clusters of {rows[other].setting} again on other rows (kappa {found[other]:.2f}), "
        f"those of the recommended one less ({found[best]:.2f}), while their held-out log-densities do not differ."
    ]


def _cautions(rows: Sequence[Scores], fitted: list[int], best: int) -> list[str]:
    """Cautions: seeds that differ, the edge of the table, fits that did not converge or failed."""
    row, told = rows[best], []
    if row.agreement is not None and row.agreement < SAME_CLUSTERS:
        told.append(
            f"Seeds lead to different clusters (adjusted Rand {row.agreement:.2f}): the model is the best of them; "
            "raise n_seeds."
        )
    for name, symbol in (("n_components", "K"), ("lat_dim", "L")):
        values = sorted({getattr(rows[number], name) for number in fitted})
        if len(values) > 1 and getattr(row, name) == values[-1]:
            told.append(f"{symbol} = {values[-1]} is the largest of the table: larger ones may be better.")
    if not row.converged:
        told.append("Not all of its fits have converged: raise max_steps.")
    if failed := len(rows) - len(fitted):
        told.append(f"{failed} of {len(rows)} settings failed; the table has the causes.")
    return told


def _value(rows: Sequence[Scores], name: str) -> Callable[[int], float]:
    return lambda number: cast(float, getattr(rows[number], name))
