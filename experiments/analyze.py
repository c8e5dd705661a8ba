"""Report on a finished run, from its checkpoints alone: tables, plots and one self-contained page.

python -m experiments.analyze runs/digits
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table as ConsoleTable

from experiments.data import Split, digits, digits_digest
from experiments.train import checkpoint_folder, evaluate
from flax_hmog import posterior_hard_assignment
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
from flax_hmog.training import CheckpointError, Restored, restore

COLUMNS = {
    "train_log_density": "train log p(x)",
    "test_log_density": "test log p(x)",
    "nmi": "NMI",
    "ari": "ARI",
    "accuracy": "ACC",
}
MODELS = {"em": "HMoG by exact EM", "differentiable": "DifferentiableHMoG", "symmetric": "SymmetricHMoG"}
IMAGE_SHAPE = (8, 8)


@dataclasses.dataclass(frozen=True)
class Run:
    """What the checkpoints of a run hold.

    Attributes:
        config: the configuration.
        models: restored model by seed and name.
        scores: per model or baseline, a dict of metrics for each seed.
    """

    config: dict[str, Any]
    models: dict[tuple[int, str], Restored]
    scores: dict[str, list[dict[str, float]]]


def main(folder: Path, /) -> None:
    """Report on a finished run, from its checkpoints alone.

    Args:
        folder: the run's folder, as train's --workdir.
    """
    console = Console()
    try:
        run = load_run(folder)
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from None
    rows = table_rows(run.scores)
    page = write_report(
        folder / "report.html",
        "Handwritten digits, clustered by hierarchical mixtures of Gaussians",
        list(sections(run, rows)),
        summary=f"{len(run.scores['em'])} seeds; latent dimension {run.config['lat_dim']}, "
        f"{run.config['n_components']} clusters; {run.config['obs_rep']} noise covariance.",
    )
    result = {"scores": run.scores, "config": run.config, "data_sha256": digits_digest(), "versions": run_versions(run)}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print_table(console, rows)
    console.print(f"report: {page}")


def load_run(folder: Path) -> Run:
    """Restore every model of a run and score it on its own split of the data.

    Raises:
        CheckpointError: if the folder holds no finished seed, or a damaged one.
    """
    seeds = sorted(int(path.name.removeprefix("seed")) for path in folder.glob("checkpoints/seed*"))
    models: dict[tuple[int, str], Restored] = {}
    scores: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        em = restore(checkpoint_folder(folder, seed, "em"))
        split = digits(seed, em.config["test_share"])
        for name, baseline in em.metrics["baselines"].items():
            scores.setdefault(name, []).append(baseline)
        for name in MODELS:
            restored = em if name == "em" else restore(checkpoint_folder(folder, seed, name))
            models[seed, name] = restored
            scores.setdefault(name, []).append(evaluate(restored.head, restored.variables, split))
    if not models:
        raise CheckpointError(f"load_run: `folder` must hold checkpoints of a run; got none in {folder}. Train first.")
    return Run(restore(checkpoint_folder(folder, seeds[0], "em")).config, models, scores)


def table_rows(scores: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row per method, with mean and standard deviation over seeds."""
    return [
        {"method": MODELS.get(name, name)}
        | {title: _summary([seed[key] for seed in seeds]) for key, title in COLUMNS.items()}
        for name, seeds in scores.items()
    ]


def _summary(values: list[float]) -> tuple[float, float] | float | None:
    """Mean and standard deviation, the value of a single seed, or nothing where a method has no density."""
    if np.isnan(values).all():
        return None
    return mean_and_sd(values) if len(values) > 1 else values[0]


def sections(run: Run, rows: list[dict[str, Any]]) -> Iterator[Section]:
    """The parts of the page."""
    config = run.config
    seed = min(seed for seed, _ in run.models)
    split = digits(seed, config["test_share"])
    restored = run.models[seed, config["head"]]
    natural = restored.head.apply(restored.variables, method="natural")
    yield Section(
        "Results",
        "Mean and standard deviation over seeds, each with its own split of the data. Log-densities are in nats per "
        "sample and exact for every method, since each two-stage baseline is itself a model of this family; "
        "k-means has none. Labels are used for these scores only.",
        tables=[Table(rows, "Held-out log-density and agreement with the digits' labels")],
    )
    yield objective_section(run, seed)
    yield from model_sections(natural, split, MODELS[config["head"]], seed)
    yield Section(
        "How this was made",
        f"Data: scikit-learn's digits, SHA-256 {digits_digest()}. Versions: {run_versions(run)}. "
        f"Command: python -m experiments.train digits, with the options below.",
        tables=[Table([{"option": name, "value": str(value)} for name, value in config.items()], "Options")],
    )


def objective_section(run: Run, seed: int) -> Section:
    """EM's objective and the course of fine-tuning."""
    em = {f"seed {s}": r.metrics["objective"] for (s, name), r in run.models.items() if name == "em"}
    heads = {
        MODELS[name]: [epoch["test_log_density"] for epoch in run.models[seed, name].metrics["history"]]
        for name in MODELS
        if name != "em"
    }
    return Section(
        "Fit",
        "Exact EM never decreases its penalised log-likelihood. The heads start from its solution.",
        pictures=[
            Picture(plot_objective(em, title="Exact EM"), "Penalised log-likelihood per sample, best of the starts",
                    "Curves of the EM objective rising over steps, one for each seed"),
            Picture(
                plot_objective(heads, step_name="epoch", quantity="test log-density (nats per sample)",
                               title="Fine-tuning"),
                f"Held-out log-density while the heads are fine-tuned, seed {seed}; epoch 0 is the warm start",
                "Curves of the held-out log-density over epochs for both heads"),
        ],
    )  # fmt: skip


def model_sections(natural: Any, split: Split, title: str, seed: int) -> Iterator[Section]:
    """What the reported head found, on the test split of one seed."""
    prototypes = cluster_prototypes(natural)
    linkage = cluster_hierarchy(natural)
    assignments = np.asarray(posterior_hard_assignment(natural, split.test))
    yield Section(
        "Clusters",
        f"{title}, seed {seed}. A prototype is the mean of its cluster in pixel space.",
        tables=[Table(component_summary(natural, split.test).rows(), "Clusters on the test split")],
        pictures=[
            Picture(plot_prototypes(prototypes, image_shape=IMAGE_SHAPE), "Cluster prototypes E[x | z]",
                    "Images of the mean digit of each cluster"),
            Picture(plot_contingency(split.test_labels, assignments), "Test samples by label and cluster",
                    "Table of counts of labels in each cluster"),
        ],
    )  # fmt: skip
    yield Section(
        "How the clusters relate",
        "Average linkage on the exact distance between components.",
        pictures=[
            Picture(
                plot_dendrogram(linkage, prototypes=prototypes, image_shape=IMAGE_SHAPE,
                                distance_name="Bhattacharyya distance (nats)"),
                "Hierarchy of the clusters", "Dendrogram of the clusters with their prototypes"),
        ],
    )  # fmt: skip
    yield Section(
        "Latent space",
        "Posterior means E[y | x] of the test samples, along the directions that separate the clusters best; and the "
        "loadings in a canonical rotation, ordered by the variance they explain.",
        pictures=[
            Picture(plot_latent_space(natural, split.test), "Test samples in the latent space, coloured by cluster",
                    "Scatter plot of latent means coloured by cluster"),
            Picture(plot_loadings(canonical_loadings(natural), image_shape=IMAGE_SHAPE), "Loadings",
                    "Images of the loadings of each latent axis"),
        ],
    )  # fmt: skip


def run_versions(run: Run) -> str:
    """Versions of the libraries that trained the run, as one line."""
    return ", ".join(f"{name} {version}" for name, version in next(iter(run.models.values())).versions.items())


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    """The results on the terminal."""
    table = ConsoleTable(*rows[0], title="Test split, mean ± sd over seeds; log p(x) in nats per sample")
    for row in rows:
        table.add_row(*(format_cell(value) for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.analyze")
