"""What the stages of a run share, and what one hands to the next."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from experiments.config import Experiment
from experiments.data import Inputs
from experiments.logs import Log, Stage
from experiments.models import Trainable
from experiments.processes import StopRequest
from flax_hmog import Natural, Regularizer
from flax_hmog.training import CheckpointWriter


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share.

    Attributes:
        config: the experiment.
        mesh: the devices.
        log: where metrics go.
        stop: whether the run has been told to stop.
        models: the trainable heads by name.
    """

    config: Experiment
    mesh: Mesh
    log: Log
    stop: StopRequest
    models: dict[str, Trainable]

    def folder(self, stage: Stage) -> Path:
        """Where the checkpoints of a stage lie."""
        return Path(self.config.workdir) / stage.folder

    def writer(self, stage: Stage, head: Any, encoder: Any, inputs: Inputs) -> CheckpointWriter:
        """Writes the checkpoints of a stage."""
        return CheckpointWriter(
            self.folder(stage),
            head=head,
            encoder=encoder,
            config=dataclasses.asdict(self.config),
            preprocessing=inputs.preprocessing,
            keep=self.config.checkpoints.keep,
            best="objective",
        )


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What EM hands to training by gradients, on the host.

    Attributes:
        natural: the fitted model.
        regularizer: the penalty that the training keeps: that of weights and noise, which do not depend on the latent
            basis of a head.
        rows: how many training rows it was fitted to.
        encoder: the encoder, or None.
        encoder_variables: its variables.
    """

    natural: Natural
    regularizer: Regularizer
    rows: int
    encoder: Any
    encoder_variables: dict[str, Any]
