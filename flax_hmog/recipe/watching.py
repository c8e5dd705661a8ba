"""The rows that are watched while a head is trained, and the criterion by which its best epoch is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np

from flax_hmog.inference.posterior import HMoGOutput, infer, merge_output
from flax_hmog.networks.objectives import negative_joint_information
from flax_hmog.recipe.encoders import features
from flax_hmog.recipe.inputs import Inputs
from flax_hmog.recipe.models import Trainable
from flax_hmog.recipe.run import Start
from flax_hmog.training import Look, Watch
from flax_hmog.training.logs import Stage
from flax_hmog.training.processes import to_host

WATCHED_ROWS = 4096  # of the test part, or of the training part
LEAST_HELD_OUT = 100  # rows of the test part below which it is the training part


class StageWatch:
    """A `Watch` of one stage: of test rows without their labels, or of training rows where fewer than 100 are held out.

    The criterion of a head alone is their log-density; of an encoder, whose densities do not compare, the information
    of two distorted views of them, each the same at all epochs.

    Args:
        model: the head that is trained.
        inputs: the data.
        stage: the stage.
        start: of training.
        output: the head's output for variables and inputs.
        seen: of the checkpoint that the stage is resumed from.
    """

    def __init__(
        self,
        model: Trainable,
        inputs: Inputs,
        stage: Stage,
        start: Start,
        output: Callable[[dict[str, Any], jax.Array], HMoGOutput],
        seen: dict[str, Any] | None,
    ) -> None:
        test = inputs.dataset.test
        part = test if len(test) >= LEAST_HELD_OUT else inputs.dataset.train
        self.model, self.clusters, self.output = model, start.clusters, output
        self.count = min(len(part), WATCHED_ROWS)
        self.x = (
            inputs.test_rows[0]
            if part is test and self.count == len(test)
            else inputs.rows(part, self.count, stage.seed)[0]
        )
        self.views = [] if model.encoder is None else [self.x, self.x]
        if self.views and model.config.augmentation.is_on:
            distorted = lambda x: [model.view(key, x) for key in jax.random.split(jax.random.key(stage.seed))]  # noqa: E731
            self.views = jax.jit(distorted)(self.x)
        self.watch = Watch(self._start(start), name=f"seed {stage.seed}, {stage.name}:", seen=seen)

    def look(self, step: int, variables: dict[str, Any]) -> Look:
        """Numbers of a step."""
        found, criterion = self._on_host(self.output(variables, self.x), self.clusters), None
        if self.views:
            # without distortions both views are the rows themselves
            one, twin = (
                found if view is self.x else self._on_host(self.output(variables, view), None) for view in self.views
            )
            weight = self.model.config.rounds.marginal_weight
            criterion = -float(negative_joint_information(one, twin, marginal_weight=weight))
        return self.watch.look(step, found, criterion)

    def _start(self, start: Start) -> HMoGOutput | None:
        """The rows as what training starts from sees them: the teacher, or the model of EM."""
        teacher, natural = start.teacher, start.natural
        if natural is not None:
            return self._on_host(infer(natural, self.x), start.clusters)
        if teacher is None:
            return None
        variables = teacher.encoder_variables
        rows = self.x if variables is None else features(self.model.encoder, variables, self.x)
        return self._on_host(infer(teacher.factors, rows), np.asarray(teacher.clusters))

    def _on_host(self, output: HMoGOutput, clusters: np.ndarray | None) -> HMoGOutput:
        """Output of clusters for the watched rows, without those that fill up devices."""
        if clusters is not None:
            output = merge_output(output, clusters, int(clusters.max()) + 1)
        return cast(HMoGOutput, jax.tree.map(lambda leaf: to_host(leaf)[: self.count], output))
