"""Choice of a setting without labels: one table of criteria for numbers of components, factors and kinds of noise."""

from flax_hmog.selection.compare import select
from flax_hmog.selection.plot import plot_selection
from flax_hmog.selection.study import sweep
from flax_hmog.selection.table import Scores, Selection

__all__ = ["Scores", "Selection", "plot_selection", "select", "sweep"]
