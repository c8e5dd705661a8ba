"""What the stages of a run share, and what one hands to the next."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_hmog.em.options import Regularizer
from flax_hmog.model.coordinates import Natural
from flax_hmog.recipe.config import Experiment
from flax_hmog.recipe.inputs import Inputs
from flax_hmog.recipe.models import Extra, Teacher, Trainable
from flax_hmog.training import CheckpointWriter, Restored, restore
from flax_hmog.training.files import saved_steps
from flax_hmog.training.logs import Log, Stage
from flax_hmog.training.processes import StopRequest


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share.

    Attributes:
        config: the experiment.
        mesh: the devices.
        log: where metrics go.
        stop: whether the run has been told to stop.
        models: the trainable heads by name and number of clusters.
    """

    config: Experiment
    mesh: Mesh
    log: Log
    stop: StopRequest
    models: dict[tuple[str, int], Trainable]

    def model(self, name: str, number: int = 0) -> Trainable:
        """The head that is trained in a round, or without rounds; the same for all seeds."""
        return self.models[name, self.config.round_clusters(number)]

    def folder(self, stage: Stage) -> Path:
        """Where the checkpoints of a stage lie."""
        return Path(self.config.workdir) / stage.folder

    def restored(self, stage: Stage) -> Restored | None:
        """The last checkpoint of a stage, if there is one. It is data: encoders are those of the configuration.

        Raises:
            CheckpointError: if it is damaged.
        """
        folder = self.folder(stage)
        return restore(folder) if saved_steps(folder) else None

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
class LinearFit:
    """What EM on the inputs hands on, on the host.

    Attributes:
        natural: the fitted model.
        regularizer: the penalty that the training of a head alone keeps: that of weights and noise, which do not depend
            on the latent basis of a head.
        rows: how many training rows it was fitted to.
        clusters: cluster of each component (K,), or None where every component is one.
    """

    natural: Natural
    regularizer: Regularizer
    rows: int
    clusters: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Start:
    """What training by gradients starts from.

    Attributes:
        variables: of the module.
        teacher: whose clusters an encoder learns, or None.
        distil_epochs: epochs in which it learns nothing else.
        regularizer: of a head alone, or None.
        rows: how many training rows its fit saw.
        clusters: cluster of each component (K,), or None where every component is one.
    """

    variables: dict[str, Any]
    teacher: Teacher | None = None
    distil_epochs: int = 0
    regularizer: Regularizer | None = None
    rows: int = 1
    clusters: np.ndarray | None = None

    def extra(self, config: Experiment, key: jax.Array, steps_per_epoch: int, done: int) -> Extra:
        """What the loss of a step needs besides its batch, on the host."""
        key_data = np.asarray(jax.random.key_data(key))
        ends = self.distil_epochs, self.distil_epochs + config.rounds.mixed_epochs
        phases = np.asarray(ends, np.uint32) * steps_per_epoch
        return Extra(self.regularizer, np.float32(1 / self.rows), self.teacher, phases, key_data, np.uint32(done))
