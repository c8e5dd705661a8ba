"""Facts of a finished run that need its data: scores, the model that is described, and what rows say of its clusters.

They are kept in the run's folder, so that a report needs the data no more.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from flax_hmog.analysis.calibration import fit_temperature, scale_temperature
from flax_hmog.analysis.metrics import fit_agreement
from flax_hmog.analysis.portrait import MOST_ROWS, Portrait, Subject, portray
from flax_hmog.data.files import File
from flax_hmog.inference.padded import in_few_sizes
from flax_hmog.inference.posterior import HMoGOutput, infer
from flax_hmog.recipe.config import Data
from flax_hmog.recipe.load import load, read_data
from flax_hmog.recipe.parts import Dataset, Part
from flax_hmog.recipe.saved import best_stage, own_classes, run_config, run_date, run_seconds, saved_stages
from flax_hmog.recipe.scores import own_scores
from flax_hmog.training import CheckpointError, Restored, restore
from flax_hmog.training.logs import Stage

FILE = "report.npz"
DIGESTED_BYTES = 4_000_000_000  # of rows; of more, some blocks stand for all


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts of a report that checkpoints do not hold.

    Attributes:
        stages: the finished stages, and the step of the checkpoint that they ended with.
        described: the stage whose model is best by its own criterion.
        scores: per model or baseline, a dict of metrics for each seed.
        agreement: per model, how far each pair of seeds agrees on the training rows of the first; empty for one seed.
        in_use: per model, how many clusters each seed uses for these rows; empty for one seed.
        data: title, source, numbers of rows and columns, names and digest of the data.
        date: of the last checkpoint, ISO 8601.
        seconds: of training, or None where the log is not there.
        portrait: rows as the described model sees them.
        calibration: "temperature" of the described model by the other seeds, and its mean largest probability before,
            "certainty", and at it, "scaled", on held-out rows, if there are any; None for one seed.
    """

    stages: dict[Stage, int]
    described: Stage
    scores: dict[str, list[dict[str, float]]]
    agreement: dict[str, list[float]]
    in_use: dict[str, list[float]]
    data: dict[str, Any]
    date: str
    seconds: float | None
    portrait: Portrait
    calibration: dict[str, float] | None = None

    def of_seeds(self, name: str) -> dict[int, dict[str, float]]:
        """Scores of a model by the seeds that have it."""
        seeds = [stage.seed for stage in self.stages if stage.name == name]
        return dict(zip(seeds, self.scores.get(name, []), strict=True))

    def agreement_of_seeds(self, name: str) -> dict[int, float]:
        """The mean agreement of each seed of a model with the others; empty for one seed."""
        seeds = [stage.seed for stage in self.stages if stage.name == name]
        found: dict[int, list[float]] = {seed: [] for seed in seeds}
        for (one, other), agreement in zip(combinations(seeds, 2), self.agreement.get(name, []), strict=False):
            found[one].append(agreement)
            found[other].append(agreement)
        return {seed: float(np.mean(values)) for seed, values in found.items() if values}

    def save(self, folder: Path) -> None:
        """Write them into the folder of the run, in place of those that are there."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "portrait"}
        values["stages"] = [[*dataclasses.astuple(stage), step] for stage, step in self.stages.items()]
        values["described"] = dataclasses.astuple(self.described)
        new = folder / f"new-{FILE}"
        np.savez_compressed(new, facts=np.array(json.dumps(values)), **cast(Any, self.portrait.arrays()))
        new.replace(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Facts | None:
        """Those that are kept in the folder of a run; None where there are none that can be read."""
        try:
            with np.load(folder / FILE, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            values = json.loads(str(arrays["facts"]))
            values["stages"] = {Stage(*stage): step for *stage, step in values["stages"]}
            return cls(**values | {"described": Stage(*values["described"]), "portrait": Portrait.from_arrays(arrays)})
        except Exception:  # whatever reads a damaged archive, raises
            return None


def finished_stages(folder: Path) -> tuple[dict[Stage, dict[str, Any]], list[Stage]]:
    """The finished stages of a run with the descriptions of their last checkpoints, and those that are not finished.

    Raises:
        CheckpointError: if no stage is finished, or one is damaged.
    """
    done, unfinished = dict[Stage, dict[str, Any]](), list[Stage]()
    for stage, about in saved_stages(folder):
        if about is None or not about["progress"]["done"]:
            unfinished.append(stage)
        else:
            done[stage] = about
    if not done:
        raise CheckpointError(
            f"load_run: `folder` must hold checkpoints of a run with EM done; got none in {folder}. Train first."
        )
    return done, unfinished


def run_facts(
    folder: Path, done: dict[Stage, dict[str, Any]], *, file: File | None = None, allow_import: bool = False
) -> Facts:
    """The facts of a run: those that are kept, or those of its data, which are kept then.

    Args:
        folder: of the run.
        done: its finished stages.
        file: rows and labels, by the run itself, which has imported what its configuration names.
        allow_import: import what config.json names.

    Raises:
        CheckpointError: for a damaged checkpoint, or a class that may not be imported.
        ValueError: where none are kept, and the data are not there.
    """
    kept, stages = Facts.load(folder), {stage: about["step"] for stage, about in done.items()}
    if kept is not None and kept.stages == stages and kept.described == best_stage(done):
        return kept
    facts = collect(folder, file=file, allow_import=allow_import or file is not None)
    facts.save(folder)
    return facts


def collect(folder: Path, *, file: File | None = None, allow_import: bool = False) -> Facts:
    """Score every finished model of a run on its own split of the data, and look at the rows with the best one.

    Args:
        folder: of the run.
        file: rows and labels, if they are there already.
        allow_import: import what config.json names, if it is not of flax_hmog; this runs its code.

    Raises:
        CheckpointError: if the folder holds no finished seed, a damaged one, or what may not be imported.
        ValueError: if the data are not there.
    """
    config, (done, _) = run_config(folder), finished_stages(folder)
    allowed = own_classes(config) if allow_import else False
    own = config.get("scores", ()) if allow_import else ()
    if ":" in config["data"]["name"] and file is None and not allow_import:
        raise CheckpointError(
            f"load_run: the data are read by {config['data']['name']}, which must be imported; got no permission. Add "
            "--allow-import if you trust it."
        )
    models = {stage: restore(folder / stage.folder, allow_import=allowed) for stage in done}
    datasets, scores = dict[int, Dataset](), dict[str, list[dict[str, float]]]()
    for stage, model in models.items():
        if stage == Stage(stage.seed, "em"):
            data = Data(**model.config["data"])
            if data.name == "memory":  # which lie beside the run, wherever it is now
                data = dataclasses.replace(data, folder=str(folder))
            file = read_data(data) if file is None else file
            datasets[stage.seed] = load(data, stage.seed, file)
            for baseline, its_scores in model.progress["baselines"].items():
                scores.setdefault(baseline, []).append(its_scores)
        scores.setdefault(stage.name, []).append(score(model, datasets[stage.seed], own))
    first = next(iter(datasets.values()))
    same = {name: [m for s, m in models.items() if s.name == name] for name in {s.name: 0 for s in models}}
    clusters = {name: clusters_of(seeds, _some(first.train)) for name, seeds in same.items() if len(seeds) > 1}
    described = best_stage(done)
    return Facts(
        stages={stage: about["step"] for stage, about in done.items()},
        described=described,
        scores=scores,
        agreement={name: pair_agreement(found) for name, found in clusters.items()},
        in_use={name: clusters_in_use(found) for name, found in clusters.items()},
        data=_about_data(first),
        date=run_date(folder),
        seconds=run_seconds(folder),
        portrait=portray(subject(models[described], datasets[described.seed])),
        calibration=calibration(models, described, datasets[described.seed]),
    )


def calibration(models: dict[Stage, Restored], described: Stage, dataset: Dataset) -> dict[str, float] | None:
    """The certainty of a model about the clusters of rows, as it is and at the temperature that other seeds give."""
    others = [model for stage, model in models.items() if stage.name == described.name and stage.seed != described.seed]
    if not others:
        return None
    part = _some(dataset.test if len(dataset.test) else dataset.train)
    own, *rest = (output_of(model, part).log_responsibilities for model in (models[described], *others))
    temperature = fit_temperature(own, *rest)
    certainty, scaled = (
        float(np.exp(log_r.max(axis=-1)).mean()) for log_r in (own, scale_temperature(own, temperature))
    )
    return {"temperature": temperature, "certainty": certainty, "scaled": scaled}


def subject(restored: Restored, dataset: Dataset) -> Subject:
    """The rows of both parts and a model, for `portray`."""
    train, test = dataset.train, dataset.test
    numbers = np.concatenate([train.index, test.index])
    order = np.argsort(numbers, kind="stable")
    part = dataclasses.replace(train, index=numbers[order])
    labels = None
    if part.labels is not None and part.is_labelled.any():
        names = part.class_names
        text = [str(label) if names is None else names[label] for label in part.labels[part.index].tolist()]
        labels = np.where(part.is_labelled, np.array(text), "")
    n_components = restored.natural.posterior_location.shape[0]
    return Subject(
        infer=lambda raw: in_few_sizes(lambda rows: infer(restored.prepared, restored.features(rows)), raw),
        read=part.read,
        numbers=part.index,
        clusters=np.arange(n_components) if restored.clusters is None else restored.clusters,
        labels=labels,
        identifier=dataset.identifier and (dataset.identifier[0], dataset.identifier[1][part.index]),
        fitted=(np.arange(len(numbers)) < len(train))[order],
        column_names=dataset.column_names,
        image_shape=dataset.image_shape,
    )


def score(restored: Restored, dataset: Dataset, own: Iterable[str] = ()) -> dict[str, float]:
    """Log-density in nats per sample on both parts, and on the test part NMI, ARI and ACC if it has labels, and others.

    Args:
        restored: the model.
        dataset: rows and labels.
        own: import paths of further scores.
    """
    parts = {"train": _some(dataset.train), "test": dataset.test}
    outputs = {name: output_of(restored, part) for name, part in parts.items() if len(part)}
    scores = {f"{name}_log_density": float(np.mean(output.log_density)) for name, output in outputs.items()}
    if "test" not in outputs:
        return scores
    scores |= dataset.test.agreement(outputs["test"].log_responsibilities.argmax(axis=-1))
    return scores | own_scores(own, outputs["test"], dataset.test)


def _some(part: Part) -> Part:
    """The part, or as many of its rows as are looked at."""
    return dataclasses.replace(part, index=part.index[:: -(-len(part) // MOST_ROWS) or 1])


def output_of(restored: Restored, part: Part) -> HMoGOutput:
    """Output of a model for all rows of a part, in numpy."""
    blocks = [restored(block) for block in part.blocks(slice(None))]
    return cast(HMoGOutput, jax.tree.map(lambda *arrays: np.concatenate(arrays), *blocks))


def clusters_of(models: list[Restored], part: Part) -> list[np.ndarray]:
    """Every model's clusters (N,) of the same rows."""
    return [np.argmax(output_of(model, part).log_responsibilities, axis=-1) for model in models]


def pair_agreement(clusters: list[np.ndarray]) -> list[float]:
    """`fit_agreement` of every two models, as a list."""
    agreement = fit_agreement(clusters)
    return [float(agreement[pair]) for pair in combinations(range(len(clusters)), 2)]


def clusters_in_use(clusters: list[np.ndarray]) -> list[float]:
    """Number of clusters that each model uses, exp of their entropy: all of them where they are of one size."""
    shares = [np.unique(found, return_counts=True)[1] / len(found) for found in clusters]
    return [float(np.exp(-np.sum(share * np.log(share)))) for share in shares]


def _about_data(dataset: Dataset) -> dict[str, Any]:
    rows = dataset.train.rows
    is_small = (rows.data.nbytes if hasattr(rows, "tocsr") else rows.nbytes) <= DIGESTED_BYTES
    return {
        "title": dataset.title,
        "source": dataset.source,
        "train": len(dataset.train),
        "test": len(dataset.test),
        "obs_dim": dataset.obs_dim,
        "image_shape": dataset.image_shape,
        "column_names": dataset.column_names,
        "class_names": dataset.test.class_names,
        "sha256": dataset.digest if is_small else None,
        "fingerprint": dataset.fingerprint,
    }
