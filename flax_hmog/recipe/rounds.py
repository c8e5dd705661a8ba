"""Start of a round of training with an encoder: clusters by EM, and a head fitted to them in closed form."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.em.fit import fit_em
from flax_hmog.em.online import stepwise_start
from flax_hmog.heads.from_natural import warm_start
from flax_hmog.heads.modules import AnalyticHMoG
from flax_hmog.inference.posterior import infer, merge_output
from flax_hmog.model.conversions import moments_to_natural, natural_to_moments
from flax_hmog.model.coordinates import Natural
from flax_hmog.networks.adversarial import RADIUS_ROWS, perturbation_radius
from flax_hmog.recipe.encoders import features, init_encoder, join_module, split_module, untrained_variables
from flax_hmog.recipe.inputs import Inputs, even
from flax_hmog.recipe.merge import merged_clusters
from flax_hmog.recipe.models import Teacher, abstract_fit, is_startable
from flax_hmog.recipe.run import LinearFit, Run, Start
from flax_hmog.recipe.scores import evaluate
from flax_hmog.training import restore_like
from flax_hmog.training.logs import Stage

INIT_ROWS = 1024  # that the running averages of an untrained encoder are taken from


class RoundStage:
    """Clusters of the inputs or of learnt features by EM and a merge, and encoder and head to learn them."""

    def __init__(self, run: Run, seed: int, name: str, number: int, inputs: Inputs) -> None:
        self.run, self.inputs, self.number = run, inputs, number
        self.stage = Stage(seed, name, number, is_em=True)
        self.model, self.model_before, self.config = run.model(name, number), run.model(name, number - 1), run.config
        self.n_clusters = self.model.n_clusters
        self.key = jax.random.fold_in(jax.random.key(seed), number)

    def result(self, linear: LinearFit, previous: dict[str, Any] | None) -> Start:
        """The start of the round: made, or read from the checkpoint of this stage.

        Args:
            linear: EM on the inputs.
            previous: variables at the end of the round before; None in the first.
        """
        if self.number == 1 and self.config.rounds.start == "nothing":
            return Start(self._untrained(), radius=self._radius())
        if self.run.restored(self.stage) is None:
            self._make(linear, previous)
        restored = self.run.kept(self.stage)
        factors = restored.prepared
        teacher = Teacher(restored.encoder_variables, factors, jnp.asarray(restored.clusters))
        template = self._abstract_start("head/frame/unit" in restored.state)
        started = restore_like(template, restored.state, "the start of a round")
        encoder_variables = started["encoder"]
        if is_startable(self.model.head):
            head_variables, _ = warm_start(self.model.head, started["head"])
        else:  # it learns the clusters from where it begins
            head_variables = self._untrained_head(encoder_variables)
        return Start(
            join_module(encoder_variables, head_variables),
            teacher=jax.tree.map(np.asarray, teacher),
            distil_epochs=self.config.rounds.distil_epochs if self._is_fresh else 0,
            radius=self._radius(),
        )

    @property
    def _is_fresh(self) -> bool:
        """True if the encoder starts untrained."""
        return self.number == 1 or self.config.rounds.fresh

    def _make(self, linear: LinearFit, previous: dict[str, Any] | None) -> None:
        """The clusters, of the inputs or of what an encoder makes of them, and the start for them."""
        config, encoder = self.config, self.model.encoder
        self.run.log.begin(self.stage, f"seed {self.stage.seed}: clusters of round {self.number}", 1)
        x, weights = self.inputs.rows(self.inputs.dataset.train, config.em.rows, self.stage.seed)
        trained, trained_head = split_module(previous) if previous else (None, {})
        own = trained if trained is not None and not self._is_fresh else self._init_encoder()
        if trained is None and config.rounds.start == "inputs":
            before, before_variables, rows, mixture = None, {}, x, linear.natural
        else:
            before, before_variables = encoder, own if trained is None else trained
            rows = features(encoder, before_variables, x)
            if trained is None or config.rounds.refit:
                mixture = self._fit(self.model.analytic(config.rounds.n_components), rows, weights)
            else:
                mixture = moments_to_natural(natural_to_moments(self.model_before.natural(trained_head)))
        clusters = merged_clusters(mixture, rows, weights, self.n_clusters)
        clusters = np.arange(self.n_clusters) if clusters is None else clusters
        assigned = merge_output(infer(mixture, rows), clusters, self.n_clusters).log_responsibilities
        labels = jnp.argmax(assigned, axis=-1).astype(jnp.int32)
        started = self._fit(self.model.analytic(self.n_clusters), features(encoder, own, x), weights, labels)
        test = lambda x: infer(mixture, features(before, before_variables, x))  # noqa: E731
        metrics = evaluate(test, self.inputs, clusters, config.scores)
        self.run.log.write(self.stage, 1, **metrics)
        variables: dict[str, Any] = {"em": stepwise_start(natural_to_moments(mixture))}
        n_components = mixture.posterior_location.shape[0]
        head = config.analytic if before is None else self.model.analytic(n_components)
        with self.run.writer(self.stage, head, before, self.inputs) as writer:
            writer.save(
                1,
                variables if before is None else join_module(before_variables, variables),
                state={"encoder": own, "head": started},
                progress={"done": True},
                history=[metrics],
                clusters=clusters,
            )

    def _abstract_start(self, has_frame: bool) -> dict[str, Any]:
        """Encoder and head that the round starts from, without values."""
        local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        x = jax.ShapeDtypeStruct((1, self.inputs.obs_dim), jnp.float32)
        encoder = nn.unbox(jax.eval_shape(lambda x: untrained_variables(self.model.encoder, self.key, x), x))
        head = self.model.analytic(self.n_clusters)
        natural, _, _ = abstract_fit(head, self.config, self.model.head_dim, local, has_frame)
        return {"encoder": encoder, "head": natural}

    def _untrained(self) -> dict[str, Any]:
        """Variables of encoder and head before any training."""
        encoder_variables = self._init_encoder()
        return join_module(encoder_variables, self._untrained_head(encoder_variables))

    def _untrained_head(self, encoder_variables: dict[str, Any]) -> dict[str, Any]:
        x = features(self.model.encoder, encoder_variables, self._first_rows())
        return dict(nn.unbox(jax.jit(self.model.head.init)(jax.random.fold_in(self.key, 2), x)))

    def _init_encoder(self) -> dict[str, Any]:
        return init_encoder(self.model.encoder, self.key, self._first_rows())

    def _radius(self) -> float:
        radius, train = self.config.rounds.adversarial_radius, self.inputs.dataset.train
        if radius != "measured":
            return float(radius)
        return perturbation_radius(self.inputs.read(train, even(len(train), RADIUS_ROWS)))

    def _first_rows(self) -> jax.Array:
        train = self.inputs.dataset.train
        return jnp.asarray(self.inputs.read(train, np.arange(min(INIT_ROWS, len(train)))))

    def _fit(self, head: AnalyticHMoG, x: jax.Array, weights: jax.Array, labels: jax.Array | None = None) -> Natural:
        key = jax.random.fold_in(self.key, 1)
        return fit_em(head, x, key, weights=weights, labels=labels, options=self.config.rounds.em).natural
