"""The first stage: exact EM on the inputs, and its components merged to clusters."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_hmog.em.cycles import Cycles
from flax_hmog.em.fit import fit_em
from flax_hmog.em.online import stepwise_start
from flax_hmog.em.result import EMResult, EMState
from flax_hmog.em.sparse import SparseInfo
from flax_hmog.heads.from_natural import warm_start
from flax_hmog.inference.posterior import infer
from flax_hmog.model.conversions import natural_to_moments
from flax_hmog.model.coordinates import Natural
from flax_hmog.recipe.inputs import Inputs
from flax_hmog.recipe.merge import merged_clusters
from flax_hmog.recipe.models import abstract_fit
from flax_hmog.recipe.run import LinearFit, Run, Writer
from flax_hmog.recipe.scores import baseline_scores, evaluate, of_all_rows
from flax_hmog.training import restore_like
from flax_hmog.training.logs import Stage
from flax_hmog.training.processes import Stopped
from flax_hmog.training.restoring import Restored


class EMStage:
    """Exact EM on all training rows."""

    def __init__(self, run: Run, seed: int, inputs: Inputs) -> None:
        self.run, self.inputs, self.stage = run, inputs, Stage(seed, "em")
        self.config, self.head = run.config.em, run.config.analytic
        self.key = jax.random.key(seed)

    def result(self) -> LinearFit:
        """The fit: made from where the last checkpoint stands, or read from it if EM is done."""
        restored = self.run.restored(self.stage)
        if restored is None or not restored.progress["done"]:
            self._fit(restored)
            restored = self.run.kept(self.stage)
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        template = self._abstract(one_device, restored.state, has_frame="natural/frame/unit" in restored.state)
        state = restore_like({name: template[name] for name in ("natural", "regularizer")}, restored.state, "EM")
        natural, regularizer = (jax.tree.map(np.asarray, state[name]) for name in ("natural", "regularizer"))
        if natural.frame is not None:  # heads have their noise in units of x
            noise = regularizer.noise_covariance.scaled(natural.frame.unit)
            regularizer = dataclasses.replace(regularizer, noise_covariance=noise)
        regularizer = dataclasses.replace(regularizer, components=np.zeros((), np.float32), shrinkage=None)
        return LinearFit(natural, regularizer, restored.progress["rows"], restored.clusters)

    def _fit(self, restored: Restored | None) -> None:
        config, log, stage = self.config, self.run.log, self.stage
        saved = restored.progress["steps"] if restored else None
        log.begin(stage, f"seed {stage.seed}: EM", config.n_restarts * (config.max_steps + 1), saved)
        done = saved or 0
        x, weights = self.inputs.rows(self.inputs.dataset.train, config.rows, stage.seed)
        count = int(jnp.sum(weights))
        started = time.perf_counter()
        with self.run.writer(stage, self.head, None, self.inputs) as writer:

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
                options=config,
                state=self._state(restored) if restored else None,
                on_step=on_step,
            )
            clusters = merged_clusters(result.natural, x, weights, self.run.config.model.n_clusters)
            model = functools.partial(infer, result.natural)
            metrics = evaluate(model, self.inputs, clusters, self.run.config.scores)
            seconds = time.perf_counter() - started
            log.write(stage, done + 1, converged=result.converged, seconds=round(seconds, 3), **metrics)
            progress = {
                "objective": result.objective_history.tolist(),
                "converged": result.converged,
                "baselines": baseline_scores(self.inputs, self.run.config, stage.seed),
                "log_density": of_all_rows(float(result.info.log_likelihood), count, self.inputs, metrics),
            }
            # a model that float32 cannot hold in units of the inputs: what it loses is warned of
            has_frame = result.natural.frame is not None
            writer.save(
                done + 1,
                warm_start(self.head, result.natural)[0] if has_frame else self._variables(result.natural),
                state={"natural": result.natural, "regularizer": result.regularizer},
                progress={"done": True, "steps": done + 1, "rows": count} | progress,
                history=[metrics],
                metrics={"objective": float(result.objective_history[-1])},
                clusters=clusters,
            )

    def _save(self, writer: Writer, done: int, state: EMState, objective: float) -> None:
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
            }
            | _numbers_of(state),
            metrics={"objective": objective if state.natural is not None else max(state.finals)},
        )

    def _variables(self, natural: Natural) -> dict[str, Any]:
        return {"em": stepwise_start(natural_to_moments(natural))}

    def _state(self, restored: Restored) -> EMState:
        """The state that was saved, on the mesh."""
        abstract = self._abstract(NamedSharding(self.run.mesh, PartitionSpec()), restored.state, has_frame=True)
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
                sparse=_sparse_info(p.get("best_sparse")),
            )
        cycles = p.get("cycles")
        if cycles is not None:
            cycles = Cycles(**cycles | {"sparse": _sparse_info(cycles["sparse"])})
        return EMState(
            natural=arrays.get("natural"),
            top=arrays.get("top"),
            regularizer=arrays.get("regularizer"),
            history=tuple(p["history"]),
            finals=tuple(p["finals"]),
            best=best,
            cycles=cycles,
        )

    def _abstract(self, sharding: jax.sharding.Sharding, saved: Iterable[str], *, has_frame: bool) -> dict[str, Any]:
        """Arrays that `_arrays_of` a state may hold, without values; the regulariser of before had two fewer."""
        fit = abstract_fit(self.head, self.run.config, self.inputs.obs_dim, sharding, has_frame)
        natural, regularizer, info = fit
        owned = {name.rpartition("regularizer/")[2] for name in saved}
        absent = {"mean_share", "component_floor"} - owned
        regularizer = dataclasses.replace(regularizer, **dict.fromkeys(absent))
        best = {"best_natural": natural, "best_info": info, "best_regularizer": regularizer}
        models = dict.fromkeys(("natural", "top"), natural)
        return models | {"regularizer": regularizer} | best


def _arrays_of(state: EMState) -> dict[str, Any]:
    best = state.best
    arrays = {"natural": state.natural, "top": state.top, "regularizer": state.regularizer}
    if best is not None:
        arrays |= {"best_natural": best.natural, "best_info": best.info, "best_regularizer": best.regularizer}
    return {name: tree for name, tree in arrays.items() if tree is not None}


def _numbers_of(state: EMState) -> dict[str, Any]:
    """Numbers in the state of an accelerated fit, beside its arrays."""
    best, cycles = state.best, state.cycles
    numbers: dict[str, Any] = {"best_sparse": best and best.sparse and dataclasses.asdict(best.sparse)}
    if cycles is not None:
        sparse = cycles.sparse and dataclasses.asdict(cycles.sparse)
        numbers["cycles"] = {"reached": cycles.reached, "slots": cycles.slots, "retry": cycles.retry, "sparse": sparse}
    return numbers


def _sparse_info(numbers: dict[str, Any] | None) -> SparseInfo | None:
    return None if numbers is None else SparseInfo(**numbers)
