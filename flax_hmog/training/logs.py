"""Reports of a run while it goes on: metrics.jsonl, a progress bar, and TensorBoard or Weights & Biases on request."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flax_hmog.training.processes import is_first

OnStep = Callable[[str, int, int], None]
"""Called after every step with the name of the stage, its steps so far, and how many there are."""
OnEpoch = Callable[[str, dict[str, Any]], None]
"""Called with the name of a stage and its metrics, at the end of EM and of every epoch."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of one seed.

    Attributes:
        seed: the seed.
        head: name of the head, or "em" for EM on the inputs.
        number: of the round, counted from 1; 0 stands for training without rounds.
        is_em: True for EM at the start of a round.
    """

    seed: int
    head: str
    number: int = 0
    is_em: bool = False

    @property
    def name(self) -> str:
        """The name in folders and metrics: "em", "differentiable", or of round 2 "differentiable-2-em" and
        "differentiable-2".
        """
        return self.head + (f"-{self.number}" if self.number else "") + ("-em" if self.is_em else "")

    @property
    def is_trained(self) -> bool:
        """True for a stage of training by gradients."""
        return self.head != "em" and not self.is_em

    @property
    def folder(self) -> Path:
        """Folder of its checkpoints in the run folder."""
        return Path("checkpoints") / f"seed{self.seed}" / self.name


class Log:
    """Writes what is measured, on the first process only; a context manager.

    Every line of metrics.jsonl names its seed, stage and step. What was written after the last checkpoint is taken back
    when a stage is resumed, so that a run that was interrupted leaves the same lines as one that was not.
    """

    def __init__(
        self,
        workdir: Path | None,
        console: Console,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
        on_step: OnStep | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        self.path = None if workdir is None else workdir / "metrics.jsonl"
        self.writers, self.on_step, self.on_epoch = list[Callable[[dict[str, Any], int], None]](), on_step, on_epoch
        self.is_first, self.closers = is_first(), list[Callable[[], None]]()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        shown = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self.progress = Progress(*columns, *shown, console=console, disable=not self.is_first)
        self.task = self.progress.add_task("", total=None, rate="", visible=False)
        for wanted, package in ((tensorboard, "tensorboardX"), (wandb, "wandb")):
            if wanted and importlib.util.find_spec(package) is None:  # on all processes, so that all stop
                raise ValueError(
                    f"Log: `logs` must have the package {package}; it is not installed. "
                    'Install it: pip install "flax-hmog[logs]".'
                )
        if self.is_first and tensorboard and workdir is not None:
            self._add_tensorboard(workdir)
        if self.is_first and wandb and workdir is not None:
            self._add_wandb(workdir, wandb, config)

    def __enter__(self) -> Log:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        for close in self.closers:
            close()

    def begin(self, stage: Stage, description: str, total: int, saved: int | None = None) -> None:
        """Show a stage of `total` steps, and take back what was written after the last checkpoint, of step `saved`."""
        done = saved or 0
        self.progress.reset(self.task, description=description, total=total, completed=done, rate="", visible=True)
        self.at = stage.name, done, total
        self._rewind(stage, saved)

    def advance(self, steps: int = 1) -> None:
        """Show that some steps more are done."""
        name, done, total = self.at
        self.at = name, done + steps, total
        if self.on_step is not None:
            self.on_step(*self.at)
        speed = self.progress.tasks[0].speed
        self.progress.update(self.task, advance=steps, rate=f"{speed:.3g} steps/s" if speed else "")

    def write(self, stage: Stage, step: int, **metrics: object) -> None:
        """A line of metrics, after so many steps of the stage; what it starts from is step 0."""
        if self.on_epoch is not None and "start" not in metrics:  # steps of EM name their start
            self.on_epoch(stage.name, metrics)
        if self.is_first and self.path is not None:
            line = json.dumps({"seed": stage.seed, "stage": stage.name, "step": step} | metrics)
            try:
                with self.path.open("a") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise ValueError(
                    f"Log: {self.path} must be written; got {type(error).__name__}: {error}. Make room, or clear "
                    "the way."
                ) from None
            named = {f"seed{stage.seed}/{stage.name}/{name}": value for name, value in metrics.items()}
            for writer in self.writers:
                writer({name: value for name, value in named.items() if isinstance(value, int | float)}, step)

    def _rewind(self, stage: Stage, saved: int | None) -> None:
        if self.is_first and self.path is not None and self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _is_kept(line, stage, saved)]
            if kept != lines:
                new = self.path.with_suffix(".new")
                new.write_text("".join(line + "\n" for line in kept))
                new.replace(self.path)

    def _add_tensorboard(self, workdir: Path) -> None:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(workdir / "tensorboard"))
        self.closers.append(writer.close)

        def write(metrics: dict[str, Any], step: int) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        self.writers.append(write)

    def _add_wandb(self, workdir: Path, project: str, config: dict[str, Any] | None) -> None:
        import wandb

        # the same run folder is the same run there, so that a resumed run goes on in it
        name = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        run = wandb.init(project=project, id=name, resume="allow", config=config, dir=str(workdir))
        self.closers.append(run.finish)
        self.writers.append(lambda metrics, step: run.log(metrics | {"step": step}))


def _is_kept(line: str, stage: Stage, saved: int | None) -> bool:
    """True if a line is one that the stage, resumed after the `saved` steps, will not write again."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # cut off when the process was killed
        return False
    is_of_others = (record["seed"], record["stage"]) != (stage.seed, stage.name)
    return is_of_others or (saved is not None and record["step"] <= saved)
