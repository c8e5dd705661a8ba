"""Options of a run that change no result: devices, processes, checkpoints and logs."""

from __future__ import annotations

import dataclasses


def check_counts(group: object, *names: str) -> None:
    """ValueError for numbers below 1; None stands for no limit."""
    for name in names:
        value = getattr(group, name)
        if value is not None and value < 1:
            raise ValueError(f"{type(group).__name__}: `{name}` must be at least 1; got {value}. Raise it.")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The mesh."""

    model: int = 1
    """Devices along the axis that splits large leaves; all others split the batch."""
    min_sharded: int = 2**14
    """Entries of a leaf below which it is replicated."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Connection of several processes."""

    coordinator: str | None = None
    """Address HOST:PORT of the first process; `auto` asks the cluster (SLURM, TPU pods, MPI); None: one process."""
    count: int | None = None
    """Number of processes, with an address."""
    index: int | None = None
    """Number of this process from 0, with an address."""
    heartbeat_seconds: int = 60
    """Silence after which a process counts as lost and the others stop."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run."""

    em_steps: int = 20
    """Steps of EM between checkpoints."""
    gradient_steps: int = 500
    """Steps of gradient training after which the end of the epoch is saved, or within epochs that are longer."""
    keep: int = 2
    """Latest checkpoints that stay; that of the best step of EM, or of the best epoch, stays as well."""

    def __post_init__(self) -> None:
        check_counts(self, "em_steps", "gradient_steps", "keep")


@dataclasses.dataclass(frozen=True)
class Logs:
    """Destinations of metrics besides metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard events into the run folder (needs tensorboardX)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (needs wandb)."""
