"""The modules of an experiment: encoder, head, and what training minimises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax.sharding import Mesh

from experiments.augment import distort
from experiments.config import Experiment
from flax_hmog import HMoGOutput, Natural, Regularizer, mean_log_density, moments_to_natural, penalty
from flax_hmog.covariances import as_rep
from flax_hmog.em import EMInfo
from flax_hmog.encoders import MLP, Clusterer
from flax_hmog.initialize import random_moments
from flax_hmog.objectives import negative_log_likelihood, negative_mutual_information
from flax_hmog.rows import map_rows, row_shards
from flax_hmog.training import make_train_step
from flax_hmog.training.describe import rebuild_module

FEATURE_ROWS = 1024  # that an encoder sees at once where nothing is trained


class Extra(NamedTuple):
    """What a loss needs besides parameters and rows.

    Attributes:
        regularizer: of the fit that training starts from.
        share: the weight of its penalty: one over the number of rows that the fit saw.
        key_data: of the PRNG key of the run.
        step: number of the step.
    """

    regularizer: Regularizer
    share: Any
    key_data: Any
    step: Any


class Trainable:
    """One head of an experiment, on the encoder if there is one; optimiser and step are the same for all seeds.

    Args:
        config: the experiment.
        name: of the head.
        image_shape: of an input, where inputs are images.

    Raises:
        ValueError: for augmentation of inputs that are no images.
    """

    def __init__(self, config: Experiment, name: str, image_shape: tuple[int, ...] | None) -> None:
        if config.augmentation.is_on and image_shape is None:
            raise ValueError(
                "Trainable: `augmentation` must be of images whose background is 0; got inputs that are none. Leave "
                "out --data.columns, --data.whitened and --data.scale standard, or the augmentation."
            )
        self.image_shape = image_shape
        self.config, self.head, self.encoder = config, config.trainable[name], make_encoder(config)
        self.module = self.head if self.encoder is None else Clusterer(self.encoder, self.head)
        # nats per column of what the head sees count as much as the likelihood does in the loss
        self.likelihood_weight = 1.0 if self.encoder is None else config.encoder.likelihood_weight
        self.optimizer = functools.lru_cache(self._optimizer)
        self.compiled: Callable | None = None

    def loss(self, params: Any, x: jax.Array, extra: Extra) -> jax.Array:
        """What is minimised, in nats per sample, of rows that are distorted first if the experiment says so.

        Of a head alone its negative penalised log-likelihood: what EM maximises, up to the prior of the components.
        With an encoder the mutual information of the assignments, to which both learn, and the likelihood of the
        features, to which the head alone does.
        """
        if self.image_shape is not None and self.config.augmentation.is_on:
            key = jax.random.fold_in(jax.random.wrap_key_data(extra.key_data), extra.step)
            x = distort(key, x, self.image_shape, self.config.augmentation)
        if self.encoder is None:
            natural = self.natural(params)
            return -mean_log_density(natural, x) - extra.share * penalty(natural, extra.regularizer)
        joint, head_only = cast(
            tuple[HMoGOutput, HMoGOutput], self.module.apply({"params": params}, x, method="joint_and_head_outputs")
        )
        return negative_mutual_information(joint) + self.likelihood_weight * negative_log_likelihood(head_only)

    def step(self, state: TrainState, mesh: Mesh) -> Callable:
        """The training step of `make_train_step`, compiled once."""
        self.compiled = self.compiled or make_train_step(self.loss, state, mesh)
        return self.compiled

    def _optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam with a cosine decay over so many steps."""
        return optax.adam(optax.cosine_decay_schedule(self.config.gradient.learning_rate, max(steps, 1)))

    def natural(self, params: Any) -> Natural:
        """The head's model."""
        own = params if self.encoder is None else params["head"]
        return cast(Natural, self.head.apply({"params": own}, method="natural"))

    def encoder_variables(self, params: Any) -> dict[str, Any]:
        """The encoder's variables, if there is one."""
        return {} if self.encoder is None else {"params": params["encoder"]}


def make_encoder(config: Experiment) -> Any:
    """The experiment's encoder, or None.

    Raises:
        ValueError: for a class that cannot be imported or does not take `features`.
    """
    if config.encoder.name == "none":
        return None
    if config.encoder.name == "mlp":
        return MLP(config.encoder.features)
    description = {"class": config.encoder.name, "arguments": {"features": config.encoder.features}}
    return rebuild_module(description, allow_import=True)


def init_encoder(encoder: Any, key: jax.Array, obs_dim: int, n_features: int) -> dict[str, Any]:
    """Variables of an encoder from inputs (B, obs_dim) to features (B, n_features); none without one.

    Raises:
        ValueError: for other features, or variables beside `params`.
    """
    if encoder is None:
        return {}
    x = jnp.zeros((1, obs_dim))
    features, variables = jax.eval_shape(encoder.init_with_output, key, x)
    if features.shape != (1, n_features) or set(variables) != {"params"}:
        raise ValueError(
            f"init_encoder: the encoder must map inputs (B, {obs_dim}) to features (B, {n_features}) with variables in "
            f"`params` alone; got features {features.shape} for one input and variables in {sorted(variables)}. "
            "Flatten its output; use normalisation without running averages, as nn.LayerNorm."
        )
    return jax.jit(encoder.init)(key, x)


def features(encoder: Any, variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """The head's inputs, by blocks of rows."""
    if encoder is None:
        return x
    shards = row_shards(x)
    return jax.jit(lambda variables, x: map_rows(encoder.apply, variables, x, FEATURE_ROWS, shards))(variables, x)


def abstract_fit(config: Experiment, obs_dim: int, sharding: Any) -> tuple[Natural, Regularizer, EMInfo]:
    """Model, regulariser and diagnostics of EM as `jax.ShapeDtypeStruct`s that lie as given; nothing is computed."""
    head, rep = config.analytic, as_rep(config.model.obs_rep, caller="abstract_fit")

    def example() -> tuple[Natural, Regularizer, EMInfo]:
        moments = random_moments(jax.random.key(0), obs_dim, head.lat_dim, head.n_components, rep)
        number = jnp.zeros(())
        info = EMInfo(number, number, moments.weights, number, number)
        return moments_to_natural(moments), config.em.pseudo_counts(1).regularizer(moments), info

    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(example)
    )
