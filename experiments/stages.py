"""The stages of a run: exact EM, then training by gradients; each is resumed from its own checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.baselines import fit_baselines
from experiments.config import Experiment
from experiments.data import Batches, Inputs
from experiments.logs import Log, Stage
from experiments.models import Extra, Trainable, abstract_fit, features, init_encoder, make_encoder
from experiments.processes import Stopped, StopRequest, to_host
from flax_hmog import Natural, Regularizer, fit_em, infer, natural_to_mean, warm_start
from flax_hmog.analysis import clustering_metrics
from flax_hmog.fit import EMResult, EMState
from flax_hmog.training import CheckpointWriter, create_state, restore, restore_like
from flax_hmog.training.named import named_arrays
from flax_hmog.training.restoring import restored_variables, saved_steps


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share.

    Attributes:
        config: the experiment.
        mesh: the devices.
        log: where metrics go.
        stop: whether the run has been told to stop.
        models: the trainable heads by name.
    """

    config: Experiment
    mesh: Mesh
    log: Log
    stop: StopRequest
    models: dict[str, Trainable]

    def folder(self, stage: Stage) -> Path:
        """Where the checkpoints of a stage lie."""
        return Path(self.config.workdir) / stage.folder

    def writer(self, stage: Stage, head: Any, encoder: Any, inputs: Inputs) -> CheckpointWriter:
        """Writes the checkpoints of a stage."""
        return CheckpointWriter(
            self.folder(stage),
            head=head,
            encoder=encoder,
            config=dataclasses.asdict(self.config),
            preprocessing=inputs.preprocessing,
            keep=self.config.checkpoints.keep,
            best="objective",
        )


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What EM hands to training by gradients, on the host.

    Attributes:
        natural: the fitted model.
        regularizer: the penalty that the training keeps: that of weights and noise, which do not depend on the latent
            basis of a head.
        rows: how many training rows it was fitted to.
        encoder: the encoder, or None.
        encoder_variables: its variables.
    """

    natural: Natural
    regularizer: Regularizer
    rows: int
    encoder: Any
    encoder_variables: dict[str, Any]


class EMStage:
    """Exact EM on all training rows, or on their features."""

    def __init__(self, run: Run, seed: int, inputs: Inputs) -> None:
        self.run, self.inputs, self.stage = run, inputs, Stage(seed, "em")
        self.config, self.head = run.config.em, run.config.analytic
        self.key = jax.random.key(seed)
        self.encoder = make_encoder(run.config)
        encoder_key = jax.random.fold_in(self.key, 1)
        self.encoder_variables = init_encoder(self.encoder, encoder_key, inputs.obs_dim, run.config.encoder.features)

    def result(self) -> WarmStart:
        """The warm start: fitted from where the last checkpoint stands, or read from it if EM is done."""
        folder = self.run.folder(self.stage)
        restored = restore(folder, allow_import=True) if saved_steps(folder) else None
        if restored is None or not restored.progress["done"]:
            self._fit(restored)
            restored = restore(folder, allow_import=True)
        template = self._abstract(jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
        state = restore_like({name: template[name] for name in ("natural", "regularizer")}, restored.state, "EM")
        natural, regularizer = (jax.tree.map(np.asarray, state[name]) for name in ("natural", "regularizer"))
        regularizer = dataclasses.replace(regularizer, components=np.zeros((), np.float32))
        encoder_variables = restored.encoder_variables or {}
        return WarmStart(natural, regularizer, restored.progress["rows"], self.encoder, encoder_variables)

    def _fit(self, restored: Any) -> None:
        config, log, stage = self.config, self.run.log, self.stage
        done = restored.progress["steps"] if restored else 0
        log.begin(stage, f"seed {stage.seed}: EM", config.n_restarts * (config.max_steps + 1), done)
        x, weights = self.inputs.rows(self.inputs.dataset.train, config.rows, stage.seed)
        x = features(self.encoder, self.encoder_variables, x)
        count = int(jnp.sum(weights))
        started = time.perf_counter()
        with self.run.writer(stage, self.head, self.encoder, self.inputs) as writer:

            def on_step(state: EMState) -> None:
                nonlocal done
                done += 1
                objective = (state.history or state.finals)[-1]
                log.write(stage, done, start=len(state.finals), objective=objective)
                log.advance()
                stopping = self.run.stop.is_made()
                if stopping or done % self.run.config.checkpoints.em_steps == 0:
                    self._save(writer, done, state, objective)
                if stopping:
                    raise Stopped

            result = fit_em(
                self.head,
                x,
                self.key,
                weights=weights,
                regularizer=config.pseudo_counts(count),
                n_restarts=config.n_restarts,
                max_steps=config.max_steps,
                tolerance=config.tolerance,
                state=self._state(restored) if restored else None,
                on_step=on_step,
            )
            metrics = evaluate(result.natural, self.encoder, self.encoder_variables, self.inputs)
            seconds = time.perf_counter() - started
            log.write(stage, done + 1, converged=result.converged, seconds=round(seconds, 3), **metrics)
            progress = {
                "objective": result.objective_history.tolist(),
                "converged": result.converged,
                "baselines": baseline_scores(self.inputs, self.run.config, stage.seed),
            }
            writer.save(
                done + 1,
                self._variables(result.natural),
                state={"natural": result.natural, "regularizer": result.regularizer},
                progress={"done": True, "steps": done + 1, "rows": count} | progress,
                history=[metrics],
                metrics={"objective": float(result.objective_history[-1])},
            )

    def _save(self, writer: CheckpointWriter, done: int, state: EMState, objective: float) -> None:
        natural = state.natural if state.best is None or state.natural is not None else state.best.natural
        writer.save(
            done,
            self._variables(natural),
            state=_arrays_of(state),
            progress={
                "done": False,
                "steps": done,
                "history": state.history,
                "finals": state.finals,
                "best_history": state.best and state.best.objective_history.tolist(),
                "best_converged": state.best and state.best.converged,
            },
            metrics={"objective": objective if state.natural is not None else max(state.finals)},
        )

    def _variables(self, natural: Natural) -> dict[str, Any]:
        em = {"mean": natural_to_mean(natural), "step": jnp.zeros((), jnp.int32)}
        if self.encoder is None:
            return {"em": em}
        return {"em": {"head": em}} | {
            name: {"encoder": collection} for name, collection in self.encoder_variables.items()
        }

    def _state(self, restored: Any) -> EMState:
        """The state that was saved, on the mesh."""
        abstract = self._abstract(NamedSharding(self.run.mesh, PartitionSpec()))
        names = {name.split("/")[0] for name in restored.state}
        arrays = restore_like({name: abstract[name] for name in abstract if name in names}, restored.state, "EM")
        p, best = restored.progress, None
        if "best_natural" in arrays:
            history = np.asarray(p["best_history"])
            best = EMResult(
                arrays["best_natural"],
                history,
                p["best_converged"],
                arrays["best_info"],
                history[-1:],
                arrays["best_regularizer"],
            )
        return EMState(
            natural=arrays.get("natural"),
            regularizer=arrays.get("regularizer"),
            history=tuple(p["history"]),
            finals=tuple(p["finals"]),
            best=best,
        )

    def _abstract(self, sharding: Any) -> dict[str, Any]:
        """What `_arrays_of` a state may hold, without values."""
        obs_dim = self.inputs.obs_dim if self.encoder is None else self.run.config.encoder.features
        natural, regularizer, info = abstract_fit(self.run.config, obs_dim, sharding)
        best = {"best_natural": natural, "best_info": info, "best_regularizer": regularizer}
        return {"natural": natural, "regularizer": regularizer} | best


def _arrays_of(state: EMState) -> dict[str, Any]:
    best = state.best
    arrays = {"natural": state.natural, "regularizer": state.regularizer}
    if best is not None:
        arrays |= {"best_natural": best.natural, "best_info": best.info, "best_regularizer": best.regularizer}
    return {name: tree for name, tree in arrays.items() if tree is not None}


class GradientStage:
    """Training of one head by gradients, together with the encoder if there is one."""

    def __init__(self, run: Run, seed: int, name: str, inputs: Inputs) -> None:
        self.run, self.inputs, self.stage = run, inputs, Stage(seed, name)
        self.config, self.model = run.config.gradient, run.models[name]
        self.batches = Batches(inputs, seed, self.config.batch_size, self.config.epochs)
        self.key = jax.random.key(seed)

    def train(self, start: WarmStart) -> None:
        """From the warm start or from the last checkpoint to the last epoch.

        Raises:
            Stopped: when the run was told to stop, once a checkpoint is written.
            ValueError: for a loss that is not finite or has diverged.
        """
        run, log, per_epoch = self.run, self.run.log, self.batches.per_epoch
        restored = self._restored()
        done, total = restored.step if restored else 0, len(self.batches)
        log.begin(self.stage, f"seed {self.stage.seed}: {self.stage.name} head", total, done)
        if done == total:
            return
        state, loss_sum, history = self._state(start, restored)
        first_loss = restored.progress["first_loss"] if restored else math.nan
        step = self.model.step(state, run.mesh)
        iterator = self.batches.iterate(restored.progress["position"] if restored else None)
        if not history:
            history.append(self._record(state, 0, None, time.perf_counter()))
        epoch_start = time.perf_counter()
        with run.writer(self.stage, self.model.head, self.model.encoder, self.inputs) as writer:
            while done < total:
                state, loss = step(state, next(iterator), self._extra(start, done))
                # one step ahead of the device keeps it busy; devices of one CPU share a pool of threads, in which steps
                # that wait for each other can wait for ever
                jax.block_until_ready(loss if jax.default_backend() == "cpu" else loss_sum)
                loss_sum, done = loss_sum + loss, done + 1
                first_loss = float(loss) if done == 1 else first_loss
                log.advance()
                is_epoch = done % per_epoch == 0
                if is_epoch:
                    mean = self._check(float(loss_sum) / per_epoch, first_loss, state, done, history)
                    history.append(self._record(state, done, -mean, epoch_start))
                    loss_sum, epoch_start = jnp.zeros_like(loss_sum), time.perf_counter()
                stopping = run.stop.is_made()
                if stopping or done == total or self._is_due(done):
                    self._check(float(loss_sum), first_loss, state, done, [])
                    # the mean over an epoch says something of the model at its end, and of no other
                    self._save(writer, done, state, loss_sum, history, first_loss, iterator, is_epoch)
                if stopping and done < total:
                    raise Stopped

    def _restored(self) -> Any:
        folder = self.run.folder(self.stage)
        return restore(folder, allow_import=True) if saved_steps(folder) else None

    def _is_due(self, done: int) -> bool:
        """Whether a checkpoint is due: at ends of epochs, and within those that are longer than what lies between."""
        between, per_epoch = self.run.config.checkpoints.gradient_steps, self.batches.per_epoch
        if per_epoch > between:
            return done % between == 0 or done % per_epoch == 0
        return done % (per_epoch * -(-between // per_epoch)) == 0

    def _extra(self, start: WarmStart, done: int) -> Extra:
        """What the loss of a step needs besides its batch, on the host."""
        return Extra(
            start.regularizer,
            np.float32(1 / start.rows),
            np.asarray(jax.random.key_data(self.key)),
            np.uint32(done),
        )

    def _save(
        self,
        writer: CheckpointWriter,
        done: int,
        state: TrainState,
        loss_sum: jax.Array,
        history: list[dict[str, Any]],
        first_loss: float,
        iterator: Any,
        is_epoch: bool,
    ) -> None:
        writer.save(
            done,
            {"params": state.params},
            state={"opt_state": state.opt_state, "step": state.step, "loss_sum": loss_sum, "key": self.key},
            progress={
                "done": done == len(self.batches),
                "position": iterator.get_state(),
                "first_loss": first_loss,
            },
            history=history,
            metrics={"objective": history[-1]["objective"]} if is_epoch else None,
        )

    def _state(self, start: WarmStart, restored: Any) -> tuple[TrainState, jax.Array, list[dict]]:
        """The state to start from, the sum of the epoch's losses so far and the records so far."""
        if restored is None:
            variables, _ = warm_start(self.model.head, start.natural)
        else:
            variables = restored_variables(restored)
        if self.model.encoder is not None and restored is None:
            variables = {"params": {"encoder": start.encoder_variables["params"], "head": variables["params"]}}
        x = jax.ShapeDtypeStruct((self.config.batch_size, self.inputs.obs_dim), jnp.float32)
        state = create_state(
            self.model.module,
            variables,
            self.model.optimizer(len(self.batches)),
            x,
            self.run.mesh,
            min_sharded=self.run.config.devices.min_sharded,
        )
        loss_sum = jax.device_put(np.zeros((), np.float32), NamedSharding(self.run.mesh, PartitionSpec()))
        if restored is None:
            return state, loss_sum, []
        template = {"opt_state": state.opt_state, "step": state.step, "loss_sum": loss_sum, "key": self.key}
        saved = restore_like(template, restored.state, "the optimiser")
        self.key = saved["key"]
        return (
            state.replace(step=saved["step"], opt_state=saved["opt_state"]),
            saved["loss_sum"],
            list(restored.history),
        )

    def _record(self, state: TrainState, done: int, objective: float | None, started: float) -> dict[str, Any]:
        """Evaluate and log the state after so many steps."""
        natural, encoder_variables = self.model.natural(state.params), self.model.encoder_variables(state.params)
        metrics = evaluate(natural, self.model.encoder, encoder_variables, self.inputs) | {"objective": objective}
        seconds = time.perf_counter() - started
        epoch = done // self.batches.per_epoch
        rate = round(self.batches.per_epoch * self.config.batch_size / seconds) if done else None
        self.run.log.write(self.stage, done, epoch=epoch, seconds=round(seconds, 3), samples_per_second=rate, **metrics)
        return {"epoch": epoch} | metrics

    def _check(
        self, loss: float, first_loss: float, state: TrainState, done: int, history: list[dict[str, Any]]
    ) -> float:
        """The loss of an epoch, if it is finite and not far above the best so far and that of the first batch.

        Raises:
            ValueError: naming what went wrong, where, and the last good checkpoint.
        """
        best = min([first_loss, *(-record["objective"] for record in history if record["objective"] is not None)])
        width = self.inputs.obs_dim if self.model.encoder is None else self.run.config.encoder.features
        cause = None
        if not math.isfinite(loss):
            bad = [name for name, leaf in named_arrays(state.params).items() if not bool(jnp.all(jnp.isfinite(leaf)))]
            cause = f"got {loss}, and leaves that are not finite: {', '.join(bad) or 'none'}"
        elif history and loss > best + self.config.max_fall * width * self.model.likelihood_weight:
            cause = f"got {loss:.6g} nats per sample, which was {best:.6g} at best"
        if cause is None:
            return loss
        folder = self.run.folder(self.stage)
        steps = saved_steps(folder)
        last = f"The last good checkpoint is {folder / str(steps[-1])}" if steps else "There is no checkpoint yet"
        raise ValueError(
            f"GradientStage: the loss must stay finite and near its start; {cause}, after {done} steps of seed "
            f"{self.stage.seed}, {self.stage.name}. {last}. Lower --gradient.learning-rate in a new --workdir."
        )


def evaluate(natural: Natural, encoder: Any, encoder_variables: dict[str, Any], inputs: Inputs) -> dict[str, float]:
    """Mean log-density of the test part in nats per sample, and NMI, ARI and ACC where there are labels."""
    part = inputs.dataset.test
    x, weights = inputs.test_rows
    output = infer(natural, features(encoder, encoder_variables, x))
    metrics = {"test_log_density": float(jnp.sum(output.log_density * weights) / len(part))}
    if part.part_labels is not None:
        assignments = to_host(jnp.argmax(output.log_responsibilities, axis=-1))[: len(part)]
        metrics |= clustering_metrics(part.part_labels, assignments)
    return metrics


def baseline_scores(inputs: Inputs, config: Experiment, seed: int) -> dict[str, dict[str, float]]:
    """Scores of two-stage baselines, if the experiment asks for them."""
    train, test = inputs.dataset.train, inputs.dataset.test
    if not config.baselines or test.part_labels is None:
        return {}
    rows = (inputs.read(part, slice(None)) for part in (train, test))
    fitted = fit_baselines(*rows, lat_dim=config.model.lat_dim, n_components=config.model.n_components, seed=seed)
    return {
        name: clustering_metrics(test.part_labels, baseline.assignments)
        | {"train_log_density": baseline.train_log_density, "test_log_density": baseline.test_log_density}
        for name, baseline in fitted.items()
    }
