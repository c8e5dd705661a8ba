"""The second stage: training of a head by gradients, with its encoder if there is one."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

from experiments.data import Batches, Inputs
from experiments.logs import Stage
from experiments.models import Extra
from experiments.processes import Stopped
from experiments.stages.run import Run, WarmStart
from experiments.stages.scores import evaluate
from flax_hmog import warm_start
from flax_hmog.training import CheckpointWriter, create_state, restore, restore_like
from flax_hmog.training.named import named_arrays
from flax_hmog.training.restoring import restored_variables, saved_steps


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
