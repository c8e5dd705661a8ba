"""Train an experiment: data, exact EM, warm-started heads fine-tuned by gradients, checkpoints, metrics.

    python -m experiments.train digits [--head symmetric] [--workdir runs/digits] ...

Run again, it resumes where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiments  # noqa: F401  sets the environment before jax is imported

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.baselines import fit_baselines
from experiments.configs import EXPERIMENTS
from experiments.data import Split, digits
from flax_hmog import Regularizer, fit_em, infer, mean_log_density, penalty, warm_start
from flax_hmog.analysis import clustering_metrics
from flax_hmog.training import CheckpointWriter, create_state, make_mesh, make_train_step, restore
from flax_hmog.training.checkpoints import restore_like, saved_steps

FREE_TO_CHANGE = ("workdir", "head", "n_seeds")  # fields that a resumed run may differ in


def main() -> None:
    """Command line: the experiment's name, then its options."""
    console = Console()
    names = ", ".join(EXPERIMENTS)
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
        if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
            console.print(f"{__doc__}\nExperiments: {names}. Their options: python -m experiments.train NAME --help")
            return
        sys.exit(f"experiments.train: the first argument must be an experiment ({names}); got {sys.argv[1:2]}.")
    try:
        config = tyro.cli(
            EXPERIMENTS[sys.argv[1]], prog=f"python -m experiments.train {sys.argv[1]}", args=sys.argv[2:]
        )
        run(config, console)
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(config: Any, console: Console) -> None:
    """All seeds of an experiment."""
    workdir = Path(config.workdir)
    _claim(workdir, config)
    mesh = make_mesh()
    if config.batch_size % mesh.shape["data"]:
        raise ValueError(
            f"run: `batch_size` must be a multiple of the {mesh.shape['data']} devices; "
            f"got {config.batch_size}. Change it."
        )
    console.print(f"{len(mesh.devices.flat)} x {jax.devices()[0].device_kind}, run folder {workdir}")
    with _Bar(console, config) as bar, (workdir / "metrics.jsonl").open("a") as log:

        def record(**metrics: Any) -> None:
            log.write(json.dumps(metrics) + "\n")
            log.flush()

        heads = [Finetuning(config, name, head, mesh) for name, head in config.trainable.items()]
        for seed in range(config.n_seeds):
            split = digits(seed, config.test_share)
            natural, regularizer = fit_seed(config, seed, split, record, bar)
            for head in heads:
                head.run(seed, split, natural, regularizer, record, bar)


def fit_seed(config: Any, seed: int, split: Split, record: Callable, bar: _Bar) -> tuple[Any, Regularizer]:
    """EM and the baselines of one seed, from the checkpoint if they are there."""
    folder = checkpoint_folder(config.workdir, seed, "em")
    strength = config.pseudo_counts(len(split.train))
    bar.show(f"seed {seed}: EM")
    if not saved_steps(folder):
        result = fit_em(
            config.analytic,
            split.train,
            jax.random.key(seed),
            regularizer=strength,
            n_restarts=config.n_restarts,
            max_steps=config.em_steps,
            tolerance=config.em_tolerance,
        )
        variables, _ = warm_start(config.analytic, result.natural, split.train)
        metrics = evaluate(config.analytic, variables, split)
        baselines = fit_baselines(
            split.train, split.test, lat_dim=config.lat_dim, n_components=config.n_components, seed=seed
        )
        scores = {
            name: clustering_metrics(split.test_labels, baseline.assignments)
            | {"train_log_density": baseline.train_log_density, "test_log_density": baseline.test_log_density}
            for name, baseline in baselines.items()
        }
        regularizer: Any = result.regularizer
        noise = np.asarray(regularizer.noise_covariance.entries)
        history = {"objective": result.objective_history.tolist(), "baselines": scores, "pseudo_noise": noise.tolist()}
        with _writer(folder, config, config.analytic, split) as writer:
            writer.save(len(result.objective_history) - 1, variables, metrics=metrics | history)
        record(seed=seed, model="em", steps=len(result.objective_history) - 1, converged=result.converged, **metrics)
    restored = restore(folder)
    natural = restored.head.apply(restored.variables, method="natural")
    regularizer = strength.regularizer(restored.head.apply(restored.variables, method="moments"))
    # the penalty on the noise only: it is the part that does not depend on the latent basis of a head
    pseudo_noise = type(regularizer.noise_covariance)(jnp.asarray(restored.metrics["pseudo_noise"]))
    bar.advance(config.epochs)
    return natural, dataclasses.replace(regularizer, components=jnp.zeros(()), noise_covariance=pseudo_noise)


class Finetuning:
    """Gradient fine-tuning of one head; its step is compiled once for all seeds."""

    def __init__(self, config: Any, name: str, head: Any, mesh: Any) -> None:
        self.config, self.name, self.head, self.mesh = config, name, head, mesh
        self.step: Callable | None = None

    def run(self, seed: int, split: Split, natural: Any, regularizer: Regularizer, record: Callable, bar: _Bar) -> None:
        """One seed, from the warm start or from the last checkpoint to the last epoch."""
        config = self.config
        folder = checkpoint_folder(config.workdir, seed, self.name)
        done = (saved_steps(folder) or [0])[-1]
        bar.show(f"seed {seed}: {self.name} head")
        bar.advance(done)
        if done == config.epochs:
            return
        state, history = self.initial_state(split, natural, folder, done)
        self.step = self.step or make_train_step(self.loss, state, self.mesh)
        extra = (regularizer, 1 / len(split.train))
        with _writer(folder, config, self.head, split) as writer:
            for epoch in range(len(history), config.epochs + 1):
                losses = []
                for batch in self.batches(seed, epoch, split) if epoch else ():
                    state, loss = self.step(state, batch, extra)
                    losses.append(loss)
                metrics: dict[str, Any] = evaluate(self.head, {"params": state.params}, split)
                metrics["objective"] = -float(np.mean(losses)) if losses else None
                history.append(metrics)
                record(seed=seed, model=self.name, epoch=epoch, **metrics)
                if epoch and (epoch % config.save_every == 0 or epoch == config.epochs):
                    saved = {"history": history}
                    writer.save(epoch, {"params": state.params}, opt_state=state.opt_state, metrics=saved)
                bar.advance(1 if epoch else 0)

    def initial_state(self, split: Split, natural: Any, folder: Path, done: int) -> tuple[TrainState, list]:
        """The state to start from, and the metrics so far."""
        variables, _ = warm_start(self.head, natural, split.train)
        batch = split.train[: self.config.batch_size]
        if self.step is None:
            self.optimizer = self.make_optimizer(len(split.train))
        state = create_state(self.head, variables, self.optimizer, batch, self.mesh)
        if not done:
            return state, []
        restored = restore(folder)
        opt_state = restore_like(state.opt_state, restored.opt_state, "opt_state")
        params = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding), restored.variables["params"], state.params
        )
        # the step count of the optimiser goes on from there, too
        steps = done * (len(split.train) // self.config.batch_size)
        return state.replace(step=state.step + steps, params=params, opt_state=opt_state), restored.metrics["history"]

    def make_optimizer(self, count: int) -> optax.GradientTransformation:
        """Adam with a cosine decay over all steps."""
        steps = self.config.epochs * (count // self.config.batch_size)
        return optax.adam(optax.cosine_decay_schedule(self.config.learning_rate, max(steps, 1)))

    def loss(self, params: Any, x: jax.Array, extra: tuple[Regularizer, float]) -> jax.Array:
        """Negative penalised log-likelihood per sample: what EM maximises, up to the prior of the components."""
        regularizer, share = extra
        natural = self.head.apply({"params": params}, method="natural")
        return -mean_log_density(natural, x) - share * penalty(natural, regularizer)

    def batches(self, seed: int, epoch: int, split: Split) -> Any:
        """The epoch's batches, in an order that follows from seed and epoch alone."""
        order = np.random.default_rng((seed, epoch)).permutation(len(split.train))
        size = self.config.batch_size
        for start in range(0, len(order) - size + 1, size):
            yield split.train[order[start : start + size]]


def evaluate(head: Any, variables: Any, split: Split) -> dict[str, float]:
    """Log-density in nats per sample on both parts, and NMI, ARI and ACC on the test part."""
    output = infer(head.apply(variables, method="natural"), np.concatenate([split.train, split.test]))
    train = len(split.train)
    return {
        "train_log_density": float(jnp.mean(output.log_density[:train])),
        "test_log_density": float(jnp.mean(output.log_density[train:])),
        **clustering_metrics(split.test_labels, np.asarray(output.log_responsibilities[train:]).argmax(axis=-1)),
    }


def checkpoint_folder(workdir: str | Path, seed: int, model: str) -> Path:
    """Where the checkpoints of one model of one seed lie."""
    return Path(workdir) / "checkpoints" / f"seed{seed}" / model


def _writer(folder: Path, config: Any, head: Any, split: Split) -> CheckpointWriter:
    return CheckpointWriter(folder, head=head, config=dataclasses.asdict(config), preprocessing=split.preprocessing)


def _claim(workdir: Path, config: Any) -> None:
    """Write the run's config, or check that the run in the folder has the same."""
    path, wanted = workdir / "config.json", dataclasses.asdict(config)
    if path.exists():
        found = json.loads(path.read_text())
        changed = [name for name in wanted if name not in FREE_TO_CHANGE and found.get(name) != wanted[name]]
        if changed:
            raise ValueError(
                f"run: `workdir` must hold a run of the same config; got {workdir} with another {', '.join(changed)}. "
                "Choose another --workdir or delete this one."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")


class _Bar:
    """Progress over all epochs of all seeds; EM counts as one more head."""

    def __init__(self, console: Console, config: Any) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        total = config.n_seeds * (1 + len(config.trainable)) * config.epochs
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def show(self, text: str) -> None:
        self.progress.update(self.task, description=text)

    def advance(self, count: int) -> None:
        self.progress.advance(self.task, count)


if __name__ == "__main__":
    main()
