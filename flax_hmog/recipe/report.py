"""Report on a finished run, from its checkpoints alone: tables, plots and one self-contained page."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from rich.console import Console
from rich.table import Table as ConsoleTable

from flax_hmog.analysis import (
    Picture,
    Section,
    Table,
    canonical_loadings,
    cluster_hierarchy,
    cluster_prototypes,
    component_summary,
    format_cell,
    mean_and_sd,
    plot_contingency,
    plot_dendrogram,
    plot_latent_space,
    plot_loadings,
    plot_objective,
    plot_prototypes,
    write_report,
)
from flax_hmog.data.files import File
from flax_hmog.inference.posterior import HMoGOutput, infer
from flax_hmog.model.optional import require
from flax_hmog.recipe.config import Data, flat_options
from flax_hmog.recipe.load import load, read_data
from flax_hmog.recipe.parts import Dataset, Part
from flax_hmog.recipe.saved import own_classes, reported_stage, run_config, saved_stages
from flax_hmog.recipe.scores import own_scores
from flax_hmog.training import CheckpointError, Restored, restore
from flax_hmog.training.logs import Stage

COLUMNS = {
    "train_log_density": "train log p(x)",
    "test_log_density": "test log p(x)",
    "nmi": "NMI",
    "ari": "ARI",
    "accuracy": "ACC",
    "labelled": "labelled rows",
}
FILE_WIDTH = 132  # of output that goes to no terminal
MAX_ROWS = 30  # clusters that the table lists
MODELS = {
    "em": "HMoG by exact EM",
    "differentiable": "DifferentiableHMoG",
    "symmetric": "SymmetricHMoG",
    "analytic": "AnalyticHMoG",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Contents of the checkpoints of a run.

    Attributes:
        config: the configuration.
        dataset: the data, as the first seed splits them.
        models: restored model of every stage that is finished.
        scores: per model or baseline, a dict of metrics for each seed.
        agreement: per model, how far each pair of seeds agrees on the training rows of the first; empty for one seed.
        in_use: per model, how many clusters each seed uses for these rows; empty for one seed.
        unfinished: stages that are still to be trained.
    """

    config: dict[str, Any]
    dataset: Dataset
    models: dict[Stage, Restored]
    scores: dict[str, list[dict[str, float]]]
    agreement: dict[str, list[float]]
    in_use: dict[str, list[float]]
    unfinished: list[str]


def report_run(folder: Path, *, allow_import: bool = False) -> None:
    """Write report.html and result.json into the folder of a run, from its checkpoints alone, and print the scores.

    Args:
        folder: the run's folder, as train's --workdir.
        allow_import: import the encoder that config.json names, if it is not of flax_hmog; this runs its code.

    Raises:
        CheckpointError: if the folder holds no finished seed, or a damaged one.
        ImportError: without matplotlib, jinja2 or scikit-learn.
    """
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    run = load_run(folder, allow_import=allow_import)
    for name in run.unfinished:
        console.print(f"not finished, and left out: {name}")
    rows = table_rows(run)
    model, encoder = run.config["model"], run.config["encoder"]["name"]
    merged = f", merged to {model['n_clusters']} clusters" if model["n_clusters"] else ""
    before = "" if encoder == "none" else f"; encoder {encoder}"
    page = write_report(
        folder / "report.html",
        f"{run.dataset.title}, clustered by hierarchical mixtures of Gaussians",
        list(sections(run, rows)),
        summary=f"Seeds: {len(run.scores['em'])}; latent dimension {model['lat_dim']}, "
        f"{model['n_components']} components{merged}, {model['obs_rep']} noise covariance{before}.",
    )
    result = {
        "scores": run.scores,
        "agreement": run.agreement,
        "clusters_in_use": run.in_use,
        "config": run.config,
        "class_names": run.dataset.test.class_names,
        "data_sha256": run.dataset.digest,
        "versions": run_versions(run),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print_table(console, rows)
    console.print(f"report: {page}")


def load_run(folder: Path, *, allow_import: bool = False) -> Run:
    """Restore every finished model of a run and score it on its own split of the data.

    Raises:
        CheckpointError: if the folder holds no finished seed, or a damaged one.
    """
    config = run_config(folder)
    allowed = own_classes(config) if allow_import else False
    own = config.get("scores", ()) if allow_import else ()
    if ":" in config["data"]["name"] and not allow_import:
        raise CheckpointError(
            f"load_run: the data are read by {config['data']['name']}, which must be imported; got no permission. Add "
            "--allow-import if you trust it."
        )
    models: dict[Stage, Restored] = {}
    unfinished = []
    for stage, about in saved_stages(folder):
        if about is None or not about["progress"]["done"]:
            unfinished.append(f"seed {stage.seed}, {stage.name}")
        else:
            models[stage] = restore(folder / stage.folder, allow_import=allowed)
    if not models:
        raise CheckpointError(
            f"load_run: `folder` must hold checkpoints of a run with EM done; got none in {folder}. Train first."
        )
    file: File | None = None
    datasets, scores = dict[int, Dataset](), dict[str, list[dict[str, float]]]()
    for stage, model in models.items():
        seed, name = stage.seed, stage.name
        if stage == Stage(seed, "em"):
            data = Data(**model.config["data"])
            if data.name == "memory":  # which lie beside the run, wherever it is now
                data = dataclasses.replace(data, folder=str(folder))
            file = read_data(data) if file is None else file
            datasets[seed] = load(data, seed, file)
            for baseline, its_scores in model.progress["baselines"].items():
                scores.setdefault(baseline, []).append(its_scores)
        scores.setdefault(name, []).append(score(model, datasets[seed], own))
    first = next(iter(datasets.values()))
    names = {stage.name: None for stage in models}
    of_stage = {name: [model for stage, model in models.items() if stage.name == name] for name in names}
    compared = {stage: clusters_of(same, first.train) for stage, same in of_stage.items() if len(same) > 1}
    agreement = {stage: pair_agreement(clusters) for stage, clusters in compared.items()}
    in_use = {stage: clusters_in_use(clusters) for stage, clusters in compared.items()}
    return Run(config, first, models, scores, agreement, in_use, unfinished)


def title(stage: Stage) -> str:
    """Name of a stage in tables: that of a head, or of a round of it."""
    head = MODELS.get(stage.head, stage.head)
    return head if not stage.number else f"{head}, round {stage.number}" + (": EM before it" if stage.is_em else "")


def score(restored: Restored, dataset: Dataset, own: Iterable[str] = ()) -> dict[str, float]:
    """Log-density in nats per sample on both parts, and on the test part NMI, ARI and ACC if it has labels, and others.

    Args:
        restored: the model.
        dataset: rows and labels.
        own: import paths of further scores.
    """
    parts = {"train": dataset.train, "test": dataset.test}
    outputs = {name: output_of(restored, part) for name, part in parts.items() if len(part)}
    scores = {f"{name}_log_density": float(np.mean(output.log_density)) for name, output in outputs.items()}
    if "test" not in outputs:
        return scores
    scores |= dataset.test.agreement(outputs["test"].log_responsibilities.argmax(axis=-1))
    return scores | own_scores(own, outputs["test"], dataset.test)


def output_of(restored: Restored, part: Part) -> HMoGOutput:
    """Output of a model for all rows of a part, in numpy."""
    blocks = [restored(block) for block in part.blocks(slice(None))]
    return cast(HMoGOutput, jax.tree.map(lambda *arrays: np.concatenate(arrays), *blocks))


def clusters_of(models: list[Restored], part: Part) -> list[np.ndarray]:
    """Every model's clusters (N,) of the same rows."""
    return [np.argmax(output_of(model, part).log_responsibilities, axis=-1) for model in models]


def pair_agreement(clusters: list[np.ndarray]) -> list[float]:
    """The adjusted Rand index between every two models' clusters of the same rows: 1 where they say the same.

    Clusters that another seed finds again are no chance of the initialisation; that needs no labels. Two models that
    put all rows in one cluster agree on nothing: 0.
    """
    pairs, metrics = combinations(clusters, 2), require("sklearn.metrics", "cluster")
    return [float(metrics.adjusted_rand_score(*pair)) if all(map(np.ptp, pair)) else 0.0 for pair in pairs]


def clusters_in_use(clusters: list[np.ndarray]) -> list[float]:
    """Number of clusters that each model uses, exp of their entropy: all of them where they are of one size."""
    shares = [np.unique(found, return_counts=True)[1] / len(found) for found in clusters]
    return [float(np.exp(-np.sum(share * np.log(share)))) for share in shares]


def table_rows(run: Run) -> list[dict[str, Any]]:
    """One row per method, with mean and standard deviation over seeds, and of the agreement over their pairs."""
    found = run.scores["em"][0]
    own = {key: key for key in found if key not in COLUMNS}
    columns = {key: title for key, title in (COLUMNS | own).items() if key in found}
    rows, titles = [], {stage.name: title(stage) for stage in run.models}
    for name, seeds in run.scores.items():
        row: dict[str, Any] = {"method": titles.get(name, name)}
        row |= {title: _summary([seed.get(key, np.nan) for seed in seeds]) for key, title in columns.items()}
        if run.agreement:
            row["agreement"] = _summary(run.agreement[name]) if name in run.agreement else None
            row["in use"] = float(np.mean(run.in_use[name])) if name in run.in_use else None
        rows.append(row)
    return rows


def _summary(values: list[float]) -> tuple[float, float] | float | None:
    """Mean and standard deviation, the value of a single seed, or nothing where a method has no density."""
    if np.isnan(values).all():
        return None
    return mean_and_sd(values) if len(values) > 1 else values[0]


def sections(run: Run, rows: list[dict[str, Any]]) -> Iterator[Section]:
    """The parts of the page."""
    chosen = reported_stage(list(run.models), *list(run.config["heads"])[:1])
    yield Section(
        "Results",
        "Mean and standard deviation over seeds, each with its own split of the data where there is none given. "
        "Log-densities are in nats per sample and exact for every method, since each two-stage baseline is itself a "
        "model of this family; k-means has none. Those of rounds with an encoder are of its features, and compare with "
        "no other. Labels are used for NMI, ARI and ACC only, over the test rows that have one; agreement is "
        "the adjusted Rand index between the clusters that two seeds find in the training rows of the first, and in "
        "use are as many clusters there as exp of the entropy of their sizes says.",
        tables=[Table(rows, "Held-out log-density, and clusters beside labels and beside those of other seeds")],
    )
    yield objective_section(run, chosen.seed)
    yield from model_sections(run.models[chosen], run.dataset, f"{title(chosen)}, seed {chosen.seed}")
    yield Section(
        "How this was made",
        f"Data SHA-256 {run.dataset.digest}. Versions: {run_versions(run)}. "
        "The options below are those of the command.",
        tables=[Table([{"option": k, "value": str(v)} for k, v in flat_options(run.config).items()], "Options")],
    )


def objective_section(run: Run, seed: int) -> Section:
    """EM's objective and the course of fine-tuning."""
    em = {f"seed {s.seed}": r.progress["objective"] for s, r in run.models.items() if s == Stage(s.seed, "em")}
    heads = {
        title(stage): [epoch["test_log_density"] for epoch in restored.history]
        for stage, restored in run.models.items()
        if stage.seed == seed and len(restored.history) > 1 and len(run.dataset.test)
    }
    pictures = [
        Picture(plot_objective(em, title="Exact EM"), "Penalised log-likelihood per sample, best of the starts",
                "Curves of the EM objective rising over steps, one for each seed"),
    ]  # fmt: skip
    if heads:
        pictures.append(
            Picture(
                plot_objective(heads, step_name="epoch", quantity="test log-density (nats per sample)",
                               title="Training of heads"),
                f"Held-out log-density while heads are trained, seed {seed}; epoch 0 is the start. "
                "On an encoder it is that of its features",
                "Curves of the held-out log-density over epochs for each head")
        )  # fmt: skip
    text = "Exact EM never decreases its penalised log-likelihood. Heads start from its model or its clusters."
    return Section("Fit", text, pictures=pictures)


def model_sections(restored: Restored, dataset: Dataset, title: str) -> Iterator[Section]:
    """Sections about the reported head, on the test part of one seed, or the training part where there is none."""
    part, samples = (dataset.test, "Test") if len(dataset.test) else (dataset.train, "Training")
    natural = restored.head.apply(restored.variables, method="natural")
    clusters = restored.clusters
    rows = np.asarray(restored.features(part.read(slice(None))))
    assignments = np.argmax(restored.merged(infer(natural, rows)).log_responsibilities, axis=-1)
    is_image = restored.encoder_variables is None and natural.interaction.shape[0] == dataset.obs_dim
    image_shape = dataset.image_shape if is_image else None
    prototypes, linkage = cluster_prototypes(natural), cluster_hierarchy(natural)
    shown = prototypes if clusters is None else cluster_prototypes(natural, labels=clusters)
    pictures = [
        Picture(plot_prototypes(shown, image_shape=image_shape), "Cluster prototypes E[x | z]",
                "The mean of each cluster in the space of the model's inputs"),
    ]  # fmt: skip
    if part.is_labelled.any():
        pictures.append(contingency_picture(part, assignments, samples))
    yield Section(
        "Clusters",
        f"{title}. A prototype is the mean of its cluster in the space of the model's inputs.",
        tables=[summary_table(component_summary(natural, rows).rows(), samples)],
        pictures=pictures,
    )
    yield Section(
        "How the clusters relate",
        "Average linkage on the exact distance between components.",
        pictures=[
            Picture(
                plot_dendrogram(linkage, labels=clusters, prototypes=prototypes if image_shape else None,
                                image_shape=image_shape,
                                distance_name="Bhattacharyya distance (nats)"),
                "Hierarchy of the clusters", "Dendrogram of the clusters"),
        ] if len(prototypes) > 1 else [],
    )  # fmt: skip
    loadings_shape = image_shape if image_shape and len(image_shape) == 2 else None
    yield Section(
        "Latent space",
        f"Posterior means E[y | x] of the {samples.lower()} samples, along the directions that separate the clusters "
        "best; and the loadings in a canonical rotation, ordered by the variance they explain.",
        pictures=[
            Picture(plot_latent_space(natural, rows, groups=assignments),
                    f"{samples} samples in the latent space, coloured by cluster",
                    "Scatter plot of latent means coloured by cluster"),
            Picture(plot_loadings(canonical_loadings(natural), image_shape=loadings_shape), "Loadings",
                    "The loadings of each latent axis"),
        ],
    )  # fmt: skip


def contingency_picture(part: Part, assignments: np.ndarray, samples: str) -> Picture:
    """Labels beside clusters, for the rows that have a label; classes by their names."""
    is_labelled, names = part.is_labelled, part.occurring_names
    labels: Any = part.part_labels
    shown = "" if is_labelled.all() else f", {is_labelled.sum():,} of {len(part):,} that have a label"
    called = f" ({', '.join(names[:MAX_ROWS])})" if names else ""
    figure = plot_contingency(labels[is_labelled], assignments[is_labelled], label_names=names)
    return Picture(
        figure, f"{samples} samples by label and cluster{shown}", f"Table of counts of labels{called} in each cluster"
    )


def summary_table(rows: list[dict[str, Any]], samples: str) -> Table:
    """The clusters, or the largest of very many."""
    caption = f"Components on the {samples.lower()} samples"
    if len(rows) <= MAX_ROWS:
        return Table(rows, caption)
    largest = sorted(rows, key=lambda row: -row["weight"])[:MAX_ROWS]
    return Table(largest, f"{caption}: the {MAX_ROWS} of largest weight, of {len(rows)}")


def run_versions(run: Run) -> str:
    """Versions of the libraries that trained the run, as one line."""
    return ", ".join(f"{name} {version}" for name, version in next(iter(run.models.values())).versions.items())


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    """The results on the terminal."""
    title = "Test split, mean ± sd over seeds; log p(x) in nats per sample"
    title += "; agreement on training rows" if "agreement" in rows[-1] else ""
    table = ConsoleTable(*rows[-1], title=title)
    for row in rows:
        table.add_row(*(format_cell(value) for value in row.values()))
    console.print(table)
