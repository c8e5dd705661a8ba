"""The second stage: training of a head by gradients, with its encoder if there is one."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_hmog.inference.likelihood import mean_log_density
from flax_hmog.inference.posterior import HMoGOutput, infer
from flax_hmog.recipe.encoders import features, split_module
from flax_hmog.recipe.inputs import Batches, Inputs
from flax_hmog.recipe.run import Run, Start, Writer, on_host
from flax_hmog.recipe.scores import evaluate, of_all_rows
from flax_hmog.recipe.watching import StageWatch
from flax_hmog.training import Restored, create_state, restore_like
from flax_hmog.training.describe import named_arrays
from flax_hmog.training.logs import Stage
from flax_hmog.training.mesh import place
from flax_hmog.training.processes import Stopped, to_host
from flax_hmog.training.steps import TrainState


@dataclasses.dataclass
class Position:
    """Position of a training run.

    Attributes:
        state: parameters and optimiser.
        done: steps so far.
        loss_sum: of the steps of this epoch ().
        first_loss: of the first batch, before any step.
        history: records so far, one for each epoch and one for the warm start.
        best: variables of the best epoch so far, on the host; None before there is one.
        good: checkpoint of that epoch, on the host, until it is saved.
    """

    state: TrainState
    done: int
    loss_sum: jax.Array
    first_loss: float
    history: list[dict[str, Any]]
    best: dict[str, Any] | None = None
    good: dict[str, Any] | None = None

    def best_loss(self, ends: tuple[int, int]) -> float:
        """The smallest loss of an epoch so far, or that of the first batch; of epochs with the same terms of the loss.

        Args:
            ends: epochs after which terms change.
        """

        def terms(epoch: int) -> list[bool]:
            return [epoch > end for end in ends]

        now = terms(self.history[-1]["epoch"] + 1)
        same = [r["objective"] for r in self.history if terms(r["epoch"]) == now and r["objective"] is not None]
        first = [self.first_loss] if terms(1) == now else []
        return min([*first, *(-objective for objective in same)], default=math.inf)


class GradientStage:
    """Training of one head by gradients, together with the encoder if there is one, in one round."""

    def __init__(self, run: Run, seed: int, name: str, inputs: Inputs, number: int = 0) -> None:
        self.run, self.inputs, self.stage = run, inputs, Stage(seed, name, number)
        self.config, self.model = run.config.gradient, run.model(name, number)
        self.batches = Batches(inputs, seed, self.config.batch_size, self.config.epochs)
        self.key = jax.random.fold_in(jax.random.key(seed), number) if number else jax.random.key(seed)

    def train(self, start: Start) -> dict[str, Any]:
        """Train from the start or from the last checkpoint to the last epoch; return the variables of the best one.

        Raises:
            Stopped: when the run was asked to stop, once a checkpoint is written.
            ValueError: for a loss that is not finite or has diverged.
        """
        run, per_epoch, total = self.run, self.batches.per_epoch, len(self.batches)
        restored = run.restored(self.stage)
        saved = restored.step if restored else None
        run.log.begin(self.stage, f"seed {self.stage.seed}: {self.stage.name} head", total, saved)
        if restored is not None and saved == total:
            return restored.module_variables
        at = self._first_position(start) if restored is None else self._restored_position(restored)
        step = self.model.step(at.state, run.mesh)
        replicated = NamedSharding(run.mesh, PartitionSpec())
        start = dataclasses.replace(start, teacher=jax.tree.map(lambda leaf: place(leaf, replicated), start.teacher))
        seen = restored.progress.get("watch") if restored else None
        watch = StageWatch(self.model, self.inputs, self.stage, start, self._output, seen)
        iterator = self.batches.iterate(restored.progress["position"] if restored else None)
        epoch_start = time.perf_counter()
        with run.writer(self.stage, self.model.head, self.model.encoder, self.inputs) as writer:
            if not at.history:
                self._record(at, start, watch, None, epoch_start)
                writer.save(**self._checkpoint(at, watch, iterator.get_state(), start))  # before anything can go wrong
                epoch_start = time.perf_counter()
            while at.done < total:
                at.state, loss = step(at.state, next(iterator), start.extra(run.config, self.key, per_epoch, at.done))
                # one step ahead of the device keeps it busy; devices of one CPU share a pool of threads, in which steps
                # that wait for each other can wait for ever
                jax.block_until_ready(loss if jax.default_backend() == "cpu" else at.loss_sum)
                at.loss_sum, at.done = at.loss_sum + loss, at.done + 1
                at.first_loss = float(loss) if at.done == 1 else at.first_loss
                run.log.advance()
                if at.done % per_epoch == 0:
                    mean = float(at.loss_sum) / per_epoch
                    worst = at.best_loss(start.ends(run.config)) + self._max_fall()
                    self._check(at, mean, start, writer, worst=worst)
                    self._record(at, start, watch, -mean, epoch_start)
                    at.loss_sum, epoch_start = jnp.zeros_like(at.loss_sum), time.perf_counter()
                    if self._best(watch.watch.seen) == at.done < total:
                        at.good = on_host(self._checkpoint(at, watch, iterator.get_state(), start))
                stopping = run.stop.is_made()
                if stopping or at.done == total or self._is_due(at.done):
                    self._check(at, float(at.loss_sum), start, writer, worst=math.inf)
                    writer.save(**self._checkpoint(at, watch, iterator.get_state(), start))
                    at.good = None
                if stopping and at.done < total:
                    raise Stopped
        return at.best if at.best is not None else cast(dict[str, Any], jax.tree.map(to_host, at.state.variables))

    def _first_position(self, start: Start) -> Position:
        return Position(self._train_state(start.variables), 0, self._zero(), math.nan, [])

    def _restored_position(self, restored: Restored) -> Position:
        position = Position(
            self._train_state(restored.module_variables),
            restored.step,
            self._zero(),
            math.nan if restored.progress["first_loss"] is None else restored.progress["first_loss"],
            list(restored.history),
        )
        best = {name: leaf for name, leaf in restored.state.items() if name.startswith("best/")}
        others = {name: leaf for name, leaf in restored.state.items() if name not in best}
        saved = restore_like(self._arrays(position), others, "the optimiser")
        if best:
            position.best = restore_like({"best": position.state.variables}, best, "the best epoch")["best"]
        elif self._best(restored.progress.get("watch", {})) == restored.step:
            position.best = restored.module_variables
        position.best = position.best and jax.tree.map(to_host, position.best)
        self.key, position.loss_sum = saved["key"], saved["loss_sum"]
        position.state = position.state.replace(step=saved["step"], opt_state=saved["opt_state"])
        return position

    def _zero(self) -> jax.Array:
        return place(np.zeros((), np.float32), NamedSharding(self.run.mesh, PartitionSpec()))

    def _train_state(self, variables: dict[str, Any]) -> TrainState:
        return create_state(
            self.model.module,
            variables,
            self.model.optimizer(len(self.batches)),
            jax.ShapeDtypeStruct((self.config.batch_size, self.inputs.obs_dim), jnp.float32),
            self.run.mesh,
            min_sharded=self.run.config.devices.min_sharded,
        )

    def _arrays(self, at: Position) -> dict[str, Any]:
        """Arrays of a checkpoint beside the parameters."""
        state = at.state
        return {"opt_state": state.opt_state, "step": state.step, "loss_sum": at.loss_sum, "key": self.key}

    def _checkpoint(self, at: Position, watch: StageWatch, position: object, start: Start) -> dict[str, Any]:
        """Arguments of a save: where training stands and the best epoch; at the end the best epoch alone."""
        is_done, seen = at.done == len(self.batches), dict(watch.watch.seen)
        is_best = self._best(seen) == at.done
        variables, state, look = at.state.variables, self._arrays(at), at.history[-1]
        first_loss = None if math.isnan(at.first_loss) else at.first_loss
        progress: dict[str, Any] = {"done": is_done, "position": position, "first_loss": first_loss, "watch": seen}
        if is_done:
            variables = at.best or variables
            progress["below_start"] = watch.watch.is_below_start()
            epoch = (self._best(seen) or 0) // self.batches.per_epoch
            progress["kept"] = next((record for record in at.history if record["epoch"] == epoch), None)
            if self.model.encoder is None:
                progress["log_density"] = self._log_density(variables, progress["kept"] or look)
        elif at.best is not None and not is_best:
            state["best"] = at.best
        # what an epoch's end is worth says nothing of a later step
        is_compared = at.done % self.batches.per_epoch == 0 and not look["has_fallen"]
        criterion = look["criterion"] if is_compared else math.nan
        if is_done and "best" in seen:
            criterion = seen["best"]["criterion"]
        return {
            "step": at.done,
            "variables": variables,
            "state": state,
            "progress": progress,
            "history": list(at.history),
            "metrics": {"criterion": criterion} if math.isfinite(criterion) else None,
            "clusters": start.clusters,
        }

    @staticmethod
    def _best(seen: dict[str, Any]) -> int | None:
        """Step of the best epoch so far."""
        return seen["best"]["step"] if "best" in seen else None

    def _is_due(self, done: int) -> bool:
        """True if a checkpoint is due: at ends of epochs, and within those that are longer than what lies between."""
        between, per_epoch = self.run.config.checkpoints.gradient_steps, self.batches.per_epoch
        if per_epoch > between:
            return done % between == 0 or done % per_epoch == 0
        return done % (per_epoch * -(-between // per_epoch)) == 0

    def _record(self, at: Position, start: Start, watch: StageWatch, objective: float | None, started: float) -> None:
        """Evaluate and log where training stands, and keep the variables of the best epoch."""
        model = functools.partial(self._output, at.state.variables)
        scores = evaluate(model, self.inputs, start.clusters, self.run.config.scores)
        look = watch.look(at.done, at.state.variables)
        if look.is_best:
            at.best = jax.tree.map(lambda leaf: np.array(to_host(leaf)), at.state.variables)
        watched = look._asdict()
        del watched["is_best"]
        metrics = scores | {"objective": objective} | watched
        seconds, epoch = time.perf_counter() - started, at.done // self.batches.per_epoch
        rate = round(self.batches.per_epoch * self.config.batch_size / seconds) if at.done else None
        times = {"seconds": round(seconds, 3), "samples_per_second": rate}
        self.run.log.write(self.stage, at.done, epoch=epoch, **times, **metrics)
        at.history.append({"epoch": epoch} | metrics)

    def _output(self, variables: dict[str, Any], x: jax.Array) -> HMoGOutput:
        """The head's output for inputs."""
        if self.model.encoder is None:
            return infer(self.model.natural(variables), x)
        encoder_variables, head_variables = split_module(variables)
        return infer(self.model.natural(head_variables), features(self.model.encoder, encoder_variables, x))

    def _log_density(self, variables: dict[str, Any], metrics: dict[str, float]) -> float:
        """Mean log-density of the rows of both parts, as many of them as EM takes."""
        x, weights = self.inputs.rows(self.inputs.dataset.train, self.run.config.em.rows, self.stage.seed)
        train = float(mean_log_density(self.model.natural(variables), x, weights))
        return of_all_rows(train, int(jnp.sum(weights)), self.inputs, metrics)

    def _max_fall(self) -> float:
        """Nats per sample by which a loss may be above the best."""
        return self.config.max_fall * (self.inputs.obs_dim if self.model.encoder is None else 1)

    def _check(self, at: Position, loss: float, start: Start, writer: Writer, *, worst: float) -> None:
        """ValueError, naming the cause and the last good checkpoint, for a loss that is not finite or above `worst`.

        The best epoch is saved before, if it is later than the last checkpoint.
        """
        if math.isfinite(loss) and loss <= worst:
            return
        cause = f"got {loss:.6g} nats per sample, which was {at.best_loss(start.ends(self.run.config)):.6g} at best"
        if not math.isfinite(loss):
            leaves = named_arrays(at.state.variables).items()
            bad = [name for name, leaf in leaves if not bool(jnp.all(jnp.isfinite(leaf)))]
            cause = f"got {loss}, and leaves that are not finite: {', '.join(bad) or 'none'}"
        if at.good is not None:
            writer.save(**at.good)
        good = self.run.last_checkpoint(self.stage)
        last = "A workdir would hold the last good one" if good is None else f"The last good checkpoint is {good}"
        raise ValueError(
            f"GradientStage: the loss must stay finite and near its start; {cause}, after {at.done} steps of seed "
            f"{self.stage.seed}, {self.stage.name}. {last}. Lower --gradient.learning-rate in a new --workdir."
        )
