"""Clusters of data in memory in one call: EM, and with an encoder the rounds of training that follow."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console

from flax_hmog.data.files import File
from flax_hmog.data.tables import index_of
from flax_hmog.model.checks import named
from flax_hmog.model.head import Head
from flax_hmog.model.kinds import as_rep
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Samples
from flax_hmog.networks.augment import Augmentation
from flax_hmog.recipe.config import EM, FEATURE_LAT_DIM, Data, Experiment, Gradient, Kind, Model, Rounds
from flax_hmog.recipe.encoders import features_shape
from flax_hmog.recipe.presets import LEAST_STEPS
from flax_hmog.recipe.run import Run
from flax_hmog.recipe.running import Checkpoints
from flax_hmog.recipe.saved import best_stage
from flax_hmog.recipe.template import Template
from flax_hmog.recipe.train import run
from flax_hmog.training.logs import OnEpoch, OnStep, Stage
from flax_hmog.training.processes import StopRequest
from flax_hmog.training.restoring import Restored

logger = logging.getLogger(__name__)
PER_CLUSTER = 4  # components of EM for each cluster, where nothing else is said
NEVER = 2**31  # steps between checkpoints that stay in memory


def fit_clusterer(
    encoder: nn.Module | None,
    x: Samples,
    n_clusters: int,
    key: jax.Array,
    *,
    head: Head | None = None,
    model: Model | None = None,
    em: EM | None = None,
    rounds: Rounds | None = None,
    gradient: Gradient | None = None,
    optimizer: Template | None = None,
    augmentation: Augmentation | None = None,
    scale: Literal["none", "range", "standard"] = "none",
    test_share: float = 0.0,
    workdir: str | Path | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    progress: bool = False,
) -> Restored:
    """Clusters of x, without labels: the recipe of docs/encoders.md, as `hmog train` runs it.

    EM fits a mixture of many components to x, which are merged to clusters. An encoder with a head on it learns these
    under augmentation, then improves on them; with more rounds EM is repeated on the learnt features.

    Args:
        encoder: any linen module from rows (B, D) to features (B, F); None clusters x itself.
        x: rows (N, D), or images (N, H, W) or (N, H, W, C), which become rows; an array, also one that is
            memory-mapped, or a scipy sparse matrix.
        n_clusters: number of clusters.
        key: PRNG key; `jax.random.key(s)` gives what `hmog train --first-seed s` does.
        head: any head, trained on the features, or by itself on x after EM, which has its size and noise then; None
            takes a `DifferentiableHMoG` with an encoder, and without one EM is all. A head by itself that ends below
            EM gives way to it (`restore_run(workdir, stage=...)` has both).
        model: latent dimension, number of components and kinds of the mixture that EM fits to x; None takes 10
            dimensions, or as many as columns, and four components for each cluster.
        em: options of EM on x.
        rounds: options of the rounds with an encoder.
        gradient: options of training by gradients; None: as they are, with 1,000 steps of a round at least.
        optimizer: name or function of optax with its arguments, as `Template("adamw", weight_decay=1e-4)`; None for
            Adam.
        augmentation: random distortions of images; None for none.
        scale: of x: all entries to [0, 1], or every column to mean 0 and standard deviation 1. What is returned takes
            rows as they are here.
        test_share: share of the rows that is held out; `history` then has their log-density.
        workdir: folder for config.json, metrics.jsonl and checkpoints as `hmog train` writes them, and for the rows, so
            that `hmog report` finds them; a run that is there is resumed. None keeps all in memory.
        on_step: called after every step with the name of the stage, its steps so far and how many there are.
        on_epoch: called at the end of EM and of every epoch with the name of the stage and its metrics.
        progress: show a progress bar.

    Returns:
        `Restored`, the model that `restore_run` takes of such a run: called with rows it gives `HMoGOutput` of the
        clusters; `head`, `encoder`, their variables, `clusters` (of each component, where they are merged), `history`
        and `origin`, the stage. `flax_hmog.training.export` takes it.

    Raises:
        ValueError: for data, options or an encoder that do not fit each other, or training that has failed.
        ImportError: without the packages of the extra `train`.

    Example:
        >>> from flax_hmog.networks import MLP
        >>> from flax_hmog.toy import x
        >>> small = {"model": Model(2, 3), "em": EM(max_steps=3), "gradient": Gradient(epochs=4, batch_size=12)}
        >>> found = fit_clusterer(MLP(2, (8,)), x, 3, jax.random.key(0), **small)
        >>> found(x).log_responsibilities.shape  # of any rows like these
        (12, 3)
    """
    seed = int(np.bitwise_xor.reduce(np.asarray(jax.random.key_data(key)).ravel()))
    file = _as_file(x, encoder)
    folder = "" if workdir is None else str(workdir)
    n_rows, n_columns = file.rows.shape
    model = model or Model(min(Model.lat_dim, n_columns), min(PER_CLUSTER * n_clusters, n_rows))
    model = dataclasses.replace(model, n_clusters=n_clusters)
    if head is not None:  # EM's mixture on x is of its kind, and of its size where it is on x as well
        model = dataclasses.replace(model, obs_rep=cast(Kind, as_rep(head.obs_rep).name))
    if head is not None and encoder is None:
        model = dataclasses.replace(model, lat_dim=head.lat_dim, n_components=head.n_components)
    heads = _heads(encoder, head, file.rows.shape[1])
    config = Experiment(
        workdir=folder,
        data=Data("memory", folder=folder, scale=scale, test_share=test_share),
        model=model,
        encoder=None if encoder is None else Template(_hashable(encoder)),
        rounds=rounds or Rounds(),
        em=em or EM(),
        gradient=gradient or Gradient(least_steps=LEAST_STEPS),
        optimizer=optimizer or Template("adam"),
        augmentation=augmentation or Augmentation(),
        heads=heads,
        first_seed=seed,
        checkpoints=Checkpoints(NEVER, NEVER) if workdir is None else Checkpoints(),
    )
    with named("fit_clusterer"):
        for package in ("sklearn", *(["grain"] if config.heads else [])):  # not after minutes of EM
            require(package, "train")
    console, stop = Console(quiet=not progress), StopRequest(listens=False)
    stages = run(config, console, stop, file=file, on_step=on_step, on_epoch=on_epoch)
    return _best(stages, seed)


def _best(stages: Run, seed: int) -> Restored:
    """The model that speaks for a run of one seed."""
    config = stages.config
    number = config.rounds.count if config.has_encoder else 0
    ends = [Stage(seed, "em"), *(Stage(seed, label, number) for label in config.labels)]
    found = {stage: stages.kept(stage) for stage in ends}
    best = best_stage({stage: vars(restored) for stage, restored in found.items()})
    if best.is_trained:
        trained = stages.model(best.head, number)
        return dataclasses.replace(found[best], module=trained.module, head=trained.head)
    for stage in ends[1:]:
        logger.warning("fit_clusterer: the head ends below EM, whose model is returned; the head is "
                       "restore_run(workdir, stage=%r)", stage.name)  # fmt: skip
    return found[best]


def _heads(encoder: nn.Module | None, head: Head | None, obs_dim: int) -> tuple[Template, ...]:
    """The head to be trained, if any."""
    if head is not None:
        return (Template(cast(nn.Module, head)),)
    if encoder is None:
        return ()
    return (Template("differentiable", lat_dim=min(FEATURE_LAT_DIM, features_shape(encoder, obs_dim)[1])),)


def _hashable(value: object) -> Any:
    """A module with tuples in place of lists, as `nn.Sequential([...])` has one."""
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if not isinstance(value, nn.Module):
        return value
    names = [field.name for field in dataclasses.fields(value) if field.init and field.name not in ("parent", "name")]
    return value.clone(**{name: _hashable(getattr(value, name)) for name in names})


def _as_file(x: object, encoder: Any) -> File:
    """Rows (N, D) with what is known of them."""
    rows = x.tocsr() if hasattr(x, "tocsr") else np.asarray(x)
    if rows.ndim not in (2, 3, 4) or not all(rows.shape):
        raise ValueError(
            f"fit_clusterer: `x` must have shape (N, D), (N, H, W) or (N, H, W, C); got {rows.shape}. Reshape it."
        )
    given, wanted = rows.shape, getattr(encoder, "image_shape", None)
    image_shape: Any = wanted if rows.ndim == 2 else given[1:]
    if image_shape is not None and image_shape[2:] == (1,):
        image_shape = image_shape[:2]
    if rows.ndim > 2:
        rows = rows.reshape(rows.shape[0], -1)
    fits = wanted is None or (image_shape in (wanted, wanted[:2]) and rows.shape[1] == math.prod(wanted))
    if wanted is not None and not fits:
        raise ValueError(
            f"fit_clusterer: `x` must have shape (N, {', '.join(map(str, wanted))}) or (N, {math.prod(wanted)}), as "
            f"the encoder's image_shape; got {given}. Give the encoder the shape of the images, channels last."
        )
    if rows.dtype.kind not in "biuf":
        raise ValueError(f"fit_clusterer: `x` must hold real numbers; got dtype {rows.dtype}. Convert it first.")
    return File(rows, image_shape=image_shape, identifier=index_of(x))
