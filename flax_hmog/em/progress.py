"""A progress bar of fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress_bar(name: str, show: bool, total: int) -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar over steps, or nothing; what to tell it: steps done, the start (from 1), the objective there."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), disable=not show) as bar:
        task = bar.add_task("", total=total)

        def report(step: int, start: int, objective: float) -> None:
            bar.update(task, completed=step + 1, description=f"start {start}, objective {objective:.4f} nats/sample")

        yield report
