"""A run of an experiment: data, exact EM, training by gradients, evaluation, checkpoints; resumed where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from flax_hmog.data.files import File
from flax_hmog.heads.from_natural import warm_start
from flax_hmog.recipe.config import Experiment, flat_options
from flax_hmog.recipe.em import EMStage
from flax_hmog.recipe.gradient import GradientStage
from flax_hmog.recipe.inputs import Inputs, input_dim, input_image_shape, prepare_inputs
from flax_hmog.recipe.load import data_shape, load, read_data
from flax_hmog.recipe.models import Trainable
from flax_hmog.recipe.plan import print_plan
from flax_hmog.recipe.rounds import RoundStage
from flax_hmog.recipe.run import LinearFit, Run, Start
from flax_hmog.training import make_mesh
from flax_hmog.training.files import saved_steps
from flax_hmog.training.lock import FolderLock
from flax_hmog.training.logs import Log
from flax_hmog.training.mesh import rows_multiple
from flax_hmog.training.processes import Stopped, StopRequest, is_first, on_first_process

RENAMED = {
    "em.weight_pseudo_count": "em.regularizer.weights",
    "em.component_pseudo_count": "em.regularizer.components",
    "em.noise_pseudo_share": "em.regularizer.noise_share",
    "em.noise_floor": "em.regularizer.noise_floor",
}  # options of runs that were begun before


def run(config: Experiment, console: Console, stop: StopRequest) -> None:
    """All seeds of an experiment.

    Raises:
        Stopped: when the run was told to stop, and has saved.
        ValueError: for a configuration that cannot be run, or training that has failed.
    """
    mesh = make_mesh(model=config.devices.model)
    if config.gradient.batch_size % rows_multiple(mesh):
        raise ValueError(
            f"run: `gradient.batch_size` must be a multiple of the {rows_multiple(mesh)} devices; "
            f"got {config.gradient.batch_size}. Change it."
        )
    file = None if config.dry_run else read_data(config.data)
    dataset = None if file is None else load(config.data, config.first_seed, file)
    train = data_shape(config.data)[0] if dataset is None else len(dataset.train)
    if config.gradient.batch_size > train:
        raise ValueError(
            f"run: `gradient.batch_size` must be at most the {train} training rows; got {config.gradient.batch_size}. "
            "Lower it."
        )
    if file is None or dataset is None:
        print_plan(config, mesh, console)
        return
    # mistakes in data and models leave no folder behind
    image_shape = input_image_shape(config.data, dataset.image_shape)
    obs_dim = input_dim(config.data, dataset.obs_dim)
    models = make_models(config, obs_dim, image_shape)
    workdir = Path(config.workdir)
    with on_first_process(lambda: _claim(workdir, config, dataset.fingerprint)) or contextlib.nullcontext():
        if is_first():
            console.print(f"{mesh.size} x {jax.devices()[0].device_kind}, run folder {workdir}")
        with Log(workdir, config, console) as log:
            _run_stages(Run(config, mesh, log, stop, models), file)


def _run_stages(stages: Run, file: File) -> None:
    """EM, then each head, for each seed."""
    config = stages.config
    for seed in config.seeds:
        inputs = prepare_inputs(config.data, load(config.data, seed, file), stages.mesh)
        linear = EMStage(stages, seed, inputs).result()
        for name in config.heads:
            _train_head(stages, seed, name, inputs, linear)


def make_models(
    config: Experiment, obs_dim: int, image_shape: tuple[int, ...] | None
) -> dict[tuple[str, int], Trainable]:
    """The trainable heads of all rounds, by name and number of clusters."""
    counts = {config.round_clusters(number) for number in range(config.rounds.count + 1)}
    return {
        (name, count): Trainable(config, name, count, obs_dim, image_shape) for name in config.heads for count in counts
    }


def _train_head(stages: Run, seed: int, name: str, inputs: Inputs, linear: LinearFit) -> None:
    """Train a head: by itself from the fit of EM, or on the encoder in rounds."""
    if stages.stop.received:  # told so after the last step of a stage, or before the first
        raise Stopped
    if not stages.config.has_encoder:
        head_variables, _ = warm_start(stages.model(name).head, linear.natural)
        start = Start(head_variables, regularizer=linear.regularizer, rows=linear.rows, clusters=linear.clusters)
        GradientStage(stages, seed, name, inputs).train(start)
        return
    variables: dict[str, Any] | None = None
    for number in range(1, stages.config.rounds.count + 1):
        start = RoundStage(stages, seed, name, number, inputs).result(linear, variables)
        variables = GradientStage(stages, seed, name, inputs, number).train(start)
        if stages.stop.received:
            raise Stopped


def _claim(workdir: Path, config: Experiment, data: str) -> FolderLock:
    """The lock of the run's folder, with the run's config in it.

    Raises:
        ValueError: if another process runs in the folder, it cannot be written to, or it has checkpoints of another
            config or of other data.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(workdir, caller="run", argument="workdir")
        try:
            _write_config(workdir, config, data)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise ValueError(
            f"run: `workdir` must be a folder that can be written to; got {workdir}, {type(error).__name__}: {error}. "
            "Free or choose another one."
        ) from None
    return lock


def _write_config(workdir: Path, config: Experiment, data: str) -> None:
    """Write the run's config, or check that the run in the folder has the same, and the same data.

    Without a checkpoint nothing of another config is worth keeping: a mistake was made, and corrected.
    """
    wanted = json.loads(json.dumps(config.result_options() | {"contents of the data": data}))
    path = workdir / "config.json"
    if not any(saved_steps(folder) for folder in workdir.glob("checkpoints/*/*")):
        (workdir / "metrics.jsonl").unlink(missing_ok=True)
    elif path.exists():
        # an option that the run did not know had the value that it has by default
        found = flat_options(json.loads(json.dumps(Experiment("").result_options())))
        former = flat_options(_read_config(path).get("result_options", {}))
        found |= {RENAMED.get(name, name): value for name, value in former.items()}
        changed = [name for name, value in flat_options(wanted).items() if found.get(name) != value]
        if changed:
            raise ValueError(
                f"run: `workdir` must hold a run of the same config; got {workdir} with another {', '.join(changed)}. "
                "Choose another --workdir or delete this one."
            )
    everything = {"config": dataclasses.asdict(config), "result_options": wanted}
    path.with_suffix(".new").write_text(json.dumps(everything, indent=2) + "\n")
    path.with_suffix(".new").replace(path)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"run: {path} must be JSON; got {error}. Choose another --workdir or delete this one."
        ) from None
