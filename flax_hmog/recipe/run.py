"""Objects that the stages of a run share, and those that one passes to the next."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from flax_hmog.em.options import Regularizer
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.head import Head
from flax_hmog.model.typed import Variables
from flax_hmog.networks.encoders import Clusterer
from flax_hmog.recipe.config import Experiment
from flax_hmog.recipe.inputs import Inputs
from flax_hmog.recipe.models import Extra, Teacher, Trainable
from flax_hmog.training import CheckpointWriter, Restored, restore
from flax_hmog.training.describe import named_arrays
from flax_hmog.training.files import saved_steps
from flax_hmog.training.logs import Log, Stage
from flax_hmog.training.preprocessing import Preprocessing
from flax_hmog.training.processes import StopRequest, to_host


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Keeps the last checkpoint of a stage in memory, in place of `CheckpointWriter` in a run without a folder.

    Attributes:
        memory: dict in which it is kept.
        stage: of the run.
        head: the head.
        module: the head, or any linen module with the head in its field `head`.
        preprocessing: from raw data to inputs.
        config: the configuration, as JSON values.
    """

    memory: dict[Stage, Restored]
    stage: Stage
    head: Any
    module: Any
    preprocessing: Preprocessing
    config: dict[str, Any]

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def save(
        self,
        step: int,
        variables: Variables,
        *,
        state: object = None,
        progress: dict[str, Any] | None = None,
        history: list[dict[str, Any]] | None = None,
        metrics: dict[str, float] | None = None,
        clusters: npt.ArrayLike | None = None,
    ) -> None:
        """Keep a step as `CheckpointWriter.save` writes it; the one before it is dropped."""
        self.memory[self.stage] = Restored(
            step=step,
            module=self.module,
            module_variables=jax.tree.map(jnp.asarray, on_host(variables)),
            head=self.head,
            place="" if self.module is self.head else "head",
            inputs=None,
            preprocessing=self.preprocessing,
            clusters=None if clusters is None else np.asarray(clusters),
            state=named_arrays(on_host(state)),
            progress=progress or {},
            history=list(history or ()),
            metrics=metrics or {},
            config=self.config,
            versions={},
            origin=str(self.stage.folder / str(step)),
        )


Writer = CheckpointWriter | Keeper


def on_host(tree: object) -> Any:
    """A tree with arrays of numpy, which no step of training overwrites; keys as their data."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(to_host(jax.random.key_data(leaf) if is_key else leaf))

    return jax.tree.map(copied, nn.unbox(tree))


@dataclasses.dataclass(frozen=True)
class Run:
    """Objects that all stages share.

    Attributes:
        config: the experiment.
        mesh: the devices.
        log: destination of metrics.
        stop: requests to stop the run.
        models: the trainable heads by name and number of clusters.
        memory: last checkpoint of every stage, where the run has no folder.
    """

    config: Experiment
    mesh: Mesh
    log: Log
    stop: StopRequest
    models: dict[tuple[str, int], Trainable]
    memory: dict[Stage, Restored] = dataclasses.field(default_factory=dict)

    @property
    def workdir(self) -> Path | None:
        """The folder of the run; None keeps checkpoints in memory."""
        return Path(self.config.workdir) if self.config.workdir else None

    def model(self, name: str, number: int = 0) -> Trainable:
        """The head that is trained in a round, or without rounds; the same for all seeds."""
        return self.models[name, self.config.round_clusters(number)]

    def restored(self, stage: Stage) -> Restored | None:
        """The last checkpoint of a stage, if there is one. It is data: encoders are those of the configuration.

        Raises:
            CheckpointError: if it is damaged.
        """
        if self.workdir is None:
            return self.memory.get(stage)
        folder = self.workdir / stage.folder
        return restore(folder) if saved_steps(folder) else None

    def kept(self, stage: Stage) -> Restored:
        """The last checkpoint of a stage that has one.

        Raises:
            CheckpointError: if it is damaged, or not there.
        """
        return self.memory[stage] if self.workdir is None else restore(self.workdir / stage.folder)

    def last_checkpoint(self, stage: Stage) -> Path | None:
        """Folder of the last checkpoint of a stage, if there is one on the disk."""
        steps = [] if self.workdir is None else saved_steps(self.workdir / stage.folder)
        return self.workdir / stage.folder / str(steps[-1]) if steps and self.workdir is not None else None

    def writer(self, stage: Stage, head: Head, encoder: nn.Module | None, inputs: Inputs) -> Writer:
        """Writes the checkpoints of a stage, or keeps the last one in memory."""
        config = self.config.options()
        if self.workdir is None:
            module = head if encoder is None else Clusterer(encoder, head)
            return Keeper(self.memory, stage, head, module, inputs.preprocessing, config)
        return CheckpointWriter(
            self.workdir / stage.folder,
            head=head,
            encoder=encoder,
            config=config,
            preprocessing=inputs.preprocessing,
            keep=self.config.checkpoints.keep,
            best="criterion" if stage.is_trained else "objective",
        )


@dataclasses.dataclass(frozen=True)
class LinearFit:
    """Results of EM on the inputs, on the host.

    Attributes:
        natural: the fitted model.
        regularizer: the penalty that the training of a head alone keeps: that of weights and noise, which do not depend
            on the latent basis of a head.
        rows: number of training rows it was fitted to.
        clusters: cluster of each component (K,), or None where every component is one.
    """

    natural: Natural
    regularizer: Regularizer
    rows: int
    clusters: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Start:
    """Start of training by gradients.

    Attributes:
        variables: of the module.
        teacher: model whose clusters an encoder learns, or None.
        distil_epochs: epochs in which it learns nothing else.
        regularizer: of a head alone, or None.
        rows: number of training rows of its fit.
        clusters: cluster of each component (K,), or None where every component is one.
        radius: length of adversarial perturbations; 0 for none.
        natural: the model of EM that a head alone starts from, or None.
    """

    variables: dict[str, Any]
    teacher: Teacher | None = None
    distil_epochs: int = 0
    regularizer: Regularizer | None = None
    rows: int = 1
    clusters: np.ndarray | None = None
    radius: float = 0.0
    natural: Natural | None = None

    def ends(self, config: Experiment) -> tuple[int, int]:
        """Epochs after which distillation counts half, and after which it does not count."""
        if self.teacher is None:
            return 0, 0
        return self.distil_epochs, self.distil_epochs + config.rounds.mixed_epochs

    def extra(self, config: Experiment, key: jax.Array, steps_per_epoch: int, done: int) -> Extra:
        """Arguments of the loss of a step besides its batch, on the host."""
        key_data = np.asarray(jax.random.key_data(key))
        phases = np.asarray(self.ends(config), np.uint32) * steps_per_epoch
        share, radius = np.float32(1 / self.rows), np.float32(self.radius)
        return Extra(self.regularizer, share, self.teacher, phases, key_data, np.uint32(done), radius)
