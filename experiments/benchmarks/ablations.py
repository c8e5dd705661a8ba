"""What each part of the recipe for encoders brings: an experiment with one part changed at a time, scored by labels.

    python -m experiments.benchmarks.ablations usps_encoder --data.path usps_9298.npz
    python -m experiments.benchmarks.ablations mnist_encoder --data.rows 10000 --gradient.epochs 20

Options are those of the experiment. Every variant is a run of its own in a folder of the workdir, and is resumed there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans

from experiments import train
from experiments.config import Augmentation, Encoder, Experiment, Gradient
from experiments.configs import EXPERIMENTS
from experiments.data import Batches, Inputs, load, prepare_inputs
from experiments.encoders import apply_encoder, features, init_encoder, join_module, split_module
from experiments.models import Extra, Teacher, Trainable
from experiments.processes import StopRequest
from experiments.stages.rounds import INIT_ROWS
from experiments.stages.scores import evaluate
from flax_hmog import HMoGOutput
from flax_hmog.encoders import Clusterer
from flax_hmog.training import create_state, make_mesh

FINE_TUNING = Gradient(epochs=5, batch_size=512)  # of a head alone
OVER_CLUSTERED = 40
Scores = dict[str, float]


def main(name: str, config: Experiment) -> None:
    """All variants, and a table of them on the test split.

    Args:
        name: of the experiment.
        config: the experiment; it must have an encoder.
    """
    console, folder = Console(width=120), Path(config.workdir)
    scores: dict[str, list[Scores]] = {}
    for variant, changed in variants(config):
        workdir = folder / variant.replace(" ", "-").replace(",", "")
        train.run(dataclasses.replace(changed, workdir=str(workdir)), console, StopRequest())
        by_stage = final_scores(workdir)
        if variant == "as configured":
            scores["linear model (EM)"] = by_stage["em"]
        scores[variant] = by_stage[list(by_stage)[-1]]
    scores["k-means for EM and head"] = [kmeans_rounds(config, seed) for seed in range(config.n_seeds)]
    title = f"{name}: mean ± sd over seeds; the objective on training rows, the rest on the test split"
    table = Table("variant", "objective", "ACC", "NMI", "ACC by seed", title=title)
    for variant, by_seed in scores.items():
        cells = [spread([seed[k] for seed in by_seed if k in seed]) for k in ("objective", "accuracy", "nmi")]
        table.add_row(variant, *cells, " ".join(f"{seed['accuracy']:.3f}" for seed in by_seed))
    console.print(table)
    (folder / "ablations.json").write_text(json.dumps(scores, indent=2) + "\n")


def variants(config: Experiment) -> Iterator[tuple[str, Experiment]]:
    """The experiment, and others that differ from it in one part; epochs in all stay the same."""
    total = config.gradient.epochs * config.rounds.count

    def rounds(count: int, **changes: Any) -> Experiment:
        return dataclasses.replace(
            config,
            rounds=dataclasses.replace(config.rounds, count=count, **changes),
            gradient=dataclasses.replace(config.gradient, epochs=total // count),
        )

    yield "as configured", config
    yield (
        "head alone, no encoder",
        dataclasses.replace(config, encoder=Encoder(), augmentation=Augmentation(), gradient=FINE_TUNING),
    )
    yield "random start, no EM", rounds(1, start="nothing")
    yield "random start, EM on features", rounds(2, start="nothing", early_clusters=OVER_CLUSTERED)
    yield "EM on inputs, one round", rounds(1)
    yield "and EM on features", rounds(2, early_clusters=None)
    yield "and many clusters before", rounds(2, early_clusters=OVER_CLUSTERED)
    yield "the same, encoder goes on", rounds(2, early_clusters=OVER_CLUSTERED, fresh=False)
    yield "symmetric head", dataclasses.replace(config, heads=("symmetric",))
    yield "analytic head, EM in the network", dataclasses.replace(config, heads=("analytic",))


def final_scores(workdir: Path) -> dict[str, list[Scores]]:
    """The last scores of each stage, in the order of stages: one entry for each seed."""
    last: dict[str, dict[int, Scores]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "accuracy" in record:
            last.setdefault(record["stage"], {})[record["seed"]] = {
                k: record[k] for k in ("accuracy", "nmi", "ari", "objective") if record.get(k) is not None
            }
    return {stage: [by_seed[seed] for seed in sorted(by_seed)] for stage, by_seed in last.items()}


def spread(values: list[float]) -> str:
    """Mean and standard deviation; nothing where there are no values."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


class KMeansHead(nn.Module):
    """Clusters by distances to centres, as softly as one variance says: k-means, if that goes to 0.

    Attributes:
        n_clusters: number of centres K.
    """

    n_clusters: int

    @nn.compact
    def __call__(self, x: jax.Array) -> HMoGOutput:
        """What an HMoG head returns: here of K spheres of one size and weight, with x as its own latent mean."""
        centres = self.param("centres", nn.initializers.normal(), (self.n_clusters, x.shape[-1]))
        log_variance = self.param("log_variance", nn.initializers.zeros, ())
        squares = jnp.sum((x[:, None] - centres) ** 2, axis=-1)
        normalizer = x.shape[-1] * (jnp.log(2 * jnp.pi) + log_variance) / 2 + jnp.log(self.n_clusters)
        joint = -squares * jnp.exp(-log_variance) / 2 - normalizer
        return HMoGOutput(jax.nn.logsumexp(joint, axis=-1), jax.nn.log_softmax(joint, axis=-1), x)


class KMeansTrainable(Trainable):
    """An encoder under a `KMeansHead`, with the objectives and the optimiser of the experiment.

    Args:
        config: the experiment.
        n_clusters: number of centres.
        inputs: the data.
    """

    def __init__(self, config: Experiment, n_clusters: int, inputs: Inputs) -> None:
        super().__init__(config, "differentiable", n_clusters, inputs.obs_dim, inputs.dataset.image_shape)
        self.head = KMeansHead(n_clusters)
        self.module = Clusterer(cast(nn.Module, self.encoder), cast(Any, self.head))

    def _taught(self, teacher: Teacher, x: jax.Array) -> jax.Array:
        """The nearest centre of x (B, K), one-hot."""
        rows = apply_encoder(self.encoder, teacher.encoder_variables, x) if teacher.encoder_variables else x
        squares = jnp.sum((rows[:, None] - cast(jax.Array, teacher.factors)) ** 2, axis=-1)
        return jax.nn.one_hot(jnp.argmin(squares, axis=-1), self.n_clusters)


def kmeans_rounds(config: Experiment, seed: int) -> Scores:
    """The rounds of the experiment with scikit-learn's k-means in place of EM and merge: scores on the test part."""
    mesh, key = make_mesh(), jax.random.key(seed)
    inputs = prepare_inputs(config.data, load(config.data, seed), mesh)
    x = inputs.rows(inputs.dataset.train)[0]
    before: dict[str, Any] = {}
    for number in range(1, config.rounds.count + 1):
        model = KMeansTrainable(config, config.round_clusters(number), inputs)
        rows = np.asarray(features(model.encoder, before, x) if before else x)
        labels = KMeans(model.n_clusters, n_init=10, random_state=seed).fit_predict(rows)
        teacher = Teacher(before, cast(Any, centres_of(rows, labels)), None)
        own = init_encoder(model.encoder, jax.random.fold_in(key, number), x[:INIT_ROWS], config.encoder.features)
        untrained = np.asarray(features(model.encoder, own, x))
        centres = centres_of(untrained, labels)
        spheres = {"centres": centres, "log_variance": np.log(np.mean((untrained - centres[labels]) ** 2))}
        variables = train_round(model, join_module(own, {"params": spheres}), teacher, inputs, seed)
        before, head_variables = split_module(variables)
    test = features(model.encoder, before, inputs.test_rows[0])
    return evaluate(model.head.apply(head_variables, test), inputs)


def centres_of(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Means of the rows of each label."""
    return np.stack([rows[labels == label].mean(axis=0) for label in np.unique(labels)])


def train_round(model: KMeansTrainable, start: Any, teacher: Teacher, inputs: Inputs, seed: int) -> Any:
    """Variables at the end of a round."""
    config = model.config
    batches = Batches(inputs, seed, config.gradient.batch_size, config.gradient.epochs)
    rows = jax.ShapeDtypeStruct((config.gradient.batch_size, inputs.obs_dim), jnp.float32)
    state = create_state(model.module, start, model.optimizer(len(batches)), rows, inputs.mesh)
    step = model.step(state, inputs.mesh)
    ends = config.rounds.distil_epochs, config.rounds.distil_epochs + config.rounds.mixed_epochs
    phases = np.asarray(ends, np.uint32) * batches.per_epoch
    key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
    for done, batch in enumerate(batches.iterate()):
        extra = Extra(None, np.float32(1), teacher, phases, key_data, np.uint32(done))
        state, loss = step(state, batch, extra)
        jax.block_until_ready(loss)
    return jax.tree.map(np.asarray, state.variables)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS or not EXPERIMENTS[sys.argv[1]].has_encoder:
        names = ", ".join(known for known, config in EXPERIMENTS.items() if config.has_encoder)
        sys.exit(f"experiments.benchmarks.ablations: name an experiment with an encoder: {names}.")
    default = dataclasses.replace(EXPERIMENTS[sys.argv[1]], workdir=f"runs/ablations/{sys.argv[1]}", n_seeds=3)
    main(sys.argv[1], tyro.cli(Experiment, default=default, args=sys.argv[2:]))
