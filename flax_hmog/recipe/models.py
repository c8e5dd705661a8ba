"""The modules of an experiment, and what training minimises: of a head alone, and of a head on an encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flax_hmog.em.initialize import random_moments
from flax_hmog.em.options import Regularizer
from flax_hmog.em.step import EMInfo, penalty
from flax_hmog.heads.modules import AnalyticHMoG, HMoGHead
from flax_hmog.inference.likelihood import mean_log_density
from flax_hmog.inference.posterior import infer_rows, merge_output
from flax_hmog.model.conversions import moments_to_natural
from flax_hmog.model.coordinates import Natural, Prepared
from flax_hmog.model.frames import Frame
from flax_hmog.model.head import Head
from flax_hmog.model.kinds import as_rep
from flax_hmog.model.prepared import prepare
from flax_hmog.model.typed import Variables
from flax_hmog.networks.adversarial import virtual_adversarial
from flax_hmog.networks.augment import distort
from flax_hmog.networks.encoders import Clusterer
from flax_hmog.networks.objectives import (
    combine,
    distillation,
    negative_joint_information,
    negative_log_likelihood,
    reconstruction,
)
from flax_hmog.recipe.config import Experiment, Gradient
from flax_hmog.recipe.encoders import apply_encoder, features_shape, make_encoder
from flax_hmog.training import make_train_step
from flax_hmog.training.steps import TrainState


class Teacher(NamedTuple):
    """A mixture fitted by EM, to inputs or to the features of an encoder, whose merged clusters are taught.

    Attributes:
        encoder_variables: of the encoder before the mixture; None where it is of the inputs.
        factors: of the mixture.
        clusters: cluster of each component (K,).
    """

    encoder_variables: dict[str, Any] | None
    factors: Prepared
    clusters: Any


class Extra(NamedTuple):
    """Arguments of a loss besides variables and rows.

    Attributes:
        regularizer: of the fit that the training of a head alone starts from, or None.
        share: the weight of its penalty: one over the number of rows that the fit saw.
        teacher: of an encoder and its head, or None.
        phases: steps after which distillation counts half, and after which it does not count.
        key_data: of the PRNG key of the run.
        step: number of the step.
        radius: length of adversarial perturbations; 0 for none.
    """

    regularizer: Regularizer | None
    share: Any
    teacher: Teacher | None
    phases: Any
    key_data: Any
    step: Any
    radius: Any = np.float32(0)


class Trainable:
    """One head of an experiment, on the encoder if there is one; optimiser and step are the same for all seeds.

    Args:
        config: the experiment.
        label: of the head.
        n_clusters: of a head on an encoder.
        obs_dim: columns of the inputs.
        image_shape: of an input, where inputs are images.

    Raises:
        ValueError: for augmentation of inputs that are no images, an encoder or a head that cannot be made, or that do
            not fit.
    """

    def __init__(
        self,
        config: Experiment,
        label: str,
        n_clusters: int,
        obs_dim: int,
        image_shape: tuple[int, ...] | None,
    ) -> None:
        if config.augmentation.is_on and image_shape is None:
            raise ValueError(
                "Trainable: `augmentation` must be of images whose background is 0; got inputs that are none. Leave "
                "out --data.columns, --data.whitened and --data.scale standard, or the augmentation."
            )
        self.image_shape = image_shape
        self.config, self.n_clusters = config, n_clusters
        self.encoder: Any = make_encoder(config, obs_dim, image_shape)  # `nn.Module`, or None
        self.head_dim = obs_dim if self.encoder is None else features_shape(self.encoder, obs_dim)[1]
        self.head = config.head(label, n_clusters, self.head_dim)
        is_head: bool = isinstance(self.head, Head)
        if not is_head:
            raise ValueError(
                f"Trainable: `heads` must name classes that offer what flax_hmog.Head lists; got {label}. Add what it "
                "lacks."
            )
        if self.head.lat_dim > self.head_dim:
            raise ValueError(
                f"Trainable: `heads.{label}.lat_dim` must be at most the {self.head_dim} features; got "
                f"{self.head.lat_dim}. Lower it."
            )
        if self.encoder is None and not is_startable(self.head):
            raise ValueError(
                f"Trainable: `heads` without an encoder must start from the model of EM; got {label}. Give its class a "
                "method start(moments) that returns its variables."
            )
        self.module: nn.Module = self.head if self.encoder is None else Clusterer(self.encoder, self.head)
        self.optimizer = functools.lru_cache(self._optimizer)
        self.compiled: Callable[..., Any] | None = None

    def step(self, state: TrainState, mesh: Mesh) -> Callable[..., Any]:
        """The training step of `make_train_step`, compiled once."""
        loss = self.head_loss if self.encoder is None else self.encoder_loss
        self.compiled = self.compiled or make_train_step(loss, state, mesh)
        return self.compiled

    def _optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimiser, its learning rate changing over so many steps."""
        rate = learning_rate(self.config.gradient, max(steps, 1))
        return cast(optax.GradientTransformation, self.config.optimizer.make({"learning_rate": rate}))

    def analytic(self, n_components: int) -> AnalyticHMoG:
        """A head that EM fits to features, of the kinds of the head that is trained."""
        head = self.head
        return AnalyticHMoG(head.lat_dim, n_components, obs_rep=head.obs_rep, projection_dtype=head.projection_dtype)

    def natural(self, variables: Variables) -> Natural:
        """The model of the head by itself."""
        return cast(Natural, self.head.apply(variables, method="natural"))

    def head_loss(self, variables: Variables, x: jax.Array, extra: Extra) -> tuple[jax.Array, dict[str, Any]]:
        """Loss of a head alone: negative penalised log-likelihood, which EM maximises up to the prior of components."""
        natural, regularizer = self.natural(variables), cast(Regularizer, extra.regularizer)
        x = self.view(self._key(extra), x)
        dtype = self.head.projection_dtype
        density = mean_log_density(natural if dtype is None else prepare(natural, dtype), x)
        return -density - extra.share * penalty(natural, regularizer), {}

    def encoder_loss(self, variables: Variables, x: jax.Array, extra: Extra) -> tuple[jax.Array, dict[str, Any]]:
        """Loss of a head on an encoder, which sees two views of each sample.

        Distillation, then information, from which both learn; the likelihood of the features, from which the head
        alone does; and consistency or reconstruction where the experiment says so.
        """
        rounds = self.config.rounds
        first_key, second_key, adversarial_key, dropout_key = jax.random.split(self._key(extra), 4)
        # pairs stand side by side, so that they stay together where rows are split over devices
        views = jnp.stack([self.view(first_key, x), self.view(second_key, x)], axis=1).reshape(-1, x.shape[-1])
        mutable = [name for name in variables if name != "params"]

        def apply(method: str, x: jax.Array, *, train: bool) -> Any:
            options: dict[str, Any] = {"mutable": mutable, "rngs": {"dropout": dropout_key}} if train else {}
            return self.module.apply(variables, x, train=train, method=method, **options)

        (joint, head_only), collections = apply("joint_and_head_outputs", views, train=True)
        one, twin = (jax.tree.map(lambda leaf, k=k: leaf[k::2], joint) for k in (0, 1))
        terms = {"likelihood": negative_log_likelihood(head_only) / self.head_dim}
        weights: dict[str, Any] = {"likelihood": rounds.likelihood_weight}
        information: Any = rounds.information_weight
        if extra.teacher is not None:
            share = jnp.sum(extra.step >= extra.phases) / 2  # 0, 1/2, 1
            targets = jax.lax.cond(share < 1, self.taught, self._nothing, extra.teacher, x)
            terms["distillation"] = (distillation(one, targets) + distillation(twin, targets)) / 2
            weights["distillation"], information = 1 - share, information * share
        terms["information"] = negative_joint_information(one, twin, marginal_weight=rounds.marginal_weight)
        weights["information"] = information
        if rounds.is_adversarial:
            rngs = {"dropout": dropout_key}
            terms["consistency"] = virtual_adversarial(
                self.module, x, adversarial_key, radius=extra.radius, variables=variables, rngs=rngs
            )
            weights["consistency"] = information
        if rounds.reconstruction_weight > 0:
            terms["reconstruction"] = reconstruction(apply("reconstruct", x, train=False), x) / x.shape[-1]
            weights["reconstruction"] = rounds.reconstruction_weight
        return combine(terms, weights, extra.step), collections

    def taught(self, teacher: Teacher, x: jax.Array) -> jax.Array:
        """The teacher's clusters of x (B, n_clusters)."""
        variables = teacher.encoder_variables
        rows = x if variables is None else apply_encoder(self.encoder, variables, x)
        output = infer_rows(teacher.factors, rows)
        return jnp.exp(merge_output(output, teacher.clusters, self.n_clusters).log_responsibilities)

    def _nothing(self, teacher: Teacher, x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0], self.n_clusters))

    def _key(self, extra: Extra) -> jax.Array:
        return jax.random.fold_in(jax.random.wrap_key_data(extra.key_data), extra.step)

    def view(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Rows distorted, if the experiment says so."""
        if self.image_shape is None or not self.config.augmentation.is_on:
            return x
        return distort(key, x, self.image_shape, self.config.augmentation)


def is_startable(head: object) -> bool:
    """True for a head that `warm_start` takes."""
    return isinstance(head, HMoGHead) or hasattr(head, "start")


def learning_rate(options: Gradient, steps: int) -> optax.Schedule:
    """The learning rate of every step."""
    rising = round(options.warmup * steps)
    rate, falling = options.learning_rate, max(steps - rising, 1)
    after: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(rate, falling),
        "linear": optax.linear_schedule(rate, 0.0, falling),
        "constant": optax.constant_schedule(rate),
    }
    if not rising:
        return after[options.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, rising), after[options.schedule]], [rising])


def abstract_fit(
    head: AnalyticHMoG, config: Experiment, obs_dim: int, sharding: jax.sharding.Sharding, has_frame: bool
) -> tuple[Any, ...]:
    """Model, `Regularizer` and `EMInfo` of EM as `jax.ShapeDtypeStruct`s that lie as given; nothing is computed.

    Args:
        head: of the fit.
        config: the experiment.
        obs_dim: D.
        sharding: of the arrays.
        has_frame: True for a model with a frame, as within a fit, and after it where float32 cannot hold it otherwise.
    """
    rep = as_rep(head.obs_rep)

    def example() -> tuple[Natural, Regularizer, EMInfo]:
        moments = random_moments(jax.random.key(0), obs_dim, head.lat_dim, head.n_components, rep)
        number = jnp.zeros(())
        info = EMInfo(number, number, moments.weights, number, number)
        frame = Frame(moments.bias, moments.bias, moments.bias, number) if has_frame else None
        natural = moments_to_natural(moments).in_frame(frame)
        return natural, config.em.regularizer.regularizer(moments), info

    placed = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return cast(tuple[Any, ...], jax.tree.map(placed, jax.eval_shape(example)))
