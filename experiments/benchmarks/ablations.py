"""Ablations of the recipe for encoders: an experiment, poorer and richer ones, and other heads.

    python -m experiments.benchmarks.ablations usps_encoder --data.path usps_9298.npz
    python -m experiments.benchmarks.ablations mnist_encoder --data.rows 10000 --gradient.epochs 40

Options are those of the experiment; its data must have labels. Every variant is a run in a folder of the workdir, and
what has been stopped goes on there. The agreement of seeds needs no labels, and may choose among variants.
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

from experiments.configs import EXPERIMENTS
from flax_hmog import HMoGOutput
from flax_hmog.networks.encoders import Clusterer
from flax_hmog.recipe import train
from flax_hmog.recipe.config import Augmentation, Encoder, Experiment, Gradient, Rounds
from flax_hmog.recipe.em import EMStage
from flax_hmog.recipe.encoders import features, join_module, split_module
from flax_hmog.recipe.inputs import Batches, Inputs, prepare_inputs
from flax_hmog.recipe.load import load
from flax_hmog.recipe.models import Teacher, Trainable
from flax_hmog.recipe.parts import Dataset
from flax_hmog.recipe.report import clusters_in_use, clusters_of, pair_agreement
from flax_hmog.recipe.rounds import RoundStage
from flax_hmog.recipe.run import Run, Start
from flax_hmog.recipe.scores import evaluate
from flax_hmog.training import create_state, make_mesh, restore
from flax_hmog.training.logs import Log, Stage
from flax_hmog.training.processes import STOPPED, Stopped, StopRequest

FINE_TUNING = Gradient(epochs=5, batch_size=512)  # of a head alone
OVER_CLUSTERED = 40
Scores = dict[str, float]


def main(name: str, config: Experiment) -> None:
    """All variants, and a table of them.

    Args:
        name: of the experiment.
        config: the experiment; it must have an encoder.

    Raises:
        Stopped: when the process was asked to stop.
        ValueError: for a dry run, an experiment that starts from nothing, or a variant that cannot be built.
    """
    if config.dry_run:
        raise ValueError("ablations: `dry_run` must be off; got on. Plan a variant by experiments.train.")
    if config.rounds.start == "nothing":
        raise ValueError('ablations: `rounds.start` must not be "nothing", which is a variant itself. Leave it out.')
    console, folder, stop = Console(width=120), Path(config.workdir), StopRequest()
    # all of them first, so that one that cannot be built does not end hours of work
    every = [
        (variant, dataclasses.replace(changed, workdir=str(folder / variant.replace(" ", "-").replace(",", ""))))
        for variant, changed in variants(config)
    ]
    scores: dict[str, list[Scores]] = {}
    without_labels: dict[str, list[str]] = {}
    dataset = load(config.data, config.first_seed)
    for variant, changed in every:
        train.run(changed, console, stop)
        workdir = Path(changed.workdir)
        by_stage = final_scores(workdir, config.seeds)
        for row, stage in (("linear model, EM", "em"), (variant, list(by_stage)[-1])):
            if row not in scores:
                scores[row] = by_stage[stage]
                without_labels[row] = agreement(workdir, stage, config.seeds, dataset)
    scores["k-means head"] = kmeans_scores(config, folder / "k-means-head", console, stop)
    title = f"{name}: mean ± sd; the first three on training rows, without labels; the rest on the test split"
    table = Table("variant", "agreement", "in use", "objective", "ACC", "NMI", "ACC by seed", title=title)
    for variant, by_seed in scores.items():
        cells = [spread([seed.get(k, np.nan) for seed in by_seed]) for k in ("objective", "accuracy", "nmi")]
        table.add_row(
            variant,
            *without_labels.get(variant, ["", ""]),
            *cells,
            " ".join(f"{seed['accuracy']:.3f}" for seed in by_seed),
        )
    console.print(table)


def variants(config: Experiment) -> Iterator[tuple[str, Experiment]]:
    """The experiment as a ladder, from a random start to all parts of the recipe, and with other heads.

    Epochs in all are those of the experiment, which is itself one step of the ladder.
    """
    total = config.gradient.epochs * config.rounds.count
    many = config.rounds.early_clusters or OVER_CLUSTERED

    def rounds(count: int, early_clusters: int | None, **changes: Any) -> Experiment:
        return dataclasses.replace(
            config,
            rounds=dataclasses.replace(config.rounds, count=count, early_clusters=early_clusters, **changes),
            gradient=dataclasses.replace(config.gradient, epochs=total // count),
        )

    no_encoder = dataclasses.replace(config, encoder=Encoder(), rounds=Rounds())
    alone = dataclasses.replace(no_encoder, augmentation=Augmentation(), gradient=FINE_TUNING)
    yield "head alone, no encoder", alone
    yield "random start, one round", rounds(1, None, start="nothing")
    yield f"random start, two rounds, {many} clusters first", rounds(2, many, start="nothing")
    yield "one round", rounds(1, None)
    yield "two rounds", rounds(2, None)
    yield f"two rounds, {many} clusters first", rounds(2, many)
    yield f"two rounds, {many} clusters first, no EM between", rounds(2, many, refit=False)
    yield f"two rounds, {many} clusters first, one encoder", rounds(2, many, fresh=False)
    yield "symmetric head", dataclasses.replace(config, heads=("symmetric",))
    yield "analytic head, EM in the network", dataclasses.replace(config, heads=("analytic",))


def final_scores(workdir: Path, seeds: range) -> dict[str, list[Scores]]:
    """The last scores of each stage, in the order of stages: one entry for each of the seeds."""
    last: dict[str, dict[int, Scores]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "accuracy" in record and record["seed"] in seeds:
            # the density of a head alone is nothing to compare with information
            names = ("accuracy", "nmi", "objective")[: 3 if record["stage"][-1].isdigit() else 2]
            last.setdefault(record["stage"], {})[record["seed"]] = {name: record[name] for name in names}
    return {stage: [by_seed[seed] for seed in seeds] for stage, by_seed in last.items()}


def agreement(workdir: Path, stage: str, seeds: range, dataset: Dataset) -> list[str]:
    """Mean ± sd of the agreement of pairs of seeds on the training rows, and of how many clusters they use there."""
    models = [restore(workdir / Stage(seed, stage).folder) for seed in seeds]
    clusters = clusters_of(models, dataset.train)
    return [spread(pair_agreement(clusters)) if len(models) > 1 else "", spread(clusters_in_use(clusters))]


def spread(values: list[float]) -> str:
    """Mean and standard deviation; nothing where values are NaN."""
    if np.isnan(values).any():
        return ""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


class KMeansHead(nn.Module):
    """Clusters by distances to centres, as softly as one variance says: k-means, if that goes to 0.

    Attributes:
        n_clusters: number of centres K.
    """

    n_clusters: int

    @nn.compact
    def __call__(self, x: jax.Array) -> HMoGOutput:
        """The output of an HMoG head, for K spheres of one size and weight, with x as its own latent mean."""
        centres = self.param("centres", nn.initializers.normal(), (self.n_clusters, x.shape[-1]))
        log_variance = self.param("log_variance", nn.initializers.zeros, ())
        squares = jnp.sum((x[:, None] - centres[None]) ** 2, axis=-1)
        normalizer = x.shape[-1] * (jnp.log(2 * jnp.pi) + log_variance) / 2 + jnp.log(self.n_clusters)
        joint = -squares * jnp.exp(-log_variance) / 2 - normalizer
        return HMoGOutput(jax.nn.logsumexp(joint, axis=-1), jax.nn.log_softmax(joint, axis=-1), x)


class KMeansTrainable(Trainable):
    """An encoder under a `KMeansHead`, with the clusters, the objectives and the optimiser of the experiment.

    Args:
        config: the experiment.
        n_clusters: number of centres.
        inputs: the data.
    """

    def __init__(self, config: Experiment, n_clusters: int, inputs: Inputs) -> None:
        super().__init__(config, "differentiable", n_clusters, inputs.obs_dim, inputs.dataset.image_shape)
        self.head = KMeansHead(n_clusters)
        self.module = Clusterer(cast(nn.Module, self.encoder), cast(Any, self.head))

    def started(self, start: Start, x: jax.Array, weights: jax.Array) -> Start:
        """The same start with centres in place of an HMoG: the means of the clusters that are taught."""
        encoder_variables, _ = split_module(start.variables)
        rows = features(self.encoder, encoder_variables, x)
        members = jax.nn.one_hot(jnp.argmax(self.taught(cast(Teacher, start.teacher), x), axis=-1), self.n_clusters)
        members = members * weights[:, None]
        centres = members.T @ rows / jnp.sum(members, axis=0)[:, None]
        squares = weights[:, None] * (rows - members @ centres) ** 2
        variance = jnp.sum(squares) / jnp.sum(weights) / rows.shape[1]
        spheres = {"params": {"centres": centres, "log_variance": jnp.log(variance)}}
        return dataclasses.replace(start, variables=join_module(encoder_variables, spheres))


def kmeans_scores(config: Experiment, workdir: Path, console: Console, stop: StopRequest) -> list[Scores]:
    """Scores of the experiment with k-means' spheres as head, by seed; those that are done are kept."""
    config = dataclasses.replace(config, heads=("differentiable",), workdir=str(workdir))
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "scores.json"
    done: dict[str, Scores] = json.loads(path.read_text()) if path.exists() else {}
    with Log(workdir, console) as log:
        for seed in map(str, config.seeds):
            if seed not in done:
                done[seed] = kmeans_rounds(config, int(seed), log, stop)
                path.write_text(json.dumps(done) + "\n")
    return [done[str(seed)] for seed in config.seeds]


def kmeans_rounds(config: Experiment, seed: int, log: Log, stop: StopRequest) -> Scores:
    """Scores of one seed on the test part.

    Raises:
        Stopped: when the process was asked to stop; its round is begun again then.
    """
    mesh = make_mesh()
    inputs = prepare_inputs(config.data, load(config.data, seed), mesh)
    models = train.make_models(config, inputs.obs_dim, inputs.dataset.image_shape)
    run = Run(config, mesh, log, stop, models)
    linear = EMStage(run, seed, inputs).result()
    x, weights = inputs.rows(inputs.dataset.train)
    variables: dict[str, Any] | None = None
    for number in range(1, config.rounds.count + 1):
        start = RoundStage(run, seed, "differentiable", number, inputs).result(linear, variables)
        model = KMeansTrainable(config, config.round_clusters(number), inputs)
        key = jax.random.fold_in(jax.random.key(seed), number)
        variables = train_round(model, model.started(start, x, weights), inputs, seed, key, stop)
    encoder_variables, head_variables = split_module(cast(dict[str, Any], variables))

    def output(x: jax.Array) -> HMoGOutput:
        rows = features(model.encoder, encoder_variables, x)
        return cast(HMoGOutput, cast(nn.Module, model.head).apply(head_variables, rows))

    return evaluate(output, inputs)


def train_round(
    model: KMeansTrainable, start: Start, inputs: Inputs, seed: int, key: jax.Array, stop: StopRequest
) -> dict[str, Any]:
    """Variables at the end of a round."""
    config = model.config
    batches = Batches(inputs, seed, config.gradient.batch_size, config.gradient.epochs)
    rows = jax.ShapeDtypeStruct((config.gradient.batch_size, inputs.obs_dim), jnp.float32)
    state = create_state(model.module, start.variables, model.optimizer(len(batches)), rows, inputs.mesh)
    step = model.step(state, inputs.mesh)
    for done, batch in enumerate(batches.iterate()):
        state, loss = step(state, batch, start.extra(config, key, batches.per_epoch, done))
        jax.block_until_ready(loss)
        if stop.received:
            raise Stopped
    return jax.tree.map(np.asarray, state.variables)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS or not EXPERIMENTS[sys.argv[1]].has_encoder:
        names = ", ".join(known for known, config in EXPERIMENTS.items() if config.has_encoder)
        sys.exit(f"experiments.benchmarks.ablations: name an experiment with an encoder: {names}.")
    default = dataclasses.replace(EXPERIMENTS[sys.argv[1]], workdir=f"runs/ablations/{sys.argv[1]}", n_seeds=3)
    try:
        main(sys.argv[1], tyro.cli(Experiment, default=default, args=sys.argv[2:]))
    except Stopped:
        sys.exit(STOPPED)
    except ValueError as error:
        sys.exit(f"error: {error}")
