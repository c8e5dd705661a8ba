"""The figure of a selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flax_hmog.analysis.style import INK, MUTED, SMALL, TEXT, WIDTH, color, decorate, marker, new_figure
from flax_hmog.model.checks import public
from flax_hmog.selection.table import Scores, Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "held_out": "held-out log p(x), nats per row",
    "bic": "BIC",
    "icl": "ICL",
    "entropy": "entropy of assignments, nats per row",
    "generalisation": "clusters found again by a probe, kappa",
    "agreement": "agreement of seeds, adjusted Rand",
}
DASHES = ("-", "--", ":", "-.")


@public
def plot_selection(selection: Selection) -> Figure:
    """The criteria of a selection over the number of components: one line for each number of factors and kind of noise.

    A ring marks the recommended setting. Held-out log-densities have bars of one standard error of their difference
    to the best one.

    Args:
        selection: of `select`.

    Returns:
        A figure of matplotlib.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> import jax
        >>> from flax_hmog import select
        >>> from flax_hmog.toy import x
        >>> selection = select(x, jax.random.key(0), n_components=(1, 3), lat_dim=1)
        >>> len(plot_selection(selection).axes)
        6
    """
    lines: dict[tuple[str, int], list[Scores]] = {}
    for row in selection.rows:
        if row.failure is None:
            lines.setdefault((row.obs_rep, row.lat_dim), []).append(row)
    kinds = list(dict.fromkeys(rep for rep, _ in lines))
    factors = sorted({lat_dim for _, lat_dim in lines})
    figure = new_figure(WIDTH + 2, 6.4)
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for (rep, lat_dim), rows in lines.items():
            rows = sorted(rows, key=lambda row: row.n_components)
            k = [row.n_components for row in rows]
            values = np.array([getattr(row, name) for row in rows], float)  # NaN for None
            number = factors.index(lat_dim)
            axes.errorbar(
                k, values, yerr=[row.behind_error for row in rows] if name == "held_out" else None,
                color=color(number), marker=marker(10 * kinds.index(rep)),
                linestyle=DASHES[kinds.index(rep) % len(DASHES)], markersize=4, linewidth=1.2, elinewidth=0.8,
                label=f"L = {lat_dim}, {rep}",
            )  # fmt: skip
        best = selection.best
        axes.plot(best.n_components, getattr(best, name), "o", markersize=12, fillstyle="none", color=INK)
        decorate(axes, xlabel="components K", grid=True)
        axes.set_title(title, fontsize=TEXT, color=INK, loc="left")
        axes.set_xticks(np.unique([row.n_components for row in selection.rows]))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=SMALL, frameon=False)
    state = "criteria agree" if selection.agrees else "criteria disagree"
    figure.suptitle(f"recommended: {best.setting}; {state}", fontsize=TEXT, color=MUTED, x=0.01, ha="left")
    return figure
