"""What a round of training with an encoder starts from: clusters by EM, and a head fitted to them in closed form."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Inputs
from experiments.encoders import features, init_encoder, join_module, split_module
from experiments.logs import Stage
from experiments.models import Teacher, abstract_fit
from experiments.stages.merge import merged_clusters
from experiments.stages.run import LinearFit, Run, Start
from experiments.stages.scores import evaluate
from flax_hmog import (
    AnalyticHMoG,
    Natural,
    PseudoCounts,
    fit_em,
    infer,
    moments_to_natural,
    natural_to_moments,
    warm_start,
)
from flax_hmog.em import compute_factors
from flax_hmog.objectives import merge_output
from flax_hmog.stepwise import stepwise_start
from flax_hmog.training import restore, restore_like
from flax_hmog.training.restoring import restored_variables, saved_steps

INIT_ROWS = 1024  # that the running averages of an untrained encoder are taken from
MAX_STEPS, TOLERANCE = 30, 1e-2  # of EM on features
FEATURE_PSEUDO_SAMPLES = 10.0  # of each component; features of one cluster are nearly alike


class RoundStage:
    """Clusters of the inputs or of the learnt features, merged, and a head with a component for each of them."""

    def __init__(self, run: Run, seed: int, name: str, number: int, inputs: Inputs) -> None:
        self.run, self.inputs, self.number = run, inputs, number
        self.stage = Stage(seed, f"{name}-{number}-em")
        self.model, self.config = run.model(name, number), run.config
        self.n_clusters = self.model.n_clusters
        self.key = jax.random.fold_in(jax.random.key(seed), number)

    def result(self, linear: LinearFit, previous: dict[str, Any] | None) -> Start:
        """What the round starts from: made, or read from the checkpoint of this stage.

        Args:
            linear: EM on the inputs.
            previous: variables at the end of the round before; None in the first.
        """
        if self.number == 1 and self.config.rounds.start == "nothing":
            return Start(self._untrained())
        folder = self.run.folder(self.stage)
        if not saved_steps(folder):
            self._make(linear, previous)
        restored = restore(folder, allow_import=True)
        variables = restored_variables(restored)
        moments = restored.variables["em"]["moments"]
        encoder_variables = split_module(variables)[0]
        head_variables, _ = warm_start(self.model.head, moments_to_natural(moments))
        return Start(
            join_module(encoder_variables, head_variables),
            teacher=self._teacher(restored, encoder_variables),
            distil_epochs=self.config.rounds.distil_epochs if self.number == 1 else 0,
        )

    def _make(self, linear: LinearFit, previous: dict[str, Any] | None) -> None:
        x, weights = self.inputs.rows(self.inputs.dataset.train, self.config.em.rows, self.stage.seed)
        encoder = self.model.encoder
        encoder_variables = self._init_encoder() if previous is None else split_module(previous)[0]
        learnt = features(encoder, encoder_variables, x)
        of_inputs = previous is None and self.config.rounds.start == "inputs"
        if of_inputs:
            mixture, rows, method = linear.natural, x, self.config.model.merge
        else:
            n_components = max(self.config.rounds.n_components, self.n_clusters)
            mixture = self._fit(self.config.feature_head(n_components), learnt, weights)
            rows, method = learnt, self.config.rounds.merge
        clusters = merged_clusters(mixture, rows, weights, self.n_clusters, method)
        clusters = np.arange(self.n_clusters) if clusters is None else clusters
        assigned = merge_output(infer(mixture, rows), clusters, self.n_clusters).log_responsibilities
        labels = jnp.argmax(assigned, axis=-1).astype(jnp.int32)
        head = self.config.feature_head(self.n_clusters)
        natural = self._fit(head, learnt, weights, labels)
        test = features(encoder, encoder_variables, self.inputs.test_rows[0])
        metrics = evaluate(infer(natural, test), self.inputs)
        self.run.log.write(self.stage, 1, **metrics)
        variables = {name: {"encoder": tree} for name, tree in encoder_variables.items()}
        with self.run.writer(self.stage, head, encoder, self.inputs) as writer:
            writer.save(
                1,
                variables | {"em": {"head": stepwise_start(natural_to_moments(natural))}},
                state={"mixture": mixture, "clusters": clusters},
                progress={"done": True, "of_inputs": of_inputs, "n_components": clusters.size},
                history=[metrics],
            )

    def _untrained(self) -> dict[str, Any]:
        """Variables of encoder and head before any training."""
        encoder_variables = self._init_encoder()
        x = features(self.model.encoder, encoder_variables, self._first_rows())
        head_variables = nn.unbox(jax.jit(self.model.head.init)(jax.random.fold_in(self.key, 2), x))
        return join_module(encoder_variables, head_variables)

    def _init_encoder(self) -> dict[str, Any]:
        return init_encoder(self.model.encoder, self.key, self._first_rows(), self.config.encoder.features)

    def _first_rows(self) -> jax.Array:
        train = self.inputs.dataset.train
        return jnp.asarray(self.inputs.read(train, np.arange(min(INIT_ROWS, len(train)))))

    def _fit(self, head: AnalyticHMoG, x: jax.Array, weights: jax.Array, labels: jax.Array | None = None) -> Natural:
        counts = PseudoCounts(components=FEATURE_PSEUDO_SAMPLES, noise=max(1.0, 0.01 * x.shape[0]))
        key = jax.random.fold_in(self.key, 1)
        return fit_em(
            head,
            x,
            key,
            weights=weights,
            labels=labels,
            regularizer=counts,
            max_steps=MAX_STEPS,
            tolerance=TOLERANCE,
        ).natural

    def _teacher(self, restored: Any, encoder_variables: dict[str, Any]) -> Teacher:
        of_inputs = restored.progress["of_inputs"]
        head = self.config.analytic if of_inputs else self.config.feature_head(restored.progress["n_components"])
        obs_dim = self.inputs.obs_dim if of_inputs else self.config.encoder.features
        local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        natural, _, _ = abstract_fit(head, self.config, obs_dim, local)
        clusters = jax.ShapeDtypeStruct((head.n_components,), jnp.int32, sharding=local)
        state = restore_like({"mixture": natural, "clusters": clusters}, restored.state, "the clusters of a round")
        factors = compute_factors(state["mixture"])
        teacher = Teacher({} if of_inputs else encoder_variables, factors, state["clusters"])
        return jax.tree.map(np.asarray, teacher)
