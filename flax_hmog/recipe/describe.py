"""An account of the folder of a run, in lines: what `hmog describe` says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_hmog.analysis.elements import format_cell
from flax_hmog.recipe.card import changed_options
from flax_hmog.recipe.config import flat_options
from flax_hmog.recipe.saved import (
    best_stage,
    run_command,
    run_config,
    run_contents,
    run_date,
    run_seconds,
    saved_stages,
    why_best,
)
from flax_hmog.training.logs import Stage

SCORES = {"test_log_density": "held-out log p(x)", "nmi": "NMI", "ari": "ARI", "accuracy": "ACC"}
WIDTH = 10  # of the names of entries


def describe_run(folder: Path) -> str:
    """Data, models, scores, the stage that is described and why, times, command and changed options of a run.

    Raises:
        CheckpointError: for a folder without a run, or a damaged checkpoint.
    """
    config, stages = run_config(folder), dict(saved_stages(folder))
    saved = {stage: about for stage, about in stages.items() if about is not None}
    done = {stage: about for stage, about in saved.items() if about["progress"].get("done")}
    best = best_stage(done) if done else None
    entries: list[tuple[str, str | None]] = [
        ("run", str(folder)),
        ("data", _data(folder, config, done)),
        ("model", _model(config)),
        ("command", run_command(folder)),
        ("changed", _changed(config)),
        ("saved", f"{_date(folder)}{_seconds(folder)}" if saved else "nothing yet"),
    ]
    if best is not None:
        entries += [("described", line) for line in _described(config, done, best)]
    lines, before = [], ""
    for name, text in entries:
        if text:
            lines.append(f"{'' if name == before else name:<{WIDTH}} {text}")
            before = name
    return "\n".join([*lines, "", *_table(stages, best)])


def _data(folder: Path, config: dict[str, Any], done: dict[Stage, dict[str, Any]]) -> str:
    """Source of the rows, their numbers, and what was done to them."""
    data, options = config["data"], []
    options += [f"{name} {data[name]}" for name in ("columns", "whitened") if data.get(name)]
    options += [name for name in ("size_factor", "log1p") if data.get(name)]
    options += [f"scaled: {data['scale']}"] if data.get("scale", "none") != "none" else []
    source = data.get("path") if data["name"] == "file" else data["name"]
    numbers = re.match(r"\((\d+), (\d+)\)", run_contents(folder) or "")
    shape = f": {int(numbers[1]):,} rows of {int(numbers[2]):,} columns" if numbers else ""
    trained = next((about["progress"]["rows"] for about in done.values() if "rows" in about["progress"]), None)
    parts = "" if trained is None else f", {trained:,} of them for training"
    return f"{source}{shape}{parts}{''.join(f'; {option}' for option in options)}"


def _model(config: dict[str, Any]) -> str:
    """Sizes of the mixture, encoder and heads."""
    model, encoder, heads = config["model"], config["encoder"]["name"], ", ".join(config["heads"])
    count, merged = model["n_components"], model.get("n_clusters")
    clusters = "" if merged in (None, count) else f" merged to {merged} clusters"
    text = f"EM: {count} components{clusters}, {model['lat_dim']} factors, {model['obs_rep']} noise"
    if heads:
        rounds = f", {config['rounds']['count']} rounds" if encoder != "none" else ""
        text += f"; then {heads}" + ("" if encoder == "none" else f" on {encoder}") + rounds
    return text


def _changed(config: dict[str, Any]) -> str:
    """Options that are not their defaults."""
    options = flat_options(config)
    return ", ".join(f"{name} {options[name]}" for name in changed_options(config) if not name.startswith("data."))


def _date(folder: Path) -> str:
    return run_date(folder).replace("T", " ").replace("+00:00", " UTC")


def _seconds(folder: Path) -> str:
    seconds = run_seconds(folder)
    return "" if seconds is None else f", after {seconds:,.0f} s of training"


def _described(config: dict[str, Any], done: dict[Stage, dict[str, Any]], best: Stage) -> Iterator[str]:
    """The model that speaks for the run, and the reason."""
    about = done[best]
    held_out = any("test_log_density" in record for record in about["history"])
    why = why_best(done, has_encoder=config["encoder"]["name"] != "none", held_out=held_out)
    yield f"seed {best.seed}, {best.name}" + ("" if len(done) == 1 else f": {why}")
    parts = ("module",) if "module" in about else ("encoder", "head")  # as formats before 6 have them
    yield from (_called(about[name]) for name in parts if about[name] is not None)
    if about["preprocessing"] is not None and about["preprocessing"]["steps"]:
        yield f"rows of {about['preprocessing']['obs_dim']} columns, by {', '.join(about['preprocessing']['steps'])}"
    yield ", ".join(f"{name} {version}" for name, version in about["versions"].items())


def _called(value: object) -> str:
    """A module or argument as a checkpoint describes it, in one line."""
    if isinstance(value, dict) and "class" in value:
        given = {key: entry for key, entry in value["arguments"].items() if entry is not None}
        return f"{value['class']}({', '.join(f'{key}={_called(entry)}' for key, entry in given.items())})"
    return str(next(iter(value.values()))) if isinstance(value, dict) and len(value) == 1 else str(value)


def _table(stages: dict[Stage, dict[str, Any] | None], best: Stage | None) -> list[str]:
    """One line for each stage: its state, and the numbers that it ended with."""
    rows = [_row(stage, about) | {"": "described" if stage == best else ""} for stage, about in stages.items()]
    columns = {name: 0 for row in rows for name in row if name} | {"": 0}  # what is said of the best comes last
    cells = [list(columns), *([format_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _row(stage: Stage, about: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"seed": stage.seed, "stage": stage.name, "state": "no checkpoint yet"}
    if about is None:
        return row
    progress = about["progress"]
    kept = progress.get("kept") or (about["history"] or [{}])[-1]
    row |= {"state": "finished" if progress.get("done") else "not finished", "steps": about["step"]}
    metrics = about.get("metrics") or {}
    name = "criterion" if stage.number else "objective"  # of a head by itself the criterion is the log-density
    row |= {name: metrics[name]} if name in metrics else {}
    return row | {title: float(kept[name]) for name, title in SCORES.items() if name in kept}
