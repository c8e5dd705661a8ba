"""A run of an experiment: data, exact EM, training by gradients, evaluation, checkpoints; resumed where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import Mesh
from rich.console import Console

from flax_hmog.data.files import File
from flax_hmog.heads.from_natural import warm_start
from flax_hmog.recipe.config import Experiment, flat_options
from flax_hmog.recipe.em import EMStage
from flax_hmog.recipe.facts import finished_stages, run_facts
from flax_hmog.recipe.gradient import GradientStage
from flax_hmog.recipe.inputs import Inputs, check_rows_vary, input_dim, input_image_shape, prepare_inputs
from flax_hmog.recipe.load import keep_rows, load, read_data
from flax_hmog.recipe.models import Trainable
from flax_hmog.recipe.parts import Dataset
from flax_hmog.recipe.rounds import RoundStage
from flax_hmog.recipe.run import LinearFit, Run, Start
from flax_hmog.recipe.template import imported
from flax_hmog.training import make_mesh
from flax_hmog.training.files import saved_steps
from flax_hmog.training.lock import FolderLock
from flax_hmog.training.logs import Log, OnEpoch, OnStep
from flax_hmog.training.mesh import rows_multiple
from flax_hmog.training.processes import Stopped, StopRequest, is_first, on_first_process

logger = logging.getLogger(__name__)
RENAMED = {
    "em.weight_pseudo_count": "em.regularizer.weights",
    "em.component_pseudo_count": "em.regularizer.components",
    "em.noise_pseudo_share": "em.regularizer.noise_share",
    "em.noise_floor": "em.regularizer.noise_floor",
    "model.pst_rep": "heads.differentiable.pst_rep",
    "model.lat_rep": "heads.symmetric.lat_rep",
}  # options of runs that were begun before


def run(
    config: Experiment,
    console: Console,
    stop: StopRequest,
    *,
    file: File | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    command: str | None = None,
) -> Run:
    """All seeds of an experiment.

    Args:
        config: the experiment; without a `workdir` checkpoints are kept in memory.
        console: console for progress.
        stop: requests to stop the run.
        file: rows and labels; None reads those of the configuration.
        on_step: called after every step.
        on_epoch: called at the end of EM and of every epoch.
        command: as it was typed, for the report.

    Returns:
        The run, which gives the last checkpoint of every stage.

    Raises:
        Stopped: when the run was asked to stop, and has saved.
        ValueError: for a configuration that cannot be run, or training that has failed.
    """
    mesh = make_mesh(model=config.devices.model)
    file = read_data(config.data) if file is None else file
    dataset = load(config.data, config.first_seed, file)
    check_rows_vary(dataset)
    config = with_batches(config, mesh, len(dataset.train))
    # mistakes in data and models leave no folder behind
    image_shape = input_image_shape(config.data, dataset.image_shape)
    obs_dim = input_dim(config.data, dataset.obs_dim)
    models = make_models(config, obs_dim, image_shape)
    for path in config.scores:
        imported("run: `scores`", path)
    log = functools.partial(Log, console=console, on_step=on_step, on_epoch=on_epoch)
    if not config.workdir:
        with log(None) as opened:
            stages = Run(config, mesh, opened, stop, models)
            _run_stages(stages, file)
        return stages
    workdir = Path(config.workdir)
    with on_first_process(lambda: _claim(workdir, config, dataset, command)) or contextlib.nullcontext():
        if is_first():
            console.print(f"{mesh.size} x {jax.devices()[0].device_kind}, run folder {workdir}")
        with log(workdir, config=config.options(), **dataclasses.asdict(config.logs)) as opened:
            stages = Run(config, mesh, opened, stop, models)
            _run_stages(stages, file)
        if is_first():
            _keep_facts(workdir, file)
    return stages


def _keep_facts(workdir: Path, file: File) -> None:
    """Note for the report what it needs of the data; where that fails, the report reads them."""
    try:
        run_facts(workdir, finished_stages(workdir)[0], file=file)
    except Exception as error:
        logger.warning("the report will have to read the data, as %s: %s", type(error).__name__, error)


def with_batches(config: Experiment, mesh: Mesh, n_rows: int) -> Experiment:
    """The experiment with batches of no more than the training rows, and with the steps that its rounds need.

    Warnings in the log say so where batches shrink and epochs are more.

    Raises:
        ValueError: for batches that do not fit the devices, or fewer rows than devices.
    """
    size, multiple = config.gradient.batch_size, rows_multiple(mesh)
    if size % multiple:
        raise ValueError(
            f"run: `gradient.batch_size` must be a multiple of the {multiple} devices; got {size}. Change it."
        )
    if config.heads and size > n_rows:
        fitting = n_rows // multiple * multiple
        if not fitting:
            raise ValueError(f"run: the training rows must be at least the {multiple} devices; got {n_rows}. Add rows.")
        logger.warning("batches have %d rows in place of %d, as there are %d for training", fitting, size, n_rows)
        config = dataclasses.replace(config, gradient=dataclasses.replace(config.gradient, batch_size=fitting))
        size = fitting
    longer = config.with_least_steps(n_rows // size)
    if longer.gradient.epochs != config.gradient.epochs:
        logger.warning("rounds have %d epochs in place of %d, as one has %d steps",
                       longer.gradient.epochs, config.gradient.epochs, n_rows // size)  # fmt: skip
    return longer


def _run_stages(stages: Run, file: File) -> None:
    """EM, then each head, for each seed."""
    config = stages.config
    for seed in config.seeds:
        inputs = prepare_inputs(config.data, load(config.data, seed, file), stages.mesh)
        linear = EMStage(stages, seed, inputs).result()
        for name in config.labels:
            _train_head(stages, seed, name, inputs, linear)


def make_models(
    config: Experiment, obs_dim: int, image_shape: tuple[int, ...] | None
) -> dict[tuple[str, int], Trainable]:
    """The trainable heads of all rounds, by name and number of clusters.

    Raises:
        ValueError: for a model that does not fit the inputs.
    """
    if config.model.lat_dim > obs_dim:
        raise ValueError(
            f"run: `model.lat_dim` must be at most the {obs_dim} columns of the inputs; got {config.model.lat_dim}. "
            "Lower it."
        )
    counts = {config.round_clusters(number) for number in range(config.rounds.count + 1)}
    return {
        (name, count): Trainable(config, name, count, obs_dim, image_shape)
        for name in config.labels
        for count in counts
    }


def _train_head(stages: Run, seed: int, name: str, inputs: Inputs, linear: LinearFit) -> None:
    """Train a head: by itself from the fit of EM, or on the encoder in rounds."""
    if stages.stop.received:  # asked so after the last step of a stage, or before the first
        raise Stopped
    if not stages.config.has_encoder:
        head_variables, _ = warm_start(stages.model(name).head, linear.natural)
        start = Start(
            head_variables,
            regularizer=linear.regularizer,
            rows=linear.rows,
            clusters=linear.clusters,
            natural=linear.natural,
        )
        GradientStage(stages, seed, name, inputs).train(start)
        return
    variables: dict[str, Any] | None = None
    for number in range(1, stages.config.rounds.count + 1):
        start = RoundStage(stages, seed, name, number, inputs).result(linear, variables)
        variables = GradientStage(stages, seed, name, inputs, number).train(start)
        if stages.stop.received:
            raise Stopped


def _claim(workdir: Path, config: Experiment, dataset: Dataset, command: str | None) -> FolderLock:
    """The lock of the run's folder, with the run's config in it.

    Raises:
        ValueError: if another process runs in the folder, it cannot be written to, or it has checkpoints of another
            config or of other data.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(workdir, argument="run: `workdir`")
        try:
            _write_config(workdir, config, dataset, command)
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise ValueError(
            f"run: `workdir` must be a folder that can be written to; got {workdir}, {type(error).__name__}: {error}. "
            "Free or choose another one."
        ) from None
    return lock


def _write_config(workdir: Path, config: Experiment, dataset: Dataset, command: str | None) -> None:
    """Write the run's config, or check that the run in the folder has the same, and the same data.

    Without a checkpoint nothing of another config is worth keeping: a mistake was made, and corrected.
    """
    wanted = json.loads(json.dumps(config.result_options() | {"contents of the data": dataset.fingerprint}))
    path = workdir / "config.json"
    if not any(saved_steps(folder) for folder in workdir.glob("checkpoints/*/*")):
        (workdir / "metrics.jsonl").unlink(missing_ok=True)
    elif path.exists():
        former = _read_config(path).get("result_options", {})
        changed = _changed(config, former, wanted)
        if changed:
            raise ValueError(
                f"run: `workdir` must hold a run of the same config; got {workdir} with another {', '.join(changed)}. "
                "Choose another --workdir or delete this one."
            )
        wanted["heads"] = former.get("heads", {}) | wanted["heads"]  # checkpoints of all of them are there
    everything = {"config": config.options(), "result_options": wanted, "column_names": dataset.column_names}
    everything["command"] = command
    path.with_suffix(".new").write_text(json.dumps(everything, indent=2) + "\n")
    path.with_suffix(".new").replace(path)
    if config.data.name == "memory":
        keep_rows(workdir, dataset)


def _changed(config: Experiment, former: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the options that differ from those of a run; one that the run did not have yet has its default."""
    found = flat_options(json.loads(json.dumps(config.default_options())))
    found |= {RENAMED.get(name, name): value for name, value in flat_options(former).items()}
    if "heads" in former:  # a head that the run did not have is new to it
        wanted = wanted | {
            "heads": {label: wanted["heads"][label] for label in former["heads"] if label in config.labels}
        }
    elif config.has_encoder:  # one latent dimension stood for all heads
        found |= {f"heads.{label}.lat_dim": found.get("encoder.lat_dim") for label in config.labels}
    return [name for name, value in flat_options(wanted).items() if found.get(name) != value]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"run: {path} must be JSON; got {error}. Choose another --workdir or delete this one."
        ) from None
