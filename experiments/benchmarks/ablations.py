"""Ablations of the recipe for encoders: an experiment, poorer and richer ones, and other heads.

    python -m experiments.benchmarks.ablations usps_encoder --data.path usps_9298.npz
    python -m experiments.benchmarks.ablations mnist_encoder --data.rows 10000 --gradient.epochs 40

Options are those of the experiment; its data must have labels. Every variant is a run in a folder of the workdir, and
what has been stopped goes on there. The agreement of seeds needs no labels, and may choose among variants.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.kmeans_head import KMeansHead
from experiments.configs import EXPERIMENTS
from flax_hmog import WarmStartWarning
from flax_hmog.recipe import Augmentation, Experiment, Gradient, Rounds, Template, restore_run, train
from flax_hmog.recipe.facts import clusters_in_use, clusters_of, pair_agreement
from flax_hmog.recipe.load import load
from flax_hmog.recipe.options import parse_experiment
from flax_hmog.recipe.parts import Dataset
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WarmStartWarning)  # spheres of one size hold no mixture
            train.run(changed, console, stop)
        workdir = Path(changed.workdir)
        by_stage = final_scores(workdir, config.seeds, has_encoder=changed.has_encoder)
        for row, stage in (("linear model, EM", "em"), (variant, list(by_stage)[-1])):
            if row not in scores:
                scores[row] = by_stage[stage]
                without_labels[row] = agreement(workdir, stage, config.seeds, dataset)
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

    no_encoder = dataclasses.replace(config, encoder=None, rounds=Rounds())
    alone = dataclasses.replace(no_encoder, augmentation=Augmentation(), gradient=FINE_TUNING)
    yield "head alone, no encoder", alone
    yield "random start, one round", rounds(1, None, start="nothing")
    yield f"random start, two rounds, {many} clusters first", rounds(2, many, start="nothing")
    yield "one round", rounds(1, None)
    yield "two rounds", rounds(2, None)
    yield f"two rounds, {many} clusters first", rounds(2, many)
    yield f"two rounds, {many} clusters first, no EM between", rounds(2, many, refit=False)
    yield f"two rounds, {many} clusters first, one encoder", rounds(2, many, fresh=False)
    for variant, name in (("symmetric head", "symmetric"), ("analytic head, EM in the network", "analytic")):
        yield variant, dataclasses.replace(config, heads=(config.heads[0].switched(name),))
    lat_dim = config.heads[0].arguments["lat_dim"]
    yield "k-means head", dataclasses.replace(config, heads=(Template(KMeansHead, lat_dim=lat_dim),))


def final_scores(workdir: Path, seeds: range, *, has_encoder: bool = True) -> dict[str, list[Scores]]:
    """The scores that each stage ends with, in the order of stages: one entry for each of the seeds."""
    last, best = dict[str, dict[int, Scores]](), dict[tuple[str, int], float]()
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        of, criterion = (record["stage"], record["seed"]), record.get("criterion", -math.inf)
        is_kept = criterion >= best.get(of, -math.inf) and not record.get("has_fallen")
        if "accuracy" in record and record["seed"] in seeds and is_kept:
            best[of] = criterion
            # the density of a head alone is nothing to compare with information
            names = ("accuracy", "nmi", "objective") if has_encoder else ("accuracy", "nmi")
            scores = {name: record[name] for name in names if name in record}
            last.setdefault(record["stage"], {})[record["seed"]] = scores
    return {stage: [by_seed[seed] for seed in seeds] for stage, by_seed in last.items()}


def agreement(workdir: Path, stage: str, seeds: range, dataset: Dataset) -> list[str]:
    """Mean ± sd of the agreement of pairs of seeds on the training rows, and of how many clusters they use there."""
    models = [restore_run(workdir, seed=seed, stage=stage, allow_import=True) for seed in seeds]
    clusters = clusters_of(models, dataset.train)
    return [spread(pair_agreement(clusters)) if len(models) > 1 else "", spread(clusters_in_use(clusters))]


def spread(values: list[float]) -> str:
    """Mean and standard deviation; nothing where values are NaN."""
    if np.isnan(values).any():
        return ""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS or not EXPERIMENTS[sys.argv[1]].has_encoder:
        names = ", ".join(known for known, config in EXPERIMENTS.items() if config.has_encoder)
        sys.exit(f"experiments.benchmarks.ablations: name an experiment with an encoder: {names}.")
    default = dataclasses.replace(EXPERIMENTS[sys.argv[1]], workdir=f"runs/ablations/{sys.argv[1]}", n_seeds=3)
    try:
        main(sys.argv[1], parse_experiment(default, sys.argv[2:], "python -m experiments.benchmarks.ablations"))
    except Stopped:
        sys.exit(STOPPED)
    except ValueError as error:
        sys.exit(f"error: {error}")
