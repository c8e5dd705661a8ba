"""The models in the folder of a run: which stages it has, and the one that speaks for it."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

from flax_hmog.training.describe import CheckpointError
from flax_hmog.training.files import read_description, saved_steps
from flax_hmog.training.logs import Stage
from flax_hmog.training.restoring import Restored, restore

HEADS = ("differentiable", "symmetric", "analytic")  # of runs whose configuration names those of its last start only
LEAST_LOSS = 0.01  # nats per row by which EM must be better than a head that has started from it


def saved_stages(folder: Path) -> Iterator[tuple[Stage, dict[str, Any] | None]]:
    """Every stage of a run with the description of its last checkpoint, or None where it has none yet.

    Seeds in their order; in a seed EM on the inputs first, and in a round EM before training.
    """
    content = _run_file(folder)
    config = content["config"]
    # those of earlier runs in the folder, too
    labels = {*HEADS, *config["heads"], *content.get("result_options", {}).get("heads", ())}
    rounds = range(config["rounds"]["count"] + 1)
    seeds = sorted(int(path.name.removeprefix("seed")) for path in folder.glob("checkpoints/seed*"))
    for seed in seeds:
        of_rounds = product(sorted(labels), rounds, (True, False))
        for stage in (Stage(seed, "em"), *(Stage(seed, *which) for which in of_rounds)):
            path = folder / stage.folder
            if path.is_dir():
                yield stage, last_description(path) if saved_steps(path) else None


def last_description(folder: Path) -> dict[str, Any]:
    """Description of the last checkpoint in a folder.

    Raises:
        CheckpointError: naming the checkpoint, if it is damaged.
    """
    path = folder / str(saved_steps(folder)[-1])
    try:
        return read_description(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"restore_run: checkpoint {path} must be readable, and as it was saved; got {error}. Delete it to go on "
            "from the step before it."
        ) from None


def best_stage(stages: dict[Stage, dict[str, Any]]) -> Stage:
    """The stage that speaks for a run: that of the best model by the run's own criterion, without labels.

    With an encoder, where densities compare with no other, the criterion is that of training in the last round. Without
    one it is the held-out log-density, in the mean over seeds, or that of the rows of the fit where none are held out;
    of the seeds, whose splits may differ, the log-density of all rows. EM gives way to a head that has lost no more
    than 0.01 nats of it.

    Args:
        stages: finished stages with the descriptions of their checkpoints.
    """
    last = max(stage.number for stage in stages)
    if last:
        trained = [stage for stage in stages if stage.is_trained and stage.number == last]
        return max(trained, key=lambda stage: _criterion(stages[stage]), default=next(iter(stages)))
    names = sorted(dict.fromkeys(stage.name for stage in stages), key="em".__eq__)
    seeds = [seed for seed in {s.seed: 0 for s in stages} if all(Stage(seed, name) in stages for name in names)]

    def in_the_mean(name: str) -> float:
        densities = [_held_out(stages[Stage(seed, name)]) for seed in seeds]
        return float(np.mean(densities)) - (LEAST_LOSS if name == "em" else 0.0)

    best = max(names, key=in_the_mean) if seeds else "em"
    return max((stage for stage in stages if stage.name == best), key=lambda stage: _of_all_rows(stages[stage]))


def why_best(stages: Collection[Stage], *, has_encoder: bool, held_out: bool) -> str:
    """The reason for which `best_stage` takes the one that it takes, as the end of a sentence."""
    if has_encoder:
        return "its last round has the best criterion"
    if len({stage.name for stage in stages}) == 1:
        return "of the seeds it has the highest log-density of all rows"
    kind = "held-out" if held_out else "training"
    seeds = ", and of the seeds the highest log-density of all rows" if len({s.seed for s in stages}) > 1 else ""
    return f"of the models it has the highest {kind} log-density{seeds}"


def _criterion(about: dict[str, Any]) -> float:
    """The criterion of training, or the objective where a former version has none."""
    history = about["history"] or [{}]
    found = (about.get("metrics") or {}).get("criterion", history[-1].get("objective"))
    return -math.inf if found is None else float(found)


def _held_out(about: dict[str, Any]) -> float:
    """Mean log-density of the test part, or where there is none of the rows of the fit."""
    kept = about["progress"].get("kept") or (about["history"] or [{}])[-1]
    return float(kept["test_log_density"]) if "test_log_density" in kept else _of_all_rows(about)


def _of_all_rows(about: dict[str, Any]) -> float:
    """Mean log-density of all rows; former versions have that of the test part, or the objective of the fit."""
    if "log_density" in about["progress"]:
        return float(about["progress"]["log_density"])
    kept = about["progress"].get("kept") or (about["history"] or [{}])[-1]
    if "test_log_density" in kept:
        return float(kept["test_log_density"])
    metrics = about.get("metrics") or {}
    return float(metrics["objective"]) if "objective" in metrics else _criterion(about)


def restore_run(
    folder: str | Path, *, seed: int | None = None, stage: str | None = None, allow_import: bool | str = False
) -> Restored:
    """The best model of a finished run, or of the seed and stage that are asked for; `origin` says which it is.

    It is best by the run's own criterion, without labels: the model that `hmog report` describes, and that
    `hmog predict` and `hmog export` take. Without an encoder that is the highest held-out log-density, in the mean over
    seeds, and of the seeds the highest log-density of all rows; with one the criterion of training in the last round.

    Args:
        folder: that of the run (train's --workdir), or of the checkpoints of one stage.
        seed: which seed; None takes the best.
        stage: as its folder is called: "em", "differentiable", "differentiable-2"; None takes the best.
        allow_import: of `restore`.

    Raises:
        CheckpointError: for a folder without such a model, or a damaged one.

    Example:
        >>> import tempfile
        >>> from flax_hmog.recipe import EM, Model, fit_clusterer
        >>> from flax_hmog.toy import x
        >>> folder = tempfile.mkdtemp()
        >>> small = {"model": Model(2, 3), "em": EM(max_steps=3)}
        >>> found = fit_clusterer(None, x, 3, jax.random.key(0), **small, workdir=folder)
        >>> bool((restore_run(folder)(x).log_density == found(x).log_density).all())
        True
    """
    folder = Path(folder)
    if saved_steps(folder):
        return restore(folder, allow_import=allow_import)
    config = run_config(folder)
    saved = {s: about for s, about in saved_stages(folder) if about is not None}
    done = {s: about for s, about in saved.items() if about["progress"].get("done")}
    found = {s: about for s, about in done.items() if seed in (None, s.seed) and stage in (None, s.name)}
    if not found:
        names = ", ".join(f"seed {s.seed} {s.name}" for s in done) or "none"
        raise CheckpointError(
            f"restore_run: `folder` must hold a finished stage as asked for; got {folder} with {names}. "
            "Choose one of them, or train to the end."
        )
    return restore(
        folder / best_stage(found).folder, allow_import=own_classes(config) if allow_import is True else allow_import
    )


def own_classes(config: dict[str, Any]) -> list[str]:
    """Names of the encoder and the heads that a configuration trains, which a reader of its run may import."""
    heads = config["heads"]
    return [config["encoder"]["name"], *(heads[label]["name"] if isinstance(heads, dict) else label for label in heads)]


def run_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        CheckpointError: for a folder that holds none.
    """
    return dict(_run_file(folder)["config"])


def run_columns(folder: Path) -> list[str] | None:
    """Names of the raw columns that a run was trained on; None where they had none, or for the folder of a stage."""
    return None if saved_steps(folder) else _run_file(folder).get("column_names")


def run_command(folder: Path) -> str | None:
    """The command that a run was made by; None where it was made by a function, or by a former version."""
    command = _run_file(folder).get("command")
    return None if command is None else str(command)


def run_contents(folder: Path) -> str | None:
    """Shape and digest of the rows of a run, as "(600, 6) 3f..."; None for a former version."""
    found = _run_file(folder).get("result_options", {}).get("contents of the data")
    return None if found is None else str(found)


def run_date(folder: Path) -> str:
    """The time at which the last checkpoint was written."""
    written = max(path.stat().st_mtime for path in folder.glob("checkpoints/*/*/*"))
    return datetime.datetime.fromtimestamp(written, datetime.UTC).isoformat(timespec="minutes")


def run_seconds(folder: Path) -> float | None:
    """Seconds of training that the log of the run has noted."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return float(sum(json.loads(line).get("seconds", 0.0) for line in lines)) if lines else None
    except (OSError, ValueError):
        return None


def _run_file(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise CheckpointError(
            f"restore_run: `folder` must be the folder of a run; got the file {folder}. Give the folder, or a model of "
            "hmog fit, which ends in .npz."
        )
    try:
        content = json.loads((folder / "config.json").read_text())
        return cast(dict[str, Any], content | {"config": content["config"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "restore_run: `folder` must hold checkpoints of a run, and its config.json; got "
            f"{type(error).__name__}: {error}. Check the path, or train first."
        ) from None
