"""Report on a finished run, from its folder alone: tables, plots and one self-contained page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as ConsoleTable

from flax_hmog.analysis import Picture, Section, Table, format_cell, mean_and_sd, plot_objective, write_report
from flax_hmog.analysis.page import model_sections, page_images, selection_section
from flax_hmog.model_file import load
from flax_hmog.recipe.card import card_section
from flax_hmog.recipe.facts import Facts, finished_stages, run_facts
from flax_hmog.recipe.saved import own_classes, run_config, why_best
from flax_hmog.training import Restored, restore
from flax_hmog.training.logs import Stage

COLUMNS = {
    "train_log_density": "train log p(x)",
    "test_log_density": "test log p(x)",
    "nmi": "NMI",
    "ari": "ARI",
    "accuracy": "ACC",
    "labelled": "labelled rows",
}
KEPT = {"criterion": "criterion", "clusters_in_use": "clusters in use", "agreement": "agreement with the start"}
FILE_WIDTH = 132  # of output that goes to no terminal
MODELS = {
    "em": "HMoG by exact EM",
    "differentiable": "DifferentiableHMoG",
    "symmetric": "SymmetricHMoG",
    "analytic": "AnalyticHMoG",
}
SELECTION = "selection.npz"  # that `Selection.save` has written
LEAST_LOSS = 0.01  # nats per row, that a sentence is worth

Stages = dict[Stage, dict[str, Any]]
"""Finished stages with the descriptions of their checkpoints."""


def report_run(folder: Path, *, allow_import: bool = False) -> None:
    """Write report.html and result.json into the folder of a run, and print the scores.

    The data are read only where the folder does not hold what training has noted of them.

    Args:
        folder: the run's folder, as train's --workdir.
        allow_import: import the encoder that config.json names, if it is not of flax_hmog; this runs its code.

    Raises:
        CheckpointError: if the folder holds no finished seed, or a damaged one.
        ImportError: without matplotlib, jinja2 or scikit-learn.
        ValueError: if the data are needed and are not there.
    """
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    config, (done, unfinished) = run_config(folder), finished_stages(folder)
    for stage in unfinished:
        console.print(f"not finished, and left out: seed {stage.seed}, {stage.name}")
    facts = run_facts(folder, done, allow_import=allow_import)
    rows = table_rows(facts, done)
    allowed = own_classes(config) if allow_import else False
    restored = restore(folder / facts.described.folder, allow_import=allowed)
    page = write_report(
        folder / "report.html",
        f"{facts.data['title']}, clustered by a hierarchical mixture of Gaussians",
        list(sections(folder, config, done, facts, restored, rows)),
        summary=summary(config, facts, restored, done),
        images=page_images(facts.portrait, facts.data["image_shape"]),
    )
    result = {
        "scores": facts.scores,
        "agreement": facts.agreement,
        "calibration": facts.calibration,
        "clusters_in_use": facts.in_use,
        "described": {"seed": facts.described.seed, "stage": facts.described.name},
        "config": config,
        "class_names": facts.data["class_names"],
        "data_sha256": facts.data["sha256"],
        "versions": restored.versions,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print_table(console, rows)
    console.print(f"report: {page}")


def title(stage: Stage) -> str:
    """Name of a stage in tables: that of a head, or of a round of it."""
    head = MODELS.get(stage.head, stage.head)
    return head if not stage.number else f"{head}, round {stage.number}" + (": EM before it" if stage.is_em else "")


def summary(config: dict[str, Any], facts: Facts, restored: Restored, done: Stages) -> str:
    """The models that were fitted, which of them is described and why, and what trained heads lost."""
    portrait, data = facts.portrait, facts.data
    natural = restored.natural
    n_clusters, n_components = len(portrait.cluster_rows), len(portrait.clusters)
    merged = f" of {n_components} components" if portrait.is_merged else ""
    encoder = config["encoder"]["name"]
    before = "" if encoder == "none" else f" of an encoder's features ({encoder})"
    found = (
        f"{data['train'] + data['test']:,} rows of {data['obs_dim']:,} columns: {n_clusters} clusters{merged}, with "
        f"{natural.interaction.shape[1]} factors{before}."
    )
    if len(done) > 1:
        reason = why_best(facts.stages, has_encoder=encoder != "none", held_out=bool(data["test"]))
        found += f" Described is {title(facts.described)}, seed {facts.described.seed}: {reason}."
    return "\n\n".join([found, *losses(facts, done, restricted_heads(config))])


def restricted_heads(config: dict[str, Any]) -> dict[str, str]:
    """Kinds of the matrices that heads have for components, by their labels, where these are restricted."""
    options = config["heads"]
    if not isinstance(options, dict):  # of former versions
        options = dict.fromkeys(options, config["model"])
    names = {"differentiable": "pst_rep", "symmetric": "lat_rep"}
    kinds = {label: str(options[label].get(name, "full")) for label, name in names.items() if label in options}
    return {label: kind for label, kind in kinds.items() if kind != "full"}


def losses(facts: Facts, done: Stages, reps: dict[str, str]) -> Iterator[str]:
    """For each head without an encoder that ends below EM on held-out rows, how much, as one sentence."""
    density = "test_log_density"
    em = facts.of_seeds("em")
    for label, rep in reps.items():
        head = facts.of_seeds(label)
        pairs = [(em[seed], scores) for seed, scores in head.items() if seed in em and density in scores]
        starts = [done[Stage(seed, label)]["history"][0].get(density) for seed in head]
        if not pairs or None in starts:
            continue
        lost = float(np.mean([a[density] - b[density] for a, b in pairs]))
        if lost < LEAST_LOSS:
            continue
        at_start = float(np.mean([a[density] - start for (a, _), start in zip(pairs, starts, strict=True)]))
        nmi = float(np.mean([a.get("nmi", np.nan) - b.get("nmi", np.nan) for a, b in pairs]))
        beside = "" if np.isnan(nmi) else f"; its NMI is {abs(nmi):.2g} {'lower' if nmi > 0 else 'higher'}"
        over = f" (mean over {len(pairs)} seeds)" if len(pairs) > 1 else ""
        yield (
            f"{MODELS.get(label, label)} holds {rep} matrices where exact EM holds full ones. Against EM that costs "
            f"{at_start:.3g} nats per held-out row at its start, and {lost:.3g} after training{beside}{over}."
        )


def table_rows(facts: Facts, done: Stages) -> list[dict[str, Any]]:
    """One row per method, with mean and standard deviation over seeds, and of the agreement over their pairs."""
    found = facts.scores["em"][0]
    own = {key: key for key in found if key not in COLUMNS}
    columns = {key: head for key, head in (COLUMNS | own).items() if key in found}
    rows, titles = [], {stage.name: title(stage) for stage in done}
    for name, seeds in facts.scores.items():
        row: dict[str, Any] = {"method": titles.get(name, name)}
        row |= {head: _summary([seed.get(key, np.nan) for seed in seeds]) for key, head in columns.items()}
        if facts.agreement:
            row["agreement"] = _summary(facts.agreement[name]) if name in facts.agreement else None
            row["in use"] = float(np.mean(facts.in_use[name])) if name in facts.in_use else None
        rows.append(row)
    return rows


def _summary(values: list[float]) -> tuple[float, float] | float | None:
    """Mean and standard deviation, the value of a single seed, or nothing where a method has no density."""
    if np.isnan(values).all():
        return None
    return mean_and_sd(values) if len(values) > 1 else values[0]


def sections(
    folder: Path, config: dict[str, Any], done: Stages, facts: Facts, restored: Restored, rows: list[dict[str, Any]]
) -> Iterator[Section]:
    """The parts of the page, the clusters first."""
    has_encoder, data = bool(restored.place), facts.data
    natural = restored.natural
    kept = not has_encoder and natural.interaction.shape[0] == data["obs_dim"]
    names = tuple(data["column_names"]) if kept and data["column_names"] else None
    shape = tuple(data["image_shape"]) if kept and data["image_shape"] else None
    yield from model_sections(facts.portrait, natural, input_names=names, image_shape=shape, has_encoder=has_encoder)
    yield from stored_selection(folder)
    yield fit_section(done, facts)
    yield scores_section(config, facts, done, rows)
    yield card_section(folder, config, facts, restored)


def stored_selection(folder: Path) -> Iterator[Section]:
    """The selection that lies in the folder of a run, if there is one."""
    if (folder / SELECTION).is_file():
        notes = load(folder / SELECTION).notes.get("selection")
        if notes:
            yield selection_section(notes["rows"], notes["recommended"], notes["reasons"])


def fit_section(done: Stages, facts: Facts) -> Section:
    """EM's objective and the course of fine-tuning."""
    em = {f"seed {s.seed}": about["progress"] for s, about in done.items() if s == Stage(s.seed, "em")}
    curves = {name: progress["objective"] for name, progress in em.items()}
    seed = facts.described.seed
    heads = {
        title(stage): [epoch["test_log_density"] for epoch in about["history"]]
        for stage, about in done.items()
        if stage.seed == seed and len(about["history"]) > 1 and facts.data["test"]
    }
    steps = [
        {"seed": name.removeprefix("seed "), "steps of EM": len(p["objective"]) - 1, "converged": p["converged"],
         "objective [nats per row]": float(p["objective"][-1])}
        for name, p in em.items()
    ]  # fmt: skip
    pictures = [
        Picture(plot_objective(curves, title="Exact EM"), "Penalised log-likelihood per row, best of the starts",
                "Curves of the EM objective rising over steps, one for each seed"),
    ]  # fmt: skip
    if heads:
        quantity = "Test log-density [nats per row]"
        what = "of its features" if any(stage.number for stage in done) else "of the inputs"
        pictures.append(
            Picture(plot_objective(heads, step_name="Epoch", quantity=quantity, title="Training of heads"),
                    f"Held-out log-density {what} while heads are trained, seed {seed}; epoch 0 is the start",
                    "Curves of the held-out log-density over epochs for each head")
        )  # fmt: skip
    not_yet = [row["seed"] for row in steps if not row["converged"]]
    text = f"EM has not converged in the steps that it was given: seed {', '.join(not_yet)}." if not_yet else ""
    kept = [
        {"training of": title(s), "seed": s.seed, "epochs": about["history"][-1]["epoch"],
         "kept epoch": about["progress"]["kept"]["epoch"]}
        | {name: about["progress"]["kept"].get(key) for key, name in KEPT.items()}
        | {"ends below its start": "yes" if about["progress"]["below_start"] else "no"}
        for s, about in done.items() if about["progress"].get("kept")
    ]  # fmt: skip
    tables = [Table(steps, "Exact EM by seed")]
    if kept:
        tables.append(Table(kept, "Training by gradients: the epoch that is kept, best by its own criterion"))
    return Section("Fit", text, tables=tables, pictures=pictures)


def scores_section(config: dict[str, Any], facts: Facts, done: Stages, rows: list[dict[str, Any]]) -> Section:
    """Scores of all models and baselines, over seeds and for each of them."""
    scores, several = facts.scores, len(facts.scores["em"]) > 1
    parts = [
        "Log-densities are in nats per row, and exact for every method: each two-stage baseline is itself a model of "
        "this family."
    ]
    if several:
        parts[0] = (
            "Mean and standard deviation over seeds, each with its own split where the data have none. " + parts[0]
        )
        parts.append(
            "Agreement is the adjusted Rand index between the clusters that two seeds find in the training rows of the "
            "first, of a seed the mean over the others: where a density says little of clusters, a seed that agrees "
            "with few others is often a worse one. In use are as many clusters there as exp of the entropy of their "
            "sizes says."
        )
    if facts.calibration:
        certain = facts.calibration
        parts.append(
            f"The largest probability of a row is {certain['certainty']:.2f} on average under the described model, "
            f"and {certain['scaled']:.2f} at the temperature {certain['temperature']:.2g}, at which it says how often "
            "other seeds agree (flax_hmog.analysis.scale_temperature)."
        )
    if config["encoder"]["name"] != "none":
        parts.append("Log-densities of rounds with an encoder are of its features, and compare with no other.")
    if "nmi" in scores["em"][0]:
        parts.append("Labels are used for NMI, ARI and ACC only, over the test rows that have one.")
    tables = [Table(rows, "Scores on held-out rows" if facts.data["test"] else "Scores on the rows of the fit")]
    if several:
        seeds = sorted({stage.seed for stage in done})
        titles = {stage.name: title(stage) for stage in done}
        each = [
            {"method": titles.get(name, name), "seed": seed}
            | {COLUMNS.get(key, key): None if np.isnan(value) else value for key, value in of_seed.items()}
            | {"agreement": with_others.get(seed)}
            for name, of_seeds in scores.items()
            for with_others in [facts.agreement_of_seeds(name)]
            for seed, of_seed in zip(seeds, of_seeds, strict=False)
        ]
        tables.append(Table(each, "Scores of every seed", folded=True))
    return Section("Seeds and scores" if several else "Scores", " ".join(parts), tables=tables)


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    """The results on the terminal."""
    title = "Test split, mean ± sd over seeds; log p(x) in nats per sample"
    title += "; agreement on training rows" if "agreement" in rows[-1] else ""
    table = ConsoleTable(*rows[-1], title=title)
    for row in rows:
        table.add_row(*(format_cell(value) for value in row.values()))
    console.print(table)
