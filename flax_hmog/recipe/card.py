"""The model card of a run: what was fitted to which data, when, and by which command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flax_hmog.analysis import Section, Table, n_parameters
from flax_hmog.recipe.config import RUNNING, Experiment, flat_options
from flax_hmog.recipe.facts import Facts
from flax_hmog.recipe.saved import run_command
from flax_hmog.recipe.template import Template
from flax_hmog.training import Restored


def card_section(folder: Path, config: dict[str, Any], facts: Facts, restored: Restored) -> Section:
    """Data, model, time and versions; the commands that make and use the model; and the options."""
    data, stage = facts.data, facts.described
    natural, command = restored.natural, run_command(folder)
    predict = f"hmog predict {folder} ROWS --seed {stage.seed} --stage {stage.name} --out clusters.csv"
    digest = data["sha256"] or f"of some blocks: {data['fingerprint'].split()[-1]}"
    card = {
        "data": data["source"] or data["title"],
        "SHA-256 of the rows and labels": digest,
        "rows": f"{data['train']:,} for training, {data['test']:,} held out",
        "model": f"{natural.posterior_location.shape[0]} components, {natural.interaction.shape[1]} factors, "
        f"{natural.observable_precision.name} noise; {n_parameters(natural):,} parameters",
        "last checkpoint": facts.date.replace("T", " ").replace("+00:00", " UTC"),
        "training": None if facts.seconds is None else f"{facts.seconds:,.0f} s, all stages and seeds",
        "made by": command,
        "clusters of other rows": predict,
        "versions": ", ".join(f"{name} {version}" for name, version in restored.versions.items()),
    }
    rows = [{"entry": name, "value": value} for name, value in card.items() if value is not None]
    changed = changed_options(config)
    options = {name: str(value) for name, value in flat_options(config).items()}
    tables = [
        Table(rows, "Model card"),
        Table([{"option": n, "value": options[n]} for n in changed], "Options that were changed from their defaults"),
        Table([{"option": n, "value": v} for n, v in options.items()], "All options", folded=True),
    ]
    return Section("Model card", tables=tables)


def changed_options(config: dict[str, Any]) -> list[str]:
    """Names of the options that are not as they are where nothing is said."""
    options: dict[str, Any] = {}
    heads = list(config["heads"])
    for given in ({"heads": heads, "encoder": config["encoder"]["name"]}, {"heads": heads}, {}):
        try:
            options = _defaults(**given)
            break
        except ValueError:  # classes that are not of this library, or of a former version
            continue
    given, defaults = flat_options(config), flat_options(json.loads(json.dumps(options)))
    running = tuple(name for name in RUNNING if name not in ("first_seed", "n_seeds"))
    return [
        name
        for name, value in given.items()
        if name.split(".")[0] not in running and defaults.get(name) != value and name != "encoder.name"
    ]


def _defaults(heads: list[str] | None = None, encoder: str = "none") -> dict[str, Any]:
    options: dict[str, Any] = {} if heads is None else {"heads": tuple(Template(name) for name in heads)}
    if encoder != "none":
        options["encoder"] = Template(encoder)
    return Experiment("", **options).options()
